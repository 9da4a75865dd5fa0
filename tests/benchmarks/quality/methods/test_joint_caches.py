"""A cache that quantizes all layers of a token together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baseline_caches import SCHEDULE, exact_logits, read
from small_models import tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

from benchmarks.quality.methods.joint_caches import JointBlocks
from benchmarks.quality.methods.quantized_caches import CacheShape, Schedule


class Recorded:
    """A lossless codec, or one that returns zeros, which records its inputs."""

    family = name = "recorded"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.seen: list[Tensor] = []

    def token_bytes(self, shape: CacheShape) -> float:
        return shape.heads * 3.5

    def keys(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x * self.factor

    def values(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_lossless_codec_changes_nothing(make: Any) -> None:
    model, ids = make(), token_ids(1, 170)
    codec = Recorded()
    found, cache = read(model, JointBlocks(codec, SCHEDULE), ids)
    torch.testing.assert_close(found, exact_logits(model, ids), rtol=1e-4, atol=1e-4)  # keys rotated and back
    assert cache.quantized == SCHEDULE.quantized(170) == 128
    heads = CacheShape.of(model).kv_heads
    assert [x.shape for x in codec.seen] == [(2, 1, heads, 32, 16)] * 4


def test_only_tokens_between_sinks_and_window_are_quantized(llama: Any) -> None:
    ids = token_ids(1, 170)
    _, cache = read(llama, JointBlocks(Recorded(0.0), SCHEDULE), ids)
    for layer in cache.layers:
        zero = (layer.keys == 0).all(3).all(1)[0]
        assert bool(zero[4:132].all()) and not bool(zero[:4].any()) and not bool(zero[132:].any())


def test_the_tokens_of_a_call_attend_to_each_other_exactly(llama: Any) -> None:
    ids = token_ids(1, 170)
    found, _ = read(llama, JointBlocks(Recorded(0.0), SCHEDULE), ids)
    first = SCHEDULE.first_step
    expected = exact_logits(llama, ids)
    torch.testing.assert_close(found[:, :first], expected[:, :first], rtol=1e-4, atol=1e-4)
    assert float((found[:, first:] - expected[:, first:]).abs().max()) > 1e-2


def test_bytes_by_hand() -> None:
    shape = CacheShape(layers=30, kv_heads=3, head_dim=64)
    held = JointBlocks(Recorded(), Schedule()).cache_bytes(shape, 8192)
    assert held == 8064 * 90 * 3.5 + 128 * 90 * 256
