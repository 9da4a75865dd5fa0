"""Example inputs for a model's forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError

TOKENS = 16  # per text


def example_arguments(model: Any) -> dict[str, Tensor]:
    """Make arguments for one forward pass of a transformers model other than a causal language model.

    Text, images and audio have the sizes of its configuration. Raises FhoptError for other inputs.
    """
    config, accepted = model.config, inspect.signature(model.forward).parameters
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    ids = torch.arange(1, TOKENS + 1).remainder(getattr(text, "vocab_size", TOKENS + 1)).unsqueeze(0)
    side = getattr(vision, "image_size", 224)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    frames = 2 * getattr(config, "max_source_positions", 50)
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)[
            :, : getattr(vision, "num_channels", 3)
        ],
        "input_values": lambda: torch.linspace(-1, 1, 8000).sin().unsqueeze(0),
        "input_features": lambda: torch.linspace(-1, 1, frames).expand(1, getattr(config, "num_mel_bins", 80), frames),
    }
    main = model.main_input_name
    arguments = {n: make() for n, make in makers.items() if n in accepted and (n == main or n in _PAIRED)}
    if main not in arguments:
        raise FhoptError(
            f"{type(model).__name__} takes {main}, for which fhopt has no example input; expected one of "
            f"{', '.join(makers)}. Write a function that returns (module, args, kwargs), and pass it as "
            "python.module:function."
        )
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        arguments |= {"decoder_input_ids": ids[:, :4]}
    return arguments


_PAIRED = frozenset({"pixel_values", "input_ids"})  # vision-language models take both
