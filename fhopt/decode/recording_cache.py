"""Caches for recording a decode step: subclasses of the caller's cache and layers that store nothing.

They answer questions about lengths with a `CacheLength`. Layers without keys and values, such as those of linear
attention, are copies, which modules that run eagerly may change.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.arguments import leaves
from fhopt.decode.length import CacheLength


def is_cache(x: Any) -> bool:
    """Return whether an argument is a cache of transformers."""
    return hasattr(x, "get_seq_length") and hasattr(x, "update") and hasattr(x, "layers")


class RecordingCaches:
    """The caches of one recorded call. offset: added to lengths. recorder: gets updates; set before the call."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.recorder: Any = None
        self._made: dict[int, Any] = {}  # stand-ins by the id of the cache
        self._length = 0

    def is_stand_in(self, x: Any) -> bool:
        """Return whether an object is a recording cache."""
        return any(x is made for made in self._made.values())

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with recording caches, and with masks that are longer by the offset.

        Raises UnsupportedError if there is not exactly one cache.
        """
        caches = {id(x): x for _, x in leaves(args, kwargs) if is_cache(x)}
        if len(caches) != 1:
            raise UnsupportedError(f"a step with {len(caches)} caches")
        (cache,) = caches.values()
        if hasattr(cache, "self_attention_cache"):
            raise UnsupportedError("a cache for cross attention")
        self._length = cached_tokens(cache)
        self._made = {id(cache): self._cache(cache)}
        return tuple([self._argument(x) for x in args]), {name: self._argument(x) for name, x in kwargs.items()}

    def _argument(self, x: Any) -> Any:
        made = self._made.get(id(x))
        if made is not None:
            return made
        if isinstance(x, Tensor):
            return self._lengthened(x) if self.offset and is_mask(x, self._length) else x
        if type(x) is dict:
            return {name: self._argument(y) for name, y in x.items()}
        return x

    def _lengthened(self, x: Tensor) -> Tensor:
        count = x.shape[-1]
        index = torch.arange(count + self.offset, device=x.device).clamp(max=count - 1)
        return x.index_select(-1, index)

    def _cache(self, cache: Any) -> Any:
        def update(stand_in: Any, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            if is_plain_layer(cache.layers[layer_idx]):
                return self.recorder.updated(key, value, layer_idx)
            raise UnsupportedError(f"a cache layer of class {type(cache.layers[layer_idx]).__name__}")

        def length(stand_in: Any, layer_idx: int = 0, *_: Any, **__: Any) -> Any:
            asked = stand_in.layers[layer_idx : None if layer_idx == 0 else layer_idx + 1]
            return next(layer for layer in asked if is_plain_layer(layer)).get_seq_length()  # not linear attention

        made = _copy(cache, {"update": update, "get_seq_length": length})
        made.layers = [self._layer(layer, index) for index, layer in enumerate(cache.layers)]
        return made

    def _layer(self, layer: Any, index: int) -> Any:
        if not is_plain_layer(layer):
            return copy.deepcopy(layer)

        def length(stand_in: Any) -> Any:
            known = layer.get_seq_length()
            if isinstance(known, Tensor):
                return self.recorder.length_tensor(known, index)
            return CacheLength.of(known + self.offset, self.recorder.guards, known - self._length)

        def update(stand_in: Any, *_: Any, **__: Any) -> Any:
            raise UnsupportedError("a write to a cache layer without its cache")

        made = _copy(layer, {"get_seq_length": length, "update": update})
        if type(vars(layer).get("cumulative_length")) is int:
            made.cumulative_length = length(made)
        return made


def cached_tokens(cache: Any) -> int:
    """Return the number of tokens in a cache."""
    return int(cache.get_seq_length())


def is_mask(x: Tensor, length: int) -> bool:
    """Return whether a tensor has an element for each cached token and for the new one."""
    return x.dim() in (2, 4) and x.shape[-1] == length + 1


def is_plain_layer(layer: Any) -> bool:
    """Return whether a cache layer holds only keys and values of tokens."""
    return hasattr(layer, "get_mask_sizes") and not hasattr(layer, "conv_states")


def _copy(x: Any, methods: dict[str, Any]) -> Any:
    """Return a shallow copy of an object, of a subclass with other methods."""
    made: Any = object.__new__(type(f"Recording{type(x).__name__}", (type(x),), methods))
    made.__dict__.update(vars(x))
    return made
