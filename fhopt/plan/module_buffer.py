"""Where a module's K/V buffer keeps tokens, and how its axes are arranged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fhopt.plan.site_plan import SitePlan


class Places(NamedTuple):
    """Where the tokens of a buffer of `tokens` slots stand in a cache of latents."""

    tokens: int
    sinks: int
    recent: int
    block: int
    window_bits: int

    @property
    def window(self) -> int:
        """Places of the ring."""
        return self.recent + self.block

    @property
    def rows(self) -> int:
        """Rows of latents."""
        return self.tokens - self.sinks

    def sealed(self, length: Tensor) -> Tensor:
        """`spec.sealed_tokens` of a number on the device."""
        return (length - self.sinks - self.recent).clamp(min=0) // self.block * self.block


@dataclass(frozen=True, eq=False)
class Held:
    """What stands for a pair of buffers: the plan, the places, and which axes of the buffers are B, G, T and D."""

    site: SitePlan
    places: Places
    key_axes: tuple[int, ...]
    value_axes: tuple[int, ...]

    def in_order(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers as [B,G,T,D]."""
        return keys.permute(self.key_axes), values.permute(self.value_axes)

    def in_place(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `in_order`."""
        back = [sorted(range(4), key=axes.__getitem__) for axes in (self.key_axes, self.value_axes)]
        return keys.permute(back[0]), values.permute(back[1])
