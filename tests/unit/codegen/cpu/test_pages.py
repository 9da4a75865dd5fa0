"""The C++ page-selection kernel against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_plans import CODED
from paged_plans import kernels, page_kernel, page_operands, page_step, rounded, same
from torch import Tensor

from fhopt.codegen.cpu import pages
from fhopt.codegen.cpu.pages import weigh_pages
from fhopt.ops import packing, page_selection, paged_attention
from fhopt.plan.site_plan import BitGroup


@pytest.mark.parametrize("tiers", [{4: 16, 2: 16}, {4: 8}, {2: 48}, {4: 24, 2: 32}, {4: 72}], ids=str)
@pytest.mark.parametrize(
    ("tokens", "length", "masked", "size"),
    [
        (100, None, False, 32), (100, None, False, 8), (96, 70, True, 8), (33, 33, False, 24), (16, 5, True, 32),
        (2100, 2051, True, 32), (2100, 2051, True, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_kernel_weighs_pages_like_the_reference(
    rows: int, tokens: int, length: int | None, masked: bool, size: int, tiers: dict[int, int]
) -> None:
    (weights, constant), options = page_operands(tiers, rows, tokens, masked, length, size)
    expected = paged_attention.page_weights_reference(rounded(weights, options).double(), constant.double(), *options)
    with page_kernel():
        found = torch.ops.fhopt.page_weights(weights, constant, *options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)


def attended(step: paged_attention.PageStep) -> tuple[Tensor, Tensor, Tensor]:
    """Attend by the kernel, which must accept the call."""
    with kernels(True), page_kernel(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "attend_pages_reference", None)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.fhopt.attend_pages(*step)
    return found


@pytest.mark.parametrize(
    ("mass", "lift", "near"), [(1.0, 0.0, False), (0.5, 0.0, True), (1.0, 1.5, True), (0.9, 0.7, False)]
)
@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize(
    ("tokens", "length", "masked", "size"),
    [
        (2100, 1500, True, 32),
        (2100, 1500, True, 8),
        (1024, None, False, 32),
        (1020, None, False, 8),
        (90, 40, True, 24),
    ],
)
def test_the_kernel_attends_to_the_pages_selected_by_the_reference(
    tokens: int, length: int | None, masked: bool, size: int, units: int, mass: float, lift: float, near: bool
) -> None:
    step = page_step({4: 16, 2: 16}, tokens, masked, length, size, units=units, mass=mass, lift=lift)
    if near:
        _, constant = page_selection.factors(step.query, step.mean, step.deviation, step.channels)
        step = step._replace(near=(constant * step.scale).reshape(2, 12, 1) + 5 + torch.randn(2, 12, 1))
    filled = step._replace(fill=torch.rand(12).log(), values=torch.randn(2, 2, 1, 16))
    for each in (step, filled):
        expected = paged_attention.attend_pages_reference(each._replace(query=each.query.double()))
        found = attended(each)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-3)
        assert found[2].tolist() == expected[2].tolist()
    assert found[2][2] > 0 or mass == 0.5  # the always-selected pages may suffice
    if mass == 1 and not masked and not lift:
        assert found[2][2] == 2 * units * page_selection.pages_read(-(-tokens // size), 0.2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx",)], ids=["avx2", "sse"])
def test_other_instruction_sets_select_the_same_pages(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    step = page_step({4: 16, 2: 16}, 1020, True, None, 8, lift=0.7)
    expected = attended(step)
    monkeypatch.setattr(pages, "LIBRARY", replace(pages.LIBRARY, flags=flags))
    same(attended(step), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_queries_select_the_same_pages_as_float32(dtype: torch.dtype) -> None:
    values = torch.randn(2, 4, 1, 16).to(dtype)
    step = page_step({4: 16}, 500, False, None, fill=torch.zeros(12), values=values)
    step = step._replace(query=step.query.to(dtype))
    expected = attended(step._replace(query=step.query.float()))
    found = attended(step)
    assert found[0].dtype == dtype and torch.equal(found[0], expected[0].to(dtype))
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def test_a_fully_masked_sequence_has_an_empty_list() -> None:
    step = page_step({4: 16}, 200, True, None, fill=torch.zeros(12), values=torch.randn(2, 4, 1, 16))
    assert step.far is not None
    step.far[1] = False
    lists, odds, _ = paged_attention.list_selected_pages(step)
    assert bool((lists[0] >= 0).all()) and bool((lists[1] == -1).all())
    assert bool(odds[0].isfinite().all()) and bool((odds[1] == -math.inf).all())
    output, lse, counts = attended(step)
    assert bool(lse[0].isfinite().all()) and bool((lse[1] == -math.inf).all()) and bool((output[1] == 0).all())
    assert int(counts[2]) == int((lists >= 0).sum())


def test_the_kernel_declines_unsupported_calls() -> None:
    weights, constant = torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 1)
    codes, scales = torch.zeros(1, 1, 20, 4, dtype=torch.uint8), torch.ones(1, 1, 20, dtype=torch.float16)

    def found(bits: int, page_tokens: int, mask: Tensor | None = None) -> Any:
        return weigh_pages(weights, constant, codes, scales, (bits,), (8,), (1.0,), page_tokens, mask, 20)

    assert found(4, 4) is None  # pages of 4 tokens
    assert found(4, 2048) is None
    assert found(2, 16) is None  # rows of 2 bytes
    assert found(4, 16, torch.zeros(1, 1, 1, 20)) is None  # an additive mask
    assert found(4, 16) is not None and found(4, 16, torch.ones(1, 1, 1, 20, dtype=torch.bool)) is not None


@pytest.mark.parametrize("tiers", [(), CODED], ids=["uncoded", "coded"])
def test_other_layouts_of_operands_are_supported(tiers: tuple[BitGroup, ...]) -> None:
    """Values with fewer latent heads, views as operands, a float64 fill, two threads."""
    step = page_step({4: 16, 2: 16}, 1000, True, None, units=2, fill=torch.rand(12).double().log())
    value, shape = torch.randn(2, 2, 1000, 16), [[getattr(t, x) for t in tiers] for x in ("bits", "width", "step")]
    rows: dict[str, Any] = dict(value=value)
    if tiers:
        codes, scale = packing.pack_reference(value, *shape)
        rows = dict(value=codes, value_scale=scale, value_bits=shape[0], value_widths=shape[1], value_steps=shape[2])

    def strided(x: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
        return out.copy_(x)

    step = step._replace(
        **rows, query=strided(step.query), near=torch.randn(2, 12, 2)[..., ::2],
        values=torch.randn(2, 12, 2, 16)[:, :, :1], mean=strided(step.mean), deviation=strided(step.deviation),
        channels=strided(step.channels),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = attended(step)
    finally:
        torch.set_num_threads(threads)
    same(found, paged_attention.attend_pages_reference(step._replace(query=step.query.double())))
