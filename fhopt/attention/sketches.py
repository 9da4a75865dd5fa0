"""Sketches of quantized tokens (a few channels in 2 or 4 bits, for page selection) and the page index of a layer.

    sketch   of a token's key latent z: (z_c - mean_c) / deviation_c = scale u_c, u_c in 2 or 4 bits, for the channels c
             with the largest effect on logits; one scale per token, large enough to avoid clipping
    logit    q~ . mean + scale sum over c of q~_c deviation_c u_c          estimate for a token
    weight   sum over a page's tokens of exp(logit)                        criterion of page selection

A token's logit differs from its estimate by at most |q~ w| |(z - sketch) / w| for any weights w (Cauchy-Schwarz). If a
plan has a limit, the second factor is stored with each sketch.

Letters: B batch, H query heads, J latent heads, S queries, T quantized tokens, P pages, N pages of a list, R latent
width, r channels of a sketch, n any number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.ops import packing, page_selection
from fhopt.ops.algebra import BitGroups
from fhopt.plan.site_plan import BitGroup, SketchPlan

LOST = {2: 0.35, 4: 0.11}  # approximate standard deviation of the rounding error of a unit normal channel, by bits
SketchRows = tuple[Tensor, Tensor, Tensor | None]
"""Quantized values uint8 [B,J,T,bytes], scales float16 [B,J,T], and |(z - sketch) / w| float16 [B,J,T] with a limit."""


# --------------------------------------------------------------------------------------------------- sketches


@dataclass(frozen=True, eq=False)
class Sketcher:
    """A `SketchPlan`'s tensors on the model's device: channels [J,r], mean and deviation [J,R]."""

    plan: SketchPlan
    channels: Tensor
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def on(plan: SketchPlan, device: torch.device) -> Sketcher:
        """Copy a plan's tensors to `device`."""
        return Sketcher(plan, *[x.to(device) for x in (plan.channels, plan.mean, plan.deviation)])

    def __deepcopy__(self, memo: object) -> Sketcher:
        return self

    @property
    def bit_groups(self) -> BitGroups:
        """Bit groups of a sketch."""
        return BitGroups.of(self.plan.tiers)

    def encode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Encode latents [B,J,T,R] to sketches: quantized values uint8 [B,J,T,bytes], scales float16 [B,J,T]."""
        unit = self.kept(self._normalized(latents))
        parts = unit.split([tier.width for tier in self.plan.tiers], -1)
        farthest = [x.abs().amax(-1) / (tier.step * 2 ** (tier.bits - 1)) for x, tier in self._each(parts)]
        scale = (torch.stack(farthest).amax(0) * (1 + 2.0**-11)).clamp(2.0**-14, 65504.0).to(torch.float16)
        rows = [
            packing.integer_bytes(x / scale.to(torch.float32).unsqueeze(-1), tier.bits, tier.step)
            for x, tier in self._each(parts)
        ]
        return torch.cat(rows, -1), scale

    def _normalized(self, latents: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: [B,J,T,R] float32."""
        return (latents.to(torch.float32) - self.mean.unsqueeze(1)) / self.deviation.unsqueeze(1)

    def _each(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, BitGroup]]:
        return zip(parts, self.plan.tiers, strict=True)

    def kept(self, x: Tensor) -> Tensor:
        """Gather the channels of a sketch: [..., J, n, R] -> [..., J, n, r]."""
        index = self.channels.unsqueeze(1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    def lost(self, latents: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Compute |(z - sketch) / w| [B,J,T] of latents [B,J,T,R] and their sketches: float16, never rounded down."""
        unit = self._normalized(latents)
        index = self.channels.unsqueeze(1).expand(*unit.shape[:-1], -1)
        units = packing.unscaled(codes, *self.bit_groups) * scale.to(torch.float32).unsqueeze(-1)
        error = unit.scatter_add(-1, index, -units) / self._weights().unsqueeze(1)
        return (error.norm(dim=-1) * (1 + 2.0**-9)).clamp(2.0**-14, 65504.0).to(torch.float16)

    def _weights(self) -> Tensor:
        """Return w [J, R], the expected error of each channel in deviations."""
        lost = [LOST[tier.bits] for tier in self.plan.tiers for _ in range(tier.width)]
        ones = torch.ones_like(self.mean)
        return ones.scatter(-1, self.channels, ones.new_tensor(lost).expand(ones.shape[0], -1))

    def logits(self, query: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Estimate q~ . z from sketches: query [B,H,S,R] (absorbed), sketches of T tokens -> [B,H,S,T].

        The result is float32 or float64.
        """
        weights, constant = self.factors(query)
        logits = page_selection.sketch_logits(weights, constant, codes, scale, *self.bit_groups)
        return logits.reshape(*query.shape[:3], -1)

    def factors(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `page_selection.factors` of absorbed queries [B,H,S,R] -> [B,J,H/J*S,r], [B,J,H/J*S]."""
        return page_selection.factors(query, self.mean, self.deviation, self.channels)

    def uncertainty(self, query: Tensor, lost: Tensor) -> Tensor:
        """Bound how far true logits may exceed those of `logits`: query [B,H,S,R], lost [B,J,T] -> [B,H,S,T]."""
        b, h, s, _ = query.shape
        rows, sizes = page_selection.grouped(query, self.mean.shape[0]), self.deviation * self._weights()
        size = (rows * sizes.unsqueeze(1)).norm(dim=-1, keepdim=True)
        return (size * lost.to(size.dtype).unsqueeze(2)).reshape(b, h, s, -1)


# --------------------------------------------------------------------------------------------------- the index


@dataclass(frozen=True, eq=False)
class PageIndex:
    """Page index of a layer: sketches and parameters of page selection.

    rows: sketches of T tokens. tokens: per page. share, mass, lift, limit: as in `PagePlan`, for this site. least:
    minimum capacity of a page list. units: U. each_query: every query of a call selects as it would alone; False:
    multi-query calls use all pages. counters: int64 [4], accumulated: lists made, lists that the limit completed, pages
    in lists, pages available. fill: log of the site's `PagePlan.fill`, float32 [H]; None: no fill. mean: of values,
    from `paged.mean_values`, for calls in which all queries see all rows; None: not computed yet.
    """

    sketcher: Sketcher
    rows: SketchRows
    tokens: int
    share: float
    mass: float
    lift: float
    least: int
    limit: float
    units: int
    each_query: bool
    counters: Tensor
    fill: Tensor | None = None
    mean: Tensor | None = None

    @property
    def count(self) -> int:
        """P, pages of the index."""
        return -(-self.rows[0].shape[2] // self.tokens)

    @property
    def most(self) -> int:
        """N, capacity of a page list."""
        return page_selection.pages_read(self.count, self.share, self.least)

    @property
    def rule(self) -> page_selection.SelectionRule:
        """The rule that decides which pages are selected."""
        return page_selection.SelectionRule(self.units, self.most, self.share, self.least, self.mass, self.lift)
