"""Checks of the Triton latent-attention kernel, run in a separate process under the interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from attention_cases import FOUR, ODD, PLANES, UNCODED, Inputs, KernelCase, expected, inputs, masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt.codegen.build import build_triton
from fhopt.codegen.gpu.configs import Config
from fhopt.codegen.gpu.launch import Span
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.site_plan import SUPPORTED_BITS
from fhopt.plan.window import ResidualWindow

SMALL = Config(block_t=16, block_m=8, num_warps=4, num_stages=2)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of the expected result."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def attend(case: KernelCase, x: Inputs, mask: Tensor | None = None, **features: Any) -> tuple[Tensor, Tensor]:
    kernel: LatentKernel = build_triton(case.spec())
    return kernel(*x, mask, **({"config": SMALL} | case.options() | features))


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    """Tolerance 1e-5: float32 sums of codes whose midpoint is subtracted last. Fully masked rows must be equal."""
    (output, lse), (wanted_output, wanted_lse) = found, wanted
    assert relative(output, wanted_output) < tolerance
    seen = wanted_lse > -math.inf
    assert torch.equal(lse > -math.inf, seen)
    assert relative(lse[seen], wanted_lse[seen]) < tolerance or float((lse - wanted_lse)[seen].abs().max()) < tolerance
    assert not output[~seen].any()


a_side = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 5).map(lambda n: 8 * n)), min_size=0, max_size=3
).map(lambda pairs: tuple((bits, width, 3.0 / 2 ** min(bits, 8)) for bits, width in pairs))


@st.composite
def a_case(draw: st.DrawFn) -> KernelCase:
    heads = draw(st.integers(1, 9))
    divisors = st.sampled_from([n for n in (1, 2, 3, heads) if heads % n == 0 and n <= 4])
    return KernelCase(
        draw(a_side), draw(a_side), heads, draw(divisors), draw(divisors), draw(st.integers(1, 3)),
        draw(st.integers(1, 40)), softcap=draw(st.sampled_from([0.0, 4.0])), width=draw(st.integers(1, 40)),
    )  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=a_case(), kind=st.integers(0, 4), splits=st.integers(1, 4), seed=st.integers(0, 99))
def any_spec_agrees_with_the_reference(case: KernelCase, kind: int, splits: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = inputs(case)
    one = tuple(t if t is None else t[:1] for t in x)
    mask = masks(case)[kind]
    mask = mask[:1] if mask is not None and mask.dim() == 4 else mask
    assert_close(attend(case, one, mask, splits=splits), expected(case, one, mask))  # type: ignore[arg-type]


def ragged_lengths_end_where_they_say() -> None:
    case = KernelCase(FOUR, PLANES, 3, 1, 1, 2, 40)
    x = inputs(case)
    ragged, few = torch.tensor([40, 17]), torch.tensor([0, 1], dtype=torch.int32)
    for lengths, splits in ((ragged, 1), (ragged, 3), (few, 3), (torch.tensor(33), 1)):
        seen = torch.arange(40) < lengths.reshape(-1, 1, 1, 1)
        assert_close(attend(case, x, lengths=lengths, splits=splits), expected(case, x, seen))


def no_token_at_all_gives_zeros() -> None:
    for tokens in (0, 1):
        case = KernelCase(FOUR, ODD, 2, 1, 1, 1, tokens)
        x = inputs(replace(case, tokens=1))
        x = tuple(t if t is None or i == 0 else t[:, :, :tokens] for i, t in enumerate(x))  # type: ignore[assignment]
        wanted = (
            expected(case, x, None)
            if tokens
            else (torch.zeros(2, 2, 1, case.value_width), torch.full((2, 2, 1), -math.inf))
        )
        for splits in (1, 2):
            assert_close(attend(case, x, splits=splits), wanted)


def a_row_that_sees_nothing_gives_zeros() -> None:
    case = KernelCase(FOUR, FOUR, 2, 1, 1, 2, 40)
    x = inputs(case)
    mask = torch.ones(2, 1, 2, 40, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 0, 0, :20] = False
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        for splits in (1, 3):
            assert_close(attend(case, x, form, splits=splits), expected(case, x, mask))


def the_lowest_mask_lets_a_row_attend_evenly() -> None:
    case = KernelCase(UNCODED, UNCODED, 1, 1, 1, 1, 20, width=16)
    x = inputs(case)
    low = torch.full((1, 1, 1, 20), torch.finfo(torch.float32).min)
    output, _ = attend(case, x, low)
    assert relative(output, x[3].mean(2, keepdim=True)) < 1e-5


def a_head_reads_the_pages_it_chose() -> None:
    case = KernelCase(FOUR, FOUR, 4, 2, 2, 1, 90)
    x = inputs(case)
    pages = torch.tensor([[[0, 2, -1], [5, 1, 4]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    short = torch.tensor([[[0, 3, 11], [1, 2, -1]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    large = torch.tensor([[[0, 3, -1], [1, 2, -1]], [[3, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    for page_tokens, lists in ((8, short), (24, large), (16, pages)):
        chosen = (torch.arange(90).view(90, 1) // page_tokens == lists.unsqueeze(2)).any(-1)  # [B, J, T]
        seen = chosen.repeat_interleave(2, 1).unsqueeze(2)
        for splits in (1, 2):
            assert_close(attend(case, x, pages=lists, page_tokens=page_tokens, splits=splits), expected(case, x, seen))
    shared = pages[:, 1:]  # one list for all heads
    of_all = chosen[:, 1:].expand(2, 4, 90).unsqueeze(2)
    assert_close(attend(case, x, pages=shared, page_tokens=16), expected(case, x, of_all))


def the_rule_of_a_window_says_what_is_read_of_pages_of_any_size() -> None:
    window, lengths = (
        ResidualWindow(3, 5, 8),
        torch.tensor([90, 17], dtype=torch.int32),
    )  # at a border: 17 = 3 + 5 + 8 + 1
    for tiers, page in ((FOUR, 7), (ODD, 12), (UNCODED, 16)):
        case = KernelCase(tiers, tiers, 4, 2, 2, 1, 9 * page)
        x = inputs(case)
        table = torch.randperm(18).view(2, 9).to(torch.int32)
        pooled = [t if t is None or i == 0 else scattered(t, table, page) for i, t in enumerate(x)]
        t, last = torch.arange(9 * page), lengths.clamp(max=9 * page).view(2, 1) - 1
        end = window.sinks + window.quantized_tokens(last)
        seen = {
            Span.QUANTIZED: (t >= window.sinks) & (t < end),
            Span.OPEN: (t >= end) & (t <= last),
            Span.FIRST: (t < window.sinks) & (t <= last),
        }
        for kind, mask in seen.items():
            wanted = expected(case, x, mask.view(2, 1, 1, -1))
            for splits in (1, 3):
                features = dict(lengths=lengths, span=Span(kind, window, table), splits=splits)
                assert_close(attend(case, pooled, **features), wanted)  # type: ignore[arg-type]
    empty = attend(case, pooled, lengths=lengths * 0, span=Span(Span.OPEN, window, table))  # type: ignore[arg-type]
    assert not bool(empty[0].any()) and bool((empty[1] == -math.inf).all())


def scattered(x: Tensor, table: Tensor, page: int) -> Tensor:
    """Place each sequence's tokens, x [B,J,T,...], in the pages of `table` [B,P] of a pool [pages,J,page,...]."""
    out = torch.empty((int(table.max()) + 1, x.shape[1], page, *x.shape[3:]), dtype=x.dtype)
    for b, i in itertools.product(*map(range, table.shape)):
        out[table[b, i]] = x[b, :, page * i : page * i + page]
    return out


def rows_of_a_longer_cache_are_read_where_they_are() -> None:
    case = KernelCase(ODD, FOUR, 4, 2, 2, 1, 30)
    long = inputs(replace(case, tokens=50))
    for cut in (slice(7, 37), slice(1, 31)):
        x = tuple(t if t is None or i == 0 else t[:, :, cut] for i, t in enumerate(long))
        assert_close(attend(case, x), expected(case, x, None))  # type: ignore[arg-type]
    other = tuple(
        t if t is None or i == 0 else t[:, :, :30].transpose(1, 2).contiguous().transpose(1, 2)
        for i, t in enumerate(long)
    )
    assert_close(attend(case, other), expected(case, other, None))  # type: ignore[arg-type]


def half_precision_multiplies_in_its_own_type() -> None:
    right_bfloat16()
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        for tiers in (((8, 16, 0.02), (4, 64, 0.3)), ((6, 64, 0.08), (16, 16, 0.0)), UNCODED):
            case = KernelCase(tiers, tiers, 4, 1, 1, 1, 40, dtype=dtype)
            x = inputs(case)
            found = attend(case, x, splits=2)
            assert found[0].dtype == dtype
            assert_close(found, expected(case, x, None), tolerance)


def right_bfloat16() -> None:
    """Fix Triton's interpreter, which multiplies bfloat16 bit patterns and truncates float32."""
    import numpy as np
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    bfloat16 = interpreter.tl.bfloat16

    def widened(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if a.dtype.scalar != bfloat16:
            return dot(self, a, b, total, *rest)
        return interpreter.TensorHandle(np.matmul(widened(a), widened(b)) + total.data, total.dtype.scalar)

    def convert_float(x: Any, source: Any, target: Any, *rest: Any) -> Any:
        if target != bfloat16 or source != interpreter.tl.float32:
            return convert(x, source, target, *rest)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        any_spec_agrees_with_the_reference,
        ragged_lengths_end_where_they_say,
        no_token_at_all_gives_zeros,
        a_row_that_sees_nothing_gives_zeros,
        the_lowest_mask_lets_a_row_attend_evenly,
        a_head_reads_the_pages_it_chose,
        the_rule_of_a_window_says_what_is_read_of_pages_of_any_size,
        rows_of_a_longer_cache_are_read_where_they_are,
        half_precision_multiplies_in_its_own_type,
    )
}
