"""Retrieval attention: a decoding step reads the pages of sealed tokens that matter to it, and no others.

    sketch     of a token's key latent z: (z_c - mean_c) / deviation_c = scale u_c, u_c in 2 or 4 bits, for the channels
               c that tell most, and one scale for the token, so large that nothing is cut off
    logit      q~ . mean + scale sum over c of q~_c deviation_c u_c     of a token, to within what the sketch lost
    weight     sum over a page's tokens of exp(logit)                   which pages are ranked by

A page is `PagePlan.tokens` sealed tokens in a row. The sketches of its tokens lie beside the latents (fhopt/layers.py)
and are all that a step reads of pages that it does not choose. The mean of some values takes the place of these, with a
part of their weight that was calibrated for each head (`PagePlan.fill`). Query heads that share latent heads (a unit)
choose together, by the mean over heads of the share of weight that each expects of a page. Sinks, window and new tokens
are read always, and so are all pages of short sequences.

Chosen by measurement: SmolLM2-135M, 4x plan, code at 7,168 to 8,192 tokens, one page of 16 tokens in eight at every
site; perplexity over that with all pages (95 %: +-0.8 to 1.8 %), bytes of the index per token and latent head:

    true weights, which nobody knows without reading all keys                    +0.7 %
    16 channels in 4 bits and 16 in 2, scale of the token, 14 bytes              +1.0 %
    16 and 32 channels, 18 bytes                                                 +1.0 %
    32 channels in 3 bits, scale of the token, 14 bytes                          +1.7 %
    32 channels in 3 or 4 bits without a scale, 12, 16 bytes                     +3.2, +3.8 %
    64 channels in 6 bits without a scale, 48 bytes                              +3.3 %

What a quantiser cuts off is what counts: tokens that queries look for have latents far from the mean, and steps that
are right for most tokens are wrong for these.

Pages of 8 tokens, with as many tokens in all, are chosen much better than pages of 16 where each query reads as many as
it needs: KL of the last 1,024 of 8,192 tokens of code, docstrings and scripture 0.0013, 0.0009 and 0.0016 nats a token
in place of 0.0030, 0.0018 and 0.0028. Sketches of 24 bytes in place of 12 gain a fifth of the cost that calibration
measures, where those pages gain half.

What takes the place of pages that are left out, KL of the predictions in nats per 100 tokens, same share, without a
plan, true weights with log-normal errors of 0.5, docstrings at 7,680 to 8,192 tokens: nothing 0.215; the mean of 256
values, with a part of their weight for each head, 0.143; that of all values 0.148; the mean of each page's values, a
part for each head 0.128, with their whole weight 0.730. Heads park weight on tokens of small values: means of pages
overrate them, and in first layers most of the weight is best left out. Parts were fitted on other text.

Squared error of what the six most sensitive layers read, relative, of other summaries, pages of 32 tokens: minima and
maxima per page and channel (Quest, Tang et al. 2024, arXiv 2406.10774, section 3.3) at their best weighting 0.061 with
3 bytes a token, where 32 channels of each token in 3 bits have 0.010; 0.030 with boxes of 16 tokens, 6 bytes; 0.027 of
8, 12 bytes. Means and variances are worse. A page is read for one token in it, which what pages have in common does not
show.

The guarantee: a token's logit differs from its sketch's by at most |q~ w| |(z - sketch) / w| for any weights w (Cauchy
and Schwarz), and with a limit the second factor of every token is kept. The bound is honest and loose: a plan with a
limit may read nearly everything. `cache.report()` says how many lists were completed.

Letters: B batch, H query heads, J latent heads, U units (a common divisor of J on both sides), S queries, T sealed
tokens, P pages, N pages of a list, R latent width, r channels of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt import ops, page_ops
from fhopt.page_ops import (
    PageStep,
    Threshold,
    best_of,
    list_counts,
    pages_read,
    sketch_logits,
)
from fhopt.spec import SketchPlan, Tier

SAMPLE = 16  # pages whose values are averaged, to stand for those that are not read
LOST = {2: 0.35, 4: 0.11}  # deviation of what rounding takes from a unit normal channel, about, by bits

SketchRows = tuple[Tensor, Tensor, Tensor | None]
"""Codes uint8 [B,J,T,bytes], scales float16 [B,J,T], and |(z - sketch) / w| float16 [B,J,T] where there is a limit."""


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
            ops.integer_bytes(x / scale.to(torch.float32).unsqueeze(-1), tier.bits, tier.step)
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
        units = ops.unscaled(codes, *self.tiers) * scale.to(torch.float32).unsqueeze(-1)
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
        return page_ops.factors(query, self.mean, self.deviation, self.channels)

    def uncertain(self, query: Tensor, lost: Tensor) -> Tensor:
        """How much larger than that a logit may be at most: lost [B,J,T] -> [B,H,S,T]."""
        b, h, s, _ = query.shape
        rows, sizes = page_ops.grouped(query, self.mean.shape[0]), self.deviation * self._weights()
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


def token_logits(
    query: Tensor, index: PageIndex, far: Tensor | None, lengths: Tensor | None, *, scale: float, softcap: float = 0.0,
    at_most: bool = False,
) -> Tensor:  # fmt: skip
    """Logits of sealed tokens as their sketches have them, [B,H,S,T]; at_most: as large as they may be instead.

    query [B,H,S,R] is absorbed. far: mask of the tokens, bool or additive, broadcastable to [B,H,S,T]; lengths: so many
    first ones count.
    """
    codes, scales, lost = index.rows
    logits = index.sketcher.logits(query, codes, scales) * scale
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
    if not _has_plain_masks(query, far, lengths, softcap):
        return ops.page_logits(token_logits(query, index, far, lengths, scale=scale, softcap=softcap), index.tokens)
    weights, constant = index.sketcher.factors(query)
    sketches = *index.rows[:2], *index.sketcher.tiers
    found = page_ops.page_weights(weights * scale, constant * scale, *sketches, index.tokens, far, lengths)
    return found.reshape(*query.shape[:3], -1)


def attend(
    query: Tensor, latents: tuple[Tensor, Tensor | None, Tensor, Tensor | None], index: PageIndex, far: Tensor | None,
    lengths: Tensor | None, near: Tensor | None, values: Tensor | None, *, scale: float, **tiers: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B,H,1,R_V], lse [B,H,1]) of one query of each sequence, [B,H,1,R], on the pages that it chooses: one
    `page_ops.PageStep`, which is counted. latents: rows and scales of keys and of values. Where `is_one_step`."""
    sketcher, (codes, scales, _) = index.sketcher, index.rows
    key, key_scale, value, value_scale = latents
    bits, widths, steps = sketcher.tiers
    step = PageStep(
        query, key, key_scale, value, value_scale, far, lengths, **tiers, scale=scale,
        codes=codes, scales=scales, bits=bits, widths=widths, steps=steps,
        channels=sketcher.channels, mean=sketcher.mean, deviation=sketcher.deviation,
        near=near, page_tokens=index.tokens, units=index.units, most=index.most, share=index.share, least=index.least,
        mass=index.mass, lift=index.lift, fill=index.fill, values=values,
    )  # fmt: skip
    output, lse, counts = page_ops.attend_pages(step)
    index.counters.add_(counts)
    return output, lse


def available_pages(index: PageIndex, lengths: Tensor | None) -> Tensor | int:
    """How many pages there are to choose from."""
    return index.count if lengths is None else -(-lengths.reshape(-1, 1, 1, 1) // index.tokens)


def is_one_step(query: Tensor, far: Tensor | None, lengths: Tensor | None, softcap: float) -> bool:
    """True where `fhopt::attend_pages` can say it: one query, a mask of tokens of each sequence, one length."""
    return query.shape[2] == 1 and _has_plain_masks(query, far, lengths, softcap)


def _has_plain_masks(query: Tensor, far: Tensor | None, lengths: Tensor | None, softcap: float) -> bool:
    """True where `fhopt::page_weights` can say it."""
    plain = far is None or (far.dtype == torch.bool and far.dim() == 4 and far.shape[1:3] == (1, 1))
    one = lengths is None or lengths.numel() == 1
    return plain and one and not softcap and query.dtype != torch.float64


def keep_best(weights: Tensor, index: PageIndex, available: Tensor | int) -> Tensor:
    """The pages to read, which are counted: weights [B,U,S,P] -> bool [B,U,S,P].

    available: how many pages there are to choose from, a number or integers broadcastable to [B,U,S,1]. Pages without
    any weight, such as those that may not be read, are never among them.
    """
    read = pages_read(available, index.share, index.least)
    kept = best_of(weights, index.most, read, Threshold(index.mass, index.lift, available))
    index.counters.add_(list_counts(kept, available))
    return kept


def page_mask(chosen: Tensor, page_tokens: int, heads: int, tokens: int) -> Tensor:
    """The same as a mask of tokens: bool [B,U,S,P] -> bool [B,H,S,T], T = `tokens`."""
    seen = chosen.repeat_interleave(page_tokens, -1)[..., :tokens]
    return seen.repeat_interleave(heads // chosen.shape[1], 1)


# --------------------------------------------------------------------------------------------------- the others


def log_fill(parts: Sequence[float], device: torch.device) -> Tensor | None:
    """`PagePlan.fill` of one site as a `PageIndex` has it: float32 [H]; None where nothing is filled."""
    return torch.tensor(parts, dtype=torch.float32, device=device).log() if any(parts) else None


def sampled(count: Tensor | int, device: torch.device) -> Tensor:
    """SAMPLE of `count` pages, evenly spread, as a list of `page_lists`; all of them where there are fewer.

    A number -> int32 [SAMPLE]; integers [B] -> [B, SAMPLE].
    """
    many = count.unsqueeze(-1) if isinstance(count, Tensor) else torch.full((), count, device=device)
    places = torch.arange(SAMPLE, device=device) * many.clamp(min=SAMPLE) // SAMPLE
    return torch.where(places < many, places, -1).to(torch.int32)


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
    index.counters[1] += failed.sum()
    return failed
