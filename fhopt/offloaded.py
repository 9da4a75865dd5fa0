"""Weights that accelerate has put elsewhere: to the CPU or to disk, until their layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name; what accelerate has put to the CPU or to disk is read from there."""
    offloaded = {f"{name}.{key}": hook for name, module in model.named_modules() for key, hook in _offloaded(module)}
    for name, weight in model.named_parameters():
        hook = offloaded.get(name)
        yield name, weight if hook is None else hook.weights_map[name.rpartition(".")[2]]


def _offloaded(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, hook of accelerate) of each parameter of a module that is not in memory."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            yield from ((key, one) for key, p in module.named_parameters(recurse=False) if p.is_meta)
