"""The canonical ops against slow, obvious references in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt import ops
from fhopt.fitting import DISTORTION, STEP
from fhopt.spec import SUPPORTED_BITS, KernelSpec

NO_TIERS = ops.latent_options(None, None)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """float64, one head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        logits = q[:, head] @ k[:, group].mT * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        if mask is not None:
            logits = logits.masked_fill(~mask.expand(q.shape[0], q.shape[1], *logits.shape[1:])[:, head], -math.inf)
        outputs.append(logits.softmax(-1) @ v[:, head * v.shape[1] // q.shape[1]])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_equals_a_loop_over_heads(heads: tuple[int, int], cap: float) -> None:
    h, g = heads
    q, k, v = torch.randn(2, h, 5, 8), torch.randn(2, g, 7, 8), torch.randn(2, g, 7, 6)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    out = torch.ops.fhopt.attention(q, k, v, mask, scale=0.4, softcap=cap)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.4, cap), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        torch.ops.fhopt.attention(q, k, k, scale=1.0)


def test_uncoded_latent_attention_is_grouped_query_attention() -> None:
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 3, 9, 5)
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, v, None, None, **NO_TIERS, scale=0.3)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, None, 0.3, 0.0), rtol=1e-5, atol=1e-5)
    logits = q.double() @ k.repeat_interleave(3, 1).double().mT * 0.3
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_query_that_may_see_nothing_gives_zero_and_minus_infinity() -> None:
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out, lse = torch.ops.fhopt.latent_attention(q, k, None, k, None, mask, **NO_TIERS, scale=1.0)
    assert bool((out[:, :, 1] == 0).all()) and bool((lse[:, :, 1] == -math.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[:, :, 0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_there_is_no_token_the_result_is_zero_and_minus_infinity(dtype: torch.dtype) -> None:
    """As of a window that a crop has emptied."""
    q, nothing = torch.randn(1, 2, 3, 8, dtype=dtype), torch.randn(1, 2, 0, 8, dtype=dtype)
    codes = ops.round_rows(nothing)
    byte = [8], [8], [1.0]
    both: tuple[Any, ...] = (
        ((nothing, None, nothing, None), NO_TIERS),
        ((*codes, *codes), ops.tier_options(byte, byte)),
    )
    for operands, options in both:
        reference: Any = ops.latent_attention_reference
        out, lse = reference(q, *operands, None, **options, scale=1.0)
        assert out.shape == q.shape and not out.any() and bool((lse == -math.inf).all()) and lse.dtype == dtype


def test_parts_merge_to_the_whole_and_an_empty_part_changes_nothing() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)

    def part(a: int, b: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.ops.fhopt.latent_attention(q, k[:, :, a:b], None, v[:, :, a:b], None, mask, **NO_TIERS, scale=0.5)
        return rows[0], rows[1]

    whole, _ = part(0, 10)
    torch.testing.assert_close(ops.merge([part(0, 4), part(4, 10)]), whole, rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(ops.merge([part(0, 10), part(0, 4, nothing)]), whole, rtol=1e-6, atol=1e-6)


# ---- codes

TIERS = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 4).map(lambda n: 8 * n)), min_size=1, max_size=4
)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The bytes of one token with one tier that holds these codes."""
    x = codes.float() - (2**bits - 1) / 2
    size = float(x.square().mean().sqrt())
    rows: Tensor = torch.ops.fhopt.pack(x, [bits], [len(codes)], [1 / size])[0]
    return rows


@given(tiers=TIERS, seed=st.integers(0, 1000), size=st.sampled_from([0.01, 1.0, 300.0]))
@settings(max_examples=40, deadline=None)
def test_codes_come_back_within_half_a_step_or_at_the_end_of_the_range(
    tiers: list[tuple[int, int]], seed: int, size: float
) -> None:
    bits, widths = [b for b, _ in tiers], [w for _, w in tiers]
    steps = [STEP.get(b, 1.0) for b in bits]
    x = torch.randn(2, 3, sum(widths), generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = torch.ops.fhopt.pack(x, bits, widths, steps)
    assert codes.shape[-1] == sum(b * w for b, w in tiers) // 8
    z = torch.ops.fhopt.unpack(codes, scale, bits, widths, steps)
    for part, back, b, step in zip(x.split(widths, -1), z.split(widths, -1), bits, steps, strict=True):
        if b == 16:
            torch.testing.assert_close(back, part, rtol=1e-3, atol=1e-6)  # float16 has 11 bits
            continue
        unit = scale.float().unsqueeze(-1)
        reach = (2**b - 1) / 2 * step
        inside = (part / unit).abs() <= reach
        assert bool(((back - part).abs() / unit)[inside].le(step / 2 * 1.001 + 1e-6).all())
        assert bool((back.abs() / unit).le(reach * 1.001).all())


@pytest.mark.parametrize("bits", [b for b in SUPPORTED_BITS if b < 16])
def test_every_code_comes_back(bits: int) -> None:
    codes = torch.randperm(256) % 2**bits
    rows = pack_codes(codes, bits)
    assert rows.shape == (256 * bits // 8,)
    assert torch.equal(ops.unscaled(rows, [bits], [256], [1.0]) + (2**bits - 1) / 2, codes.float())


@pytest.mark.parametrize(
    ("bits", "codes", "planes"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], [[0b10001101]]),
        (2, [1, 2, 3, 0, 0, 0, 0, 3], [[0b00111001, 0b11000000]]),
        (3, [5, 3, 0, 0, 0, 0, 0, 4], [[0b00000110, 0b10000000], [0b00000011]]),
        (3, [5] * 8 + [2] * 8, [[0b10101010] * 2 + [0b01010101] * 2, [0b11111111, 0b00000000]]),
        (4, [1, 15, 0, 0, 0, 0, 8, 2], [[0b11110001, 0, 0, 0b00101000]]),
        (5, [31, 16, 0, 0, 0, 0, 1, 2], [[0b10001111, 0, 0, 0b00010000], [0b01000001]]),
        (6, [63, 32, 5, 0, 0, 0, 0, 18], [[0b10001111, 0b00000001, 0, 0b01000000], [0b00010011, 0b10000000]]),
        (8, [0, 1, 2, 3, 128, 253, 254, 255], [[0, 1, 2, 3, 128, 253, 254, 255]]),
    ],
)
def test_a_tier_is_stored_as_bit_planes_with_the_high_order_bits_first(
    bits: int, codes: list[int], planes: list[list[int]]
) -> None:
    assert pack_codes(torch.tensor(codes), bits).tolist() == [byte for plane in planes for byte in plane]
    assert [8 * len(plane) // len(codes) for plane in planes] == list(ops.planes(bits))


def test_one_bit_is_a_sign() -> None:
    x = torch.tensor([[-3.0, 3.0, -0.1, 0.1, -1.0, 1.0, 2.0, -2.0]])
    codes, scale = torch.ops.fhopt.pack(x, [1], [8], [0.5])
    z = torch.ops.fhopt.unpack(codes, scale, [1], [8], [0.5])
    assert torch.equal(z, x.sign() * 0.25 * scale.float().unsqueeze(-1))


def test_float16_channels_may_start_at_an_odd_byte() -> None:
    bits, widths, steps = [3, 16], [8, 8], [0.5, 1.0]
    x = torch.randn(1, 1, 1, 16)
    codes, scale = torch.ops.fhopt.pack(x, bits, widths, steps)
    z = torch.ops.fhopt.unpack(codes, scale, bits, widths, steps)
    assert torch.equal(z[..., 8:], x[..., 8:].half().float())


@pytest.mark.parametrize("bits", sorted(STEP))
def test_the_distortion_of_a_gaussian_is_the_one_that_allocation_uses(bits: int) -> None:
    x = torch.randn(2000, 64)
    codes, scale = torch.ops.fhopt.pack(x, [bits], [64], [STEP[bits]])
    error = (torch.ops.fhopt.unpack(codes, scale, [bits], [64], [STEP[bits]]) - x).square().mean()
    assert float(error) == pytest.approx(DISTORTION[bits], rel=0.15)  # the scale is measured on 64 channels


def test_a_token_of_zeros_stays_small() -> None:
    codes, scale = torch.ops.fhopt.pack(torch.zeros(1, 16), [4], [16], [0.3])
    assert float(torch.ops.fhopt.unpack(codes, scale, [4], [16], [0.3]).abs().max()) < 1e-4


@pytest.mark.parametrize("tiers", [[(8, 8), (4, 16), (2, 8)], [(16, 8), (4, 24)], [(6, 8), (5, 16), (3, 8), (1, 8)]])
def test_attention_on_codes_equals_attention_on_what_they_stand_for(tiers: list[tuple[int, int]]) -> None:
    bits, widths = [b for b, _ in tiers], [w for _, w in tiers]
    steps = [STEP.get(b, 1.0) for b in bits]
    q = torch.randn(2, 6, 3, sum(widths))
    key, key_scale = torch.ops.fhopt.pack(torch.randn(2, 2, 20, sum(widths)), bits, widths, steps)
    value, value_scale = torch.ops.fhopt.pack(torch.randn(2, 1, 20, sum(widths)) * 7, bits, widths, steps)
    options = dict(key_bits=bits, key_widths=widths, key_steps=steps)
    options |= dict(value_bits=bits, value_widths=widths, value_steps=steps)
    mask = torch.rand(2, 1, 3, 20) > 0.2
    out, _ = torch.ops.fhopt.latent_attention(q, key, key_scale, value, value_scale, mask, **options, scale=0.2)
    k = torch.ops.fhopt.unpack(key, key_scale, bits, widths, steps)
    v = torch.ops.fhopt.unpack(value, value_scale, bits, widths, steps)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, mask, 0.2, 0.0), rtol=1e-4, atol=1e-4)


def test_ops_keep_the_rules_of_torch_library() -> None:
    x = torch.randn(1, 1, 4, 16)
    checks = ("test_schema", "test_faketensor")
    for tiers in (([4, 2], [8, 8], [0.3, 0.9]), ([5, 1], [8, 8], [0.2, 1.6])):
        torch.library.opcheck(torch.ops.fhopt.pack.default, (x, *tiers), test_utils=checks)
        codes, scale = torch.ops.fhopt.pack(x, *tiers)
        torch.library.opcheck(torch.ops.fhopt.unpack.default, (codes, scale, *tiers), test_utils=checks)
    q = torch.randn(1, 2, 1, 16)
    arguments = (q, x, None, x, None, None)
    options = {**NO_TIERS, "scale": 1.0}
    torch.library.opcheck(torch.ops.fhopt.latent_attention.default, arguments, options, test_utils=checks)


def test_a_kernel_spec_names_itself_by_what_its_text_depends_on() -> None:
    spec = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.3),), 48, 64, "float32", False)
    other = KernelSpec(((8, 16, 0.1), (4, 32, 0.3)), ((4, 64, 0.4),), 48, 64, "float32", False)
    assert spec.name.startswith("latent_k16b8x32b4_v64b4_float32_")
    assert spec.name != other.name
