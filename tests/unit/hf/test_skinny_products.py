"""Linear layers of a model with a plan: which calls use the kernel, and that other calls are unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from needs import needs_compiler
from small_models import FittedModel, token_ids
from torch import Tensor
from torch.nn.functional import linear

import fhopt
from fhopt.hardware import float_products
from fhopt.hf.skinny_products import replace_products, restore_products

WIDTH, COLUMNS = 320, 128  # 80 KB in 16 bits


@pytest.fixture
def layer() -> Iterator[torch.nn.Linear]:
    """A linear layer whose skinny GEMMs use the kernel."""
    made = torch.nn.Linear(WIDTH, COLUMNS)
    replace_products(made)
    yield made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the output shapes of kernel calls."""
    seen: list[tuple[int, ...]] = []
    real = fhopt.codegen.dispatch_linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        output = real(x, weight, bias)
        if output is not None:
            seen.append(tuple(output.shape))
        return output

    monkeypatch.setattr(fhopt.codegen, "dispatch_linear", watched)
    return seen


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, 1, WIDTH), (2, 8, WIDTH)])
@torch.no_grad()
def test_skinny_gemms_agree_with_torch(
    layer: torch.nn.Linear, calls: list[tuple[int, ...]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    found = layer.to(dtype)(x)
    wanted = linear(x.double(), layer.weight.double(), layer.bias.double())
    assert calls == [tuple(wanted.shape)] and found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@torch.no_grad()
@pytest.mark.parametrize("case", ["rows", "none", "small", "strided", "gradients", "autocast", "subclass", "meta"])
def test_other_matmuls_are_left_to_torch(layer: torch.nn.Linear, calls: list[tuple[int, ...]], case: str) -> None:
    x = torch.randn(3, WIDTH)
    if case == "rows":
        x = torch.randn(17, WIDTH)
    elif case == "none":
        x = torch.randn(0, WIDTH)
    elif case == "small":
        layer = torch.nn.Linear(WIDTH, 8)
        replace_products(layer)
    elif case == "strided":
        layer.weight = torch.nn.Parameter(torch.randn(WIDTH, COLUMNS).t())
    elif case == "subclass":
        x = torch.nn.Parameter(x)
    elif case == "meta":
        layer, x = layer.to("meta"), x.to("meta")
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        found = layer(x)
        plainly = linear if case in ("gradients", "autocast") else float_products.fastest_linear
        wanted = plainly(x, layer.weight, layer.bias)
    assert not calls and found.requires_grad == (case == "gradients") and found.dtype == wanted.dtype
    assert case == "meta" or torch.equal(found, wanted)


@needs_compiler
@torch.no_grad()
def test_a_copy_uses_its_own_weight(layer: torch.nn.Linear, calls: list[tuple[int, ...]]) -> None:
    other = copy.deepcopy(layer)
    other.weight.zero_()
    x = torch.randn(1, WIDTH)
    assert torch.equal(other(x), layer.bias[None]) and not torch.equal(layer(x), layer.bias[None]) and len(calls) == 2


def test_layers_with_a_custom_forward_are_not_changed() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Offloaded(torch.nn.Linear):
        pass

    own = torch.nn.Linear(WIDTH, COLUMNS)
    own.forward = lambda input: input  # type: ignore[method-assign]
    model = torch.nn.ModuleList([Doubled(WIDTH, COLUMNS), Offloaded(WIDTH, COLUMNS), own])
    before = [vars(module).get("forward") for module in model]
    replace_products(model)
    assert [vars(module).get("forward") for module in model] == before
    restore_products(model)
    assert [vars(module).get("forward") for module in model] == before


@pytest.mark.parametrize("asked", [True, False])
def test_a_plan_adds_and_removes_them(llama: FittedModel, asked: bool) -> None:
    layers = [module for module in llama.model.modules() if type(module) is torch.nn.Linear]
    fhopt.apply(llama.model, llama.plan(4), skinny_products=asked)
    assert all(("forward" in vars(layer)) == asked for layer in layers) and layers
    fhopt.unapply(llama.model)
    assert not any("forward" in vars(layer) for layer in layers)


@torch.no_grad()
def test_a_model_with_an_exact_plan_gives_the_same_logits(llama: FittedModel) -> None:
    ids = token_ids(1, 5)
    wanted = llama.model(ids).logits
    fhopt.apply(llama.model, llama.plan(1))
    try:
        torch.testing.assert_close(llama.model(ids).logits, wanted)
    finally:
        fhopt.unapply(llama.model)


@torch.no_grad()
def test_compiled_graphs_use_torch_matmuls(layer: torch.nn.Linear, calls: list[tuple[int, ...]]) -> None:
    x, graphs = torch.randn(1, WIDTH), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    compiled = torch.compile(layer, backend=backend)(x)
    assert not calls and any(node.target is linear for node in graphs[0].graph.nodes)
    torch.testing.assert_close(compiled, layer(x))
