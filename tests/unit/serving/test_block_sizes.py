"""Tokens per block of each cache, chosen so that blocks are full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fhopt.plan.window import ResidualWindow
from fhopt.serving.block_sizes import (
    MAX_GROUPS,
    BlockSizes,
    CacheNeeds,
    block_bytes,
    choose_block_sizes,
    request_bytes,
    uneven,
    window_blocks,
)

# SmolLM2-135M with a 4x plan: 30 layers, 3 heads of size 64; in bfloat16 23,040 bytes per token.
NEEDS = CacheNeeds(30, 5490, 396, 13824, ResidualWindow(16, 256, 64, 8), 272, 8192)
EXACT = 23040 * 8192


def least(needs: CacheNeeds) -> int:
    """Return the bytes of a request without padding between blocks."""
    window = needs.window.capacity * needs.window_bytes * needs.layers
    return needs.tokens * needs.latent_bytes + window + needs.first_bytes * needs.layers


@pytest.mark.parametrize(("latent_bytes", "ratio"), [(5490, 3.8), (2480, 7.5)])
def test_a_request_of_8192_tokens_has_the_promised_ratio(latent_bytes: int, ratio: float) -> None:
    needs = replace(NEEDS, latent_bytes=latent_bytes)
    assert EXACT / request_bytes(needs, choose_block_sizes(needs)) > ratio


@pytest.mark.parametrize("latent_bytes", [700, 2480, 5490, 12000])
@pytest.mark.parametrize("window", [ResidualWindow(16, 256, 64), ResidualWindow(4, 32, 16), ResidualWindow(0, 100, 7)])
def test_padding_between_blocks_is_small(latent_bytes: int, window: ResidualWindow) -> None:
    needs = replace(NEEDS, latent_bytes=latent_bytes, window=window)
    sizes = choose_block_sizes(needs)
    assert request_bytes(needs, sizes) < 1.15 * least(needs)
    assert sizes.first >= needs.first and sizes.first % sizes.latents == sizes.first % sizes.window == 0
    assert sizes.alignment == sizes.first


def test_a_given_block_size_is_used() -> None:
    assert choose_block_sizes(NEEDS, 64).latents == 64


def test_few_groups_of_layers_are_made() -> None:
    sizes, block = choose_block_sizes(NEEDS), block_bytes(NEEDS, choose_block_sizes(NEEDS))
    pages = NEEDS.window_bytes * sizes.window, NEEDS.first_bytes
    assert sum(-(-NEEDS.layers // (block // page)) for page in pages) <= MAX_GROUPS


def test_blocks_of_a_window_are_counted_for_any_start() -> None:
    window = ResidualWindow(16, 256, 64)
    assert window_blocks(window, 16) == 20  # blocks begin where the window does
    assert window_blocks(window, 12) == 28
    starts = {p: window.sinks + window.quantized_tokens(p) for p in range(window.first_length, 4000)}
    held = [p // 12 - start // 12 + 1 for p, start in starts.items()]
    assert max(held) <= 28


def test_block_sizes_have_one_alignment() -> None:
    assert BlockSizes(36, 16, 288).alignment == 288


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8, 8, 8], [8, 8, 8]),
        ([8, 10, 10], [8, 10, 10]),
        ([8, 20, 10], [10, 20, 10]),
        ([8, 9], [9, 9]),
        ([8, 8, 12, 12], [12, 8, 12, 12]),
    ],
)
def test_equally_frequent_sizes_are_made_unequal(sizes: list[int], expected: list[int]) -> None:
    named = {f"layer {i}": size for i, size in enumerate(sizes)}
    assert list(uneven(named).values()) == expected
