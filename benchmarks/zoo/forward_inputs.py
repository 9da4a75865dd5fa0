"""Arguments for a forward pass of any transformers model, by the names of its parameters.

No uniform description of a model's inputs exists: arguments are tried, the likely ones first, until the model runs.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, FRAMES, SAMPLES = 2, 9, 4, 4000
MAXIMUM_TRIES = 40


class NoInputs(Exception):
    """No arguments were found with which a model runs; the message is its error for the first ones."""


def forward_arguments(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments with which the model runs. Raises NoInputs."""
    errors: list[str] = []
    for arguments in itertools.islice(_tries(model), MAXIMUM_TRIES):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                model(**arguments)
        except Exception as error:  # a model may raise anything for unsupported arguments
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            return arguments
    raise NoInputs(errors[0] if errors else "no argument of its forward is known here")


def _tries(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield combinations of arguments: those without defaults, then with the main input, then with all known ones."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    required = [n for n, p in parameters.items() if p.default is p.empty]
    main = [n for n in (getattr(model, "main_input_name", ""),) if n in parameters]
    decoder = [n for n in ("decoder_input_ids",) if n in parameters and "decoder_input_ids" not in main]
    fixed: dict[str, Any] = {n: False for n in ("use_cache", "return_loss") if n in parameters}
    known = [n for n in parameters if n in MAKERS]
    sets = [[*main, *required, *decoder], [*main, *required], [*required, *decoder], known[:2], known]
    seen: list[list[str]] = []
    for names in sets:
        names = list(dict.fromkeys(names))
        if names and names not in seen and all(n in MAKERS for n in names):
            seen.append(names)
            for values in itertools.product(*(MAKERS[n](model.config) for n in names)):
                yield {**dict(zip(names, values, strict=True)), **fixed}


# --------------------------------------------------------------------------------------------------- values by name


def field(config: Any, *names: str, default: int) -> int:
    """Return the first field of these names, of the configuration or of one in it, as one number."""
    nested = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    for name in names:
        for each in (config, *nested):
            value = getattr(each, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def _tokens(config: Any, tokens: int = TOKENS) -> list[Tensor]:
    largest = field(config, "vocab_size", default=100)
    books = getattr(config, "num_codebooks", None)
    sizes = [(BATCH, tokens)] + ([(BATCH * books, tokens), (BATCH, tokens, books)] if isinstance(books, int) else [])
    return [torch.randint(min(3, largest - 1), min(90, largest), size) for size in sizes]


def _pixels(config: Any) -> list[Tensor]:
    channels = field(config, "num_channels", "in_channels", "in_chans", default=3)
    size = field(config, "image_size", "img_size", "input_size", default=64)
    sizes = getattr(config, "image_size", None)
    height, width = sizes if isinstance(sizes, (list, tuple)) and len(sizes) == 2 else (size, size)
    frames = field(config, "num_frames", "frames_per_clip", default=FRAMES)
    images = [torch.randn(BATCH, channels, h, w) for h, w in dict.fromkeys([(height, width), (64, 64), (224, 224)])]
    videos = [torch.randn(1, frames, channels, height, width), torch.randn(1, channels, frames, height, width)]
    patch = field(config, "patch_size", default=4)
    return [*images, *videos, torch.randn(1, 16, channels * patch * patch), *_hidden(config)]


def _features(config: Any) -> list[Tensor]:
    bins = field(
        config, "num_mel_bins", "input_dim", "feature_size", "n_mels", "feature_projection_input_dim", default=80
    )
    positions = field(config, "max_source_positions", "n_ctx", default=50)
    return [
        torch.randn(BATCH, bins, 2 * positions), torch.randn(BATCH, 64, bins), torch.randn(BATCH, bins, 64),
        torch.randn(BATCH, 1, 1001, 64),
    ]  # fmt: skip


def _waves(config: Any) -> list[Tensor]:
    bins = field(config, "num_mel_bins", "mel_dim", default=80)
    length = field(config, "max_length", default=64)
    waves = [torch.randn(BATCH, SAMPLES), torch.randn(BATCH, 1, SAMPLES), torch.randn(BATCH, 1, 2000)]
    return [*waves, torch.randn(BATCH, length, bins), torch.randn(BATCH, 1, 32000), *_embedded(config)]


def _hidden(config: Any) -> list[Tensor]:
    """Return patches in rows, as for Qwen2-VL, and hidden states."""
    channels = field(config, "in_channels", "num_channels", "in_chans", default=3)
    patch, frames = field(config, "patch_size", default=4), field(config, "temporal_patch_size", default=1)
    hidden = field(config, "hidden_size", "d_model", "embed_dim", default=64)
    return [torch.randn(16, channels * frames * patch * patch), torch.randn(BATCH, TOKENS, hidden)]


def _embedded(config: Any) -> list[Tensor]:
    width = field(config, "hidden_size", "d_model", "encoder_hidden_size", "n_embd", default=64)
    return [torch.randn(BATCH, TOKENS, width)]


def _series(config: Any) -> list[Tensor]:
    length = field(config, "context_length", "seq_length", default=32)
    channels = field(config, "num_input_channels", "input_size", default=1)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return [torch.randn(BATCH, length + lags, channels), torch.randn(BATCH, length + lags)]


def _ones(*sizes: int) -> Callable[[Any], list[Tensor]]:
    return lambda config: [torch.ones(sizes, dtype=torch.long)]


def _grid(config: Any) -> list[Tensor]:
    return [torch.tensor([[1, 4, 4]]), torch.tensor([[4, 4]])]


def _boxes(config: Any) -> list[Tensor]:
    return [torch.randint(0, 8, (BATCH, TOKENS, 4)).sort(-1).values]


MAKERS: dict[str, Callable[[Any], list[Any]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": lambda config: _tokens(config, 7),
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _features,
    "input_values": _waves,
    "audio_values": _waves,
    "hidden_states": _hidden,
    "inputs_embeds": _embedded,
    "encoder_hidden_states": _embedded,
    "query_embeds": _embedded,
    "bbox": _boxes,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "grid_hws": _grid,
    "inputs": _embedded,
    "merge_sizes": _ones(1),
    "spatial_shapes": lambda config: [torch.tensor([[4, 4]] * BATCH)],
    "pixel_attention_mask": _ones(BATCH, 16),
    "past_values": _series,
    "attention_mask": _ones(BATCH, TOKENS),
}
