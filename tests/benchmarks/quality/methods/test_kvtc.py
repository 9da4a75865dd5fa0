"""KVTC: allocation, coder and bytes."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from baseline_caches import SCHEDULE, exact_logits, read, relative_error
from small_models import tiny_llama, token_ids
from torch import Tensor

from benchmarks.quality.methods.calibration_moments import TokenMoments, token_moments
from benchmarks.quality.methods.joint_caches import JointBlocks
from benchmarks.quality.methods.kvtc import Components, Group, Kvtc, allocate, deflate_share, kvtc
from benchmarks.quality.methods.quantized_caches import CacheShape

SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=32)  # 128 components


def moments(rows: Tensor) -> TokenMoments:
    x = rows.double()
    return TokenMoments(x.mean(0), torch.cov(x.T, correction=0), rows)


def structured(rows: int = 512) -> Tensor:
    """[N, 128] with falling variances in a random basis."""
    basis = torch.linalg.qr(torch.randn(128, 128))[0]
    return torch.randn(rows, 128) * torch.logspace(1, -2, 128) @ basis + 3


def fitted(rows: Tensor, bits: float) -> Kvtc:
    components = Components.of(moments(rows))
    return kvtc(components, components, bits)


def as_heads(rows: Tensor) -> Tensor:
    return rows.view(1, len(rows), 2, 2, 32).permute(2, 0, 3, 1, 4)  # [L, B, G, N, D]


# --------------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("budget", [0, 100, 300, 1000, 5000])
def test_groups_are_contiguous_and_within_the_budget(budget: int) -> None:
    groups = allocate(torch.logspace(2, -2, 128), torch.randn(100, 128) * torch.logspace(1, -1, 128), budget)
    assert sum(group.total_bits for group in groups) <= budget
    ends = list(itertools.accumulate(group.size for group in groups))
    assert [group.start for group in groups] == [0, *ends][: len(groups)]


def test_the_allocation_is_optimal() -> None:
    """Compare dynamic programming with every way to split 4 units into groups."""
    sample = torch.randn(50, 64) * torch.logspace(1, -1, 64)
    variances = sample.square().mean(0)
    budget = 260

    def error(groups: tuple[Group, ...]) -> float:
        end = sum(group.size for group in groups)
        total = float(variances[end:].double().sum())
        for group in groups:
            if group.bits < 16:
                x = group.of(sample)
                square = float((x.amax(1) - x.amin(1)).double().square().mean())
                total += group.size * square / (12 * (2**group.bits - 1) ** 2)
        return total

    def cuts(start: int) -> list[tuple[Group, ...]]:
        found: list[tuple[Group, ...]] = [()]
        for size, bits in itertools.product((16, 64), (2, 4, 8, 16)):
            if start + size <= 64:
                found += [(Group(start, size, bits), *rest) for rest in cuts(start + size)]
        return found

    allowed = [groups for groups in cuts(0) if sum(group.total_bits for group in groups) <= budget]
    assert error(tuple(allocate(variances, sample, budget))) == pytest.approx(min(map(error, allowed)), rel=1e-5)


def test_leading_components_get_more_bits() -> None:
    rows = structured()
    groups = fitted(rows, 3).key_transform.groups
    assert groups[0].bits > groups[-1].bits and sum(group.size for group in groups) < 128


# --------------------------------------------------------------------------------------------------- the coder


@pytest.mark.parametrize("random", [True, False])
def test_more_bits_reduce_the_error(random: bool) -> None:
    rows = torch.randn(512, 128) if random else structured()
    errors = [relative_error(fitted(rows, bits).keys(as_heads(rows)), as_heads(rows)) for bits in (1.5, 2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


def test_sixteen_bits_are_nearly_exact_and_zero_bits_give_the_mean() -> None:
    rows = structured()
    whole, none = fitted(rows, 16), fitted(rows, 0)
    torch.testing.assert_close(whole.values(as_heads(rows)), as_heads(rows), rtol=0, atol=0.1)  # float16 of up to 100
    mean = rows.mean(0).expand(512, 128)
    torch.testing.assert_close(none.values(as_heads(rows)), as_heads(mean), rtol=0, atol=1e-4)


def test_bytes_equal_those_of_packed_codes() -> None:
    rows = structured()
    codec = fitted(rows, 3)
    side = codec.key_transform
    assert len(side.packed(rows[:64])) == 64 * side.code_bytes
    scales = sum(4 for group in side.groups if group.bits < 16)
    assert side.token_bytes == side.code_bytes + scales <= 3 * 128 / 8
    assert codec.token_bytes(SHAPE) == side.token_bytes + codec.value_transform.token_bytes


def test_packed_codes_are_in_order_of_their_components() -> None:
    rows = torch.randn(512, 128) * torch.logspace(2, -2, 128)
    side = fitted(rows, 8).key_transform
    first = side.groups[0]
    packed = side.packed(rows[:64])
    assert first.bits == 16
    x = (rows[:64] - side.mean) @ side.basis
    assert packed[:128] == x[:, 0].half().numpy().tobytes()


def test_deflate_compresses_only_codes() -> None:
    rows = structured()
    plain = fitted(rows, 3)
    coded = plain.deflated((rows, rows))
    assert (plain.name, coded.name) == ("kvtc-3bit", "kvtc-deflate-3bit") and coded.shares is not None
    side = plain.key_transform
    streams = [side.packed(part) for part in rows.split(64)]
    held = sum(len(zlib.compress(stream, 9, -15)) for stream in streams) / len(rows)
    scales = side.token_bytes - side.code_bytes
    assert coded.token_bytes(SHAPE) == pytest.approx(2 * (scales + held))
    assert coded.token_bytes(SHAPE) < plain.token_bytes(SHAPE)
    assert torch.equal(coded.keys(as_heads(rows)), plain.keys(as_heads(rows)))


def test_deflate_never_increases_the_size() -> None:
    noise = bytes(torch.randint(0, 256, (500,), dtype=torch.uint8).tolist())
    assert deflate_share([noise]) == 1 and deflate_share([b"a" * 500]) < 0.1 and deflate_share([]) == 1


def test_it_quantizes_a_model() -> None:
    model = tiny_llama()
    keys, values = token_moments(model, token_ids(6, 200), 4)
    sides = Components.of(keys), Components.of(values)
    text = token_ids(1, 200)
    expected = exact_logits(model, text)
    errors = []
    for bits in (3, 8, 16):
        baseline = JointBlocks(kvtc(*sides, bits), SCHEDULE)
        found, _ = read(model, baseline, text)
        errors.append(relative_error(found, expected))
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    assert errors[2] < 1e-5  # all components in float16
