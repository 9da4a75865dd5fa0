"""Layout of a module's K/V buffer: slots in the latent cache, and order of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fhopt.plan.site_plan import SitePlan
from fhopt.plan.window import ResidualWindow


@dataclass(frozen=True)
class Places:
    """Location of the tokens of a buffer of `tokens` slots in a latent cache."""

    tokens: int
    window: ResidualWindow

    @property
    def packed(self) -> int:
        """Number of slots with a packed latent."""
        return self.tokens - self.window.sinks

    @property
    def numbers(self) -> tuple[int, ...]:
        """Arguments of `of`, in the order that saved graphs use for their nodes."""
        window = self.window
        return self.tokens, window.sinks, window.recent, window.block, window.bits

    @staticmethod
    def of(numbers: Sequence[int]) -> Places:
        """Inverse of `numbers`."""
        return Places(numbers[0], ResidualWindow(*numbers[1:]))


@dataclass(frozen=True, eq=False)
class BufferPair:
    """How a pair of buffers is stored: the site's plan, the places, and which buffer axes are B, G, T and D."""

    site: SitePlan
    places: Places
    key_axes: tuple[int, ...]
    value_axes: tuple[int, ...]

    def in_order(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return buffers as [B,G,T,D]."""
        return keys.permute(self.key_axes), values.permute(self.value_axes)

    def in_place(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return tensors [B,G,T,D] in the axis order of the buffers, the inverse of `in_order`."""
        back = [sorted(range(4), key=axes.__getitem__) for axes in (self.key_axes, self.value_axes)]
        return keys.permute(back[0]), values.permute(back[1])
