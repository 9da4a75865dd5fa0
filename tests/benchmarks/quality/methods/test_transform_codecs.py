"""Low rank and attention-aware transform coding: values and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baseline_caches import SCHEDULE, exact_logits, read, relative_error
from small_models import tiny_llama, token_ids
from torch import Tensor

from benchmarks.quality.methods.calibration_moments import (
    AttentionMoments,
    TokenMoments,
    attention_moments,
    head_moments,
    token_moments,
)
from benchmarks.quality.methods.joint_caches import JointBlocks
from benchmarks.quality.methods.quantized_caches import CacheShape, QuantizedBlocks, Schedule
from benchmarks.quality.methods.transform_codecs import Aatc, LowRank, aatc, low_rank, rank_for, water_bits, water_level

SMOLLM2 = CacheShape(layers=30, kv_heads=3, head_dim=64)
AT = 8192
QUANTIZED = 8064


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


# --------------------------------------------------------------------------------------------------- low rank


def test_full_rank_is_lossless_and_a_low_one_is_not(llama: Any) -> None:
    ids = token_ids(1, 170)
    moments = head_moments(llama, token_ids(3, 60), sinks=4)
    expected = exact_logits(llama, ids)
    full, _ = read(llama, QuantizedBlocks(low_rank(moments, 16), SCHEDULE), ids)
    # float32: two more matmuls with orthonormal bases
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    low, _ = read(llama, QuantizedBlocks(low_rank(moments, 4), SCHEDULE), ids)
    assert float((low - expected).abs().max()) > 1e-2


def test_a_low_rank_basis_preserves_its_training_rows() -> None:
    directions = torch.linalg.qr(torch.randn(2, 16, 3))[0]  # [G, D, 3]
    rows = torch.randn(2, 50, 3) @ directions.mT
    moment = (rows.mT @ rows).double()
    codec = low_rank([(moment, moment)], 3)
    torch.testing.assert_close(codec.key(rows[None], 0)[0], rows, rtol=0, atol=1e-5)  # float32 bases


@pytest.mark.parametrize(("ratio", "rank"), [(3.2, 20), (4, 16), (8, 8), (12, 5)])
def test_the_rank_is_the_smallest_that_reaches_the_ratio(ratio: float, rank: int) -> None:
    assert rank_for(ratio, SMOLLM2, Schedule(), AT) == rank
    basis = torch.zeros(3, 64, rank)
    held = QuantizedBlocks(LowRank([(basis, basis)]), Schedule()).cache_bytes(SMOLLM2, AT)
    allowed = AT * SMOLLM2.exact_token_bytes / ratio
    assert held >= allowed > held - QUANTIZED * 90 * 4


# --------------------------------------------------------------------------------------------------- water-filling


def test_water_bits_by_hand() -> None:
    energies = torch.tensor([256.0, 16.0, 4.0, 1.0, 0.01])
    assert water_bits(energies, 1.0).tolist() == [4, 2, 1, 0, 0]
    assert water_bits(torch.tensor([1e30]), 1.0).tolist() == [8]


@pytest.mark.parametrize("bits", [0.5, 1.5, 2, 3, 4])
def test_the_water_level_spends_the_given_bits(bits: float) -> None:
    energies = torch.randn(5000).mul(3).exp()
    mean = float(water_bits(energies, water_level(energies, bits)).mean())
    assert bits - 0.01 < mean <= bits


def test_more_energy_never_means_fewer_bits() -> None:
    energies = torch.randn(1000).exp().sort().values
    assert bool((water_bits(energies, water_level(energies, 2)).diff() >= 0).all())


# --------------------------------------------------------------------------------------------------- AATC

SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=16)


def structured(rows: int = 400) -> Tensor:
    """[N, 64] with falling variances in a random basis."""
    basis = torch.linalg.qr(torch.randn(64, 64))[0]
    return torch.randn(rows, 64) * torch.logspace(1, -2, 64) @ basis + 3


def moments_of(rows: Tensor) -> TokenMoments:
    x = rows.double()
    return TokenMoments(x.mean(0), torch.cov(x.T, correction=0), rows)


def plain_attention(value_weight: float = 1.0) -> list[AttentionMoments]:
    eye = torch.eye(16).double().expand(2, 16, 16)
    return [AttentionMoments(eye, eye, torch.ones(2, 16).double(), eye * value_weight) for _ in range(2)]


def fitted(bits: float, rows: Tensor, value_weight: float = 1.0) -> Aatc:
    return aatc((moments_of(rows), moments_of(rows)), plain_attention(value_weight), SHAPE, bits, rotary_size=16)


def as_heads(rows: Tensor) -> Tensor:
    return rows.view(1, len(rows), 2, 2, 16).permute(2, 0, 3, 1, 4)  # [L, B, G, N, D]


@pytest.mark.parametrize("random", [True, False])
def test_more_bits_reduce_the_error(random: bool) -> None:
    rows = torch.randn(400, 64) if random else structured()
    x = as_heads(rows)
    errors = [relative_error(fitted(bits, rows).keys(x), x) for bits in (1.5, 2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def test_a_transform_helps_if_channels_are_correlated() -> None:
    rows = structured()
    x = as_heads(rows)
    spread = as_heads(torch.randn(400, 64) * rows.std(0) + 3)
    together, alone = (relative_error(fitted(2, r).keys(y), y) for r, y in ((rows, x), (torch.randn(400, 64), spread)))
    assert together < 0.5 * alone


def test_bytes_include_the_channels_and_a_scale_per_group_of_heads() -> None:
    codec = fitted(3, structured())
    bits = [
        int(t.bits.sum()) for side in (codec.key_transforms, codec.value_transforms) for layer in side for t in layer
    ]
    assert len(bits) == 4 and 0.9 * 3 * 128 < sum(bits) <= 3 * 128
    assert codec.token_bytes(SHAPE) == sum(bits) / 8 + 4 * 2
    assert all(float(t.bits.max()) <= 8 and bool((t.bits == t.bits.round()).all()) for t in codec.key_transforms[0])


def test_channels_with_more_attention_weight_get_more_bits() -> None:
    codec = fitted(3, structured(), value_weight=16.0)
    keys, values = (sum(float(t.bits.sum()) for layer in side for t in layer)
                    for side in (codec.key_transforms, codec.value_transforms))  # fmt: skip
    assert values > keys + 40  # two bits per channel above the water level


def test_channels_without_bits_become_their_mean() -> None:
    rows = structured()
    codec = fitted(0.2, rows)
    dropped = [t for layer in codec.key_transforms for t in layer if not bool(t.bits.any())]
    found = codec.keys(as_heads(rows))
    assert relative_error(found, as_heads(rows)) < 1
    for transform in dropped:
        torch.testing.assert_close(transform(rows[:, :32]), transform.mean.expand(400, 32), rtol=0, atol=1e-5)


def test_it_is_deterministic_and_exact_tokens_are_unchanged(llama: Any) -> None:
    ids = token_ids(4, 200)
    tokens, attention = token_moments(llama, ids, 4), attention_moments(llama, ids, 4)
    shape = CacheShape.of(llama)
    text = token_ids(1, 200)
    expected = exact_logits(llama, text)
    errors = []
    for bits in (2, 4, 8):
        baseline = JointBlocks(aatc(tokens, attention, shape, bits, rotary_size=16), SCHEDULE)
        found, cache = read(llama, baseline, text)
        torch.testing.assert_close(found, read(llama, baseline, text)[0], rtol=0, atol=0)
        first = SCHEDULE.first_step
        torch.testing.assert_close(found[:, :first], expected[:, :first], rtol=1e-4, atol=1e-4)
        errors.append(relative_error(found, expected))
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0 and cache.quantized == SCHEDULE.quantized(200)
