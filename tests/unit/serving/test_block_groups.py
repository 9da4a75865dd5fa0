"""Allocating, freeing and finding blocks of a residual window and of first tokens, in vLLM's own pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` brings it")

import torch
from vllm.v1.core.block_pool import BlockPool

from fhopt.plan.window import ResidualWindow
from fhopt.serving.block_groups import FirstManager, FirstSpec, WindowManager, WindowSpec

WINDOW = ResidualWindow(4, 8, 4)  # 4 tokens are quantized from 16 tokens on
SIZE, FIRST = 4, 8
PACKED: dict[str, Any] = dict(num_kv_heads=1, head_size=8, dtype=torch.uint8, num_head_slots=1, dcp_sharded=False)
SPEC = WindowSpec(block_size=SIZE, sliding_window=WINDOW.capacity, window=WINDOW, state_content_bytes=8, **PACKED)
FIRST_SPEC = FirstSpec(block_size=FIRST, sliding_window=1, tokens_per_state=FIRST, state_content_bytes=8, **PACKED)


def pool_of(blocks: int) -> Any:
    return BlockPool(blocks, True, SIZE)


def manager_of(kind: Any, spec: Any, pool: Any) -> Any:
    return kind(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=FIRST)


def request(name: str, tokens: int) -> Any:
    hashes = [f"{i}".encode() for i in range(tokens // SIZE)]
    return SimpleNamespace(request_id=name, block_hashes=hashes, shared_prefix_boundary=None, num_prompt_tokens=tokens)


def lend(manager: Any, name: str, tokens: int, computed: int = 0) -> list[bool]:
    """Allocate `tokens` tokens for a request; return which of its new blocks are the null block."""
    manager.remove_skipped_blocks(name, computed)
    needed = manager.get_num_blocks_to_allocate(name, tokens, [], computed, computed, tokens)
    free = manager.block_pool.get_num_free_blocks()
    new = manager.allocate_new_blocks(name, tokens, tokens)
    manager.cache_blocks(request(name, tokens), tokens, replay_boundaries=())
    assert free - manager.block_pool.get_num_free_blocks() >= needed  # never less than requested
    return [block.is_null for block in new]


def found(manager: Any, kind: Any, spec: Any, tokens: int) -> tuple[list[bool], int]:
    blocks, length = kind.find_longest_cache_hit(
        request("", tokens).block_hashes, tokens, [0], manager.block_pool, spec, False, FIRST
    )
    return [block.is_null for block in blocks[0]], length


def test_with_enough_room_a_prompt_holds_all_blocks_until_it_is_computed() -> None:
    manager = manager_of(WindowManager, SPEC, pool_of(100))
    assert lend(manager, "a", 40) == [False] * 10
    assert found(manager, WindowManager, SPEC, 40) == ([True] * 8 + [False] * 2, 40)
    assert found(manager, WindowManager, SPEC, 24) == ([True] * 4 + [False] * 2, 24)
    lend(manager, "a", 41, computed=40)
    assert [b.is_null for b in manager.req_to_blocks["a"]] == [True] * 8 + [False] * 3
    assert found(manager, WindowManager, SPEC, 24)[1] == 24  # freed blocks are found until they are reused


def test_in_a_small_pool_a_prompt_gets_only_the_blocks_needed_later() -> None:
    manager = manager_of(WindowManager, SPEC, pool_of(10))
    assert lend(manager, "a", 40) == [True] * 8 + [False] * 2
    assert found(manager, WindowManager, SPEC, 40)[1] == 40
    assert found(manager, WindowManager, SPEC, 32) == ([], 0)
    assert lend(manager, "a", 80, computed=40) == [True] * 8 + [False] * 2
    lend(manager, "a", 84, computed=80)
    assert [b.is_null for b in manager.req_to_blocks["a"]] == [True] * 18 + [False] * 3
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == 9  # all but the null block


def test_a_request_stays_within_its_reservation() -> None:
    manager = manager_of(WindowManager, SPEC, pool_of(60))
    lend(manager, "a", 20)
    for tokens in range(21, 200):
        lend(manager, "a", tokens, computed=tokens - 1)
        held = sum(not block.is_null for block in manager.req_to_blocks["a"])
        assert held <= SPEC.max_admission_blocks_per_request(10_000, 10_000)


def test_there_is_one_block_of_first_tokens() -> None:
    pool = pool_of(100)
    manager = manager_of(FirstManager, FIRST_SPEC, pool)
    assert lend(manager, "a", 5) == [False]
    assert lend(manager, "a", 40, computed=5) == [True] * 4
    assert pool.get_num_free_blocks() == 98
    assert found(manager, FirstManager, FIRST_SPEC, 39) == ([False, True, True, True], 32)
    assert found(manager, FirstManager, FIRST_SPEC, 7) == ([], 0)
    assert FIRST_SPEC.max_admission_blocks_per_request(10_000, 10_000) == 1


def test_a_found_block_of_first_tokens_is_shared() -> None:
    pool = pool_of(100)
    manager = manager_of(FirstManager, FIRST_SPEC, pool)
    lend(manager, "a", 40)
    (blocks,), length = FirstManager.find_longest_cache_hit(
        request("", 40).block_hashes, 39, [0], pool, FIRST_SPEC, False, FIRST
    )
    assert manager.get_num_blocks_to_allocate("b", 40, blocks, length, length, 40) == 0
    manager.add_local_computed_blocks("b", blocks, length, 0)
    manager.allocate_new_blocks("b", 41, 41)
    assert manager.req_to_blocks["b"][0] is manager.req_to_blocks["a"][0] and len(manager.req_to_blocks["b"]) == 6
    for name in ("a", "b"):
        manager.free(name)
    assert pool.get_num_free_blocks() == 99
