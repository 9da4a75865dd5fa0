"""Fitting of the sketches for page selection."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.attention import sketches
from fhopt.attention.cache_view import CacheView
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.fitting.allocation import STEPS
from fhopt.models.model_facts import cache_argument
from fhopt.ops import algebra
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SKETCH_BITS, TIER_QUANTUM, BitGroup, SketchPlan
from fhopt.refine.page_options import PIECE

# --------------------------------------------------------------------------------------------------- sketches


class _Moments:
    """Sums over one site's squared absorbed queries, and over its key latents, by channel: [J, R] each."""

    def __init__(self) -> None:
        self.energy: Tensor | None = None
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, latents: CacheView, scale: float, softcap: float
    ) -> None:
        """Add the absorbed queries of a call."""
        absorbed = algebra.absorb(query, latents.key.decode).double()
        energy = absorbed.unflatten(1, (latents.key.rows.shape[1], -1)).square().sum((0, 2, 3))
        self.energy = energy if self.energy is None else self.energy + energy

    def see(self, latents: Tensor) -> None:
        """Add latents [1,J,T,R]."""
        x = latents.double()
        self.count += x.shape[2]
        self.sums, self.squares = self.sums + x.sum((0, 2)), self.squares + x.square().sum((0, 2))

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the added latents."""
        mean = self.sums / self.count
        variance = (self.squares - self.count * mean.square()) / max(1, self.count - 1)
        return mean, variance.clamp(min=1e-12).sqrt()


@torch.inference_mode()
def with_sketches(model: Any, plan: LatentPlan, ids: Tensor, size: int) -> LatentPlan:
    """Fit sketches of at most `size` bytes of quantized values per token to ids [N, T]; return the plan with them.

    Decoder sites that page selection can observe get one. Raises FhoptError if the plan is not for this model, or its
    attention cannot select pages.
    """
    plan, seen = replace(plan, pages=None), dict[str, _Moments]()
    with switched(model, plan):
        for row in ids:
            cache = new_cache(model, plan)
            layers = [layer for layer in cache.layers if isinstance(layer, LatentLayer)]
            for layer in layers:
                layer.observer = seen.setdefault(layer.site.site.name, _Moments())
            for piece in row.split(PIECE):
                model(piece[None].to(model.device), **{cache_argument(model): cache}, use_cache=True)
            for layer in layers:
                seen[layer.site.site.name].see(layer.packed_keys.unpack(0, layer.quantized))
    if all(moments.energy is None for moments in seen.values()):
        raise FhoptError(
            f"no attention of {type(model).__name__} supports page selection: the model computes attention in "
            "its own code; expected calls of transformers' attention interface. Use the plan without pages."
        )
    made = {name: _sketch(moments, size) for name, moments in seen.items()}
    return replace(plan, sites=tuple(replace(s, sketch=made.get(s.site.name)) for s in plan.sites))


def _sketch(moments: _Moments, size: int) -> SketchPlan | None:
    """Build the sketch from the channels whose errors change logits most; None if there are too few."""
    if moments.energy is None:
        return None
    mean, deviation = moments.mean_and_deviation()
    wrong, order = (moments.energy * deviation.square()).sort(-1, descending=True)
    tiers = sketch_tiers(wrong.sum(0), size)
    if not tiers:
        return None
    kept = order[:, : sum(tier.width for tier in tiers)]
    return SketchPlan(kept.contiguous().cpu(), mean.float().cpu(), deviation.float().cpu(), tiers)


def sketch_tiers(wrong: Tensor, size: int) -> tuple[BitGroup, ...]:
    """Allocate bits to the channels of a sketch: the bit groups with the least error in `size` bytes.

    wrong [R]: squared logit error per channel, descending. Every bit group is a multiple of four-byte words, the unit
    of loads. Empty if no group fits.
    """
    steps = [TIER_QUANTUM if bits > 2 else 2 * TIER_QUANTUM for bits in SKETCH_BITS]
    ranges = [range(0, min(len(wrong), 8 * size // b) + 1, n) for b, n in zip(SKETCH_BITS, steps, strict=True)]
    best: tuple[float, tuple[BitGroup, ...]] = (math.inf, ())
    for widths in itertools.product(*ranges):
        groups = list(zip(SKETCH_BITS, widths, strict=True))[::-1]
        if sum(widths) > len(wrong) or sum(b * w for b, w in groups) > 8 * size or not any(widths):
            continue
        left = torch.tensor([sketches.LOST[b] ** 2 for b, w in groups for _ in range(w)], dtype=wrong.dtype)
        error = float((wrong[: len(left)].cpu() * left).sum() + wrong[len(left) :].sum())
        if error < best[0]:
            best = error, tuple(BitGroup(b, w, STEPS[b]) for b, w in groups if w)
    return best[1]
