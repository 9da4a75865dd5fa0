"""How many tokens a block of each of a layer's caches has.

vLLM lends blocks of one size from one pool. Three caches share it: packed latents of all tokens, the residual window,
and what is kept of a sequence's first tokens (attention sinks and means). A block belongs to one cache, for all layers;
where the tokens of all layers do not fit, vLLM splits the layers over several groups, with blocks of their own. Block
sizes are chosen so that blocks are full and a request takes the fewest bytes.

A prefix of another request is found in multiples of the block of first tokens, which is a multiple of both others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from fhopt.plan.window import ResidualWindow

LATENT_TOKENS = range(16, 161)  # of a block of packed latents, that are tried
WINDOW_TOKENS = (4, 8, 12, 16, 24, 28, 32, 48, 64, 96, 128)
MOST_GROUPS = 8  # of layers, over all caches: each costs the scheduler time
CLOSE = 0.002  # of bytes, in which block sizes count as equal
MOST_ALIGNMENT = 512  # tokens: prefixes are found in multiples of it, or of the first tokens that a plan needs


@dataclass(frozen=True)
class CacheNeeds:
    """What a model with a plan keeps, in bytes and tokens.

    layers: how many. latent_bytes: of a token's packed latents, over all layers. window_bytes: of a token in the
    residual window, of one layer. first_bytes: of attention sinks and means of a sequence, of one layer. window: which
    tokens it holds. first: tokens at the start of a sequence that sinks and means are made of. tokens: of the longest
    sequence.
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
    """Tokens of a block of packed latents, of the residual window, and of the first tokens."""

    latents: int
    window: int
    first: int

    @property
    def alignment(self) -> int:
        """Tokens of which the prefix that is found of another request is a multiple."""
        return math.lcm(self.latents, self.window, self.first)


def choose(needs: CacheNeeds, latents: int | None = None) -> BlockSizes:
    """Choose the block sizes with which a request of `needs.tokens` tokens takes the fewest bytes, or nearly so.

    latents: tokens of a block of packed latents where that is given. Sizes whose least common multiple is large, or
    that need many groups of layers, are taken only where there are no others. Of those that are equal but for CLOSE,
    the ones with the largest common divisor are taken: a prefix is hashed in pieces of it.
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
    """Return the bytes of a block: the packed latents of all layers, and at least one layer of the other caches."""
    return max(needs.latent_bytes * sizes.latents, needs.window_bytes * sizes.window, needs.first_bytes)


def window_blocks(window: ResidualWindow, size: int) -> int:
    """Return how many blocks of `size` tokens a residual window touches at most, wherever it stands."""
    starts = [window.sinks + i * window.block for i in range(size // math.gcd(window.block, size))]
    return max((start + window.capacity - 1) // size - start // size + 1 for start in starts)


def _groups(needs: CacheNeeds, sizes: BlockSizes) -> tuple[int, int]:
    """Return over how many groups the layers' windows, and their first tokens, are spread."""
    block = block_bytes(needs, sizes)
    in_a_block = [max(1, block // page) for page in (needs.window_bytes * sizes.window, needs.first_bytes)]
    window, first = (-(-needs.layers // layers) for layers in in_a_block)
    return window, first


def _is_awkward(needs: CacheNeeds, sizes: BlockSizes) -> bool:
    many = sum(_groups(needs, sizes)) > MOST_GROUPS
    return many or sizes.alignment > max(MOST_ALIGNMENT, _multiple(MOST_ALIGNMENT // 4, needs.first))


def _multiple(of: int, least: int) -> int:
    return max(1, -(-least // of)) * of


def uneven(sizes: dict[str, int]) -> dict[str, int]:
    """Return sizes of rows by layer, of which some are larger than given: not all occur equally often.

    vLLM takes layers of which every size occurs equally often for a pattern that repeats, and splits all caches by it.
    The row that grows by the fewest bytes does.
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
