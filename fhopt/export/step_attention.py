"""Attention of an exported decode step at one site, in operations that torch.export and MLIR support.

Dimensions: B batch, H query heads, G kv heads, J latent heads, S new tokens, N slots of sinks and recent window, T
slots of quantized tokens, D and E head sizes, R latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fhopt.ops import algebra, packing
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan

_MASKED = -1e30  # a logit whose weight is 0; unlike -inf it never gives NaN
_HALF_EXPONENTS = [2.0 ** (e - 25) for e in range(32)]


@dataclass(frozen=True)
class StateTensor:
    """Name, shape and dtype of a tensor of the state. `shape` has None for T."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def empty(self, rows: int) -> Tensor:
        """Allocate zeros with capacity for `rows` quantized tokens."""
        return torch.zeros([rows if n is None else n for n in self.shape], dtype=self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes per quantized token; 0 for a tensor of fixed size."""
        if None not in self.shape:
            return 0
        return math.prod(n for n in self.shape if n is not None) * self.dtype.itemsize


def state_tensors(plan: LatentPlan, dtype: torch.dtype) -> list[StateTensor]:
    """List the state of every site in the order in which `ExportedStep` takes it."""
    tensors = []
    for site_plan in plan.sites:
        site, name = site_plan.site, site_plan.site.name
        for side, dim in (("key", site.key_dim), ("value", site.value_dim)):
            places = plan.window.first_length
            tensors.append(StateTensor(f"{name}.open_{side}", (1, site.kv_heads, places, dim), dtype))
        for side, one in _row_sides(site_plan):
            width = one.row_bytes() if one.tiers else one.width
            kind = torch.uint8 if one.tiers else dtype
            tensors.append(StateTensor(f"{name}.{side}_rows", (1, one.groups, None, width), kind))
            if one.tiers:
                tensors.append(StateTensor(f"{name}.{side}_scale", (1, one.groups, None), torch.float16))
    return tensors


def _row_sides(site: SitePlan) -> list[tuple[str, SidePlan]]:
    """List the sides with packed latents of their own: one if keys and values share them."""
    return [("key", site.key)] if site.is_shared else [("key", site.key), ("value", site.value)]


# --------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Rows:
    """Packed latents [B,J,T,...] of one side, their scales, and the decoder [G,D,R] as a tensor of the graph."""

    plan: SidePlan
    rows: Tensor
    scale: Tensor | None
    decode: Tensor


class SiteAttention(nn.Module):
    """Attention of one site over its state and the new tokens. `kernel`: name of the C++ kernel, "" for torch ops."""

    def __init__(self, site: SitePlan, plan: LatentPlan, kernel: str = "") -> None:
        super().__init__()
        self.site, self.sinks, self.kernel = site, plan.sinks, kernel
        for side in ("key", "value"):
            one = getattr(site, side)
            self.register_buffer(f"{side}_decode", one.decode.clone())
            self.register_buffer(f"{side}_encode", one.encode.clone())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, counts: Tensor, state: Sequence[Tensor], scale: float
    ) -> Tensor:
        """Attend with query [B,H,S,D], new key and value [B,G,S,D], causally: [B,H,S,E] in float32."""
        window_key, window_value, *rows = state
        rows_of_key, rows_of_value = self._rows(rows)
        query = query.float() * scale
        near_logits = self._window_logits(
            query, torch.cat([window_key, key], 2).float(), counts[0], window_key.shape[2]
        )
        values = torch.cat([window_value, value], 2).float()
        if self.kernel:
            return self._attend_by_kernel(query, near_logits, values, counts[1], rows_of_key, rows_of_value)
        far_logits = self._latent_logits(query, rows_of_key, counts[1])
        top = torch.maximum(near_logits.amax(-1, keepdim=True), far_logits.amax(-1, keepdim=True))
        near, far = torch.exp(near_logits - top), torch.exp(far_logits - top)
        total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
        mixed = algebra.expand(self._mix(far, rows_of_value), rows_of_value.decode)
        return (_grouped(near, values) + mixed) / total

    def _rows(self, rows: Sequence[Tensor]) -> tuple[_Rows, _Rows]:
        pairs = []
        tensors = iter(rows)
        for _, side in _row_sides(self.site):
            pairs.append((next(tensors), next(tensors) if side.tiers else None))
        decoders: Any = (self.key_decode, self.value_decode)
        key = _Rows(self.site.key, *pairs[0], decoders[0])
        return key, _Rows(self.site.value, *pairs[-1], decoders[1])

    def _window_logits(self, query: Tensor, keys: Tensor, count: Tensor, places: int) -> Tensor:
        """Compute logits [B,H,S,N+S], masked for empty slots and for tokens after their query."""
        logits = _capped(_grouped(query, keys.transpose(-1, -2)), self.site.site.softcap)
        place = torch.arange(keys.shape[2], device=keys.device)
        row = torch.arange(query.shape[2], device=keys.device).unsqueeze(1)
        is_seen = torch.where(place < places, place < count, place - places <= row)  # [S, N+S]
        return torch.where(is_seen, logits, _MASKED)

    def _latent_logits(self, query: Tensor, rows: _Rows, count: Tensor) -> Tensor:
        """Compute logits [B,H,S,T] of quantized tokens: one matmul per bit group."""
        absorbed = algebra.absorb(query, rows.decode)
        parts: list[Tensor] = []
        scaled: list[Tensor] = []
        for channels, values, has_scale in _bit_groups(rows):
            logits = _grouped(absorbed[..., channels], values.transpose(-1, -2))
            (scaled if has_scale else parts).append(logits)
        if scaled:
            assert rows.scale is not None
            parts.append(_sum(scaled) * _per_head(rows.scale, query.shape[1]))
        logits = _capped(_sum(parts), self.site.site.softcap)
        place = torch.arange(logits.shape[-1], device=logits.device)
        return torch.where(place < count, logits, _MASKED)

    def _mix(self, weights: Tensor, rows: _Rows) -> Tensor:
        """Sum the latents of values by attention weights: [B,H,S,T] -> [B,H,S,R]."""
        heads = weights.shape[1]
        scaled = weights if rows.scale is None else weights * _per_head(rows.scale, heads)
        parts = [_grouped(scaled if has_scale else weights, values) for _, values, has_scale in _bit_groups(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _attend_by_kernel(
        self, query: Tensor, near_logits: Tensor, values: Tensor, count: Tensor, keys: _Rows, mixed: _Rows
    ) -> Tensor:
        """Attend to quantized tokens with the C++ kernel, and merge the result with attention to the window."""
        absorbed = algebra.absorb(query, keys.decode)
        latent, lse = torch.ops.fhopt.latent_kernel(
            self.kernel, absorbed, keys.rows, keys.scale, mixed.rows, mixed.scale, None, count, None, 0, 1.0,
            self.site.site.softcap, mixed.plan.width,
        )  # fmt: skip
        near_lse = torch.logsumexp(near_logits, -1)
        near = _grouped(torch.exp(near_logits - near_lse.unsqueeze(-1)), values)
        return algebra.merge([(near, near_lse), (algebra.expand(latent, mixed.decode), lse)])

    def quantize(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """Encode keys and values [B,G,n,D] to packed latents and scales, or to unquantized latents."""
        encoders: Any = {"key": self.key_encode, "value": self.value_encode}
        inputs = {"key": torch.cat([key, value], -1) if self.site.is_shared else key, "value": value}
        rows: list[Tensor] = []
        for side, one in _row_sides(self.site):
            latent = algebra.encode(inputs[side].float(), encoders[side])
            rows += list(_packed(latent, one)) if one.tiers else [latent.to(key.dtype)]
        return rows


def _packed(latent: Tensor, side: SidePlan) -> tuple[Tensor, Tensor]:
    return packing.pack_reference(latent, *algebra.bit_groups(side))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _sum(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _per_head(scale: Tensor, heads: int) -> Tensor:
    """Expand scales [B,J,T] to float32 [B,H,1,T]."""
    return scale.float().repeat_interleave(heads // scale.shape[1], 1).unsqueeze(2)


def _grouped(rows: Tensor, latents: Tensor) -> Tensor:
    """Multiply [B,H,S,m] x [B,J,m,n] -> [B,H,S,n] by one bmm: for a dynamic n, matmul copies `latents` per head."""
    b, h, s, m = rows.shape
    j, n = latents.shape[1], latents.shape[3]
    return torch.bmm(rows.reshape(b * j, h // j * s, m), latents.flatten(0, 1)).view(b, h, s, n)


def _bit_groups(rows: _Rows) -> Iterator[tuple[slice, Tensor, bool]]:
    """Yield (channels, dequantized values [B,J,T,width] before the token's scale, whether they have one) of each group.

    Quantized values stay bytes until the last operation, which compilers fuse with the matmul that uses them.
    """
    if not rows.plan.tiers:
        yield slice(0, rows.plan.width), rows.rows.float(), False
        return
    byte = channel = 0
    for tier in rows.plan.tiers:
        size = tier.bits * tier.width // 8
        piece = rows.rows[..., byte : byte + size]
        channels = slice(channel, channel + tier.width)
        if tier.bits == 16:
            yield channels, _halves(piece), False
        else:
            yield channels, (_quantized_values(piece, tier.bits).float() - (2**tier.bits - 1) / 2) * tier.step, True
        byte, channel = byte + size, channel + tier.width


def _quantized_values(piece: Tensor, bits: int) -> Tensor:
    """Unpack bit planes [..., W*bits/8] to int32 [..., W], by operations that every compiler supports."""
    values: Tensor | None = None
    start, widths = 0, packing.planes(bits)
    count = piece.shape[-1] // bits  # bytes of a 1-bit plane
    for width in widths:
        plane = _lanes(piece[..., start : start + count * width].int(), width)
        values = plane if values is None else (values << width) | plane
        start += count * width
    assert values is not None
    return values


def _lanes(plane: Tensor, width: int) -> Tensor:
    """Split bytes [..., n], int32, into fields [..., n * 8/width] of `width` bits, low-order ones first."""
    if width == 8:
        return plane
    lanes = [(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(lanes, -1).flatten(-2)


def _halves(piece: Tensor) -> Tensor:
    """Convert bytes [..., 2n] of float16 to float32 [..., n] by arithmetic: few compilers support views of bytes."""
    low, high = piece.unflatten(-1, (-1, 2)).int().unbind(-1)
    exponent, fraction = (high >> 2) & 31, ((high & 3) * 256 + low).float()
    table = torch.tensor(_HALF_EXPONENTS, device=piece.device)
    size = torch.where(exponent == 0, fraction * 2.0**-24, (fraction + 1024) * table[exponent.long()])
    return torch.where(high >= 128, -size, size)
