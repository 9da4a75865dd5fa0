"""Bases: what each layout preserves, mixes and separates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import FAR, FittedModel, found, numbered, tiny_gpt2, tiny_llama
from torch import Tensor

from fhopt.calibration import collect, probe
from fhopt.fitting.bases import Basis, _Average, fit_basis, fit_joint, joint_basis
from fhopt.fitting.statistics import SiteStatistics
from fhopt.ops import algebra
from fhopt.plan.site import Rope

HALF = Rope("half", 8, (1.0, 0.4, 0.1, 0.02))
INTERLEAVED = replace(HALF, pairing="interleaved")
PARTIAL = Rope("half", 4, (0.7, 0.05), offset=2)
MIXING = ("band", "freq", "head", "identity")
FOREVER = 10**15  # tokens, over which even the slowest frequency covers every angle


def first(fitted: FittedModel) -> SiteStatistics:
    return next(iter(fitted.statistics.values()))


def rotation(rope: Rope, heads: int, dim: int, position: float) -> Tensor:
    """Return R(t) as a block-diagonal matrix over all heads, channel pair by channel pair."""
    turn = torch.eye(dim, dtype=torch.float64)
    for (real, imaginary), angle in zip(rope.pairs, rope.angles, strict=True):
        cos, sin = math.cos(angle * position), math.sin(angle * position)
        turn[real, real], turn[imaginary, imaginary] = cos, cos
        turn[real, imaginary], turn[imaginary, real] = -sin, sin
    return torch.block_diag(*[turn] * heads)


def random_moment(width: int) -> Tensor:
    rows = torch.randn(3 * width, width, dtype=torch.float64)
    return (rows.mT @ rows).unsqueeze(0)


# ---- full width


@pytest.mark.parametrize("layout", MIXING)
@pytest.mark.parametrize("side", ["key", "value"])
def test_full_width_restores_keys_and_values(fitted: FittedModel, layout: str, side: str) -> None:
    for statistics in fitted.statistics.values():
        basis = fit_basis(statistics, side, layout, 2048, 96)
        moment = getattr(statistics, side).moment
        heads = moment.shape[0] * moment.shape[1] // 16 // basis.groups
        x = torch.randn(basis.groups, 5, heads * 16, dtype=torch.float64)
        back = (x @ basis.encode.mT) @ basis.decode.mT
        torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)  # float64, times the spread of the metric


@pytest.mark.parametrize("layout", MIXING)
def test_every_layout_has_as_many_latent_heads_as_it_says(fitted: FittedModel, layout: str) -> None:
    statistics = first(fitted)
    alone = layout in ("head", "identity")
    assert fit_basis(statistics, "key", layout, 2048, 96).groups == (statistics.site.kv_heads if alone else 1)


def test_channels_are_ordered_by_falling_cost_with_unit_variance(llama: FittedModel) -> None:
    statistics = first(llama)
    for layout in ("head", "identity"):  # not averaged over rotations: variances of the calibration tokens
        basis = fit_basis(statistics, "value", layout, 2048, 96)
        assert bool((basis.variance.diff(dim=1) <= 0).all())
        moment = torch.stack([statistics.value.moment[0][i : i + 16, i : i + 16] for i in (0, 16)])
        power = basis.encode @ (moment / int(statistics.value.count)) @ basis.encode.mT
        unit = torch.ones_like(basis.variance)
        torch.testing.assert_close(power.diagonal(dim1=1, dim2=2), unit, rtol=1e-6, atol=0)  # float64 eigenvectors


# ---- rotation


@pytest.mark.parametrize("span", [0.0, 7.0, 300.0])
@pytest.mark.parametrize("rope", [HALF, INTERLEAVED, PARTIAL], ids=["half", "interleaved", "partial"])
def test_the_closed_form_average_equals_the_one_over_many_positions(rope: Rope, span: float) -> None:
    moment, points = random_moment(16), 4000
    positions = [(i + 0.5) / points * span for i in range(points)] if span else [0.0]
    total = torch.zeros_like(moment)
    for position in positions:
        turn = rotation(rope, 2, 8, position)
        total += turn @ moment @ turn.mT
    expected = total / len(positions)
    scale = float(moment.abs().max())
    # the midpoint rule has an error of (2 * fastest angle * step)^2 / 24, here below 1e-3
    torch.testing.assert_close(_Average(rope, 2, 8, span)(moment), expected, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("rope", [HALF, INTERLEAVED, PARTIAL], ids=["half", "interleaved", "partial"])
def test_an_average_over_all_positions_commutes_with_the_rotation(rope: Rope) -> None:
    average = _Average(rope, 2, 8, float("inf"))(random_moment(16))
    turn = rotation(rope, 2, 8, 3.7)
    torch.testing.assert_close(turn @ average, average @ turn, rtol=1e-9, atol=1e-9)  # exact: float64
    torch.testing.assert_close(_Average(rope, 2, 8, 1e9)(average), average, rtol=1e-6, atol=1e-6)  # 1 / (angle * span)


def test_a_frequency_basis_commutes_with_the_rotation(llama: FittedModel) -> None:
    """Encoding a rotated key equals rotating the encoded key, by the same angle per frequency (RoPE commutes)."""
    statistics = first(llama)
    rope = statistics.site.rope
    assert rope is not None
    basis = fit_basis(statistics, "key", "freq", 2048, 96)
    key = torch.randn(32, dtype=torch.float64)

    def energy(position: float) -> Tensor:
        """|z|^2 of neighboring channels: rotation preserves the modulus of a complex number."""
        z = basis.encode[0] @ (rotation(rope, 2, 16, position) @ key)
        return z.square().unflatten(0, (-1, 2)).sum(-1)

    for position in (3.0, 500.0):
        torch.testing.assert_close(energy(position), energy(0.0), rtol=1e-9, atol=1e-9)  # float64 eigenvectors


@pytest.mark.parametrize("layout", ["band", "freq"])
def test_frequencies_with_different_angles_are_not_mixed(llama: FittedModel, layout: str) -> None:
    """For an endless context, `band` has the structure of `freq`: every channel mixes one frequency of all heads."""
    statistics = first(llama)
    basis = fit_basis(statistics, "key", layout, FOREVER, 96)
    energy = basis.encode[0].square().unflatten(1, (2, 2, 8)).sum((1, 2))  # [R, F]: heads, halves
    share = energy.max(1).values / energy.sum(1)
    assert float(share.min()) > 1 - 1e-6  # 1 / (difference of angles * context), squared, is far below


def test_a_band_of_the_calibrated_length_uses_keys_unaveraged(llama: FittedModel) -> None:
    statistics = first(llama)
    plain = replace(statistics, site=replace(statistics.site, rope=None))
    bands = [fit_basis(s, "key", "band", 96, 96) for s in (statistics, plain)]
    torch.testing.assert_close(bands[0].encode, bands[1].encode, rtol=1e-6, atol=1e-6)  # a span of zero tokens


def test_rotation_does_not_affect_values(llama: FittedModel) -> None:
    bases = [fit_basis(first(llama), "value", layout, 2048, 96) for layout in ("band", "freq")]
    assert torch.equal(bases[0].encode, bases[1].encode)


# ---- identity


def test_identity_only_scales_and_orders(fitted: FittedModel) -> None:
    for side in ("key", "value"):
        basis = fit_basis(first(fitted), side, "identity", 2048, 96)
        for matrix in (basis.encode, basis.decode):
            assert bool(((matrix != 0).sum(1) == 1).all() and ((matrix != 0).sum(2) == 1).all())
            assert bool((matrix >= 0).all())


# ---- input


def test_the_joint_basis_represents_keys_and_values_of_gpt2_exactly() -> None:
    captured, outcome = found(tiny_gpt2(), 96)
    rows: dict[str, list[Tensor]] = {}

    class Seen(probe.Watch):
        """Records keys and values, concatenated."""

        def attend(self, site: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
            rows[site.name] = [torch.cat([k, v], -1)[0].permute(1, 0, 2).flatten(1)]  # [T, G*(D+E)]
            return super().attend(site, q, k, v, *rest, **options)

    statistics = collect.collect(captured, outcome, numbered(4), **FAR)
    watch = Seen((4, 8), lambda name, k, v: lambda a, b: None)
    probe._Instrumented(captured, outcome, watch).run(*captured.program.values.values())
    for name, s in statistics.items():
        basis = joint_basis(s)
        assert basis is not None and basis.shape[0] <= basis.shape[1] // 2  # the input has 64 of 128 dimensions
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64))
        x = rows[name][0].detach()
        back = x @ basis.float().mT @ basis.float()
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)  # float32 matmuls over 64 terms
        coded = fit_joint(s)
        assert coded is not None and coded.encode.shape == (1, len(basis), basis.shape[1])
        back = x @ coded.encode[0].float().mT @ coded.decode[0].float().mT
        torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)  # the same, times the spread of the metric


def test_there_is_no_joint_basis_of_keys_that_rotate(llama: FittedModel) -> None:
    assert joint_basis(first(llama)) is None and fit_joint(first(llama)) is None


def test_there_is_no_joint_basis_where_the_input_is_as_wide_as_keys_and_values() -> None:
    """Grouped heads of a model without rotation: the input has 64 dimensions, keys and values have 64."""
    model = tiny_llama(num_hidden_layers=1)
    model.model.rotary_emb.inv_freq.zero_()
    captured, outcome = found(model, 96)
    (statistics,) = collect.collect(captured, outcome, numbered(2), **FAR).values()
    assert statistics.site.kv_heads == 2 and statistics.cross is not None
    assert joint_basis(statistics) is None


def test_there_is_no_joint_basis_without_more_tokens_than_rank() -> None:
    captured, outcome = found(tiny_gpt2(), 32)
    for statistics in collect.collect(captured, outcome, numbered(1, 32), **FAR).values():
        assert joint_basis(statistics) is None


# ---- the same on every machine


@pytest.mark.parametrize("layout", MIXING)
def test_the_same_statistics_give_the_same_basis_byte_for_byte(fitted: FittedModel, layout: str) -> None:
    one, two = (fit_basis(first(fitted), "key", layout, 2048, 96) for _ in range(2))
    for a, b in zip(_numbers(one), _numbers(two), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_signs_do_not_depend_on_those_of_the_eigenvectors(llama: FittedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = fit_basis(first(llama), "value", "band", 2048, 96)
    eigh = torch.linalg.eigh

    def mirrored(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", mirrored)
    assert torch.equal(fit_basis(first(llama), "value", "band", 2048, 96).encode, straight.encode)


def test_the_joint_basis_is_the_same_whatever_signs_eigenvectors_have(
    gpt2: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = first(gpt2)
    straight, eigh = joint_basis(statistics), torch.linalg.eigh

    def mirrored(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(torch.linalg, "eigh", mirrored)
    again = joint_basis(statistics)
    assert straight is not None and again is not None and torch.equal(straight, again)


def _numbers(basis: Basis) -> tuple[Tensor, ...]:
    return basis.encode, basis.decode, basis.variance


def test_statistics_without_a_gradient_still_give_an_exact_basis(llama: FittedModel) -> None:
    """A site that does not affect the output has a zero metric: none of its channels has a cost."""
    statistics = first(llama)
    mute = replace(statistics, value=replace(statistics.value, metric=torch.zeros_like(statistics.value.metric)))
    for layout in MIXING:
        basis = fit_basis(mute, "value", layout, 2048, 96)
        product = basis.decode @ basis.encode
        eye = torch.eye(product.shape[-1], dtype=torch.float64).expand_as(product)
        torch.testing.assert_close(product, eye, rtol=0, atol=1e-6)  # float64, far below normal sizes


def test_full_width_plans_restore_keys_and_values_in_float32(fitted: FittedModel) -> None:
    for layout in MIXING:
        for site in fitted.plan(1, layout).sites:
            x = torch.randn(2, site.site.kv_heads, 5, site.site.key_dim)
            for side in (site.key, site.value):
                back = algebra.decode(algebra.encode(x, side.encode), side.decode)
                torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)  # float32 bases with a spread of about 100
