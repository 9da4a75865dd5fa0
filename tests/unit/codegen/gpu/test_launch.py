"""Kernel launches: splits, dtypes, and calls that do not fit."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import FOUR, ODD, KernelCase, inputs
from torch import Tensor
from triton_machine_code import StubModule

from fhopt.codegen.gpu.launch import TritonKernel, choose_splits
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec

DISPATCH = importlib.import_module("fhopt.codegen.dispatch")


def test_splits_fill_the_device_in_whole_waves_and_are_never_short() -> None:
    places = 132 * 8
    assert choose_splits(64, 32768, places) == 16  # 17 would leave 32 programs for a second wave
    assert choose_splits(700, 32768, places) == 3  # 2,100 programs in two waves, not 700 in one
    assert choose_splits(100 * places, 32768, places) == 1
    assert choose_splits(1, 10**7, places) > 120
    assert choose_splits(1, 300, places) == choose_splits(1, 0, places) == 1


class Launched:
    """A kernel without effect, which spilled when it was compiled."""

    n_spills = 8

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Launched]:
        return lambda *_, **__: self


def test_a_kernel_that_spills_is_reported_once_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhopt.codegen.gpu.launch._warned", set())
    module = StubModule("stub")
    module.attention_kernel = module.merge_kernel = Launched()  # type: ignore[assignment]
    odd, even = KernelCase(ODD, FOUR, 4, 1, 1, 1, 20), KernelCase(((8, 16, 0.1),), ((4, 32, 0.3),), 4, 1, 1, 1, 20)

    def call(case: KernelCase) -> None:
        kernel: LatentKernel = TritonKernel(module, case.spec())
        kernel(*inputs(case), None, **case.options())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(even)  # rows as fitted for a GPU: another plan would not help
    with pytest.warns(RuntimeWarning, match=r"spills 32 bytes of registers per thread.* fhopt fit MODEL --device"):
        call(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(odd)


@pytest.mark.parametrize(
    ("change", "features", "message"),
    [
        pytest.param({"key": lambda x: x[..., :-1]}, {}, "key has shape", id="row"),
        pytest.param({"key": lambda x: x.float()}, {}, "expected torch.uint8", id="type"),
        pytest.param({"value_scale": lambda x: None}, {}, "value_scale is none", id="scale"),
        pytest.param({"query": lambda x: x[..., :-1]}, {}, "build their kernel", id="query"),
        pytest.param({}, {"softcap": 3.0}, "build their kernel", id="softcap"),
        pytest.param({}, {"pages": torch.zeros(2, 1, 1, dtype=torch.int32)}, "multiple of 8", id="no page"),
        pytest.param(
            {}, {"pages": torch.zeros(2, 1, 1, dtype=torch.int32), "page_tokens": 20}, "multiple of 8", id="page"
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    change: dict[str, Callable[[Tensor], Tensor | None]], features: dict[str, Any], message: str
) -> None:
    pytest.importorskip("triton")
    case = KernelCase(FOUR, FOUR, 4, 1, 1, 1, 20)
    names = ("query", "key", "key_scale", "value", "value_scale")
    x = [
        change[name](t) if t is not None and name in change else t for name, t in zip(names, inputs(case), strict=True)
    ]
    kernel: LatentKernel = TritonKernel(StubModule("stub"), case.spec())
    with pytest.raises(ValueError, match=message):
        kernel(*x, None, **({"scale": 1.0} | features))


def test_calls_on_a_gpu_get_the_kernel_in_the_type_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KernelSpec] = []
    monkeypatch.setattr(DISPATCH, "build_triton", asked.append)
    tiers = ((4,), (64,), (0.3,), (8,), (16,), (0.1,))
    query, key, value = (torch.empty(1, 1, 1, n, device="meta", dtype=torch.bfloat16) for n in (64, 32, 16))
    DISPATCH._kernel(query, key, value, tiers, False)
    assert asked == [KernelSpec(((4, 64, 0.3),), ((8, 16, 0.1),), 64, 16, "bfloat16", False)]
