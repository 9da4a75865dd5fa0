"""Views of a KV cache for attention: packed latents, residual window, attention sinks, page index.

A cache orders its tokens as [sinks | quantized tokens | window, new tokens]. Sinks, window and new tokens are open:
their keys and values are available. Quantized tokens are packed latents, one row each. An 8-bit window is part of
`SideRows`; the other open tokens are exact. `CacheView` and `StaticLatents` map slots to parts: `split` divides
per-slot data among open tokens and latents, `place` joins it. Tokens are in position order, except in left-padded
sequences: `by_place` and `by_position` convert between slot order and position order.

Letters: B batch, G kv heads, J latent heads, T all tokens, N open tokens (exact ones included), M tokens of the 8-bit
window, V packed latents, D head size, R latent width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fhopt.attention.sketches import PageIndex
from fhopt.attention.token_places import TokenPlaces
from fhopt.ops import algebra, packing
from fhopt.ops import masks as ops_masks
from fhopt.plan.segment_rotation import SegmentRotation


@dataclass(frozen=True, eq=False)
class SideRows:
    """Packed latents of keys or of values, their decoder, and the 8-bit window.

    bit_groups: empty for unquantized latents. rows: quantized values uint8 [B,J,V,bytes] with scale float16 [B,J,V], or
    unquantized latents [B,J,V,R] without a scale. decode [G,D,R]. window: quantized values uint8 [B,G,M,D] and scales
    float16 [B,G,M] from `ops.packing.round_rows`; None: the window is exact. mean: float32 [B,G,1,D], subtracted from
    latents and 8-bit window; None: no mean. rotation: of keys relative to segments, the first row having index `first`
    after the attention sinks; None: keys in absolute positions.
    """

    bit_groups: algebra.BitGroups
    rows: Tensor
    scale: Tensor | None
    decode: Tensor
    window: tuple[Tensor, Tensor] | None = None
    mean: Tensor | None = None
    rotation: SegmentRotation | None = None
    first: int = 0

    @property
    def rounded(self) -> int:
        """M; 0 if the window is exact."""
        return 0 if self.window is None else self.window[0].shape[2]

    def open(self, exact: Tensor, sinks: int) -> Tensor:
        """Return all open tokens [B,G,N,D]: the exact ones, with the window inserted after the first `sinks`."""
        if self.window is None:
            return exact
        window = packing.unround_rows(*self.window, exact.dtype if self.mean is None else torch.float32)
        if self.mean is not None:
            window = (window + self.mean).to(exact.dtype)
        return torch.cat([exact[:, :, :sinks], window, exact[:, :, sinks:]], 2)

    def unpacked(self, part: slice | None = None) -> Tensor:
        """Unpack the latents [B,J,V,R] of all rows, or of a slice."""
        rows, scale = self.rows, self.scale
        if part is not None:
            rows, scale = rows[:, :, part], None if scale is None else scale[:, :, part]
        return rows if scale is None else torch.ops.fhopt.unpack(rows, scale, *self.bit_groups)

    def reconstruct(self) -> Tensor:
        """Reconstruct the keys or values of quantized tokens from their latents: [B,G,V,D]."""
        dtype = algebra.product_dtype(self.decode.dtype, self.decode.device)
        decoded = algebra.decode(self.unpacked().to(dtype), self.decode.to(dtype))
        if self.mean is not None:
            decoded = decoded + self.mean  # float32: a mean may be much larger than the differences
        if self.rotation is not None:
            places = torch.arange(decoded.shape[2], device=decoded.device) + self.first
            decoded = self.rotation.absolute(decoded, places)
        return decoded.to(self.decode.dtype)

    @property
    def turning(self) -> tuple[Tensor, Tensor, int] | None:
        """Rotated channels, cosines and sines of all segments, and tokens per segment; None: no rotation."""
        return None if self.rotation is None else self.rotation.of_tokens(self.rows.shape[2])

    def part(self, start: int, stop: int) -> SideRows:
        """Return a range of the rows."""
        scale = None if self.scale is None else self.scale[:, :, start:stop]
        first = self.first + start if self.rotation is not None else 0
        return replace(self, rows=self.rows[:, :, start:stop], scale=scale, first=first)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Ordered:
    """Base of views with one entry per token. order: slots of the tokens; None: slots are positions."""

    order: TokenPlaces | None = None

    def by_place(self, x: Tensor) -> Tensor:
        """Reorder per-token data [..., T] from position order to slot order."""
        return x if self.order is None else self.order.by_place(x)

    def by_position(self, x: Tensor, dim: int) -> Tensor:
        """Reorder per-slot data along `dim` to position order: the inverse of `by_place`."""
        return x if self.order is None else self.order.by_position(x, dim)


@dataclass(frozen=True, eq=False)
class CacheView(_Ordered):
    """View of a dynamic cache: `visible` quantized tokens, after the first `sinks` open tokens.

    index: selects pages; None: attention uses all pages. observer: called before attention, which then uses all pages
    (fhopt/refine/page_probes.py).
    """

    key: SideRows
    value: SideRows
    sinks: int
    visible: int
    index: PageIndex | None = None
    observer: Callable[..., None] | None = None

    @property
    def lengths(self) -> None:
        """None: every row holds a token."""
        return None

    def length(self, exact: Tensor) -> int:
        """Return T, the number of tokens. exact: the exact ones [B,G,_,D]."""
        return self.visible + self.key.rounded + exact.shape[2]

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Split per-token data in slot order, [..., T], into [..., N] of open tokens and [..., V] of latents.

        fill: unused; every slot has a token.
        """
        end = self.sinks + self.visible
        return torch.cat([x[..., : self.sinks], x[..., end:]], -1), x[..., self.sinks : end]

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """Join data of open tokens and of latents along `dim`, in slot order: the inverse of `split`."""
        first, rest = opened.narrow(dim, 0, self.sinks), opened.narrow(dim, self.sinks, opened.shape[dim] - self.sinks)
        return torch.cat([first, latent.to(opened.dtype), rest], dim)

    def causal(self, queries: int, exact: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return causal masks of the newest `queries` tokens: (over open tokens [S,N], over latents)."""
        count = self.key.rounded + exact.shape[2]
        return (ops_masks.causal_mask(queries, count, exact.device) if queries > 1 else None), None


@dataclass(frozen=True, eq=False)
class StaticLatents(_Ordered):
    """View of a static cache, in which tensors say which slots hold tokens.

    positions [N]: of the open slots, -1 for an empty one. seen: which rows are attended (row r is token `sinks` + r):
    bool [V], or int64 [], the number of leading rows. tokens: T, slots of the cache; each has a score, 0 if empty.
    index: selects pages; None: attention uses all pages.
    """

    key: SideRows
    value: SideRows
    sinks: int
    positions: Tensor
    seen: Tensor
    tokens: int
    index: PageIndex | None = None

    @property
    def lengths(self) -> Tensor | None:
        """Number of leading rows that hold tokens, int64 []; None if `seen` is a mask."""
        return None if self.seen.dtype == torch.bool else self.seen

    def seen_rows(self) -> Tensor:
        """Return which rows hold tokens, bool [V]."""
        rows = self.key.rows.shape[2]
        return self.seen if self.lengths is None else torch.arange(rows, device=self.seen.device) < self.seen

    def length(self, exact: Tensor) -> int:
        """Return T, the number of slots."""
        return self.tokens

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Split per-slot data, [..., T], into [..., N] of open slots and [..., V] of latents.

        fill: value for empty slots.
        """
        opened = x.index_select(-1, self.positions.clamp(min=0)).masked_fill(self.positions < 0, fill)
        rows = x[..., self.sinks : self.sinks + self.key.rows.shape[2]]
        return opened, rows.masked_fill(~self.seen_rows(), fill)

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """Join data of open slots and of latents along `dim`: the inverse of `split`."""
        shape = list(opened.shape)
        shape[dim] = self.tokens + 1  # the last entry takes data of empty slots
        whole, rows = opened.new_zeros(shape), self.key.rows.shape[2]
        if rows:
            whole.narrow(dim, self.sinks, rows).copy_(latent)
        whole.index_copy_(dim, torch.where(self.positions < 0, self.tokens, self.positions), opened)
        return whole.narrow(dim, 0, self.tokens)

    def causal(self, queries: int, exact: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return causal masks of the newest `queries` tokens: (over open slots [S,N], over latents [S,V])."""
        asking = self.positions[-queries:, None]
        far = self.seen.expand(queries, -1) if self.lengths is None else None
        return (self.positions >= 0) & (self.positions <= asking), far


AnyLatents = CacheView | StaticLatents
