"""Properties of a transformers model: positions, cache argument, attention implementations, encoder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.plan.site import AttentionSite


def text_key(config: Any) -> str:
    """Return the name of the decoder's sub-configuration; "" if it is the whole configuration."""
    text = config.get_text_config(decoder=True)
    return next((key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text), "")


def implementations(config: Any) -> dict[str, str]:
    """Return the attention implementations of a configuration ("") and its sub-configurations."""
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}
    implementation = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return implementation | {"": config._attn_implementation}


def uses_interface(module: torch.nn.Module) -> bool:
    """Return True if attention goes through transformers' interface, False if the model computes it itself.

    Inspects the code of the module's classes, not of their file: GIT's decoder computes attention itself, in one file
    with an image encoder that uses the interface.
    """
    classes: set[Any] = {type(part) for part in module.modules()}
    return any(map(_calls_interface, classes))


@functools.cache
def _calls_interface(cls: Any) -> bool:
    methods = [inspect.unwrap(f) for base in cls.__mro__ for f in vars(base).values() if inspect.isfunction(f)]
    return any(
        "ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names for method in methods if hasattr(method, "__code__")
    )


def cache_argument(model: torch.nn.Module | type[torch.nn.Module]) -> str:
    """Return the name of the cache argument, which depends on the transformers version."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def keeps_own_cache(model: Any) -> bool:
    """Return whether `generate` makes a cache class of the model's own."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def positions_of(model: Any) -> int | None:
    """Return the model's maximum number of positions; None if its configuration has none."""
    positions: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions


def check_length(model: Any, tokens: int) -> None:
    """Raise FhoptError if `tokens` exceeds the model's positions."""
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise FhoptError(
            f"a context of {tokens} tokens is too long; expected at most {positions}, the model's limit. "
            "Lower --context or --lengths."
        )


def encoder_path(model: torch.nn.Module | None) -> str | None:
    """Return the encoder's module path in a transformers encoder-decoder; None for other models."""
    if model is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is encoder), None)


def decoder_sites(sites: Iterable[AttentionSite], encoder: str | None) -> list[AttentionSite]:
    """Return the sites with cached keys and values: all but those in the module `encoder`, see `encoder_path`.

    All sites if the model has no others.
    """
    found = list(sites)
    return [site for site in found if not is_inside(site.name, encoder)] or found


def is_inside(name: str, path: str | None) -> bool:
    """Return True if the module `name` is `path` or inside it."""
    return path is not None and f"{name}.".startswith(f"{path}.")


def counts_in_images(config: Any) -> bool:
    """Return whether positions are image coordinates, so that many tokens may share one.

    With M-RoPE (Qwen2-VL, 2409.12191), text after images has positions far below its token indices.
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = (parameters, *parameters.values()) if isinstance(parameters, Mapping) else ()
    return any(isinstance(kind, Mapping) and "mrope_section" in kind for kind in kinds)


def check_segments(config: Any, segment: int, name: str) -> None:
    """Raise FhoptError if the model's positions do not allow keys relative to segments."""
    if segment and counts_in_images(config):
        raise FhoptError(
            f"{name}: segments of {segment} tokens do not support image positions (mrope_section). Fit with "
            "--segment 0."
        )
