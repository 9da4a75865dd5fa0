"""Trellis codes: decoding a ring of bits, optimality of the encoded ring, and its error on a Gaussian."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.fitting import codes
from fhopt.fitting.allocation import DISTORTION
from fhopt.ops import packing, trellis
from fhopt.plan.site_plan import TRELLIS_BITS, TRELLIS_TABLES

pytestmark = pytest.mark.usefixtures("references")

CODES = [trellis.LEVELS[w // 16 ^ trellis.ORDER[w % 16]] + trellis.OFFSETS[w % 16] for w in range(256)]


def values_by_definition(ring: list[int], bits: int) -> list[float]:
    """Decode a ring of bytes by the definition in the module's docstring."""
    stream = [byte >> i & 1 for byte in ring for i in range(8)]
    found = []
    for channel in range(len(stream) // bits):
        end = (channel + 1) * bits
        window = sum(stream[(end - 8 + i) % len(stream)] << i for i in range(8))
        found.append(CODES[window] - 127.5)
    return found


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from(TRELLIS_BITS), octets=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_ring_decodes_to_its_definition(bits: int, octets: int, seed: int) -> None:
    ring = torch.randint(0, 256, (3, octets * bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    wanted = [values_by_definition(row, bits) for row in ring.tolist()]
    assert trellis.decode_rings(ring, bits).tolist() == wanted


def test_other_tables_have_another_number() -> None:
    """It is part of the digest of plans with trellis codes: other tables decode stored rows to other values."""
    text = repr((trellis.LEVELS, trellis.OFFSETS, trellis.ORDER))
    assert (TRELLIS_TABLES, hashlib.sha256(text.encode()).hexdigest()[:16]) == (2, "70cb37e23aca5775")


def test_no_ring_closed_in_the_same_state_has_a_smaller_error() -> None:
    rings = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
    every = trellis.decode_rings(rings, 1)  # [256, 8]
    states = trellis.windows(rings, 1)[:, -1] >> 1
    for x in 60 * gaussian(40, 8):
        ring = int(trellis.encode_rings(x, 1))
        errors = (every - x).square().sum(-1)
        same = states == states[ring]
        torch.testing.assert_close(errors[ring], errors[same].min(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_the_error_on_a_gaussian_is_the_one_used_by_allocation(bits: int) -> None:
    x, step = gaussian(300, 64), codes.STEP[bits]
    kept = trellis.decode_rings(trellis.encode_rings(x / step, bits), bits) * step
    left = float((kept - x).square().mean())
    assert left == pytest.approx(codes.SHARE[bits] * DISTORTION[bits], rel=0.07)
    assert left < DISTORTION[bits] * 0.87
    unbiased = float((x * x).mean() / (x * kept).mean())
    assert codes.GAIN[bits] == pytest.approx(unbiased, rel=0.02)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_nan_and_inf_affect_no_other_rows(bits: int) -> None:
    x = 40 * gaussian(3, 32)
    spoilt = x.clone()
    spoilt[1, 5], spoilt[2, 7] = torch.nan, torch.inf
    found, wanted = trellis.encode_rings(spoilt, bits), trellis.encode_rings(x, bits)
    assert torch.equal(found[0], wanted[0])
    far = (trellis.decode_rings(found, bits) - x).abs()
    assert float(far[1, 20:].mean()) < 4 * float(far[0].mean())


@given(bits=st.sampled_from(TRELLIS_BITS), shape=st.sampled_from([(), (0,), (2, 3), (1, 2, 0)]))
@settings(max_examples=20)
def test_any_number_of_leading_dimensions_is_supported(bits: int, shape: tuple[int, ...]) -> None:
    ring = trellis.encode_rings(torch.zeros(*shape, 16), bits)
    assert ring.shape == (*shape, 2 * bits) and trellis.decode_rings(ring, bits).shape == (*shape, 16)


def test_a_row_may_hold_both_kinds_of_codes() -> None:
    groups = ([6, 3, 16, 2, 1], [8, 24, 8, 40, 32], [0.15, -codes.STEP[3], 1.0, -codes.STEP[2], 1.6])
    x = gaussian(50, 112)
    packed, scale = torch.ops.fhopt.pack(x, *groups)
    assert packed.shape[-1] == sum(b * w for b, w in zip(*groups[:2], strict=True)) // 8
    kept = torch.ops.fhopt.unpack(packed, scale, *groups)
    errors = [float((a - b).square().mean()) for a, b in zip(x.split(groups[1], -1), kept.split(groups[1], -1))]  # noqa: B905
    assert errors[1] < DISTORTION[3] and errors[3] < DISTORTION[2] < errors[4]


def test_the_gradient_passes_unchanged() -> None:
    x = gaussian(4, 32).requires_grad_()
    packing.straight_through(x, [2], [32], [-codes.STEP[2]]).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_a_gpu_refuses_in_one_sentence() -> None:
    from fhopt.codegen.gpu.packing import device_table

    with pytest.raises(FhoptError, match=r"not support trellis codes.*--code uniform"):
        device_table((2,), (32,), (-0.025,), torch.device("cpu"))
