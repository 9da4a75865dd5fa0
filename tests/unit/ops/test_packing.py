"""Packing latents into bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt.fitting.allocation import DISTORTION, STEP
from fhopt.ops import packing
from fhopt.plan.site_plan import SUPPORTED_BITS

pytestmark = pytest.mark.usefixtures("references")


@given(st.integers(0, 9999), st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
def test_rounded_rows_are_within_half_a_scale_and_round_to_themselves(seed: int, size: float) -> None:
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = packing.round_rows(x)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16 and scale.shape == (2, 3, 5)
    found = packing.unround_rows(codes, scale, x.dtype)
    assert bool(((found - x).abs() <= 0.501 * scale.unsqueeze(-1)).all())  # .501: the division rounds, too
    again = packing.unround_rows(*packing.round_rows(found), x.dtype)
    assert bool(((again - found).abs() <= 0.501 * scale.unsqueeze(-1)).all())


def test_rows_of_zeros_and_no_rows_have_codes_too() -> None:
    for tokens in (2, 0):
        zeros = torch.zeros(1, 2, tokens, 8, dtype=torch.bfloat16)
        found = packing.unround_rows(*packing.round_rows(zeros), zeros.dtype)
        assert found.dtype == torch.bfloat16 and bool((found.abs() <= 2.0**-25).all())  # half the smallest float16


TIERS = st.lists(
    st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 4).map(lambda n: 8 * n)), min_size=1, max_size=4
)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of one token with one bit group of these codes."""
    x = codes.float() - (2**bits - 1) / 2
    size = float(x.square().mean().sqrt())
    rows: Tensor = torch.ops.fhopt.pack(x, [bits], [len(codes)], [1 / size])[0]
    return rows


@given(tiers=TIERS, seed=st.integers(0, 1000), size=st.sampled_from([0.01, 1.0, 300.0]))
@settings(max_examples=40, deadline=None)
def test_values_are_restored_within_half_a_step_or_clipped(
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
def test_every_code_is_restored(bits: int) -> None:
    codes = torch.randperm(256) % 2**bits
    rows = pack_codes(codes, bits)
    assert rows.shape == (256 * bits // 8,)
    assert torch.equal(packing.unscaled(rows, [bits], [256], [1.0]) + (2**bits - 1) / 2, codes.float())


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
def test_a_bit_group_is_stored_as_bit_planes_with_the_high_order_bits_first(
    bits: int, codes: list[int], planes: list[list[int]]
) -> None:
    assert pack_codes(torch.tensor(codes), bits).tolist() == [byte for plane in planes for byte in plane]
    assert [8 * len(plane) // len(codes) for plane in planes] == list(packing.planes(bits))


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
def test_the_distortion_of_a_gaussian_is_the_one_used_by_allocation(bits: int) -> None:
    x = torch.randn(2000, 64)
    codes, scale = torch.ops.fhopt.pack(x, [bits], [64], [STEP[bits]])
    error = (torch.ops.fhopt.unpack(codes, scale, [bits], [64], [STEP[bits]]) - x).square().mean()
    assert float(error) == pytest.approx(DISTORTION[bits], rel=0.15)  # the scale is measured on 64 channels


def test_a_token_of_zeros_stays_small() -> None:
    codes, scale = torch.ops.fhopt.pack(torch.zeros(1, 16), [4], [16], [0.3])
    assert float(torch.ops.fhopt.unpack(codes, scale, [4], [16], [0.3]).abs().max()) < 1e-4
