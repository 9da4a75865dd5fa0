"""The residual window of a KV cache: which tokens of a sequence are quantized, and which are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from torch import Tensor

    from fhopt.plan.site_plan import SitePlan


@dataclass(frozen=True)
class ResidualWindow:
    """Which tokens of a sequence a KV cache does not quantize: attention sinks and the residual window.

    sinks: first tokens, kept exact. recent: newest tokens that are never quantized. block: tokens that leave the window
    and are quantized at once. bits: 16 keeps tokens of the window as they come, 8 rounds them, with a scale for each
    token, head and side. Raises FhoptError for numbers that cannot be.
    """

    sinks: int
    recent: int
    block: int
    bits: int = 16

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1 or self.block < 1 or self.bits not in (8, 16):
            raise FhoptError(
                f"sinks={self.sinks}, recent={self.recent}, block={self.block}, window_bits={self.bits}: "
                "expected sinks of at least 0, recent and block of at least 1, and a window of 8 or 16 bits."
            )

    @property
    def capacity(self) -> int:
        """Tokens in the residual window at which its oldest block is quantized."""
        return self.recent + self.block

    @property
    def first_length(self) -> int:
        """Tokens of the shortest sequence of which a block is quantized."""
        return self.sinks + self.capacity

    @overload
    def quantized_tokens(self, tokens: int) -> int: ...

    @overload
    def quantized_tokens(self, tokens: Tensor) -> Tensor: ...

    def quantized_tokens(self, tokens: int | Tensor) -> int | Tensor:
        """Return how many of `tokens` cached tokens are quantized; of a number on a device, as one on it."""
        left = tokens - self.sinks - self.recent
        if isinstance(left, int):
            return max(0, left) // self.block * self.block
        from torch import Tensor  # late: sizes are checked before torch is imported

        left = left.clamp(min=0) if isinstance(left, Tensor) else max(0, left)
        return left // self.block * self.block

    def split(self, tokens: int) -> tuple[int, int, int]:
        """Return how many of `tokens` tokens are attention sinks, in the residual window, and quantized."""
        first, quantized = min(tokens, self.sinks), self.quantized_tokens(tokens)
        return first, tokens - first - quantized, quantized

    def bytes(self, tokens: int, sites: Iterable[SitePlan], itemsize: int = 2) -> int:
        """Return the bytes of attention sinks and residual window of `tokens` tokens, over all `sites`.

        itemsize: bytes of a number that is kept as it came.
        """
        sites = tuple(sites)
        first, newest, _ = self.split(tokens)
        exact = sum(site.window_bytes(16, itemsize) for site in sites)
        return first * exact + newest * sum(site.window_bytes(self.bits, itemsize) for site in sites)
