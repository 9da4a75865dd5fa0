"""Views of a KV cache that attention reads: packed latents, the residual window, attention sinks, pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.attention.sketches import PageIndex
from fhopt.ops import algebra, packing
from fhopt.ops import masks as ops_masks


@dataclass(frozen=True, eq=False)
class SideRows:
    """Latent rows of keys or values, as the canonical op takes them, and their decoder [G, D, R].

    window: codes [B,G,M,D] and scales [B,G,M] of open tokens in the window, as `ops.round_rows` gives them.
    """

    tiers: algebra.TierArguments
    rows: Tensor
    scale: Tensor | None
    decode: Tensor
    window: tuple[Tensor, Tensor] | None = None

    @property
    def rounded(self) -> int:
        """M."""
        return 0 if self.window is None else self.window[0].shape[2]

    def open(self, opened: Tensor, sinks: int) -> Tensor:
        """All open tokens [B,G,N,D], from those that are given as numbers."""
        if self.window is None:
            return opened
        window = packing.unround_rows(*self.window, opened.dtype)
        return torch.cat([opened[:, :, :sinks], window, opened[:, :, sinks:]], 2)

    def rebuild(self) -> Tensor:
        """Keys or values [B,G,V,D]: what the latents kept."""
        latent = self.rows if self.scale is None else torch.ops.fhopt.unpack(self.rows, self.scale, *self.tiers)
        return algebra.decode(latent.to(self.decode.dtype), self.decode)


@dataclass(frozen=True, eq=False)
class Latents:
    """Rows for `visible` tokens that stand behind the first `sinks` open ones and before the others.

    index: what pages of them are chosen by; None: all are read. observer: called before attention, which then reads all
    pages (fhopt/refine/page_probes.py).
    """

    key: SideRows
    value: SideRows
    sinks: int
    visible: int
    index: PageIndex | None = None
    observer: Callable[..., None] | None = None

    @property
    def lengths(self) -> None:
        """All rows stand for tokens."""
        return None

    def length(self, opened: Tensor) -> int:
        """T: all tokens. opened: those that are given as numbers."""
        return self.visible + self.key.rounded + opened.shape[2]

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """x [..., T], numbers of tokens in order of position -> [..., N] of the open ones, [..., V] of the latents."""
        end = self.sinks + self.visible
        return torch.cat([x[..., : self.sinks], x[..., end:]], -1), x[..., self.sinks : end]

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """The inverse of `split`, along `dim`."""
        first, rest = opened.narrow(dim, 0, self.sinks), opened.narrow(dim, self.sinks, opened.shape[dim] - self.sinks)
        return torch.cat([first, latent.to(opened.dtype), rest], dim)

    def causal(self, queries: int, opened: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Masks (open, latents) of the newest `queries` tokens where none is given: none sees what follows it."""
        count = self.key.rounded + opened.shape[2]
        return (ops_masks.causal_mask(queries, count, opened.device) if queries > 1 else None), None


@dataclass(frozen=True, eq=False)
class StaticLatents:
    """The same with fixed sizes: what stands where is told by tensors.

    positions [N]: of the open places, -1 where there is no token. seen: which rows stand for their token, which is
    `sinks` + row; bool [V], or int64 [], how many first ones. All T places have a score, those without a token 0.
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
        """How many first rows stand for tokens, where that is all there is to say."""
        return None if self.seen.dtype == torch.bool else self.seen

    def seen_rows(self) -> Tensor:
        """Bool [V]."""
        rows = self.key.rows.shape[2]
        return self.seen if self.lengths is None else torch.arange(rows, device=self.seen.device) < self.seen

    def length(self, opened: Tensor) -> int:
        """T: places."""
        return self.tokens

    def split(self, x: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """As above; `fill` where there is no token."""
        opened = x.index_select(-1, self.positions.clamp(min=0)).masked_fill(self.positions < 0, fill)
        rows = x[..., self.sinks : self.sinks + self.key.rows.shape[2]]
        return opened, rows.masked_fill(~self.seen_rows(), fill)

    def place(self, opened: Tensor, latent: Tensor, dim: int) -> Tensor:
        """As above."""
        shape = list(opened.shape)
        shape[dim] = self.tokens + 1  # the last for what is no token
        whole, rows = opened.new_zeros(shape), self.key.rows.shape[2]
        if rows:
            whole.narrow(dim, self.sinks, rows).copy_(latent)
        whole.index_copy_(dim, torch.where(self.positions < 0, self.tokens, self.positions), opened)
        return whole.narrow(dim, 0, self.tokens)

    def causal(self, queries: int, opened: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As above."""
        asking = self.positions[-queries:, None]
        far = self.seen.expand(queries, -1) if self.lengths is None else None
        return (self.positions >= 0) & (self.positions <= asking), far


AnyLatents = Latents | StaticLatents
