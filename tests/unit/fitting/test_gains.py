"""Gains of decoders: what is least over a sequence, within what theory allows."""

from __future__ import annotations

import pytest
import torch
from small_models import Fitted

from fhopt.calibration import collect
from fhopt.fitting import fit_plan
from fhopt.fitting.allocation import STEPS, Allocation
from fhopt.fitting.bases import Basis
from fhopt.fitting.costs import Costs, empty_costs
from fhopt.fitting.gains import unbiased_gain, value_gains


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_with_the_unbiased_gain_errors_hold_nothing_of_what_was_encoded(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(200_000, dtype=torch.float64)
    half = 2 ** (bits - 1)
    kept = ((x / STEPS[bits]).floor().clamp(-half, half - 1) + 0.5) * STEPS[bits]
    error = unbiased_gain(bits) * kept - x
    assert abs(float((error * x).mean())) < 0.01
    assert unbiased_gain(bits) > 1


def of_values(x: torch.Tensor, gradient: torch.Tensor, bits: int) -> dict[int, float]:
    """Gains of a plan whose values, of 8 channels, have `bits` bits. x, gradient [B, 1, T, 8]."""
    eye = torch.eye(8, dtype=torch.float64)[None]
    basis = Basis(eye, eye, torch.ones(1, 8, dtype=torch.float64))
    bases = {"a": {"band": (basis, basis)}}
    costs: Costs = empty_costs(bases, (0, *STEPS))
    collect._add_costs(costs["a", "band", 1], basis, x, gradient, {0: 0.0, **STEPS})
    return value_gains(bases, costs, {"a": "band"}, Allocation({("a", 0): [bits], ("a", 1): [bits]}, 0.0, 0.0))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_tokens_that_are_read_together_and_alike_get_the_unbiased_gain(bits: int) -> None:
    """What is read of a token is what it holds: sums over tokens are then of x times what is kept of it."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 4000, 8)
    assert of_values(x, x, bits)[bits] == pytest.approx(unbiased_gain(bits), rel=0.02)


@pytest.mark.parametrize("bits", [1, 2])
def test_tokens_that_are_read_whatever_they_hold_get_none(bits: int) -> None:
    """Independent errors: the least error of a token, which a gain would increase."""
    torch.manual_seed(0)
    x = torch.randn(400, 1, 100, 8)
    assert of_values(x, torch.randn(400, 1, 100, 8), bits)[bits] == pytest.approx(1.0, abs=0.05)


def test_numbers_of_bits_that_no_channel_got_have_no_gain() -> None:
    x = torch.randn(2, 1, 100, 8)
    assert set(of_values(x, x, 2)) == {2} and of_values(x, x, 8) == {}


def test_decoders_of_values_are_scaled_and_those_of_keys_are_not(
    llama: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    gained = llama.plan(8)
    monkeypatch.setattr(fit_plan, "value_gains", lambda *_: {})
    plain = llama.plan(8)
    for a, b in zip(gained.sites, plain.sites, strict=True):
        assert torch.equal(a.key.decode, b.key.decode) and torch.equal(a.value.encode, b.value.encode)
        start = 0
        for tier in a.value.tiers:
            part = slice(start, start := start + tier.width)
            ratio = a.value.decode[..., part] / b.value.decode[..., part]
            lowest, highest = float(ratio.nan_to_num(1).min()), float(ratio.nan_to_num(1).max())
            assert highest - lowest < 1e-4 and lowest >= 1 - 1e-4
            assert highest <= (unbiased_gain(tier.bits) if tier.bits <= 3 else 1) + 1e-4
