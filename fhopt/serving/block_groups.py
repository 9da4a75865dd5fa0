"""How vLLM counts, allocates and frees the blocks of the residual window and of a sequence's first tokens.

Packed latents use ordinary blocks, all of which are retained. Window blocks are freed when no later query uses them.
Blocks in the middle of a prompt that no later query will use are allocated only while the pool is mostly free, to allow
prefix caching, and are vLLM's null block otherwise. The first tokens have one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from fhopt.plan.window import ResidualWindow
from fhopt.serving.block_sizes import window_blocks

PLENTY = 2  # prompts retain all window blocks while more than 1/PLENTY of the pool stays free


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):  # type: ignore[misc]
    """Cache of a layer's residual window: unquantized or 8-bit tokens. `sliding_window`: its capacity."""

    window: ResidualWindow

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return the maximum number of blocks that a request holds between two steps."""
        return min(window_blocks(self.window, self.block_size), -(-max_model_len // self.block_size))


@dataclass(frozen=True, kw_only=True)
class FirstSpec(SlidingWindowSpec):  # type: ignore[misc]
    """Cache of a layer's first tokens: one page per request, in the block of its first tokens."""

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return 1, the page of first tokens."""
        return 1


class _Manager(SlidingWindowManager):  # type: ignore[misc]
    """Shared part of both managers: aligned hit lengths, and no matched blocks that are not retained."""

    @classmethod
    def reachable_block_mask(cls, *args: Any, **options: Any) -> None:
        """Return None: every allocated block can be a prefix hit."""
        return

    @classmethod
    def _hashes(cls, block_hashes: Any, block_pool: Any, spec: Any, alignment_tokens: int) -> Any:
        return resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, spec.block_size,
            supports_fine_grained_hash_lookup=False, alignment_tokens=alignment_tokens,
        )  # fmt: skip

    def _hold(self, blocks: list[Any], unused: int, lent: list[Any], behind: int = 0) -> list[Any]:
        """Append null blocks, allocated ones, and null blocks to a request; return the appended blocks."""
        new = [self._null_block] * unused + lent + [self._null_block] * behind
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in lent)
        return new


def _skipped(window: ResidualWindow, tokens: int) -> int:
    """Return how many first tokens no query from position `tokens` on uses from the window."""
    quantized = window.quantized_tokens(tokens)
    return min(tokens, window.sinks + quantized) if quantized else 0


class WindowManager(_Manager):
    """Manages blocks of a residual window."""

    def __init__(self, kv_cache_spec: WindowSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.window = kv_cache_spec.window
        self._cleared: dict[str, int] = {}  # number of leading blocks of each request that are freed

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return how many first tokens no query from `num_computed_tokens` on uses from the window."""
        return _skipped(self.window, num_computed_tokens)

    def _first_kept(self, held: int, num_tokens: int) -> int:
        """Return the first block to allocate after the `held` first ones."""
        return max(held, self.get_num_skipped_tokens(num_tokens) // self.block_size)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], total_computed_tokens: int,
        *args: Any, **options: Any,
    ) -> int:  # fmt: skip
        """Return how many free blocks a request needs to hold `num_tokens` tokens."""
        held, evictable = len(self.req_to_blocks.get(request_id, ())), 0
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            evictable = self._get_num_evictable_blocks(new_computed_blocks[max(0, skipped - held) :])
            held = max(skipped, held + len(new_computed_blocks))
        return max(0, -(-num_tokens // self.block_size) - self._first_kept(held, num_tokens)) + evictable

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Allocate blocks for `num_tokens` tokens: those that later queries use, or all if the pool is mostly free."""
        blocks = self.req_to_blocks[request_id]
        held, end = len(blocks), -(-num_tokens // self.block_size)
        if end <= held:
            return []
        kept = min(end, self._first_kept(held, num_tokens))
        if PLENTY * (self.block_pool.get_num_free_blocks() - (end - held)) > self.block_pool.num_gpu_blocks:
            kept = held
        return self._hold(blocks, kept - held, self.block_pool.get_new_blocks(end - kept))

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """Free a range of blocks. Unlike in other sliding windows, null blocks may be interspersed."""
        blocks = self.req_to_blocks.get(request_id, [])
        first, last = max(first_block, self._cleared.get(request_id, 0)), min(last_block, len(blocks))
        freed = [i for i in range(last - 1, first - 1, -1) if not blocks[i].is_null]
        self.block_pool.free_blocks([blocks[i] for i in freed])
        for i in freed:
            blocks[i] = self._null_block
        self._cleared[request_id] = max(first, last)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Drop a request and return its blocks."""
        self._cleared.pop(request_id, None)
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool, alignment_tokens: int, **_: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """Find the longest prefix with all window blocks that later queries use."""
        size, window = kv_cache_spec.block_size, kv_cache_spec.window
        hashes = cls._hashes(block_hashes, block_pool, kv_cache_spec, alignment_tokens)
        for length in range(max_length // alignment_tokens * alignment_tokens, 0, -alignment_tokens):
            first = _skipped(window, length) // size
            found = [block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in range(first, length // size)]
            if all(found):
                blocks = zip(*found, strict=True) if found else [()] * len(kv_cache_group_ids)
                return tuple([block_pool.null_block] * first + list(own) for own in blocks), length
        return tuple([] for _ in kv_cache_group_ids), 0


class FirstManager(_Manager):
    """Manages the one block of a sequence's first tokens."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Return 0: the block is used for the lifetime of the request."""
        return 0

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **options: Any
    ) -> int:
        """Return 1 for a request without its block, unless a prefix hit provides one that is in use."""
        if self.req_to_blocks.get(request_id):
            return 0
        return self._get_num_evictable_blocks(new_computed_blocks[:1]) if new_computed_blocks else 1

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Allocate the first block; all others are the null block."""
        blocks = self.req_to_blocks[request_id]
        lent = [] if blocks else self.block_pool.get_new_blocks(1)
        behind = max(0, -(-num_tokens // self.block_size) - len(blocks) - len(lent))
        return self._hold(blocks, 0, lent, behind)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool, alignment_tokens: int, **_: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """Find the longest aligned prefix, which only needs its first block."""
        length = max_length // alignment_tokens * alignment_tokens
        hashes = cls._hashes(block_hashes, block_pool, kv_cache_spec, alignment_tokens)
        first = block_pool.get_cached_block(hashes[0], kv_cache_group_ids) if length else None
        if not first:
            return tuple([] for _ in kv_cache_group_ids), 0
        others = [block_pool.null_block] * (length // kv_cache_spec.block_size - 1)
        return tuple([block, *others] for block in first), length


def register_specs() -> None:
    """Register both cache specifications with vLLM, once per process."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, WindowSpec)
    KVCacheSpecRegistry.register(FirstSpec, FirstManager, FirstSpec)
