"""Access to weights that accelerate has offloaded to CPU memory or disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Weights(Mapping[str, Tensor]):
    """All parameters of a model by name, sorted.

    Offloaded weights are loaded on access and not cached.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._held = dict(sorted(model.named_parameters()))
        self._hooks = {f"{name}.{key}": hook for name, module in model.named_modules() for key, hook in _away(module)}

    def __getitem__(self, name: str) -> Tensor:
        weight, hook = self._held[name], self._hooks.get(name)
        return weight if hook is None else hook.weights_map[name.rpartition(".")[2]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def absent(self) -> list[str]:
        """Names of weights without data: on the meta device, and not offloaded."""
        return [name for name, weight in self._held.items() if weight.is_meta and name not in self._hooks]


def named_weights(model: torch.nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return every parameter by name, sorted; offloaded ones are loaded during iteration."""
    return Weights(model).items()


def named_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every buffer by name; offloaded ones are loaded."""
    for path, module in model.named_modules():
        maps = [hook.weights_map for hook in hooks(module) if getattr(hook, "weights_map", None) is not None]
        for key, buffer in module.named_buffers(recurse=False):
            yield f"{path}.{key}" if path else key, maps[0][key] if buffer.is_meta and maps else buffer


def _away(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, accelerate hook) of each offloaded parameter of a module."""
    for hook in hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            yield from ((key, hook) for key, p in module.named_parameters(recurse=False) if p.is_meta)


def execution_device(module: torch.nn.Module) -> torch.device:
    """Return the device that a module runs on, even if its weights are offloaded. Expects a module with weights."""
    for part in module.modules():
        for hook in hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return next(module.parameters()).device


def hooks(module: torch.nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
