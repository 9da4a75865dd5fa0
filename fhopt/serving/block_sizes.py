"""Tokens per block of each of a layer's caches.

vLLM allocates blocks of one size from one pool. Three caches share it: packed latents of all tokens, the residual
window, and the first tokens of a sequence (attention sinks and means). A block belongs to one cache, for all layers. If
the tokens of all layers do not fit, vLLM splits the layers into several groups with their own blocks. Block sizes are
chosen so that blocks are full and a request takes the fewest bytes.

Prefix hits are multiples of the block of first tokens, which is a multiple of both others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from fhopt.plan.window import ResidualWindow

LATENT_TOKENS = range(16, 161)  # candidates per block of packed latents
WINDOW_TOKENS = (4, 8, 12, 16, 24, 28, 32, 48, 64, 96, 128)
MAX_GROUPS = 8  # of layers, over all caches: each costs scheduler time
CLOSE = 0.002  # relative difference in bytes below which block sizes count as equal
MAX_ALIGNMENT = 512  # tokens: maximum granularity of prefix hits, unless the plan's first tokens need more


@dataclass(frozen=True)
class CacheNeeds:
    """Cache requirements of a model with a plan, in bytes and tokens.

    layers: number of layers. latent_bytes: per token of packed latents, over all layers. window_bytes: per token of the
    residual window, of one layer. first_bytes: attention sinks and means of a sequence, of one layer. window: the
    residual window. first: tokens at the start of a sequence used for sinks and means. tokens: maximum sequence length.
    """

    layers: int
    latent_bytes: int
    window_bytes: int
    first_bytes: int
    window: ResidualWindow
    first: int
    tokens: int


@dataclass(frozen=True)
class BlockSizes:
    """Tokens per block of packed latents, of the residual window, and of first tokens."""

    latents: int
    window: int
    first: int

    @property
    def alignment(self) -> int:
        """Granularity of prefix hits, in tokens."""
        return math.lcm(self.latents, self.window, self.first)


def choose_block_sizes(needs: CacheNeeds, latents: int | None = None) -> BlockSizes:
    """Choose the block sizes that (nearly) minimize the bytes of a request of `needs.tokens` tokens.

    latents: tokens per block of packed latents, if fixed. Avoids sizes with a large least common multiple, or that need
    many groups of layers. Of sizes within CLOSE of the minimum, those with the largest common divisor win: it is the
    hash granularity of prefixes.
    """
    sizes = [
        BlockSizes(n, w, _multiple(math.lcm(n, w), needs.first))
        for n in ([latents] if latents else LATENT_TOKENS)
        for w in WINDOW_TOKENS
    ]
    handy = [one for one in sizes if not _is_awkward(needs, one)] or sizes
    least = min(request_bytes(needs, one) for one in handy)
    close = [one for one in handy if request_bytes(needs, one) <= least * (1 + CLOSE)]
    return max(close, key=lambda one: (math.gcd(one.latents, one.window), one.latents, -one.alignment))


def request_bytes(needs: CacheNeeds, sizes: BlockSizes) -> int:
    """Return the bytes of the blocks that a request of `needs.tokens` tokens holds."""
    block = block_bytes(needs, sizes)
    window_groups, first_groups = _groups(needs, sizes)
    blocks = -(-needs.tokens // sizes.latents) + window_groups * window_blocks(needs.window, sizes.window)
    return (blocks + first_groups) * block


def block_bytes(needs: CacheNeeds, sizes: BlockSizes) -> int:
    """Return the bytes of a block: packed latents of all layers, and at least one layer of the other caches."""
    return max(needs.latent_bytes * sizes.latents, needs.window_bytes * sizes.window, needs.first_bytes)


def window_blocks(window: ResidualWindow, size: int) -> int:
    """Return the maximum number of blocks of `size` tokens that a residual window spans, for any offset."""
    starts = [window.sinks + i * window.block for i in range(size // math.gcd(window.block, size))]
    return max((start + window.capacity - 1) // size - start // size + 1 for start in starts)


def _groups(needs: CacheNeeds, sizes: BlockSizes) -> tuple[int, int]:
    """Return the numbers of groups into which the layers' windows and first tokens are split."""
    block = block_bytes(needs, sizes)
    in_a_block = [max(1, block // page) for page in (needs.window_bytes * sizes.window, needs.first_bytes)]
    window, first = (-(-needs.layers // layers) for layers in in_a_block)
    return window, first


def _is_awkward(needs: CacheNeeds, sizes: BlockSizes) -> bool:
    many = sum(_groups(needs, sizes)) > MAX_GROUPS
    return many or sizes.alignment > max(MAX_ALIGNMENT, _multiple(MAX_ALIGNMENT // 4, needs.first))


def _multiple(of: int, least: int) -> int:
    return max(1, -(-least // of)) * of


def uneven(sizes: dict[str, int]) -> dict[str, int]:
    """Return row sizes by layer, enlarging one if necessary so that not all sizes are equally frequent.

    If all sizes are equally frequent, vLLM assumes a repeating pattern of layers and splits all caches by it. The row
    that needs the fewest extra bytes is enlarged.
    """
    counts: dict[int, int] = {}
    for size in sizes.values():
        counts[size] = counts.get(size, 0) + 1
    ordered = sorted(counts)
    if len(counts) < 2 or len(set(counts.values())) > 1:
        return sizes
    smaller, larger = min(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    first = next(name for name, size in sizes.items() if size == smaller)
    return sizes | {first: larger}
