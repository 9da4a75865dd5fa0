"""Facts of a loaded model: positions, cache argument, attention implementations, encoder."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from fhopt.errors import FhoptError


def text_key(config: Any) -> str:
    """Name of the part of a configuration that is the decoder's, "" where it is the whole."""
    text = config.get_text_config(decoder=True)
    return next((key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text), "")


def implementations(config: Any) -> dict[str, str]:
    """Attention implementation of a configuration ("") and of each of its parts."""
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}
    found = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return found | {"": config._attn_implementation}


def uses_interface(module: torch.nn.Module) -> bool:
    """False for attention that is written out in the model's own code, whatever implementation is chosen."""
    return hasattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS")


def cache_argument(model: torch.nn.Module | type[torch.nn.Module]) -> str:
    """What this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def positions_of(model: Any) -> int | None:
    """How many tokens the model can read; None where its configuration does not say."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def check_length(model: Any, tokens: int) -> None:
    """Raise FhoptError when `tokens` are more than the model has positions."""
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise FhoptError(
            f"{tokens} tokens are to be read at once; the model has {positions} positions. Read fewer: --context or "
            "--lengths."
        )


def encoder_path(model: torch.nn.Module) -> str | None:
    """Module path of the encoder of an encoder-decoder of transformers, None for any other module."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is encoder), None)


def is_inside(name: str, path: str | None) -> bool:
    """True when the module `name` is `path` or a part of it."""
    return path is not None and f"{name}.".startswith(f"{path}.")
