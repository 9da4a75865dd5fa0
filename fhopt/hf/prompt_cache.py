"""Prompt caches on disk: one safetensors file with a KV cache's contents, plan and model.

    save_cache(model, cache, "system-prompt.safetensors")
    cache = load_cache(model, "system-prompt.safetensors")
    model.generate(ids_that_begin_with_the_prompt, past_key_values=cache)

Latent layers are saved as stored: quantized values, scales, attention sinks and residual window, without spare
capacity. Full-precision layers are saved too. A file names its plan and weights, and loads only with these, and only if
its digest shows no damage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.cache.layer_map import LATENT_LAYERS
from fhopt.cache.left_padding import PADDING
from fhopt.errors import FhoptError
from fhopt.files import check_digest, read_tensors, write_tensors
from fhopt.hf.apply import applied_plan, applied_site_layers, latent_cache
from fhopt.parallel.offloaded_weights import execution_device, named_weights
from fhopt.plan.latent_plan import LatentPlan

VERSIONS = (3, 4)  # 4: left-padded sequences, which earlier code would load in the wrong order
KEY = "fhopt_cache"  # metadata key of the description


def save_cache(model: torch.nn.Module, cache: Any, path: str | os.PathLike[str]) -> Path:
    """Write `cache`, filled by `model` with a plan applied, to `path`, atomically.

    Raises FhoptError if the cache is empty or has no latents, holds unsupported data, or cannot be written.
    """
    from safetensors import SafetensorError

    file, plan = Path(path), applied_plan(model)
    latent = [layer for layer in _layers(cache).values() if isinstance(layer, LATENT_LAYERS)]
    if not latent or not all(layer.is_initialized for layer in latent):
        raise FhoptError(
            "the cache has no latents; expected a cache filled by a model with an applied plan. Run the prompt first."
        )
    if any(layer.plan is not plan and layer.plan.digest() != plan.digest() for layer in latent):
        raise FhoptError(
            "the cache was filled with another plan than the applied one. Apply that plan, or fill a new cache."
        )
    tensors: dict[str, Tensor] = {}
    layers = {name: _describe(name, layer, tensors) for name, layer in _layers(cache).items()}
    about = _identity(model, plan) | {
        "version": VERSIONS[any(_is_padded(layer) for layer in latent)],
        "layers": layers,
        "max_cache_len": next((layer.max_cache_len for layer in latent if hasattr(layer, "max_cache_len")), None),
    }
    try:
        write_tensors(file, about, tensors, KEY)
    except (OSError, SafetensorError, ValueError) as error:
        raise FhoptError(f"cannot write {file}: {error}. Choose a writable location.") from error
    return file


def load_cache(
    model: torch.nn.Module, path: str | os.PathLike[str], device: torch.device | str | None = None, **options: Any
) -> Any:
    """Load the cache in `path` for `model` with the same plan applied; options as of `LatentCache`.

    device: of its tensors; None: each layer's own device in the model. Raises FhoptError if the file is not a cache, is
    damaged, or belongs to another plan, model or version.
    """
    file = Path(path)
    devices = _devices(model)
    first = next(iter(devices.values()), next(model.parameters()).device)
    about, tensors = _read(file)
    _check(file, about, _identity(model, applied_plan(model)))
    length = about.get("max_cache_len")
    if options.get("max_cache_len", length) != length:
        raise FhoptError(f"{file} has max_cache_len={length}; expected {options['max_cache_len']}. Drop max_cache_len.")
    try:
        cache = latent_cache(model, **({"max_cache_len": length} | options))
        layers = _layers(cache)
        if layers.keys() != about["layers"].keys():
            raise ValueError(f"it has {len(about['layers'])} layers; expected {len(layers)}")
        for name, layer in layers.items():
            target = torch.device(device or devices.get(name, first))
            own = {n: t.to(target) for n, t in tensors.items() if n.startswith(f"{name}.")}
            _restore(file, name, layer, about["layers"][name], own)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise FhoptError(f"{file} is damaged ({type(error).__name__}: {error}). Fill the cache again.") from error
    if hasattr(cache, "is_updated"):
        updated = cache.cross_attention_cache
        cache.is_updated = {i: bool(updated.get_seq_length(i)) for i in range(len(updated))}
    return cache


def _is_padded(layer: Any) -> bool:
    """Return whether sequences of a latent layer are left-padded."""
    padding = getattr(layer, PADDING, None)
    return padding is not None and bool(padding.parts)


# --------------------------------------------------------------------------------------------------- identity


def _identity(model: torch.nn.Module, plan: LatentPlan) -> dict[str, Any]:
    """Return the properties that a file and the model that loads it must share."""
    return {"plan": plan.digest(), "model": _weights(model), "dtype": str(next(model.parameters()).dtype)}


def _weights(model: torch.nn.Module) -> str:
    """Return a hash of the names and shapes of all parameters, and of up to 64 evenly spaced elements of each."""
    h = hashlib.sha256()
    for name, weight in named_weights(model):
        own: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight  # DTensor: one file per process
        flat = own.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().contiguous()
        h.update(f"{name}{tuple(weight.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _check(file: Path, about: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    cures = {
        "plan": ("plan", "Apply the plan that the file was saved with."),
        "dtype": ("dtype", "Load the model in the file's dtype."),
        "model": ("model", "Load the model that filled the cache."),
    }
    for key, (what, cure) in cures.items():
        if about.get(key) != expected[key]:
            raise FhoptError(
                f"{file} belongs to another {what}: {str(about.get(key))[:14]}; expected {expected[key][:14]}. {cure}"
            )


def _devices(model: torch.nn.Module) -> dict[str, torch.device]:
    """Return the device of each latent layer, by its name in the file."""
    devices = {}
    for site in applied_plan(model).sites:
        index = applied_site_layers(model).get(site.site.name)
        if index is not None:
            module = model.get_submodule(site.site.name.partition("#")[0])
            devices[f"{site.site.kind}.{index}"] = execution_device(module)
    return devices


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError

    try:
        about, tensors = read_tensors(file, KEY)
        if not about:
            raise FhoptError(
                f"{file} is not an fhopt cache; expected a file written by save_cache. Choose another file."
            )
        if about.get("version") not in VERSIONS:
            raise FhoptError(
                f"{file} has version {about.get('version')}; expected one of {VERSIONS}. Fill the cache again."
            )
        check_digest(about, tensors)
    except OSError as error:
        raise FhoptError(
            f"cannot read {file}: {error.strerror or error}; expected a file written by save_cache. Check the path."
        ) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FhoptError(f"{file} is damaged ({error}). Fill the cache again.") from error
    return about, tensors


# --------------------------------------------------------------------------------------------------- layers


def _layers(cache: Any) -> dict[str, Any]:
    """Return every layer by its name in the file."""
    if hasattr(cache, "is_updated"):
        parts = {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    else:
        parts = {"self": cache}
    return {f"{part}.{i}": layer for part, one in parts.items() for i, layer in enumerate(one.layers)}


def _describe(name: str, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe a layer as JSON values; its tensors are added to `tensors`."""
    state = layer.state() if isinstance(layer, LATENT_LAYERS) else vars(layer)
    return {"class": type(layer).__name__, "state": {k: _pack(f"{name}.{k}", v, tensors) for k, v in state.items()}}


def _restore(file: Path, name: str, layer: Any, item: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if item["class"] != type(layer).__name__:
        raise FhoptError(
            f"{file}: layer {name} is a {item['class']}; expected {type(layer).__name__}. Fill the cache again."
        )
    state = {k: _unpack(v, tensors) for k, v in item["state"].items()}
    if isinstance(layer, LATENT_LAYERS):
        layer.restore(state)
    else:
        vars(layer).update(state)
        if "device" in state and isinstance(state.get("keys"), Tensor):
            layer.device = state["keys"].device


def _pack(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Encode a value for JSON: ["tensor", name], ["dict", [[key, value], ...]], ["list", [...]], ["plain", x]..."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[k, _pack(f"{name}.{k}", v, tensors)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["list", [_pack(f"{name}.{i}", v, tensors) for i, v in enumerate(value)]]
    if isinstance(value, (torch.dtype, torch.device)):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["plain", value]
    raise FhoptError(
        f"a cache with {name} of type {type(value).__name__} cannot be saved. Save a cache created by "
        "`generate()` or `fhopt.hf.apply.latent_cache`."
    )


def _unpack(item: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, value = item
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value}
    if kind == "list":
        return [_unpack(v, tensors) for v in value]
    if kind == "dtype":
        return getattr(torch, value)
    return torch.device(value) if kind == "device" else value
