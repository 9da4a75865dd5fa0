"""Modules made of functions, and random weights that preserve the deviation of activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 32  # of most zoo models

Run = Callable[..., Any]
Has = Mapping[str, Callable[[], Any]]


def weight(*shape: int, fan: int = CHANNELS) -> Callable[[], nn.Parameter]:
    """Return a maker of a parameter of deviation fan**-0.5: a sum over `fan` terms keeps its input's deviation."""
    return lambda: nn.Parameter(torch.randn(shape) * fan**-0.5)


def settled(module: nn.Module) -> nn.Module:
    """Put `module` in eval mode, with variance-preserving linear maps and nontrivial norms and biases."""
    for part in module.modules():
        matrix, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)) and isinstance(matrix, nn.Parameter):
            nn.init.normal_(matrix, std=matrix[0].numel() ** -0.5)
        elif isinstance(part, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and matrix is not None:
            nn.init.normal_(matrix, mean=1.0, std=0.2)
        if isinstance(bias, nn.Parameter):
            nn.init.normal_(bias, std=0.2)
    return module.eval()


class Functional(nn.Module):
    """`run(self, *inputs)` with the parameters, buffers and modules that the makers in `has` make."""

    def __init__(self, run: Run, has: Has) -> None:
        super().__init__()
        self.run = run
        self.hold(has)

    def hold(self, has: Has) -> None:
        for name, make in has.items():
            value = make()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)
