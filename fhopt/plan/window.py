"""The residual window of a KV cache: which tokens of a sequence are quantized.

A layer with a sliding window of W tokens holds W - 1: with the query's own token, these are what the next query sees.
Until the first token leaves the window, it behaves like any other layer. Then its attention sinks are quantized too,
blocks that no query can see are dropped, and attention uses the newest W - 1 of the tokens that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SLIDING = 32  # tokens of the shortest sliding window that is compressed
MAX_WINDOW = 1 << 20  # tokens: static caches allocate this much
RECENT_PART, BLOCK_PART = 4, 8  # of a sliding window: residual window at most 1/4, block at most 1/8


@dataclass(frozen=True)
class ResidualWindow:
    """The tokens of a sequence that a KV cache does not quantize: attention sinks and residual window.

    sinks: number of first tokens, stored exactly. recent: number of newest tokens that are never quantized. block:
    tokens that leave the window and are quantized at once. bits: 16 stores the window unquantized, 8 rounds it, with a
    scale per token, head and side. Raises FhoptError for invalid values.
    """

    sinks: int
    recent: int
    block: int
    bits: int = 16

    def __post_init__(self) -> None:
        is_size = 0 <= self.sinks <= MAX_WINDOW and all(1 <= n <= MAX_WINDOW for n in (self.recent, self.block))
        if not is_size or self.bits not in (8, 16):
            raise FhoptError(
                f"sinks={self.sinks}, recent={self.recent}, block={self.block}, window_bits={self.bits} is "
                "invalid; expected sinks of at least 0, recent and block of at least 1, at most "
                f"{MAX_WINDOW:,} each, and window_bits of 8 or 16."
            )

    @property
    def capacity(self) -> int:
        """Tokens in the residual window at which its oldest block is quantized."""
        return self.recent + self.block

    @property
    def first_length(self) -> int:
        """Length of the shortest sequence with a quantized block."""
        return self.sinks + self.capacity

    @overload
    def quantized_tokens(self, tokens: int) -> int: ...

    @overload
    def quantized_tokens(self, tokens: Tensor) -> Tensor: ...

    def quantized_tokens(self, tokens: int | Tensor) -> int | Tensor:
        """Return how many of `tokens` cached tokens are quantized; a device tensor for a device tensor."""
        left = tokens - self.sinks - self.recent
        if isinstance(left, int):
            return max(0, left) // self.block * self.block
        from torch import Tensor  # deferred: sizes are checked before torch is imported

        left = left.clamp(min=0) if isinstance(left, Tensor) else max(0, left)
        return left // self.block * self.block

    def within(self, sliding: int) -> ResidualWindow:
        """Return the residual window of a layer with a sliding window of `sliding` tokens; 0: none."""
        if not sliding:
            return self
        recent, block = min(self.recent, sliding // RECENT_PART), min(self.block, sliding // BLOCK_PART)
        return replace(self, sinks=min(self.sinks, block), recent=recent, block=block)

    def without_sinks(self) -> ResidualWindow:
        """Return the residual window for a cache without attention sinks."""
        return replace(self, sinks=0)

    def dropped(self, tokens: int, sliding: int) -> int:
        """Return how many of `tokens` tokens fall out of a layer with a sliding window (0: none)."""
        unseen = tokens - (sliding - 1) - self.sinks if sliding else -1  # counted after the attention sinks
        return self.sinks + unseen // self.block * self.block if unseen >= 0 else 0

    def split(self, tokens: int, sliding: int = 0) -> tuple[int, int, int]:
        """Return how many of `tokens` tokens are in attention sinks, residual window, and quantized.

        sliding: size of a sliding window that this window is `within`; 0: none.
        """
        first, quantized = min(tokens, self.sinks), self.quantized_tokens(tokens)
        newest = tokens - first - quantized
        if sliding and tokens >= sliding:
            return 0, newest, first + quantized - self.dropped(tokens, sliding)
        return first, newest, quantized


COUNTED_AT = 8192  # default number of tokens for sizes
DEFAULT_WINDOW = ResidualWindow(sinks=16, recent=256, block=64, bits=8)  # default of plans for 8,192 tokens
