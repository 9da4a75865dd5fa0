"""The residual window of a KV cache: which tokens of a sequence are quantized, and which are not.

A layer with a sliding window of W tokens holds W - 1: with the query's own, these are what the next query sees. As long
as no token has left, it is a layer as any other. Then its attention sinks are quantized too, and blocks are dropped
that no query sees any more; of what it still holds, attention reads the newest W - 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SLIDING = 32  # tokens of the smallest sliding window of which a layer is compressed
MAX_WINDOW = 1 << 20  # tokens: static caches reserve memory for as many
RECENT_PART, BLOCK_PART = 4, 8  # a residual window takes at most 1/4 of a sliding one, a block 1/8


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
        is_size = 0 <= self.sinks <= MAX_WINDOW and all(1 <= n <= MAX_WINDOW for n in (self.recent, self.block))
        if not is_size or self.bits not in (8, 16):
            raise FhoptError(
                f"sinks={self.sinks}, recent={self.recent}, block={self.block}, window_bits={self.bits}: "
                f"expected sinks of at least 0, recent and block of at least 1, at most {MAX_WINDOW:,} tokens of each, "
                "and a window of 8 or 16 bits."
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

    def within(self, sliding: int) -> ResidualWindow:
        """Return the residual window of a layer with a sliding window of that many tokens, 0 for none."""
        if not sliding:
            return self
        recent, block = min(self.recent, sliding // RECENT_PART), min(self.block, sliding // BLOCK_PART)
        return replace(self, sinks=min(self.sinks, block), recent=recent, block=block)

    def without_sinks(self) -> ResidualWindow:
        """Return the same residual window of a cache that has no attention sinks."""
        return replace(self, sinks=0)

    def dropped(self, tokens: int, sliding: int) -> int:
        """Return how many of `tokens` tokens a layer with a sliding window, 0 for none, does not hold any more."""
        unseen = tokens - (sliding - 1) - self.sinks if sliding else -1  # behind the attention sinks
        return self.sinks + unseen // self.block * self.block if unseen >= 0 else 0

    def split(self, tokens: int, sliding: int = 0) -> tuple[int, int, int]:
        """Return how many of `tokens` tokens are held as attention sinks, in the residual window, and quantized.

        sliding: tokens of a sliding window, which this one is `within`; 0: none.
        """
        first, quantized = min(tokens, self.sinks), self.quantized_tokens(tokens)
        newest = tokens - first - quantized
        if sliding and tokens >= sliding:
            return 0, newest, first + quantized - self.dropped(tokens, sliding)
        return first, newest, quantized


COUNTED_AT = 8192  # tokens of a sequence, if no other number is stated
DEFAULT_WINDOW = ResidualWindow(sinks=16, recent=256, block=64, bits=8)  # of plans for 8,192 tokens
