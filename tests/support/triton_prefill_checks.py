"""Checks of the Triton prefill kernel, run in a separate process under the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_cases import FOUR, HALVES, ODD, UNCODED, side
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_attention_checks import assert_close, right_bfloat16

from fhopt.codegen.gpu import configs, prefill_launch
from fhopt.codegen.gpu.configs import Config
from fhopt.codegen.gpu.prefill_launch import build_prefill
from fhopt.codegen.tiers import Tiers
from fhopt.ops.prefill_attention import rebuilt_attention_reference
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SUPPORTED_BITS

SMALL = Config(block_t=16, block_m=16, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Chunk:
    """One kernel and the shapes it runs on."""

    key_tiers: Tiers
    value_tiers: Tiers
    heads: int = 4  # H
    groups: int = 2  # G
    key_heads: int = 1  # J of the keys
    value_heads: int = 1
    queries: int = 5
    tokens: int = 40
    size: int = 24  # D
    value_size: int = 16  # E
    softcap: float = 0.0
    width: int = 24  # R of unquantized sides
    dtype: torch.dtype = torch.float32

    def tensors(self) -> list[Any]:
        """Make the query; then rows, scale and decoder of keys, and of values."""
        found: list[Any] = [torch.randn(2, self.heads, self.queries, self.size).to(self.dtype)]
        for tiers, heads, size in (
            (self.key_tiers, self.key_heads, self.size),
            (self.value_tiers, self.value_heads, self.value_size),
        ):
            width = sum(w for _, w, _ in tiers) or self.width
            rows, scale = side(tiers, heads, self.tokens, width)
            decode = torch.randn(self.groups, size, width) / width**0.5
            found += [rows if tiers else rows.to(self.dtype), scale, decode.to(self.dtype)]
        return found

    def options(self) -> dict[str, Any]:
        pairs = (("key", self.key_tiers), ("value", self.value_tiers))
        tiers = {
            f"{name}_{what}": [tier[i] for tier in found]
            for name, found in pairs
            for i, what in enumerate(("bits", "widths", "steps"))
        }
        return tiers | {"scale": 0.25, "softcap": self.softcap}

    def spec(self) -> KernelSpec:
        dtype = str(self.dtype).removeprefix("torch.")
        key, value = (sum(w for _, w, _ in tiers) or self.width for tiers in (self.key_tiers, self.value_tiers))
        return KernelSpec(self.key_tiers, self.value_tiers, key, value, dtype, self.softcap != 0.0)


Found = tuple[Tensor, Tensor]
reference: Any = rebuilt_attention_reference
rebuilt: Any = prefill_launch.rebuilt_attention_triton


def expected(chunk: Chunk, x: list[Any], mask: Tensor | None, lengths: Tensor | None = None) -> Found:
    """Run the reference in float64."""
    return reference(x[0].double(), *x[1:], mask, lengths, **chunk.options())


def within(
    chunk: Chunk, x: list[Any], mask: Tensor | None = None, lengths: Tensor | None = None, **features: Any
) -> Found:
    """Run the kernel that reconstructs keys and values in each program."""
    options = {"scale": 0.25, "softcap": chunk.softcap, "config": SMALL} | features
    kernel: Any = build_prefill(chunk.spec())
    return kernel.attend(x[0], tuple(x[1:4]), tuple(x[4:]), mask, lengths, **options)


def apart(
    chunk: Chunk, x: list[Any], mask: Tensor | None = None, lengths: Tensor | None = None, length: int = 16
) -> Found:
    """Reconstruct keys and values first, `length` tokens at a time."""
    before = configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH
    configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH = 0, length, 0
    try:
        return rebuilt(*x, mask, lengths, **chunk.options())
    finally:
        configs.WITHIN_ROWS, prefill_launch.SHORTEST, prefill_launch.SCRATCH = before


def masks(chunk: Chunk) -> list[Any]:
    """None; bool with fully masked rows; additive, full shape; bool, broadcast over queries; additive [T]."""
    shape = 2, 1, chunk.queries, chunk.tokens
    whole = torch.rand(shape) > 0.4
    whole[0, 0, -1] = False
    bias = torch.randn(2, chunk.heads, *shape[2:])
    bias[1, :, 0] = -torch.inf
    padding = torch.arange(chunk.tokens).expand(2, 1, 1, chunk.tokens) >= torch.tensor([0, 9]).view(2, 1, 1, 1)
    return [None, whole, bias, padding, torch.randn(chunk.tokens)]


a_side = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 5).map(lambda n: 8 * n)), min_size=0, max_size=3
).map(lambda pairs: tuple((bits, width, 3.0 / 2 ** min(bits, 8)) for bits, width in pairs))


@st.composite
def a_chunk(draw: st.DrawFn) -> Chunk:
    groups = draw(st.sampled_from([1, 2, 4, 6]))
    shared = st.sampled_from([n for n in (1, 2, 3, 6) if groups % n == 0])
    return Chunk(
        draw(a_side), draw(a_side), groups * draw(st.integers(1, 3)), groups, draw(shared), draw(shared),
        draw(st.integers(1, 9)), draw(st.integers(1, 50)), draw(st.integers(8, 24)), draw(st.integers(8, 24)),
        draw(st.sampled_from([0.0, 4.0])), draw(st.integers(1, 40)),
    )  # fmt: skip


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    chunk=a_chunk(), kind=st.integers(0, 4), splits=st.integers(1, 3), seed=st.integers(0, 99),
    lengths=st.sampled_from([None, (7, 50), (0, 33)]), way=st.sampled_from(["within", "apart"]),
)  # fmt: skip
def any_spec_agrees_with_the_reference(
    chunk: Chunk, kind: int, splits: int, seed: int, lengths: tuple[int, int] | None, way: str
) -> None:
    torch.manual_seed(seed)
    x, mask = chunk.tensors(), masks(chunk)[kind]
    ends = None if lengths is None else torch.tensor(lengths)
    found = within(chunk, x, mask, ends, splits=splits) if way == "within" else apart(chunk, x, mask, ends)
    assert_close(found, expected(chunk, x, mask, ends))


def ragged_lengths_end_where_they_say() -> None:
    chunk = Chunk(FOUR, HALVES)
    x = chunk.tensors()
    for lengths in (torch.tensor([40, 17]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor(33)):
        wanted = expected(chunk, x, None, lengths)
        for splits in (1, 3):
            assert_close(within(chunk, x, None, lengths, splits=splits), wanted)
        assert_close(apart(chunk, x, None, lengths), wanted)


def no_token_at_all_gives_zeros() -> None:
    chunk = Chunk(FOUR, ODD, tokens=0)
    x = Chunk(FOUR, ODD, tokens=1).tensors()
    x = [t[:, :, :0] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(x)]
    for splits in (1, 2):
        output, lse = within(chunk, x, splits=splits)
        assert output.shape == (2, 4, 5, 16) and not output.any() and (lse == -math.inf).all()
    output, lse = rebuilt(*x, None, None, **chunk.options())
    assert output.shape == (2, 4, 5, 16) and not output.any() and (lse == -math.inf).all()


def rows_that_see_nothing_give_zeros() -> None:
    chunk = Chunk(FOUR, FOUR)
    x = chunk.tensors()
    mask = torch.ones(2, 1, 5, 40, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 0, 0, :20] = False
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        for way in (within, apart):
            found = way(chunk, x, form)
            assert (found[1][0, :, 1] == -math.inf).all() and not found[0][0, :, 1].any()
            assert_close(found, expected(chunk, x, mask))


def the_lowest_mask_lets_a_row_attend_evenly() -> None:
    chunk = Chunk(UNCODED, UNCODED)
    x = chunk.tensors()
    low = torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min)
    output, _ = within(chunk, x, low)
    values = torch.einsum("bjtr,ger->bge", x[4], x[6]) / 40
    torch.testing.assert_close(output, values.repeat_interleave(2, 1).unsqueeze(2).expand_as(output))


def rows_that_are_keys_and_values_need_no_decoder() -> None:
    chunk = replace(Chunk(UNCODED, UNCODED, key_heads=2, value_heads=2), width=24, value_size=24)
    x = chunk.tensors()
    x[3] = x[6] = None
    for mask in masks(chunk):
        for splits in (1, 2):
            assert_close(within(chunk, x, mask, splits=splits), expected(chunk, x, mask))
        found = rebuilt(*x, mask, None, **chunk.options())
        assert_close(found, expected(chunk, x, mask))


def rows_of_a_longer_cache_are_read_where_they_are() -> None:
    chunk = Chunk(ODD, FOUR, tokens=30)
    long = replace(chunk, tokens=50).tensors()
    for cut in (slice(7, 37), slice(1, 31)):
        x = [t[:, :, cut] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(long)]
        for way in (within, apart):
            assert_close(way(chunk, x), expected(chunk, x, None))
    x = [t[:, :, :30] if i in (1, 2, 4, 5) and t is not None else t for i, t in enumerate(long)]
    x[0] = x[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(within(chunk, x), expected(chunk, x, None))


def wide_decoders_are_not_held() -> None:
    tiers: Tiers = ((4, 128, 0.3), (2, 512, 0.9))
    chunk = Chunk(tiers, FOUR, tokens=20)
    x = chunk.tensors()
    sides: Any = tuple(x[1:4]), tuple(x[4:])
    assert build_prefill(chunk.spec()).decoder_bytes(sides) == 4 * (640 * 32 + 64 * 16) > prefill_launch.WITHIN_BYTES
    kernels: Any = prefill_launch.PrefillKernel
    calls, rebuild = list[int](), kernels.rebuild

    def noted(self: Any, side: int, *args: Any) -> Any:
        calls.append(side)
        return rebuild(self, side, *args)

    kernels.rebuild = noted
    try:
        assert_close(rebuilt(*x, None, None, **chunk.options()), expected(chunk, x, None))
    finally:
        kernels.rebuild = rebuild
    assert calls == [0, 1]


def many_rows_are_cut_into_tiles_and_rebuilt_apart() -> None:
    chunk = Chunk(HALVES, FOUR, queries=40, tokens=20)  # 80 rows of a kv head
    x = chunk.tensors()
    kernels: Any = prefill_launch.PrefillKernel
    calls, attend = list[KernelSpec](), kernels.attend

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self.spec)
        return attend(self, *args, **options)

    kernels.attend = noted
    try:
        for queries, coded in ((40, False), (30, True)):
            part = [x[0][:, :, :queries], *x[1:]]
            found = rebuilt(*part, None, None, **chunk.options())
            assert_close(found, expected(chunk, part, None))
            assert bool(calls.pop().key_tiers) == coded and not calls
    finally:
        kernels.attend = attend


def half_precision_multiplies_in_its_own_type() -> None:
    right_bfloat16()
    for dtype, tolerance in ((torch.bfloat16, 2**-6), (torch.float16, 2**-9)):  # keys, values and weights are rounded
        for tiers in (((8, 16, 0.02), (4, 64, 0.3)), ((6, 64, 0.08), (16, 16, 0.0)), UNCODED):
            chunk = Chunk(tiers, tiers, dtype=dtype)
            x = chunk.tensors()
            for found in (within(chunk, x), apart(chunk, x, length=32)):
                assert found[0].dtype == dtype and found[1].dtype == torch.float32
                assert_close(found, expected(chunk, x, None), tolerance)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        any_spec_agrees_with_the_reference,
        ragged_lengths_end_where_they_say,
        no_token_at_all_gives_zeros,
        rows_that_see_nothing_give_zeros,
        the_lowest_mask_lets_a_row_attend_evenly,
        rows_that_are_keys_and_values_need_no_decoder,
        rows_of_a_longer_cache_are_read_where_they_are,
        many_rows_are_cut_into_tiles_and_rebuilt_apart,
        wide_decoders_are_not_held,
        half_precision_multiplies_in_its_own_type,
    )
}
