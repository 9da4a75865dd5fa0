"""The residual window: the newest tokens, not yet quantized to latents, exact or rounded to 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fhopt.cache.store import Store, Window
from fhopt.ops import packing


class OpenTokens(Store):
    """Open tokens of one side, [sinks | window], as they came: one part [B, G, N, D]."""

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        self.parts = (like[:, :, :0].clone(),)  # a view would keep the memory of `like`

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.parts[0].shape[0])

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2])

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sinks among `nbytes`."""
        return self.parts[0][:, :, : self.sinks].nbytes if self.parts else 0

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them."""
        return torch.cat([*self.parts, *new], 2) if new else self.parts[0]

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """The same as attention reads them: tokens as they came, and codes of those in the window."""
        return self.read(*new), None

    def keep(self, new: Tensor, sealed: int) -> None:
        """Hold new tokens too, without the `sealed` oldest of the window."""
        tokens = torch.cat([*self.parts, new], 2)
        if sealed:
            tokens = torch.cat([tokens[:, :, : self.sinks], tokens[:, :, self.sinks + sealed :]], 2)
        self.parts = (tokens,)

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window."""
        (held,) = self.parts
        self.parts = (torch.cat([held[:, :, : self.sinks], rebuilt.to(held.dtype), held[:, :, self.sinks :]], 2),)

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        self.parts = (self.parts[0][:, :, :count].clone(),)


class RoundedTokens(OpenTokens):
    """The same with a window of 8 bits: parts are sinks [B,G,N,D], codes uint8 [B,G,M,D] and their scales [B,G,M]."""

    def start(self, like: Tensor) -> None:
        """Hold no tokens, of the shape and dtype of `like`."""
        nothing = like[:, :, :0].clone()
        self.parts = (nothing, *packing.round_rows(nothing))

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.parts[0].shape[2] + self.parts[1].shape[2])

    def read(self, *new: Tensor) -> Tensor:
        """The tokens, and `new` ones behind them exactly as they came, in the dtype of the sinks."""
        sinks, codes, scale = self.parts
        return torch.cat([sinks, packing.unround_rows(codes, scale, sinks.dtype), *new], 2)

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """As above."""
        sinks, codes, scale = self.parts
        return (torch.cat([sinks, *new], 2) if new else sinks), (codes, scale)

    def keep(self, new: Tensor, sealed: int) -> None:
        """As above; only tokens that stay are rounded."""
        sinks, codes, scale = self.parts
        more_codes, more_scale = packing.round_rows(new[:, :, max(0, self.sinks + sealed - self.count) :])
        if sinks.shape[2] < self.sinks:  # and the window is empty
            sinks = torch.cat([sinks, new], 2)[:, :, : self.sinks].clone()
        codes = torch.cat([codes[:, :, sealed:], more_codes], 2)
        self.parts = (sinks, codes, _joined([scale[:, :, sealed:], more_scale]))

    def insert(self, rebuilt: Tensor) -> None:
        """Put tokens between sinks and window, rounded."""
        sinks, *window = self.parts
        more = packing.round_rows(rebuilt)
        self.parts = (sinks, *[_joined([new, old]) for new, old in zip(more, window, strict=True)])

    def crop(self, count: int) -> None:
        """Hold the first `count` tokens only."""
        sinks, *window = self.parts
        rest = max(0, count - self.sinks)
        self.parts = (sinks[:, :, :count].clone(), *[part[:, :, :rest].clone() for part in window])


def _joined(parts: list[Tensor]) -> Tensor:
    """Codes or scales, one behind the other; as integers, since autocast on a CPU cannot join float16."""
    if parts[0].dtype != torch.float16:
        return torch.cat(parts, 2)
    return torch.cat([part.contiguous().view(torch.int16) for part in parts], 2).view(torch.float16)


# --------------------------------------------------------------------------------------------------- static stores


class StaticTokens(Store):
    """Open tokens in fixed places: sinks [B,G,sinks+1,D] and a ring [B,G,window+1,D], or its codes and scales."""

    def __init__(self, sinks: int, window: int, bits: int) -> None:
        self.sinks, self.window, self.bits = sinks, window, bits

    def start(self, like: Tensor) -> None:
        """Reserve the places, of the shape and dtype of `like`."""
        blank = [like.new_zeros((*like.shape[:2], count + 1, like.shape[3])) for count in (self.sinks, self.window)]
        self.parts = tuple(blank) if self.bits == 16 else (blank[0], *packing.round_rows(blank[1]))

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.parts[0].shape[0])

    @property
    def sink_bytes(self) -> int:
        """Bytes of the sinks among `nbytes`."""
        return self.parts[0].nbytes if self.parts else 0

    def give(self, *new: Tensor) -> tuple[Tensor, Window]:
        """What stands in the places, sinks then ring, and `new` tokens behind, as attention reads them (see above)."""
        sinks, *ring = [part[:, :, :-1] for part in self.parts]
        if self.bits == 16:
            return torch.cat([sinks, *ring, *new], 2), None
        return torch.cat([sinks, *new], 2), (ring[0], ring[1])

    def write(self, tokens: Tensor, sink_places: Tensor, ring_places: Tensor) -> None:
        """Put tokens [B,G,S,D] into their places [S], the last place for those that have none."""
        window = (tokens,) if self.bits == 16 else packing.round_rows(tokens)
        self.parts[0].index_copy_(2, sink_places, tokens)
        for part, new in zip(self.parts[1:], window, strict=True):
            part.index_copy_(2, ring_places, new)
