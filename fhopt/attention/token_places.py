"""Places of tokens in a cache of sequences that begin with padding: each keeps its own first tokens as attention sinks.

A cache keeps exactly what stands in its first places. Of a sequence with p tokens of padding, token p + i therefore
changes places with what stands in place i, for i = 0, 1, ... n - 1 in turn:

    p = 3, n = 2    tokens  . . . a b c d    ->    places  a b . . . c d     of tokens 3 4 2 0 1 5 6

All tokens stay in the cache, so that attention is the same with a mask in order of places, whatever it shows.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Which token of a sequence stands in which place.

    padding: p and n of each sequence, int64 [B,1,2]. reach: from this place on, places hold tokens of the same number;
    at least the largest p + n, at most T.
    """

    padding: Tensor
    reach: int

    def tokens(self) -> Tensor:
        """Return the number of the token in each of the first `reach` places, int64 [B,reach]."""
        place = torch.arange(self.reach, device=self.padding.device)
        ahead, own = self.padding.unbind(-1)  # [B,1]
        behind_sinks = torch.where(place < ahead + own, place % ahead.clamp(min=1), place)
        return torch.where(place < own, place + ahead, behind_sinks)

    def by_place(self, x: Tensor, dim: int = -1) -> Tensor:
        """Bring numbers of tokens from order of position to order of places along `dim`.

        x: of up to four dimensions, the first of four B or 1, T along `dim` -> of four dimensions, the first B.
        """
        x = x[(None,) * (4 - x.dim())]
        x = x.expand(self.padding.shape[0], -1, -1, -1)
        first, rest = x.split([self.reach, x.shape[dim] - self.reach], dim)
        return torch.cat([torch.take_along_dim(first, self._index(dim), dim), rest], dim)

    def by_position(self, x: Tensor, dim: int) -> Tensor:
        """Bring numbers of tokens, of four dimensions, B first, from order of places to order of position."""
        first, rest = x.split([self.reach, x.shape[dim] - self.reach], dim)
        return torch.cat([first.scatter(dim, self._index(dim).expand_as(first), first), rest], dim)

    def _index(self, dim: int) -> Tensor:
        shape = [self.padding.shape[0], 1, 1, 1]
        shape[dim] = self.reach
        return self.tokens().view(shape)
