"""Contents of transformers' KV cache per layer of a model: all tokens, a sliding window, a chunk, a state, nothing.

    cache_layers(model)       from the configuration only: the layers of transformers' own cache
    measured_layers(model)    with sizes, measured on a cache of two tokens

Modules without a transformers configuration have none; for them only the mask in the graph is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.models.model_facts import cache_argument
from fhopt.plan.cache_size import CacheLayer

SLIDING, CHUNKED = "sliding", "chunked"


def cache_layers(model: Any) -> tuple[CacheLayer, ...]:
    """Return the layers of transformers' cache for a decoder, without sizes; empty for other modules.

    Also empty for encoder-decoder models, whose layers all cache every token.
    """
    plain = _plain_layers(model)
    if not plain:
        return ()
    types, names = _layer_types(model.config, len(plain)), _layer_paths(model)
    return tuple(_layer(names.get(i, ""), layer, types[i]) for i, layer in enumerate(plain))


def measured_layers(model: Any) -> tuple[CacheLayer, ...]:
    """Return the layers of transformers' cache for a decoder, with sizes; empty if no cache can be filled.

    Runs the model on two tokens, one after the other.
    """
    layers = cache_layers(model)
    weight = next(model.parameters(), None) if layers else None
    if weight is None or weight.device.type == "meta":
        return ()
    held = _plain_cache(model)
    ids = torch.ones(1, 1, dtype=torch.long, device=weight.device)
    try:
        with torch.no_grad():
            sizes = [_after(model, held, ids), _after(model, held, ids)]
    except Exception:  # the model may not support this call; only its sites are known
        return ()
    return tuple(_sized(*item) for item in zip(layers, *sizes, strict=True))


def _plain_layers(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return []
    parameters = inspect.signature(model.forward).parameters  # an encoder's configuration may have windows too
    if not {"cache", "past_key_values"} & parameters.keys():
        return []
    try:
        return list(_plain_cache(model).layers)
    except Exception:  # the configuration of a model without a cache
        return []


def _plain_cache(model: Any) -> Any:
    from transformers.cache_utils import DynamicCache

    class OrdinaryCache(DynamicCache):  # type: ignore[misc]
        """A class that an applied plan does not replace. Not in fhopt/hf, which imports this package."""

    return OrdinaryCache(config=model.config.get_text_config(decoder=True))


def _layer_types(config: Any, count: int) -> list[str]:
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    return [*types, *[""] * (count - len(types))]


def _layer(name: str, layer: Any, layer_type: str) -> CacheLayer:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    window = int(getattr(layer, "sliding_window", 0) or 0)
    chunked = window and ("chunk" in layer_type)
    is_full = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    return CacheLayer(name, CHUNKED if chunked else SLIDING if window else "", window, is_full=is_full)


def _layer_paths(model: torch.nn.Module) -> dict[int, str]:
    """Return the common path of each layer's modules, by cache index."""
    inside = _decoder_path(model)
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and f"{name}.".startswith(inside):
            paths.setdefault(index, []).append(name)
    return {index: _until(str(index), _common(names)) for index, names in paths.items()}


def _until(index: str, path: str) -> str:
    """Truncate a path after its layer number: other modules of the layer may not know the index."""
    parts = path.split(".")
    return ".".join(parts[: len(parts) - parts[::-1].index(index)]) if index in parts else path


def _decoder_path(model: Any) -> str:
    """Return the decoder's path with a trailing dot; "" if the decoder is the model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{path}." if path else ""


def _common(names: Sequence[str]) -> str:
    parts = []
    for column in zip(*(name.split(".") for name in names), strict=False):
        if len(set(column)) > 1:
            break
        parts.append(column[0])
    return ".".join(parts)


# --------------------------------------------------------------------------------------------------- sizes


def _after(model: Any, cache: Any, ids: Tensor) -> list[list[Tensor]]:
    """Run the model on token ids [1, 1] with a cache; return the tensors of each cache layer."""
    model(ids, **{cache_argument(model): cache}, use_cache=True)
    return [[t for t in _tensors(layer) if t.dim()] for layer in cache.layers]


def _tensors(layer: Any) -> Iterator[Tensor]:
    for value in vars(layer).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        yield from (x for x in held if isinstance(x, Tensor))


def _sized(layer: CacheLayer, first: Sequence[Tensor], second: Sequence[Tensor]) -> CacheLayer:
    """Return a layer with sizes. first, second: its tensors after one and after two tokens."""
    grown = sum(t.numel() for t in second) - sum(t.numel() for t in first)
    fixed = sum(t.nbytes for t in first) - (sum(t.nbytes for t in second) - sum(t.nbytes for t in first))
    return replace(layer, numbers=grown, state_bytes=max(0, fixed))
