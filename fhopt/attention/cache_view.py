"""What attention reads of a KV cache: packed latents, residual window, attention sinks, page index.

A cache lays its tokens out as [sinks | quantized tokens | window, new tokens]. Sinks, window and new tokens are open,
their keys and values at hand; quantized tokens are packed latents, a row each. Where the window is rounded to 8 bits it
belongs to `SideRows`, and the other open tokens are exact. `Latents` and `StaticLatents` say which places are which:
`split` cuts what has a number for each place, `place` puts it together again. Tokens stand in order of position, but
for sequences that begin with padding: `by_place` and `by_position` lead from one order to the other.

Letters: B batch, G kv heads, J latent heads, T all tokens, N open tokens (of which exact ones are stored as they came),
M tokens of the window in 8 bits, V packed latents, D head size, R latent width.
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
    """Packed latents of keys or of values, and their decoder.

    bit_groups: none for uncoded latents. rows: quantized values uint8 [B,J,V,bytes] with scale float16 [B,J,V], or
    uncoded latents [B,J,V,R] without a scale. decode [G,D,R]. window: quantized values uint8 [B,G,M,D] and scales
    float16 [B,G,M] of the window in 8 bits, as from `ops.packing.round_rows`; None: the window is exact. mean: float32
    [B,G,1,D], from which latents and a window in 8 bits are differences; None: they are not. rotation: keys are
    relative to their segments, the first row being number `first` after the attention sinks; None: they are not.
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
        """M, 0 where the window is exact."""
        return 0 if self.window is None else self.window[0].shape[2]

    def open(self, exact: Tensor, sinks: int) -> Tensor:
        """Return all open tokens [B,G,N,D]: the exact ones, and those of the window behind the first `sinks`."""
        if self.window is None:
            return exact
        window = packing.unround_rows(*self.window, exact.dtype if self.mean is None else torch.float32)
        if self.mean is not None:
            window = (window + self.mean).to(exact.dtype)
        return torch.cat([exact[:, :, :sinks], window, exact[:, :, sinks:]], 2)

    def unpacked(self, part: slice | None = None) -> Tensor:
        """Return latents as numbers [B,J,V,R]: of all rows, or of a part of them."""
        rows, scale = self.rows, self.scale
        if part is not None:
            rows, scale = rows[:, :, part], None if scale is None else scale[:, :, part]
        return rows if scale is None else torch.ops.fhopt.unpack(rows, scale, *self.bit_groups)

    def reconstruct(self) -> Tensor:
        """Reconstruct the keys or values of quantized tokens from their latents: [B,G,V,D]."""
        dtype = algebra.product_dtype(self.decode.dtype, self.decode.device)
        decoded = algebra.decode(self.unpacked().to(dtype), self.decode.to(dtype))
        if self.mean is not None:
            decoded = decoded + self.mean  # in float32: a mean may be much larger than what is added
        if self.rotation is not None:
            places = torch.arange(decoded.shape[2], device=decoded.device) + self.first
            decoded = self.rotation.absolute(decoded, places)
        return decoded.to(self.decode.dtype)

    @property
    def turning(self) -> tuple[Tensor, Tensor, int] | None:
        """Channels that turn, cosines and sines of all segments, and tokens of one; None: keys are as they came."""
        return None if self.rotation is None else self.rotation.of_tokens(self.rows.shape[2])

    def part(self, start: int, stop: int) -> SideRows:
        """Return some of the rows."""
        scale = None if self.scale is None else self.scale[:, :, start:stop]
        first = self.first + start if self.rotation is not None else 0
        return replace(self, rows=self.rows[:, :, start:stop], scale=scale, first=first)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Ordered:
    """What has a number for each token of a cache. order: its places; None: those of their positions."""

    order: TokenPlaces | None = None

    def by_place(self, x: Tensor) -> Tensor:
        """Bring numbers of tokens [..., T] from order of position to order of places."""
        return x if self.order is None else self.order.by_place(x)

    def by_position(self, x: Tensor, dim: int) -> Tensor:
        """Bring numbers of places along `dim` to order of position: the inverse of `by_place`."""
        return x if self.order is None else self.order.by_position(x, dim)


@dataclass(frozen=True, eq=False)
class Latents(_Ordered):
    """Latents of a cache that grows: `visible` quantized tokens, behind the first `sinks` open tokens.

    index: by which pages are selected; None: all of them are read. observer: called before attention, which then reads
    all pages (fhopt/refine/page_probes.py).
    """

    key: SideRows
    value: SideRows
    sinks: int
    visible: int
    index: PageIndex | None = None
    observer: Callable[..., None] | None = None

    @property
    def lengths(self) -> None:
        """None: all rows stand for tokens."""
        return None

    def length(self, exact: Tensor) -> int:
        """Return T, the number of all tokens. exact: the exact ones [B,G,_,D]."""
        return self.visible + self.key.rounded + exact.shape[2]

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Split numbers of tokens in order of places, [..., T], into [..., N] of open tokens and [..., V] of latents.

        fill: not used; every place has a token.
        """
        end = self.sinks + self.visible
        return torch.cat([x[..., : self.sinks], x[..., end:]], -1), x[..., self.sinks : end]

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """Join numbers of open tokens and of latents along `dim`, in order of places: the inverse of `split`."""
        first, rest = opened.narrow(dim, 0, self.sinks), opened.narrow(dim, self.sinks, opened.shape[dim] - self.sinks)
        return torch.cat([first, latent.to(opened.dtype), rest], dim)

    def causal(self, queries: int, exact: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return causal masks of the newest `queries` tokens: (over open tokens [S,N], over latents)."""
        count = self.key.rounded + exact.shape[2]
        return (ops_masks.causal_mask(queries, count, exact.device) if queries > 1 else None), None


@dataclass(frozen=True, eq=False)
class StaticLatents(_Ordered):
    """Latents of a cache of fixed size, where tensors say which places hold tokens.

    positions [N]: of the open places, -1 where there is no token. seen: which rows stand for their token, which is
    `sinks` + row; bool [V], or int64 [], how many first ones. tokens: T, places of the cache; all of them have a score,
    those without a token 0. index: by which pages are selected; None: all of them are read.
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
        """How many first rows stand for tokens, int64 []; None where `seen` is a mask."""
        return None if self.seen.dtype == torch.bool else self.seen

    def seen_rows(self) -> Tensor:
        """Return which rows stand for tokens, bool [V]."""
        rows = self.key.rows.shape[2]
        return self.seen if self.lengths is None else torch.arange(rows, device=self.seen.device) < self.seen

    def length(self, exact: Tensor) -> int:
        """Return T, the number of places."""
        return self.tokens

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Split numbers of places, [..., T], into [..., N] of open places and [..., V] of latents.

        fill: what places without a token get.
        """
        opened = x.index_select(-1, self.positions.clamp(min=0)).masked_fill(self.positions < 0, fill)
        rows = x[..., self.sinks : self.sinks + self.key.rows.shape[2]]
        return opened, rows.masked_fill(~self.seen_rows(), fill)

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """Join numbers of open places and of latents along `dim`: the inverse of `split`."""
        shape = list(opened.shape)
        shape[dim] = self.tokens + 1  # the last one takes what belongs to no token
        whole, rows = opened.new_zeros(shape), self.key.rows.shape[2]
        if rows:
            whole.narrow(dim, self.sinks, rows).copy_(latent)
        whole.index_copy_(dim, torch.where(self.positions < 0, self.tokens, self.positions), opened)
        return whole.narrow(dim, 0, self.tokens)

    def causal(self, queries: int, exact: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return causal masks of the newest `queries` tokens: (over open places [S,N], over latents [S,V])."""
        asking = self.positions[-queries:, None]
        far = self.seen.expand(queries, -1) if self.lengths is None else None
        return (self.positions >= 0) & (self.positions <= asking), far


AnyLatents = Latents | StaticLatents
