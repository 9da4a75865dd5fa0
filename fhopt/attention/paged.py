"""Retrieval attention: a decoding step reads the pages of sealed tokens that matter to it, and no others.

    sketch     of a token's key latent z: (z_c - mean_c) / deviation_c = scale u_c, u_c in 2 or 4 bits, for the channels
               c that tell most, and one scale for the token, so large that nothing is cut off
    logit      q~ . mean + scale sum over c of q~_c deviation_c u_c     of a token, to within what the sketch lost
    weight     sum over a page's tokens of exp(logit)                   which pages are ranked by

A page is `PagePlan.tokens` sealed tokens in a row. The sketches of its tokens lie beside the latents
(fhopt/cache/base_layer.py) and are all that a step reads of pages that it does not choose. The mean of some values
takes the place of these, with a part of their weight that was calibrated for each head (`PagePlan.fill`). Query heads
that share latent heads (a unit) choose together, by the mean over heads of the share of weight that each expects of a
page. Sinks, window and new tokens are read always, and so are all pages of short sequences.

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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.attention import paged
from fhopt.attention.exact_tokens import exact_parts, joint_lse
from fhopt.attention.sketches import PageIndex
from fhopt.ops import algebra, latent_attention, masks, page_choice, page_selection
from fhopt.ops import masks as ops_masks
from fhopt.ops.page_choice import Threshold, best_of, list_counts, pages_read
from fhopt.ops.page_selection import PageStep


def selects_pages(query: Tensor, index: PageIndex) -> bool:
    """True for a query that is alone, or counts as such, and has more pages than it may read."""
    return (index.each_query or query.shape[2] == 1) and index.most < index.count


def attend_selected_pages(
    query: Tensor, key: Tensor, value: Tensor,
    key_rows: Tensor, key_scale: Tensor | None, key_decode: Tensor,
    value_rows: Tensor, value_scale: Tensor | None, value_decode: Tensor,
    window_keys: Tensor | None, window_key_scale: Tensor | None,
    window_values: Tensor | None, window_value_scale: Tensor | None,
    near: Tensor | None, inside: Tensor | None, far: Tensor | None, lengths: Tensor | None,
    *, index: PageIndex, sinks: Tensor | None, causal: bool, scale: float, softcap: float = 0.0, **tiers: Any,
) -> Tensor:  # fmt: skip
    """`attend_parts` with latents of chosen pages alone; with those of the others too, for the units of which these
    might weigh more than the index allows."""
    numbers = dict(scale=scale, softcap=softcap)
    absorbed = algebra.absorb(query, key_decode)
    rows = key_rows, key_scale, value_rows, value_scale

    def values() -> Tensor | None:
        if index.fill is None or (index.mean is not None and far is None and lengths is None):
            return index.mean
        return mean_values(absorbed, *rows, far, lengths, index.tokens, **tiers)

    def read(mask: Tensor | None, listed: dict[str, Any], odds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = dict(**tiers, **numbers, **listed)
        output, lse = latent_attention.latent_attention(absorbed, *rows, mask, **options, lengths=lengths)
        if odds is not None:
            output, lse = page_choice.stand_in(output, lse, values(), odds, index.fill)
        return algebra.expand(output, value_decode), lse

    window = window_keys, window_key_scale, window_values, window_value_scale
    others = exact_parts(query, key, value, window, (near, inside), sinks, causal, numbers)
    others_lse = joint_lse(others)
    if index.limit == 1 and paged.is_one_step(absorbed, far, lengths, softcap):
        output, lse = paged.attend(absorbed, rows, index, far, lengths, others_lse, values(), scale=scale, **tiers)
        parts = [(algebra.expand(output, value_decode), lse), *others]
        return algebra.merge(parts) if len(parts) > 1 else parts[0][0]
    estimates, count = paged.page_estimates(absorbed, index, far, lengths, **numbers), key_rows.shape[2]
    weights = page_choice.expected_weights(estimates, index.units, others_lse)
    chosen = paged.keep_best(weights, index, paged.available_pages(index, lengths))
    odds = None if index.fill is None else page_choice.odds_left_out(estimates, chosen)
    parts = [read(*_listed(chosen, index, index.most, query, far, count), odds), *others]
    if index.limit < 1:
        lse_of_all = joint_lse(parts)
        assert lse_of_all is not None, "pages were read"
        most = algebra.page_logits(
            paged.token_logits(absorbed, index, far, lengths, **numbers, at_most=True), index.tokens
        )
        share = paged.left_out(most, chosen, lse_of_all)
        rest = ~chosen & paged.to_complete(share, index).unsqueeze(-1)
        parts.append(read(*_listed(rest, index, index.count, query, far, count)))
    return algebra.merge(parts) if len(parts) > 1 else parts[0][0]


def mean_values(
    query: Tensor, key_rows: Tensor, key_scale: Tensor | None, value_rows: Tensor, value_scale: Tensor | None,
    far: Tensor | None, lengths: Tensor | None, page_tokens: int, **tiers: Any,
) -> Tensor:  # fmt: skip
    """Mean of the value latents of some pages that each query may see: what a query of zeros reads.

    query [B,H,S,R] is absorbed; the others as of `attend_parts` -> [B,n,S,R], S that of the mask `far` or 1, n a
    divisor of H.
    """
    (b, heads), rows = query.shape[:2], math.lcm(key_rows.shape[1], value_rows.shape[1])
    shape = (1, 1) if far is None or far.dim() < 3 else far.shape[-3:-1]
    asking = query.new_zeros((b, heads if shape[0] > 1 else rows, shape[1], query.shape[3]))
    count = -(-(key_rows.shape[2] if lengths is None else lengths.reshape(-1)) // page_tokens)
    lists = paged.sampled(count, query.device).reshape(-1, 1, paged.SAMPLE).expand(b, 1, -1)
    mean, _ = latent_attention.latent_attention(
        asking, key_rows, key_scale, value_rows, value_scale, far, **tiers, scale=1.0, lengths=lengths, pages=lists,
        page_tokens=page_tokens,
    )  # fmt: skip
    return mean


def _listed(
    chosen: Tensor, index: PageIndex, most: int, query: Tensor, far: Tensor | None, tokens: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """(mask, options) with which `fhopt::latent_attention` reads the latents of chosen pages, bool [B,U,S,P]."""
    if query.shape[2] == 1:
        return far, {"pages": page_choice.page_lists(chosen.squeeze(2), most), "page_tokens": index.tokens}
    mask = paged.page_mask(chosen, index.tokens, query.shape[1], tokens)
    return (mask if far is None else ops_masks.restricted(far, mask)), {}


SAMPLE = 16  # pages whose values are averaged, to stand for those that are not read
"""Codes uint8 [B,J,T,bytes], scales float16 [B,J,T], and |(z - sketch) / w| float16 [B,J,T] where there is a limit."""


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
    bias = masks.additive(masks.within(lengths, codes.shape[2], far), logits.dtype)
    return logits if bias is None else logits + bias


def page_estimates(
    query: Tensor, index: PageIndex, far: Tensor | None, lengths: Tensor | None, *, scale: float, softcap: float = 0.0
) -> Tensor:
    """Log of the weight of each page, as its sketches have it: `ops.page_logits` of `token_logits`, [B,H,S,P]."""
    if not _has_plain_masks(query, far, lengths, softcap):
        return algebra.page_logits(token_logits(query, index, far, lengths, scale=scale, softcap=softcap), index.tokens)
    weights, constant = index.sketcher.factors(query)
    sketches = *index.rows[:2], *index.sketcher.tiers
    found = page_selection.page_weights(weights * scale, constant * scale, *sketches, index.tokens, far, lengths)
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
    output, lse, counts = page_selection.attend_pages(step)
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
