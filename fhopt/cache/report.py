"""Bytes that a cache holds and loads, by region: attention sinks, residual window, packed latents, sketches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, EncoderDecoderCache

from fhopt.cache.layer_map import LATENT_LAYERS
from fhopt.cache.sliding_layer import SlidingLatentLayer
from fhopt.cache.store import QUANTIZED_TOKENS
from fhopt.cache.store import REGIONS as REGIONS

# --------------------------------------------------------------------------------------------------- bytes


def cache_bytes(cache: Any) -> int:
    """Return the bytes of storage of any transformers cache."""
    return sum(row["bytes"] for row in cache_report(cache))


def exact_cache_bytes(cache: Any) -> int:
    """Return the bytes of a full-precision cache of the same tokens, in the same dtype."""
    if isinstance(cache, EncoderDecoderCache):
        return exact_cache_bytes(cache.self_attention_cache) + exact_cache_bytes(cache.cross_attention_cache)
    return sum(map(_exact_bytes, cache.layers))


def _exact_bytes(layer: Any) -> int:
    if not isinstance(layer, LATENT_LAYERS):
        return tensor_bytes(layer)
    if not layer.is_initialized:
        return 0
    numbers: int = layer.site.site.exact_numbers_per_token * layer.dtype.itemsize
    tokens = int(layer.get_seq_length())
    if isinstance(layer, SlidingLatentLayer):
        tokens = min(tokens, layer.sliding_window - 1)
    return tokens * layer.batch_size * numbers


def cache_report(cache: Any) -> list[dict[str, Any]]:
    """Return what `LatentCache.report` does, for any transformers cache; non-latent layers count as exact."""
    if isinstance(cache, EncoderDecoderCache):
        rows = [("self", cache.self_attention_cache), ("cross", cache.cross_attention_cache)]
        return [{"part": part, **row} for part, one in rows for row in cache_report(one)]
    return [_report(index, layer) for index, layer in enumerate(cache.layers)]


def _report(index: int, layer: Any) -> dict[str, Any]:
    latent = isinstance(layer, LATENT_LAYERS)
    regions = dict.fromkeys(REGIONS, 0) | (layer.regions() if latent else {"exact": tensor_bytes(layer)})
    tokens = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0
    return {
        "layer": index,
        "kind": layer.site.layout if latent else "exact",
        "tokens": int(tokens),
        QUANTIZED_TOKENS: layer.quantized_tokens if latent else 0,
        "bytes": sum(regions.values()),
        **regions,
        **_read_in_decode_step(layer if latent else None, sum(regions.values())),
    }


def _read_in_decode_step(layer: Any, held: int) -> dict[str, float]:
    """Return the bytes that the next decode step loads from a layer of `held` bytes. layer None: full precision."""
    if layer is None:
        return {"dense_step_bytes": held, "step_bytes": held, "completed": 0.0}
    dense, selected = layer.decode_step_bytes()
    return {"dense_step_bytes": dense, "step_bytes": selected, "completed": layer.completed}


def tensor_bytes(layer: Any) -> int:
    """Return the bytes of storage of an ordinary cache layer of any class."""
    held: list[Any] = list(vars(layer).values())
    held += [x for value in held if isinstance(value, (dict, list, tuple)) for x in _items(value)]
    tensors = [t for t in held if isinstance(t, Tensor) and t.dim() > 0]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)
