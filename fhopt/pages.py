"""Retrieval attention: a decoding step reads the pages of sealed tokens that matter to it, and no others.

    sketch     of a token's key latent z: (z_c - mean_c) / deviation_c in 2 to 4 bits, for the channels c that tell most
    logit      q~ . mean + sum over c of q~_c deviation_c code_c            of a token, to within what the sketch lost
    weight     sum over a page's tokens of exp(logit)                       which pages are ranked by

A page is `PagePlan.tokens` sealed tokens in a row. The sketches of its tokens lie beside the latents (fhopt/layers.py)
and are all that a step reads of pages that it does not choose. Query heads that share latent heads (a unit) choose
together, by the mean over heads of the share of weight that each expects of a page. Sinks, window and new tokens are
read always, and so are all pages of short sequences.

Chosen by measurement. SmolLM2-135M, 4x plan, code at 4,096 to 8,192 tokens, one page of 32 tokens in eight; squared
error of what the six most sensitive layers read, relative, against bytes of the index per token and latent head:

    true weights, which nobody knows without reading all keys          0.007
    32 of 64 channels in 3 bits, 12 bytes; 24 in 3, 9; 32 in 2, 8      0.010; 0.014; 0.016
    16 channels in 4 bits, 8 bytes                                     0.033
    principal directions in place of channels, 32 in 3 bits            0.018

Four of these layers, minima and maxima per page and channel (Quest, Tang et al. 2024, arXiv 2406.10774, section 3.3) at
their best weighting: 0.061 for pages of 32 tokens, 3 bytes a token, where sketches have 0.010; 0.030 with boxes of 16
tokens, 6 bytes; 0.027 of 8, 12 bytes. Means and variances are worse. A page is read for one token in it, which what
pages have in common does not show.

The guarantee: a token's logit differs from its sketch's by at most |q~ w| |(z - sketch) / w| for any weights w (Cauchy
and Schwarz), and with a limit the second factor of every token is kept. The bound is honest and loose: a plan with a
limit may read nearly everything. `cache.report()` says how many lists were completed.

Letters: B batch, H query heads, J latent heads, U units (a common divisor of J on both sides), S queries, T sealed
tokens, P pages, N pages of a list, R latent width, r channels of a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fhopt import ops
from fhopt.spec import SketchPlan

LOST = {2: 0.35, 3: 0.19, 4: 0.1}  # deviation of what rounding takes from a unit normal channel, about, by bits

SketchRows = tuple[Tensor, Tensor | None]  # codes uint8 [B,J,T,bytes]; |(z - sketch) / w| float16 [B,J,T] or None


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

    def codes(self, latents: Tensor) -> Tensor:
        """Sketches of latents [B,J,T,R], uint8 [B,J,T,bytes]."""
        unit = (latents.to(torch.float32) - self.mean.unsqueeze(1)) / self.deviation.unsqueeze(1)
        return ops.integer_bytes(self.kept(unit), self.plan.tier.bits, self.plan.tier.step)

    def kept(self, x: Tensor) -> Tensor:
        """The channels that are kept: [..., J, n, R] -> [..., J, n, r]."""
        index = self.channels.unsqueeze(1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    def lost(self, latents: Tensor, codes: Tensor) -> Tensor:
        """|(z - sketch) / w| [B,J,T], float16 and never below."""
        unit = (latents.to(torch.float32) - self.mean.unsqueeze(1)) / self.deviation.unsqueeze(1)
        index = self.channels.unsqueeze(1).expand(*unit.shape[:-1], -1)
        error = unit.scatter_add(-1, index, -self._units(codes)) / self._weights().unsqueeze(1)
        return (error.norm(dim=-1) * (1 + 2.0**-9)).clamp(2.0**-14, 65504.0).to(torch.float16)

    def _weights(self) -> Tensor:
        """w, in deviations, [J, R]: what a channel is wrong by, about."""
        ones = torch.ones_like(self.mean)
        return ones.scatter(-1, self.channels, LOST[self.plan.tier.bits])

    def _units(self, codes: Tensor) -> Tensor:
        tier = self.plan.tier
        return ops.unscaled(codes, [tier.bits], [tier.width], [tier.step])

    def logits(self, query: Tensor, codes: Tensor) -> Tensor:
        """q~ . sketch: query [B,H,S,R] (absorbed), codes [B,J,T,bytes] -> [B,H,S,T], float32 or more exact."""
        weights, constant = self.factors(query)
        tiles = [weights @ self._units(tile).to(weights.dtype).mT for tile in codes.split(ops.PAGE_TILE, 2)]
        return (torch.cat(tiles, -1) + constant.unsqueeze(-1)).reshape(*query.shape[:3], -1)

    def factors(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """What channels of a sketch and 1 are multiplied by: [B,H,S,R] -> [B,J,H/J*S,r], [B,J,H/J*S]."""
        grouped = self._grouped(query)
        return self.kept(grouped * self.deviation.unsqueeze(1)), (grouped * self.mean.unsqueeze(1)).sum(-1)

    def uncertain(self, query: Tensor, lost: Tensor) -> Tensor:
        """How much larger than that a logit may be at most: lost [B,J,T] -> [B,H,S,T]."""
        b, h, s, _ = query.shape
        size = (self._grouped(query) * (self.deviation * self._weights()).unsqueeze(1)).norm(dim=-1, keepdim=True)
        return (size * lost.to(size.dtype).unsqueeze(2)).reshape(b, h, s, -1)

    def _grouped(self, query: Tensor) -> Tensor:
        """[B,H,S,R] -> [B,J,H/J*S,R], float32 or more exact."""
        b, h, s, width = query.shape
        j = self.mean.shape[0]
        return query.to(torch.promote_types(query.dtype, torch.float32)).reshape(b, j, h // j * s, width)


# --------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True, eq=False)
class PageIndex:
    """What a layer gives attention to choose pages by.

    rows: sketches of T tokens. tokens: of a page. share, mass, limit: as in `PagePlan`, of this site; least: pages that
    are read in any case. units: U. each_query: every query of a call reads what it would choose alone; False: calls of
    several queries read all pages. counters: int64 [2], lists made, and those that the limit made complete; added to.
    """

    sketcher: Sketcher
    rows: SketchRows
    tokens: int
    share: float
    mass: float
    least: int
    limit: float
    units: int
    each_query: bool
    counters: Tensor

    @property
    def count(self) -> int:
        """P."""
        return -(-self.rows[0].shape[2] // self.tokens)

    @property
    def most(self) -> int:
        """N: pages of a list."""
        return pages_read(self.count, self.share, self.least)


@overload
def pages_read(count: int, share: float, least: int) -> int: ...


@overload
def pages_read(count: Tensor, share: float, least: int) -> Tensor: ...


def pages_read(count: Tensor | int, share: float, least: int) -> Tensor | int:
    """How many of `count` pages are read at most."""
    if isinstance(count, Tensor):
        return torch.minimum(count, (count.double() * share).long().clamp(min=least))
    return min(count, max(least, int(count * share)))


def token_logits(
    query: Tensor, index: PageIndex, far: Tensor | None, lengths: Tensor | None, *, scale: float, softcap: float = 0.0,
    at_most: bool = False,
) -> Tensor:  # fmt: skip
    """Logits of sealed tokens as their sketches have them, [B,H,S,T]; at_most: as large as they may be instead.

    query [B,H,S,R] is absorbed. far: mask of the tokens, bool or additive, broadcastable to [B,H,S,T]; lengths: so many
    first ones count.
    """
    codes, lost = index.rows
    logits = index.sketcher.logits(query, codes) * scale
    if at_most:
        assert lost is not None, "there is a limit"
        logits = logits + index.sketcher.uncertain(query, lost) * abs(scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = ops.additive(ops.within(lengths, codes.shape[2], far), logits.dtype)
    return logits if bias is None else logits + bias


def page_estimates(
    query: Tensor, index: PageIndex, far: Tensor | None, lengths: Tensor | None, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """Log of the weight of each page, as its sketches have it: `ops.page_logits` of `token_logits`, [B,H,S,P]."""
    codes, tier = index.rows[0], index.sketcher.plan.tier
    single = lengths is None or lengths.numel() == 1
    if far is not None or softcap or not single or query.dtype == torch.float64:
        return ops.page_logits(token_logits(query, index, far, lengths, scale=scale, softcap=softcap), index.tokens)
    weights, constant = index.sketcher.factors(query)
    options = (tier.bits, tier.width, tier.step, index.tokens)
    found: Tensor = torch.ops.fhopt.page_weights(weights * scale, constant * scale, codes, *options, lengths)
    return found.reshape(*query.shape[:3], -1)


def expected_weights(logits: Tensor, units: int) -> Tensor:
    """The share that each unit expects of each page in the weight of all: [B,H,S,P] -> [B,U,S,P], sums of 1 or 0."""
    weights, _ = ops._softmax(logits)
    return weights.unflatten(1, (units, -1)).mean(2)


def keep_best(weights: Tensor, index: PageIndex, available: Tensor | int) -> Tensor:
    """The pages to read: weights [B,U,S,P] -> bool [B,U,S,P].

    available: how many pages there are to choose from, a number or integers broadcastable to [B,U,S,1]. Pages without
    any weight, such as those that may not be read, are never among them.
    """
    best, order = weights.topk(index.most, -1)
    place = torch.arange(index.most, device=weights.device)
    kept = (place < pages_read(available, index.share, index.least)) & (best > 0)
    if index.mass < 1:
        kept &= best.cumsum(-1) - best < index.mass  # what comes before does not suffice
    return torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter(-1, order, kept)


def page_lists(chosen: Tensor, length: int) -> Tensor:
    """Lists of chosen pages, ascending, -1 behind them. bool [B,U,P] -> int32 [B,U,N], N = `length`."""
    count = chosen.shape[-1]
    numbers = torch.where(chosen, torch.arange(count, device=chosen.device), count)
    lists = numbers.topk(length, -1, largest=False, sorted=True).values if length < count else numbers.sort(-1).values
    return torch.where(lists < count, lists, -1).to(torch.int32)


def page_mask(chosen: Tensor, page_tokens: int, heads: int, tokens: int) -> Tensor:
    """The same as a mask of tokens: bool [B,U,S,P] -> bool [B,H,S,T], T = `tokens`."""
    seen = chosen.repeat_interleave(page_tokens, -1)[..., :tokens]
    return seen.repeat_interleave(heads // chosen.shape[1], 1)


# --------------------------------------------------------------------------------------------------- the guarantee


def left_out(bounds: Tensor, chosen: Tensor, lse: Tensor) -> Tensor:
    """Upper bound on the share of pages that are not chosen in a query's weight, [B,H,S].

    bounds [B,H,S,P]: on the log of the weight of pages; chosen bool [B,U,S,P]; lse [B,H,S]: of all that was read.
    """
    heads = chosen.repeat_interleave(bounds.shape[1] // chosen.shape[1], 1)
    others = bounds.masked_fill(heads, -math.inf).logsumexp(-1)
    return torch.sigmoid(others - lse).masked_fill(others == -math.inf, 0.0)


def to_complete(share: Tensor, index: PageIndex) -> Tensor:
    """Units that read the other pages too: share [B,H,S] as from `left_out` -> bool [B,U,S]. Counts them."""
    failed = (share > index.limit).unflatten(1, (index.units, -1)).any(2)
    index.counters.add_(torch.stack([failed.new_ones(failed.shape, dtype=torch.int64).sum(), failed.sum()]))
    return failed
