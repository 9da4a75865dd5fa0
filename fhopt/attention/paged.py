"""Page selection: a decode step loads only the pages of quantized tokens with the largest estimated weight.

A page is `PagePlan.tokens` consecutive quantized tokens. The token sketches are stored next to the packed latents
(fhopt/cache/base_layer.py), and a decode step loads nothing else of pages that it does not select.
`fhopt.ops.page_selection` selects. This module estimates page weights, attends to the selected pages, and accounts for
the others: by a mean of sampled values with a calibrated factor of their weight (`PagePlan.fill`), or, if an upper
bound on their weight exceeds the plan's limit, by attending to them. Sinks, window, new tokens and all pages of short
sequences are always attended.

With plain masks, one query per sequence runs as one op, `fhopt::attend_pages`; other calls run the same functions as
torch operations. Measurements: docs/explanation/page_selection.md.

Letters: B batch, H query heads, J latent heads, U units (a common divisor of J on both sides), S queries, T quantized
tokens, P pages, N pages of a list, R latent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.attention.exact_tokens import exact_parts, joint_lse
from fhopt.attention.operands import AttentionOperands, PartMasks, attend_latents, with_means
from fhopt.attention.sketches import PageIndex
from fhopt.ops import algebra, masks, page_selection, paged_attention

SAMPLE = 16  # pages averaged for value-mean fill


# --------------------------------------------------------------------------------------------------- attention


def selects_pages(query: Tensor, index: PageIndex) -> bool:
    """Return True if the query selects its own pages and there are more pages than its maximum."""
    return (index.each_query or query.shape[2] == 1) and index.most < index.count


def attend_selected_pages(operands: AttentionOperands, index: PageIndex) -> Tensor:
    """Attend to exact tokens, to the window and to the latents of selected pages: [B,H,S,E].

    Units for which unselected pages might exceed the limit attend to these pages, too.
    """
    key, value, mask = operands.key_side, operands.value_side, operands.masks
    absorbed = algebra.absorb(operands.query, key.decode)
    exact = exact_parts(operands)
    near = _beside_latents(operands, joint_lse(exact))
    if index.limit == 1 and absorbed.shape[2] == 1 and _has_plain_masks(absorbed, mask, operands.softcap):
        mean = _fill_mean(absorbed, operands, index)
        output, lse = attend_single_query(absorbed, key, value, index, mask, near, mean, scale=operands.scale)
        parts = [with_means(operands, algebra.expand(output, value.decode), lse), *exact]
        return algebra.merge(parts) if len(parts) > 1 else parts[0][0]
    estimates = _page_estimates(absorbed, operands, index)
    available = _available_pages(index, mask.lengths)
    selected, counts = page_selection.select_pages(estimates, index.rule, available, near)
    index.counters.add_(counts)
    output, lse = _read_pages(absorbed, operands, index, selected, index.most)
    if index.fill is not None:
        odds = page_selection.odds_left_out(estimates, selected)
        mean = _fill_mean(absorbed, operands, index)
        output, lse = page_selection.fill_with_mean(output, lse, mean, odds, index.fill)
    parts = [with_means(operands, algebra.expand(output, value.decode), lse), *exact]
    if index.limit < 1:
        others = _pages_beyond_limit(absorbed, operands, index, selected, parts)
        output, lse = _read_pages(absorbed, operands, index, others, index.count)
        parts.append(with_means(operands, algebra.expand(output, value.decode), lse))
    return algebra.merge(parts) if len(parts) > 1 else parts[0][0]


def _beside_latents(operands: AttentionOperands, lse: Tensor | None) -> Tensor | None:
    """Convert a log weight [B,H,S] to the reference of latent logits, which exclude the mean of keys."""
    if lse is None:
        return None
    return algebra.counted_from_mean(lse, operands.query, operands.key_side.mean, operands.scale)


def attend_single_query(
    query: Tensor, key: SideRows, value: SideRows, index: PageIndex, mask: PartMasks, near: Tensor | None,
    mean: Tensor | None, *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Select pages and attend to them by one op, `fhopt::attend_pages`, for one query per sequence.

    query [B,H,1,R] is absorbed; mask: of latents, in the op's format; near [B,H,1]: log weight of the tokens that are
    always attended; mean: of values, for the fill. Updates the counters of the index. Returns (output [B,H,1,R_V] (not
    expanded), lse [B,H,1]).
    """
    sketcher, (codes, scales, _) = index.sketcher, index.rows
    bits, widths, steps = sketcher.bit_groups
    groups: Any = algebra.group_options(key.bit_groups, value.bit_groups)
    step = paged_attention.PageStep(
        query, key.rows, key.scale, value.rows, value.scale, mask.latents, mask.lengths, **groups, scale=scale,
        codes=codes, scales=scales, bits=bits, widths=widths, steps=steps,
        channels=sketcher.channels, mean=sketcher.mean, deviation=sketcher.deviation,
        near=near, page_tokens=index.tokens, units=index.units, most=index.most, share=index.share, least=index.least,
        mass=index.mass, lift=index.lift, fill=index.fill, values=mean,
    )  # fmt: skip
    output, lse, counts = paged_attention.attend_pages(step)
    index.counters.add_(counts)
    return output, lse


def _has_plain_masks(query: Tensor, mask: PartMasks, softcap: float) -> bool:
    """Return True if the page ops support the masks: one token mask per sequence, one length, no softcap."""
    far, lengths = mask.latents, mask.lengths
    plain = far is None or (far.dtype == torch.bool and far.dim() == 4 and far.shape[1:3] == (1, 1))
    one = lengths is None or lengths.numel() == 1
    return plain and one and not softcap and query.dtype != torch.float64


def _read_pages(
    absorbed: Tensor, operands: AttentionOperands, index: PageIndex, selected: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Attend to the latents of at most `most` selected pages, bool [B,U,S,P], by page lists, or a mask if S > 1.

    Returns (output [B,H,S,R_V] (not expanded), lse [B,H,S]).
    """
    key, value, far = operands.key_side, operands.value_side, operands.masks.latents
    options: dict[str, Any] = operands.numbers | {"lengths": operands.masks.lengths}
    if absorbed.shape[2] == 1:
        lists = page_selection.page_lists(selected.squeeze(2), most)
        return attend_latents(absorbed, key, value, far, **options, pages=lists, page_tokens=index.tokens)
    mask = page_mask(selected, index.tokens, absorbed.shape[1], key.rows.shape[2])
    mask = mask if far is None else masks.restricted(far, mask)
    return attend_latents(absorbed, key, value, mask, **options)


def page_mask(selected: Tensor, page_tokens: int, heads: int, tokens: int) -> Tensor:
    """Convert selected pages, bool [B,U,S,P], to a token mask: bool [B,H,S,T], T = `tokens`."""
    seen = selected.repeat_interleave(page_tokens, -1)[..., :tokens]
    return seen.repeat_interleave(heads // selected.shape[1], 1)


# --------------------------------------------------------------------------------------------------- estimates


def token_logits(
    query: Tensor, index: PageIndex, far: Tensor | None, lengths: Tensor | None, *, scale: float, softcap: float = 0.0,
    at_most: bool = False,
) -> Tensor:  # fmt: skip
    """Estimate logits of quantized tokens from their sketches, [B,H,S,T]; at_most: upper bounds instead.

    query [B,H,S,R] is absorbed. far: token mask, bool or additive, broadcastable to [B,H,S,T]. lengths: number of
    leading tokens to use.
    """
    codes, scales, lost = index.rows
    logits = index.sketcher.logits(query, codes, scales) * scale
    if at_most:
        assert lost is not None, "there is a limit"
        logits = logits + index.sketcher.uncertainty(query, lost) * abs(scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = masks.additive(masks.within(lengths, codes.shape[2], far), logits.dtype)
    return logits if bias is None else logits + bias


def _page_estimates(absorbed: Tensor, operands: AttentionOperands, index: PageIndex) -> Tensor:
    """Estimate the log weight of each page from its sketches, [B,H,S,P]."""
    far, lengths = operands.masks.latents, operands.masks.lengths
    if not _has_plain_masks(absorbed, operands.masks, operands.softcap):
        return page_selection.page_logits(token_logits(absorbed, index, far, lengths, **operands.numbers), index.tokens)
    weights, constant = index.sketcher.factors(absorbed)
    weights, constant = weights * operands.scale, constant * operands.scale
    sketches = *index.rows[:2], *index.sketcher.bit_groups
    logits = paged_attention.page_weights(weights, constant, *sketches, index.tokens, far, lengths)
    return logits.reshape(*absorbed.shape[:3], -1)


def _available_pages(index: PageIndex, lengths: Tensor | None) -> Tensor | int:
    """Return the number of pages to select from."""
    return index.count if lengths is None else -(-lengths.reshape(-1, 1, 1, 1) // index.tokens)


# --------------------------------------------------------------------------------------------------- value-mean fill


def mean_values(
    query: Tensor, key: SideRows, value: SideRows, far: Tensor | None, lengths: Tensor | None, page_tokens: int
) -> Tensor:
    """Average the value latents of SAMPLE pages that each query may see, by attention with a zero query.

    query [B,H,S,R] is absorbed and only gives shape, dtype and device; far, lengths: as `latents` and `lengths` of
    `PartMasks` -> [B,n,S,R_V], S as in the mask `far` or 1, n a divisor of H.
    """
    (b, heads), rows = query.shape[:2], math.lcm(key.rows.shape[1], value.rows.shape[1])
    shape = (1, 1) if far is None or far.dim() < 3 else far.shape[-3:-1]
    zeros = query.new_zeros((b, heads if shape[0] > 1 else rows, shape[1], query.shape[3]))
    count = -(-(key.rows.shape[2] if lengths is None else lengths.reshape(-1)) // page_tokens)
    lists = sampled_pages(count, query.device).reshape(-1, 1, SAMPLE).expand(b, 1, -1)
    mean, _ = attend_latents(zeros, key, value, far, scale=1.0, lengths=lengths, pages=lists, page_tokens=page_tokens)
    return mean


def log_fill(parts: Sequence[float], device: torch.device) -> Tensor | None:
    """Convert a site's `PagePlan.fill` to that of a `PageIndex`: its log, float32 [H]; None if all are zero."""
    return torch.tensor(parts, dtype=torch.float32, device=device).log() if any(parts) else None


def _fill_mean(absorbed: Tensor, operands: AttentionOperands, index: PageIndex) -> Tensor | None:
    """Return the mean of values for the fill: the cached one if all queries see all rows, else a new one."""
    far, lengths = operands.masks.latents, operands.masks.lengths
    if index.fill is None or (index.mean is not None and far is None and lengths is None):
        return index.mean
    return mean_values(absorbed, operands.key_side, operands.value_side, far, lengths, index.tokens)


def sampled_pages(count: Tensor | int, device: torch.device) -> Tensor:
    """List SAMPLE of `count` pages, evenly spaced, in the format of `page_lists`; all pages if there are fewer.

    int -> int32 [SAMPLE]; integers [B] -> [B, SAMPLE].
    """
    many = count.unsqueeze(-1) if isinstance(count, Tensor) else torch.full((), count, device=device)
    places = torch.arange(SAMPLE, device=device) * many.clamp(min=SAMPLE) // SAMPLE
    return torch.where(places < many, places, -1).to(torch.int32)


# --------------------------------------------------------------------------------------------------- the limit


def _pages_beyond_limit(
    absorbed: Tensor,
    operands: AttentionOperands,
    index: PageIndex,
    selected: Tensor,
    parts: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Select all remaining pages for units that might exceed the limit: bool [B,U,S,P]."""
    lse = _beside_latents(operands, joint_lse(parts))
    assert lse is not None, "pages were read"
    far, lengths = operands.masks.latents, operands.masks.lengths
    bounds = token_logits(absorbed, index, far, lengths, **operands.numbers, at_most=True)
    share = left_out_bound(page_selection.page_logits(bounds, index.tokens), selected, lse)
    return ~selected & exceeds_limit(share, index).unsqueeze(-1)


def left_out_bound(bounds: Tensor, selected: Tensor, lse: Tensor) -> Tensor:
    """Bound the fraction of a query's weight on unselected pages, [B,H,S].

    bounds [B,H,S,P]: upper bounds of log page weights; selected bool [B,U,S,P]; lse [B,H,S]: of everything attended.
    """
    heads = selected.repeat_interleave(bounds.shape[1] // selected.shape[1], 1)
    others = bounds.masked_fill(heads, -math.inf).logsumexp(-1)
    return torch.sigmoid(others - lse).masked_fill(others == -math.inf, 0.0)


def exceeds_limit(share: Tensor, index: PageIndex) -> Tensor:
    """Return and count the units with a head above the limit: share [B,H,S] -> bool [B,U,S]."""
    failed = (share > index.limit).unflatten(1, (index.units, -1)).any(2)
    index.counters[1] += failed.sum()
    return failed
