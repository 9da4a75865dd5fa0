"""Slots of tokens in a cache with left padding: each sequence has its own first tokens as attention sinks.

A cache stores the tokens in its first slots exactly. In a sequence with p padding tokens, token p + i is therefore
swapped with the content of slot i, for i = 0, 1, ... n - 1 in this order:

    p = 3, n = 2    tokens  . . . a b c d    ->    slots  a b . . . c d     of tokens 3 4 2 0 1 5 6

All tokens stay in the cache, so attention is unchanged with any mask in slot order.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Permutation of a sequence's tokens to slots.

    padding: p and n of each sequence, int64 [B,1,2]. reach: slots from here on hold the token of the same index; at
    least the largest p + n, at most T.
    """

    padding: Tensor
    reach: int

    def tokens(self) -> Tensor:
        """Return the index of the token in each of the first `reach` slots, int64 [B,reach]."""
        place = torch.arange(self.reach, device=self.padding.device)
        ahead, own = self.padding.unbind(-1)  # [B,1]
        behind_sinks = torch.where(place < ahead + own, place % ahead.clamp(min=1), place)
        return torch.where(place < own, place + ahead, behind_sinks)

    def by_place(self, x: Tensor, dim: int = -1) -> Tensor:
        """Reorder per-token data from position order to slot order along `dim`.

        x: up to 4 dimensions, the first of 4 being B or 1, T along `dim` -> 4 dimensions, the first B.
        """
        x = x[(None,) * (4 - x.dim())]
        x = x.expand(self.padding.shape[0], -1, -1, -1)
        first, rest = x.split([self.reach, x.shape[dim] - self.reach], dim)
        return torch.cat([torch.take_along_dim(first, self._index(dim), dim), rest], dim)

    def by_position(self, x: Tensor, dim: int) -> Tensor:
        """Reorder per-token data, 4 dimensions, B first, from slot order to position order."""
        first, rest = x.split([self.reach, x.shape[dim] - self.reach], dim)
        return torch.cat([first.scatter(dim, self._index(dim).expand_as(first), first), rest], dim)

    def _index(self, dim: int) -> Tensor:
        shape = [self.padding.shape[0], 1, 1, 1]
        shape[dim] = self.reach
        return self.tokens().view(shape)
