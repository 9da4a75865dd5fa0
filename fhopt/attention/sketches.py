"""Sketches of quantized tokens: a few channels at low precision, by which pages are selected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.ops import packing, page_choice
from fhopt.ops.page_choice import pages_read, sketch_logits
from fhopt.plan.site_plan import SketchPlan, Tier

LOST = {2: 0.35, 4: 0.11}  # deviation of what rounding takes from a unit normal channel, about, by bits
SketchRows = tuple[Tensor, Tensor, Tensor | None]


# --------------------------------------------------------------------------------------------------- sketches


@dataclass(frozen=True, eq=False)
class Sketcher:
    """The tensors of a `SketchPlan` where a model needs them."""

    plan: SketchPlan
    channels: Tensor
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def on(plan: SketchPlan, device: torch.device) -> Sketcher:
        """On that device."""
        return Sketcher(plan, *[x.to(device) for x in (plan.channels, plan.mean, plan.deviation)])

    def __deepcopy__(self, memo: object) -> Sketcher:
        return self

    @property
    def tiers(self) -> tuple[list[int], list[int], list[float]]:
        """Bits, widths and steps."""
        tiers = self.plan.tiers
        return [t.bits for t in tiers], [t.width for t in tiers], [t.step for t in tiers]

    def codes(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Sketches of latents [B,J,T,R]: codes uint8 [B,J,T,bytes], scales float16 [B,J,T]."""
        unit = self.kept((latents.to(torch.float32) - self.mean.unsqueeze(1)) / self.deviation.unsqueeze(1))
        parts = unit.split([tier.width for tier in self.plan.tiers], -1)
        farthest = [x.abs().amax(-1) / (tier.step * 2 ** (tier.bits - 1)) for x, tier in self._each(parts)]
        scale = (torch.stack(farthest).amax(0) * (1 + 2.0**-11)).clamp(2.0**-14, 65504.0).to(torch.float16)
        rows = [
            packing.integer_bytes(x / scale.to(torch.float32).unsqueeze(-1), tier.bits, tier.step)
            for x, tier in self._each(parts)
        ]
        return torch.cat(rows, -1), scale

    def _each(self, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tier]]:
        return zip(parts, self.plan.tiers, strict=True)

    def kept(self, x: Tensor) -> Tensor:
        """The channels that are kept: [..., J, n, R] -> [..., J, n, r]."""
        index = self.channels.unsqueeze(1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    def lost(self, latents: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """|(z - sketch) / w| [B,J,T], float16 and never below."""
        unit = (latents.to(torch.float32) - self.mean.unsqueeze(1)) / self.deviation.unsqueeze(1)
        index = self.channels.unsqueeze(1).expand(*unit.shape[:-1], -1)
        units = packing.unscaled(codes, *self.tiers) * scale.to(torch.float32).unsqueeze(-1)
        error = unit.scatter_add(-1, index, -units) / self._weights().unsqueeze(1)
        return (error.norm(dim=-1) * (1 + 2.0**-9)).clamp(2.0**-14, 65504.0).to(torch.float16)

    def _weights(self) -> Tensor:
        """w, in deviations, [J, R]: what a channel is wrong by, about."""
        lost = [LOST[tier.bits] for tier in self.plan.tiers for _ in range(tier.width)]
        ones = torch.ones_like(self.mean)
        return ones.scatter(-1, self.channels, ones.new_tensor(lost).expand(ones.shape[0], -1))

    def logits(self, query: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """q~ . sketch: query [B,H,S,R] (absorbed), codes and scales of T tokens -> [B,H,S,T], float32 or more exact."""
        weights, constant = self.factors(query)
        found = sketch_logits(weights, constant, codes, scale, *self.tiers)
        return found.reshape(*query.shape[:3], -1)

    def factors(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """What channels of a sketch and 1 are multiplied by: [B,H,S,R] -> [B,J,H/J*S,r], [B,J,H/J*S]."""
        return page_choice.factors(query, self.mean, self.deviation, self.channels)

    def uncertain(self, query: Tensor, lost: Tensor) -> Tensor:
        """How much larger than that a logit may be at most: lost [B,J,T] -> [B,H,S,T]."""
        b, h, s, _ = query.shape
        rows, sizes = page_choice.grouped(query, self.mean.shape[0]), self.deviation * self._weights()
        size = (rows * sizes.unsqueeze(1)).norm(dim=-1, keepdim=True)
        return (size * lost.to(size.dtype).unsqueeze(2)).reshape(b, h, s, -1)


# --------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True, eq=False)
class PageIndex:
    """What a layer gives attention to choose pages by.

    rows: sketches of T tokens. fill: log of `PagePlan.fill` of this site, float32 [H]; None: nothing takes the place of
    pages that are not read. tokens: of a page. share, mass, lift, limit: as in `PagePlan`, of this site; least: pages
    that a list has room for in any case. units: U. each_query: every query of a call reads what it would choose alone;
    False: calls of several queries read all pages. counters: int64 [4], added to: lists made, those that the limit made
    complete, pages in lists, and pages that there were to choose from. mean: of values, as of `latents.mean_values`,
    for calls in which all queries see all rows; None: it is not known yet.
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
        """P."""
        return -(-self.rows[0].shape[2] // self.tokens)

    @property
    def most(self) -> int:
        """N: pages that a list has room for."""
        return pages_read(self.count, self.share, self.least)
