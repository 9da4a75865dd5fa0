"""Channels and bits of sketches."""

from __future__ import annotations

import pytest
import torch
from page_options import _plan

from fhopt.attention.sketches import LOST
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.refine import page_sketches

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_sketch_has_the_channels_in_which_errors_matter_most() -> None:
    plan = _plan()
    layer = LatentLayer(plan, plan.sites[0])
    size = torch.arange(1.0, 17).roll(5)
    layer.update(torch.randn(1, 2, 200, 16) * size + 3, torch.randn(1, 2, 200, 16))
    energy = torch.ones(2, 16, dtype=torch.float64)
    energy[1, :8] = 1e6
    moments, latents = page_sketches._Moments(), layer.packed_keys.unpack(0, layer.quantized)
    assert page_sketches._sketch(moments, 4) is None
    moments.energy = energy
    for part in latents.split(50, 2):
        moments.see(part)
    mean, deviation = moments.mean_and_deviation()
    torch.testing.assert_close(mean.float(), latents.mean((0, 2)))
    torch.testing.assert_close(deviation.float(), latents.std((0, 2)))
    made = page_sketches._sketch(moments, 4)
    assert made is not None and [(t.bits, t.width) for t in made.tiers] == [(4, 8)]
    assert made.channels[0].tolist() == deviation[0].argsort(descending=True)[:8].tolist()
    assert sorted(made.channels[1].tolist()) == list(range(8))
    torch.testing.assert_close(made.deviation, size.expand(2, 16), rtol=0.3, atol=0)  # 180 tokens


@pytest.mark.parametrize("size", [4, 8, 12, 16])
@pytest.mark.parametrize("falls", [0.0, 0.5, 1.0, 3.0])
def test_bits_of_sketches_minimize_the_loss(falls: float, size: int) -> None:
    """Compare with all allocations of bits in steps of 8 channels (16 with 2 bits), by a plain loop."""
    wrong = torch.logspace(0, -falls, 40, dtype=torch.float64)
    best = None
    for four in range(0, 41, 8):
        for two in range(0, 41 - four, 16):
            if 0 < 4 * four + 2 * two <= 8 * size:
                lost = [LOST[4] ** 2] * four + [LOST[2] ** 2] * two
                lost += [1.0] * (40 - len(lost))
                error = sum(x * float(w) for x, w in zip(lost, wrong, strict=True))
                best = min(best or (error, four, two), (error, four, two))
    widths = {t.bits: t.width for t in page_sketches.sketch_tiers(wrong, size)}
    assert best is not None and (widths.get(4, 0), widths.get(2, 0)) == best[1:]


def test_too_few_channels_have_no_sketch() -> None:
    assert page_sketches.sketch_tiers(torch.ones(7), 12) == ()
    assert [(t.bits, t.width) for t in page_sketches.sketch_tiers(torch.ones(15), 12)] == [(4, 8)]
