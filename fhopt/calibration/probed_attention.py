"""Attention that reports the gradients of far keys and values, tile by tile of the attention matrix.

Logits are in bits, because torch's `exp2` takes a third of the time of its `exp` on CPUs. Dimensions: B sequences, H
query heads, G kv heads, S queries, T keys, D and E widths of keys and of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.ops import attention
from fhopt.ops import masks as ops_masks

QUERIES = 128  # rows of the attention matrix computed at once
EVERY = slice(None)
BITS = math.log2(math.e)  # per nat
OnGradients = Callable[[Tensor, Tensor], None]  # called with the gradients of keys and of values, see `probe.Watch`
Columns = slice | Tensor  # of a tile: a range, or indices


# --------------------------------------------------------------------------------------------------- masks


def additive_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return an additive mask with at least two dimensions, so that it has rows and columns to slice."""
    return None if mask is None else torch.atleast_2d(ops_masks.additive(mask, query.dtype))


def slice_mask(mask: Tensor | None, rows: slice, columns: slice) -> Any:
    """Slice a mask broadcastable to [..., S, T] to a tile."""
    if mask is None:
        return None
    mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., columns]


def probed_tiles(q: Tensor, k: Tensor, bias: Tensor | None) -> list[tuple[slice, slice]]:
    """Return (queries, keys that any of them sees) for each tile."""
    queries, keys = q.shape[2], k.shape[2]
    out = []
    for start in range(0, queries, QUERIES):
        rows = slice(start, min(start + QUERIES, queries))
        seen = keys
        if bias is not None:
            seen = max(1, _columns_until(slice_mask(bias, rows, EVERY) > -math.inf, keys))
        out.append((rows, slice(0, seen)))
    return out


def _columns_until(mask: Tensor, keys: int) -> int:
    """Return one past the last of the first `keys` columns with any true entry in a mask [..., S, T]; 0 if none has."""
    columns = _in_any_row(mask, keys).nonzero()
    return int(columns.max()) + 1 if len(columns) else 0


def _in_any_row(mask: Tensor, keys: int) -> Tensor:
    """Return which of the first `keys` columns have any true entry in a mask [..., S, T]."""
    return mask.flatten(0, -2).any(0).expand(keys)


@dataclass(frozen=True, eq=False)
class ProbedTile:
    """A block of queries with the keys that any of them sees: which of these are masked, and which are far."""

    rows: slice
    columns: slice
    masked: slice  # from the first to the last column that the mask changes
    bias: Tensor | None  # the mask of those columns, in bits; None if it changes none
    reached: int  # columns up to the last that is far for any row
    some: Columns  # columns that are far for some rows and near for others
    of_some: Tensor  # bool: the rows for which each of these is far
    none: Columns  # columns that are far for no row

    @classmethod
    def of(cls, rows: slice, columns: slice, bias: Tensor | None, far: Tensor) -> ProbedTile:
        """Build a tile from a mask that is added to logits, in nats, and the far pairs, bool [S,T]."""
        said, count = slice_mask(bias, rows, columns), columns.stop
        far, masked = slice_mask(far, rows, columns), slice(0, 0)
        pairs = (far, ~far) if said is None else (far & (said > -math.inf), ~far & (said > -math.inf))
        of_far, of_near = (_in_any_row(mask, count) for mask in pairs)
        if said is not None:
            changed = _in_any_row(said != 0, count).nonzero()
            masked = slice(int(changed[0]), int(changed[-1]) + 1) if len(changed) else masked
            said = slice_mask(said, EVERY, masked) * BITS if len(changed) else None
        last, some = of_far.nonzero(), _columns((of_far & of_near).nonzero().squeeze(-1))
        return cls(
            rows, columns, masked, said, int(last[-1]) + 1 if len(last) else 0, some,
            far if far.shape[-1] == 1 else far[..., some], _columns((~of_far).nonzero().squeeze(-1)),
        )  # fmt: skip

    def add_mask(self, logits: Tensor) -> Tensor:
        """Add the mask to logits [B,H,S,T] of this tile, in bits and in place."""
        if self.bias is not None:
            logits[..., self.masked] += self.bias
        return logits


def _columns(numbers: Tensor) -> Columns:
    """Return ascending indices as a slice if they are contiguous, since a slice copies nothing."""
    if not len(numbers):
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def tiled(q: Tensor, k: Tensor, bias: Tensor | None, far: Tensor) -> list[ProbedTile]:
    """Return the tiles of queries q [B,H,S,D] on keys k [B,G,T,D]; bias, far: as in `Tile.of`."""
    return [ProbedTile.of(rows, columns, bias, far) for rows, columns in probed_tiles(q, k, bias)]


# --------------------------------------------------------------------------------------------------- attention


class ProbedAttention(torch.autograd.Function):
    """Attention whose backward pass also passes gradients of far keys and values to the callback from `observe`.

    It works on QUERIES rows at a time and skips columns that none of them sees. With weights P, output o and its
    gradient g, score gradients are P (g v^T - g . o) as in FlashAttention (2205.14135, appendix B.2). Columns that are
    far for all rows have the same gradient from far pairs as from all pairs, and need no second matmul.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, matrix: list[ProbedTile], sinks: Tensor | None, scale: float,
        softcap: float, observe: Callable[[Tensor, Tensor], OnGradients],
    ) -> Tensor:  # fmt: skip
        """Attend with q [B,H,S,D] to k [B,G,T,D] and v [B,G,T,E] by the tiles of `tiled`: [B,H,S,E]."""
        outputs, sums, scaled = [], [], q * (scale if softcap else scale * BITS)
        for tile in matrix:
            logits = tile.add_mask(_logits(scaled[:, :, tile.rows], k[:, :, tile.columns], softcap))
            if sinks is not None:
                more = slice_mask(sinks, tile.rows, EVERY).to(logits).expand(*logits.shape[:3], -1)
                logits = torch.cat((logits, more * BITS), -1)
            top = logits.amax(-1, keepdim=True)
            top = torch.where(top == -math.inf, 0.0, top)  # queries that see nothing
            p = logits.sub_(top).exp2_()
            total = p.sum(-1, keepdim=True)
            output = attention.grouped_mix(p[..., : tile.columns.stop], v[:, :, tile.columns])
            outputs.append(output.div_(torch.where(total == 0, 1.0, total)))
            sums.append(torch.where(total == 0, 0.0, total.log2() + top))
        output = torch.cat(outputs, 2)
        ctx.save_for_backward(q, k, v, output, torch.cat(sums, 2))
        ctx.matrix, ctx.options, ctx.observe = matrix, (scale, softcap), observe
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v, and pass those of far keys and values to the callback from `observe`."""
        q, k, v, output, lse = ctx.saved_tensors
        (grad,), groups, (scale, softcap) = gradients, k.shape[1], ctx.options
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        add, scaled = ctx.observe(k.detach(), v.detach()), q * scale
        dots = (grad * output).sum(-1, keepdim=True)
        asking = scaled if softcap else scaled * BITS
        for tile in ctx.matrix:
            rows, columns = tile.rows, tile.columns
            logits = _logits(asking[:, :, rows], k[:, :, columns], softcap)
            slope = 1 - (logits / (softcap * BITS)) ** 2 if softcap else None
            p = tile.add_mask(logits).sub_(lse[:, :, rows]).exp2_()
            part = grad[:, :, rows]
            d_s = attention.grouped_scores(part, v[:, :, columns]).sub_(dots[:, :, rows]).mul_(p)
            d_s = d_s if slope is None else d_s.mul_(slope)
            d_q[:, :, rows] = attention.grouped_mix(d_s, k[:, :, columns])
            to_keys, to_values = _to_keys(d_s, scaled[:, :, rows], groups), _to_keys(p, part, groups)
            d_k[:, :, columns] += to_keys
            d_v[:, :, columns] += to_values
            if tile.reached:
                some = tile.some
                for gradient, weights, of_rows in ((to_keys, d_s, scaled[:, :, rows]), (to_values, p, part)):
                    gradient[:, :, some] = _to_keys(weights[..., some] * tile.of_some, of_rows, groups)
                    gradient[:, :, tile.none] = 0.0
                add(to_keys[:, :, : tile.reached], to_values[:, :, : tile.reached])
        return d_q.mul_(scale), d_k, d_v, None, None, None, None, None


def _logits(q: Tensor, k: Tensor, softcap: float) -> Tensor:
    """Return logits [B,H,S,T] in bits, without a mask; queries are scaled, and in bits unless there is a softcap."""
    logits = attention.grouped_scores(q, k)
    return logits.div_(softcap).tanh_().mul_(softcap * BITS) if softcap else logits


def _to_keys(weights: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Sum over queries and over the heads of a group: weights [B,H,S,T], rows [B,H,S,D] -> [B,G,T,D]."""
    b, h, s, t = weights.shape
    grouped = weights.reshape(b, groups, h // groups * s, t)
    return grouped.mT @ rows.reshape(b, groups, h // groups * s, rows.shape[-1])
