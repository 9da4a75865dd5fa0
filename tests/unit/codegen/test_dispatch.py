"""Which kernel a call gets."""

from __future__ import annotations

import importlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import CASES, UNCODED, KernelCase, assert_same, build_cpp, expected, inputs
from needs import needs_compiler
from small_models import FittedModel
from torch import Tensor

from fhopt.codegen import background
from fhopt.codegen.build import build_torch
from fhopt.codegen.dispatch import dispatch_latent_attention, register_kernels
from fhopt.evaluation.perplexity import switched
from fhopt.ops import algebra, registry
from fhopt.ops.latent_attention import LatentKernel, latent_attention_reference
from fhopt.plan.kernel_spec import KernelSpec

pytestmark = pytest.mark.usefixtures("nothing_built")

DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


def read(width: int) -> Tensor:
    """Call the kernel of unquantized rows of this width."""
    rows = torch.randn(1, 1, 3, width)
    options: Any = algebra.uncoded_options()
    return dispatch_latent_attention(rows, rows, None, rows, None, None, scale=1.0, **options)[0]


def test_the_first_call_waits_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()

    def load() -> None:
        time.sleep(0.2)
        order.append("loaded")

    def built(spec: KernelSpec) -> LatentKernel:
        order.append(f"{spec.key_width}")
        return build_torch(spec)

    monkeypatch.setattr(background, "build_kernel", built)
    library = SimpleNamespace(name="attention", load=load, compiles=lambda: True)
    monkeypatch.setattr(background, "LIBRARY", library)
    monkeypatch.setattr(DISPATCH, "builder", background.Builder())
    torch.manual_seed(0)
    rows, options = torch.randn(1, 1, 3, 12), algebra.uncoded_options()
    before = latent_attention_reference(rows, rows, None, rows, None, None, scale=1.0, **options)[0]
    for _ in range(2):
        torch.manual_seed(0)
        torch.testing.assert_close(read(12), before)
    assert order == ["loaded", "12"] and len(DISPATCH._kernels) == 1


@pytest.mark.parametrize(("ratio", "starts"), [(4.0, 1), (1.0, 0)])
def test_loading_a_plan_starts_to_build_its_kernels(
    llama: FittedModel, ratio: float, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr("fhopt.codegen.start_builds", lambda: started.append(1))
    with switched(llama.model, llama.plan(ratio)):
        assert len(started) == starts


def test_the_op_runs_through_the_kernel_of_its_arguments_once_installed() -> None:
    case = CASES["keys shared by 9 heads, values by 3"]
    x, before = inputs(case), registry.use("latent_attention", "cpu", None)
    try:
        register_kernels()
        found = torch.ops.fhopt.latent_attention(*x, None, **case.options())
    finally:
        registry.use("latent_attention", "cpu", before)
    assert_same(found, expected(case, x, None))
    assert len(DISPATCH._kernels) == 1


def test_a_call_that_needs_gradients_runs_the_reference() -> None:
    case = CASES["uncoded, several queries"]
    x = inputs(case)
    x[0].requires_grad_()
    output, _ = dispatch_latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
    output.sum().backward()
    assert x[0].grad is not None


def test_float64_latents_run_the_reference() -> None:
    case = KernelCase(UNCODED, UNCODED, 2, 1, 1, 1, 9, dtype=torch.float64)
    x = inputs(case)
    output, _ = dispatch_latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
    assert output.dtype == torch.float64
    assert torch.equal(output, expected(case, x, None)[0])


@needs_compiler
@pytest.mark.parametrize("change", ["tokens", "width", "scale", "type", "softcap"])
def test_tensors_that_do_not_fit_the_kernel_are_refused(change: str) -> None:
    case = CASES["9 heads read one latent"]
    query, key, key_scale, value, value_scale = inputs(case)
    options = case.options()
    if change == "tokens":
        value = value[:, :, 1:]
    elif change == "width":
        query = query[..., 1:]
    elif change == "scale":
        key_scale = None
    elif change == "type":
        key = key.float()
    else:
        options["softcap"] = 3.0
    with pytest.raises(
        ValueError, match=r"latent_k16b8x40b4x8b2|value has shape|key_scale is none|key is torch.float32"
    ):
        build_cpp(case.spec())(query, key, key_scale, value, value_scale, None, **options)
