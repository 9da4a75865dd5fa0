"""Attention on latents for models that compute it themselves: scores, weighted sums, reconstructed K/V.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T all tokens, N open tokens, V packed latents,
D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents, SideRows
from fhopt.ops import algebra, attention

TILE = 1024  # tokens unpacked at a time


def latent_logits(query: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0) -> Tensor:
    """Compute logits of all quantized tokens: query [B,H,S,D] -> [B,H,S,V], float32 or float64."""
    exact = torch.promote_types(query.dtype, torch.float32)
    logits = torch.cat(list(_logits(query, latents.key, exact, scale)), -1)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def scores(query: Tensor, key: Tensor, latents: AnyLatents) -> Tensor:
    """Compute q k^T for all tokens in position order: query [B,H,S,D], exact keys [B,G,_,D] -> [B,H,S,T]."""
    side = latents.key
    near = attention.grouped_scores(query, side.open(key, latents.sinks))
    tiles = list(_logits(query, side, query.dtype, 1.0))
    far = torch.cat(tiles, -1).to(near.dtype) if tiles else near[..., :0]
    return latents.by_position(latents.place(near, far, -1), -1)


def mix(weights: Tensor, value: Tensor, latents: AnyLatents) -> Tensor:
    """Compute p v over all tokens: weights [B,H,S,T], exact values [B,G,_,E] -> [B,H,S,E]."""
    near, far = latents.split(latents.by_place(weights))
    side = latents.value
    output = attention.grouped_mix(near, side.open(value, latents.sinks))
    total = sum(attention.grouped_mix(far[..., cut], tile.to(far.dtype)) for cut, tile in _tiles(side))
    if isinstance(total, int):
        return output
    if side.mean is not None:
        share = far.sum(-1, keepdim=True)
        output = output + (share * algebra.mean_outputs(side.mean, far.shape[1])).to(output.dtype)
    return output + algebra.expand(total, side.decode)


def _logits(query: Tensor, side: SideRows, dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    """Yield logits of quantized tokens, a tile at a time: query [B,H,S,D] -> [B,H,S,tokens]; matmuls in `dtype`."""
    turned, queries = query, algebra.absorb(query, side.decode)
    for part, tile in _tiles(side):
        if side.rotation is not None and (part.start or side.rotation.is_per_sequence):
            turned = side.rotation.rotate_query(query, part.start // side.rotation.segment)
            queries = algebra.absorb(turned, side.decode)
        logits = attention.grouped_scores(queries.to(dtype) * scale, tile.to(dtype))
        if side.mean is not None:
            logits = logits + scale * algebra.mean_logits(turned, side.mean).to(logits.dtype).unsqueeze(-1)
        yield logits


def _tiles(side: SideRows) -> Iterator[tuple[slice, Tensor]]:
    """Yield unpacked latents a tile at a time: slice of tokens, latents [B,J,tokens,R].

    With a segment rotation, each tile is one segment.
    """
    size = TILE if side.rotation is None else side.rotation.segment
    for start in range(0, side.rows.shape[2], size):
        part = slice(start, start + size)
        yield part, side.unpacked(part)


def reconstructed(exact: Tensor, side: SideRows, latents: AnyLatents) -> Tensor:
    """Reconstruct all keys or values [B,G,T,D], in position order, from exact tokens and latents."""
    return latents.by_position(latents.place(side.open(exact, latents.sinks), side.reconstruct(), 2), 2)
