"""Attention to packed latents, in one or several parts.

Queries are rotated to attend to keys relative to segments (fhopt/plan/segment_rotation.py). A few queries are rotated
to each segment, and the segments of a sequence are processed like a batch. For many queries keys are reconstructed and
rotated back. In decode steps on CPU all of this is one native call (fhopt/attention/attend.py).

Letters: B batch, H query heads, S queries, N segments, D and E head size of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fhopt.attention.operands import AttentionOperands, attend_latents, with_means
from fhopt.ops import algebra, prefill_attention
from fhopt.ops import masks as ops_masks
from fhopt.ops.attention import safe_softmax

# Reconstruction tile for many queries: minimum number of tokens, and target number of elements of keys and values.
MIN_AT_ONCE, NUMBERS_AT_ONCE = 256, 1 << 20
MAX_TURNED = 1 << 22  # maximum elements of queries rotated to all segments at once


def latent_parts(operands: AttentionOperands) -> list[tuple[Tensor, Tensor]]:
    """Attend to packed latents, with queries rotated to each segment: outputs [B,H,S,E], lse [B,H,S]."""
    if operands.key_side.rotation is None:
        return [with_means(operands, *_latent_part(operands))]
    output, lse = _joined(_segment_parts(operands))
    return [(output.to(operands.query.dtype), lse)]


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge parts incrementally, in float32 or float64: each of the many outputs covers all queries."""
    rest = iter(parts)
    output, lse = next(rest)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    for other, other_lse in rest:
        total = torch.logaddexp(lse, other_lse)
        share = (other_lse - total).exp().nan_to_num(0.0)  # no token in either: both are -inf
        output = output + (other.to(output.dtype) - output) * share.unsqueeze(-1).to(output.dtype)
        lse = total
    return output, lse


def _segment_parts(operands: AttentionOperands) -> Iterator[tuple[Tensor, Tensor]]:
    """Attend to segments, one or several at a time: outputs [B,H,S,E], lse [B,H,S], means added."""
    query, key = operands.query, operands.key_side
    rotation = key.rotation
    assert rotation is not None
    if _reads_finished(operands):
        yield from _finished_parts(operands)
        return
    whole = key.rows.shape[2] // rotation.segment
    folds = len(query) <= whole and whole * query[:1].numel() <= MAX_TURNED and not _reconstructs(operands)
    if folds:
        yield _folded_part(operands, whole)
    exact = query.to(torch.promote_types(query.dtype, torch.float32))
    for number in range(whole if folds else 0, rotation.segments(key.rows.shape[2])):
        turned = rotation.rotate_query(exact, number)
        part = operands.of_segment(number, turned.to(query.dtype))
        output, lse = _latent_part(part)
        if key.mean is not None:  # uses unrounded queries: a mean may be much larger than the differences
            lse = lse + operands.scale * algebra.mean_logits(turned, key.mean).to(lse.dtype)
        yield _with_value_means(operands, output, lse)


def _with_value_means(operands: AttentionOperands, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Add the means of values; the lse already includes those of keys."""
    return with_means(replace(operands, key_side=replace(operands.key_side, mean=None)), output, lse)


def _folded_part(operands: AttentionOperands, segments: int) -> tuple[Tensor, Tensor]:
    """Attend to the leading full segments of each sequence as a batch: output and lse, means added.

    This makes fewer calls than one per segment, and each fills a GPU.
    """
    query, key, value, masks = operands.query, operands.key_side, operands.value_side, operands.masks
    rotation, parts = key.rotation, []
    assert rotation is not None
    for b in range(len(query)):
        one = slice(b, b + 1)
        exact = query[one].to(torch.promote_types(query.dtype, torch.float32))
        turned = rotation.rotate_queries(exact, segments, b)  # [N,H,S,D]
        far, lengths = masks.latents, masks.lengths
        if far is not None:
            far = far.reshape((1,) * (4 - far.dim()) + far.shape)
            far = far[one] if len(far) > 1 else far
            if far.shape[-1] != 1:
                far = _folded(far, segments, rotation.segment, 3)
        if lengths is not None:
            starts = torch.arange(segments, device=query.device) * rotation.segment
            lengths = (lengths.reshape(-1)[b if lengths.numel() > 1 else 0] - starts).clamp(0, rotation.segment)
        sides = [
            replace(
                side, rows=_folded(side.rows[one], segments, rotation.segment, 2), rotation=None,
                scale=None if side.scale is None else _folded(side.scale[one], segments, rotation.segment, 2),
            )
            for side in (key, value)
        ]  # fmt: skip
        absorbed = algebra.absorb(turned.to(query.dtype), key.decode)
        output, lse = attend_latents(absorbed, sides[0], sides[1], far, lengths=lengths, **operands.numbers)
        if key.mean is not None:
            mean = key.mean[one].expand(segments, -1, -1, -1)
            lse = lse + operands.scale * algebra.mean_logits(turned, mean).to(lse.dtype)
        weights, total = safe_softmax(lse.movedim(0, -1))
        mixed = (output.to(weights.dtype) * weights.movedim(-1, 0).unsqueeze(-1)).sum(0)
        parts.append((mixed.to(output.dtype), total))
    output, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    return _with_value_means(operands, algebra.expand(output, value.decode), lse)


def _folded(x: Tensor, segments: int, tokens: int, dim: int) -> Tensor:
    """View data of one sequence's tokens along `dim`, [1,...], by segment: [N,...]."""
    return x.narrow(dim, 0, segments * tokens).unflatten(dim, (segments, tokens)).movedim(dim, 0).squeeze(1)


def _reads_finished(operands: AttentionOperands) -> bool:
    """Return True if a CPU prefill kernel can attend to keys that are reconstructed and rotated back."""
    query, key, value = operands.query, operands.key_side, operands.value_side
    if query.shape[1] * query.shape[2] < prefill_attention.CPU_ROWS * key.rows.shape[1]:
        return False
    if not prefill_attention.is_cpu_prefill(query, key.rows, key.decode, value.rows, value.decode):
        return False
    keys, values = (side.part(0, 1).reconstruct().to(query.dtype) for side in (key, value))
    return prefill_attention.attend_on_cpu("open_attention", query, keys, values, None, **operands.numbers) is not None


def _finished_parts(operands: AttentionOperands) -> Iterator[tuple[Tensor, Tensor]]:
    """Attend to keys that are rotated back, a tile of tokens at a time: outputs and lse, means added."""
    query, key, value, masks = operands.query, operands.key_side, operands.value_side, operands.masks
    tokens = key.rows.shape[2]
    seen = ops_masks.within(masks.lengths, tokens, masks.latents)
    numbers = len(query) * (key.decode[..., 0].numel() + value.decode[..., 0].numel())
    at_once = max(MIN_AT_ONCE, NUMBERS_AT_ONCE // numbers)
    for start in range(0, tokens, at_once):
        stop = min(tokens, start + at_once)
        keys, values = (side.part(start, stop).reconstruct().to(query.dtype) for side in (key, value))
        mask = seen if seen is None or seen.shape[-1] == 1 else seen[..., start:stop]
        part = prefill_attention.attend_on_cpu(
            "open_attention", query, keys, values, mask, causal=False, **operands.numbers
        )
        assert part is not None, "`_reads_finished` was asked"
        yield part


def _latent_part(operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Attend to packed latents without adding the means back: output [B,H,S,E], lse [B,H,S]."""
    query, key, value, masks = operands.query, operands.key_side, operands.value_side, operands.masks
    rows = key.rows, key.scale, key.decode, value.rows, value.scale, value.decode, masks.latents, masks.lengths
    options = algebra.group_options(key.bit_groups, value.bit_groups) | operands.numbers
    if _reconstructs(operands):
        result: tuple[Tensor, Tensor] = torch.ops.fhopt.rebuilt_attention(query, *rows, **options)
        return result
    rebuilt = prefill_attention.attend_on_cpu("rebuilt_attention", query, *rows, **options)
    if rebuilt is not None:
        return rebuilt
    absorbed = algebra.absorb(query, key.decode)
    output, lse = attend_latents(absorbed, key, value, masks.latents, lengths=masks.lengths, **operands.numbers)
    return algebra.expand(output, value.decode), lse


def _reconstructs(operands: AttentionOperands) -> bool:
    """Return True if K/V are reconstructed from packed latents for these queries."""
    key, value = operands.key_side, operands.value_side
    return prefill_attention.should_reconstruct(
        operands.query, key.rows, key.decode, value.rows, value.decode, operands.masks.latents,
        bool(key.bit_groups[0] or value.bit_groups[0]),
    )  # fmt: skip
