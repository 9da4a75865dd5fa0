"""Traces of decoder layers in dry runs: their records, and the unchanged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_caches import plans
from small_models import tiny_llama, token_ids
from torch import Tensor, nn

import fhopt
from fhopt.codegen.layers.trace import ATTENTION, UnsupportedError
from fhopt.hf.apply import latent_cache
from fhopt.hf.attention_interface import IMPLEMENTATION, register_attention
from fhopt.hf.layer_trace import leaves, rehearse

STRANGER = torch.ones(8)


class _Layer(nn.Module):
    """A decoder layer with one matmul, and optionally an unsupported operation."""

    def __init__(self, oddity: str = "") -> None:
        super().__init__()
        self.oddity, self.is_causal = oddity, True
        self.project = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, cache: Any, mask: Tensor | None = None) -> Any:
        from transformers import AttentionInterface

        heads = self.project(x).view(*x.shape[:2], 2, 8).transpose(1, 2)
        if self.oddity == "length":
            heads = heads * float(cache.get_seq_length())
        if self.oddity == "stranger":
            heads = heads * STRANGER
        if self.oddity == "layers":
            heads = heads * len(cache.layers)
        keys, values = cache.update(heads, heads, 0)
        if self.oddity == "twice":
            keys, values = cache.update(heads, heads, 1)
        if self.oddity == "no attention":
            return x + heads.transpose(1, 2).flatten(2)
        if self.oddity == "other keys":
            keys = keys * 1
        out, _ = AttentionInterface()[IMPLEMENTATION](self, heads, keys, values, mask, scaling=0.25)
        result = x + out.flatten(2)
        return (result, x) if self.oddity == "two results" else result


class Cache:
    """A cache that must not be written to."""

    layers = ()

    def update(self, *_: Any) -> None:
        raise AssertionError("a rehearsal wrote to the cache")

    def get_seq_length(self, layer: int = 0) -> int:
        return 5


@torch.no_grad()
def recorded(oddity: str = "", later: int = 0, **options: Any) -> Any:
    register_attention()
    torch.manual_seed(0)
    layer = _Layer(oddity)
    return rehearse(layer, layer.forward, (torch.randn(2, 1, 16), Cache()), options, later)


def test_a_trace_records_the_operations_of_a_layer() -> None:
    mask = torch.zeros(1)
    recording = recorded(mask=mask)
    assert [op.name for op in recording.trace.ops].count(ATTENTION) == 1
    assert list(recording.inputs.values()) == [(0,)]
    (weight,) = recording.weights.values()
    assert weight.name == "weight" and weight.is_current()
    call = recording.attention
    assert (call.layer, call.cache, call.mask, call.options["scaling"]) == (0, (1,), ("mask",), 0.25)
    assert recording.extra == -1


def test_layers_with_the_same_operations_have_equal_traces() -> None:
    assert recorded().trace == recorded(later=1000).trace
    assert recorded("length").trace != recorded("length", later=1000).trace


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("stranger", "neither an argument nor a weight of the layer"),
        ("layers", "asks the cache for layers"),
        ("twice", "two writes"),
        ("no attention", "without attention"),
        ("other keys", "other keys than the cache returned"),
        ("two results", "more than one tensor"),
    ],
)
def test_obstacles_to_a_program_are_named(oddity: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        recorded(oddity)


def test_a_layer_that_fails_with_a_mock_cache_is_reported() -> None:
    register_attention()
    layer = _Layer()
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"its dry run fails \(RuntimeError"):
        rehearse(layer, layer.forward, (torch.randn(1, 1, 15), Cache()), {}, 0)


def test_tracing_leaves_the_cache_and_the_implementation_unchanged() -> None:
    from transformers import AttentionInterface

    model: Any = fhopt.apply(tiny_llama(), plans(tiny_llama, 8), layer_programs=False)
    cache, before = latent_cache(model), AttentionInterface()[IMPLEMENTATION]
    layer = model.model.layers[0]
    hidden, position = torch.randn(1, 1, 64), token_ids(1, 1)
    angles = model.model.rotary_emb(hidden, position)
    with torch.no_grad():
        recording = rehearse(layer, layer.forward, (hidden,), dict(cache=cache, position_embeddings=angles), 7)
    fhopt.unapply(model)
    assert recording.attention.layer == 0 and cache.get_seq_length() == 0
    assert AttentionInterface()[IMPLEMENTATION] is before


def test_arguments_have_paths() -> None:
    found = dict(leaves((1, (2, 3)), {"a": 4, "b": [5]}))
    assert found == {(0,): 1, (1, 0): 2, (1, 1): 3, ("a",): 4, ("b", 0): 5}
