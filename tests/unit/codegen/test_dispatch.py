"""Which kernel a call gets."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import pytest
import torch
from attention_cases import CASES, UNCODED, Case, assert_same, expected, inputs
from needs import needs_compiler
from small_models import Fitted, token_ids
from torch import Tensor

from fhopt.cache.latent_cache import LatentCache
from fhopt.codegen import background
from fhopt.codegen.build import build_cpp, build_torch
from fhopt.codegen.dispatch import install, latent_attention
from fhopt.evaluation.perplexity import switched
from fhopt.ops import algebra, registry
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec

pytestmark = pytest.mark.usefixtures("nothing_built")

DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


def read(width: int) -> Tensor:
    """Call the kernel of uncoded rows of this width."""
    rows = torch.randn(1, 1, 3, width)
    options: Any = algebra.uncoded_options()
    return latent_attention(rows, rows, None, rows, None, None, scale=1.0, **options)[0]


def uncoded(*widths: int) -> list[KernelSpec]:
    return [KernelSpec((), (), width, width, "float32", False) for width in widths]


def test_kernels_that_are_expected_are_built_with_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, each once; others bring nothing with them, and what was expected before is forgotten."""
    forgotten, *awaited, other = uncoded(8, 9, 10, 11)
    built: list[str] = []
    together = threading.Barrier(2, timeout=30)

    def watched(spec: KernelSpec) -> LatentKernel:
        built.append(spec.name)
        if spec in awaited:
            together.wait()
        return build_torch(spec)

    monkeypatch.setattr(background, "build", watched)
    monkeypatch.setattr(background, "cores", lambda: 2)
    DISPATCH.expect([forgotten])
    DISPATCH.expect(awaited)
    read(11)
    assert built == [other.name]
    read(9)
    read(10)
    assert sorted(built) == sorted([other.name, *(spec.name for spec in awaited)])
    assert DISPATCH._expected == set()


def test_calls_run_on_torch_operations_until_their_kernel_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = uncoded(12)
    may_build, used = threading.Event(), []

    def watched(spec: KernelSpec) -> LatentKernel:
        may_build.wait(30)
        kernel = build_torch(spec)
        return lambda *args, **options: used.append(spec) or kernel(*args, **options)  # type: ignore[func-returns-value]

    monkeypatch.setattr(background, "build", watched)
    monkeypatch.setattr(background, "needs_compiler", lambda spec: True)
    monkeypatch.setattr(DISPATCH, "builder", background.Builder())
    torch.manual_seed(0)
    before = read(12)
    assert not used and not DISPATCH._kernels
    may_build.set()
    DISPATCH.prepare([spec])
    torch.manual_seed(0)
    torch.testing.assert_close(read(12), before)
    assert used == [spec] and len(DISPATCH._kernels) == 1


def test_a_plan_expects_the_kernels_that_its_cache_will_call(llama: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[KernelSpec] = set()
    expected: list[set[KernelSpec]] = []

    def watched(spec: KernelSpec) -> LatentKernel:
        asked.add(spec)
        return build_torch(spec)

    monkeypatch.setattr(background, "build", watched)
    monkeypatch.setattr("fhopt.codegen.expect", lambda specs: expected.append(set(specs)))
    plan = llama.plan(4, window_bits=16)
    with torch.no_grad(), switched(llama.model, plan):
        cache = LatentCache(plan, llama.model.config)
        llama.model(token_ids(1, 60), past_key_values=cache)
        llama.model(token_ids(1, 1), past_key_values=cache)
    assert len(expected) == 1 and expected[0] and expected[0] <= asked
    assert {spec for spec in asked if spec.key_tiers} == expected[0]


def test_the_op_runs_through_the_kernel_of_its_arguments_once_installed() -> None:
    case = CASES["keys shared by 9 heads, values by 3"]
    x, before = inputs(case), registry.use("latent_attention", "cpu", None)
    try:
        install()
        found = torch.ops.fhopt.latent_attention(*x, None, **case.options())
    finally:
        registry.use("latent_attention", "cpu", before)
    assert_same(found, expected(case, x, None))
    assert len(DISPATCH._kernels) == 1


def test_a_call_that_needs_gradients_runs_the_reference() -> None:
    case = CASES["uncoded, several queries"]
    x = inputs(case)
    x[0].requires_grad_()
    output, _ = latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
    output.sum().backward()
    assert x[0].grad is not None


def test_float64_latents_run_the_reference() -> None:
    case = Case(UNCODED, UNCODED, 2, 1, 1, 1, 9, dtype=torch.float64)
    x = inputs(case)
    output, _ = latent_attention(*x, None, **case.options())  # type: ignore[arg-type]
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
    with pytest.raises(ValueError, match=r"latent_k16b8x40b4x8b2|value has shape|key_scale is none|key has type"):
        build_cpp(case.spec())(query, key, key_scale, value, value_scale, None, **options)
