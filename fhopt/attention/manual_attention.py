"""Attention spelled out in torch operations, on latents: scores, weighted sums, reconstructed keys and values.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T all tokens, N open tokens, V packed latents,
D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents, SideRows
from fhopt.ops import algebra, attention

TILE = 1024  # tokens that are unpacked at a time


def latent_logits(query: Tensor, latents: AnyLatents, *, scale: float, softcap: float = 0.0) -> Tensor:
    """Compute logits of all quantized tokens: query [B,H,S,D] -> [B,H,S,V], float32 or more exact."""
    queries = algebra.absorb(query, latents.key.decode)
    exact = torch.promote_types(query.dtype, torch.float32)
    tiles = [attention.grouped_scores(queries.to(exact) * scale, tile.to(exact)) for _, tile in _tiles(latents.key)]
    logits = torch.cat(tiles, -1)
    if latents.key.mean is not None:
        logits = logits + scale * algebra.mean_logits(query, latents.key.mean).to(exact).unsqueeze(-1)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def scores(query: Tensor, key: Tensor, latents: AnyLatents) -> Tensor:
    """Compute q k^T for all tokens in order of position: query [B,H,S,D], exact keys [B,G,_,D] -> [B,H,S,T]."""
    side = latents.key
    near = attention.grouped_scores(query, side.open(key, latents.sinks))
    queries = algebra.absorb(query, side.decode)
    tiles = [attention.grouped_scores(queries, tile.to(queries.dtype)) for _, tile in _tiles(side)]
    far = torch.cat(tiles, -1) if tiles else near[..., :0]
    if side.mean is not None:
        far = (far + algebra.mean_logits(query, side.mean).unsqueeze(-1)).to(near.dtype)
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


def _tiles(side: SideRows) -> Iterator[tuple[slice, Tensor]]:
    """Unpack latents a tile at a time, never all of them at once: places, and numbers [B,J,TILE,R]."""
    for start in range(0, side.rows.shape[2], TILE):
        part = slice(start, start + TILE)
        yield part, side.unpacked(part)


def reconstructed(exact: Tensor, side: SideRows, latents: AnyLatents) -> Tensor:
    """Reconstruct all keys or values [B,G,T,D], in order of position, from the exact ones and the latents."""
    return latents.by_position(latents.place(side.open(exact, latents.sinks), side.reconstruct(), 2), 2)
