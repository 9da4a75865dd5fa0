"""Sizes, inputs and layers shared by the handwritten models.

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels, V words, M token
capacity of a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

B, H, G, T, D, V, M = 2, 4, 2, 12, 8, 50, 16
C, LAYERS = H * D, 2


def words(count: int = T) -> Tensor:
    return torch.randint(1, V, (B, count))


def states(*shape: int) -> Tensor:
    return torch.randn(B, *(shape or (T, C)))


def perceptron(width: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def layers(make: Callable[[], nn.Module], count: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList([make() for _ in range(count)])


class PreNorm(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x))."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(C), attention, nn.LayerNorm(C), perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Threaded(nn.Module):
    """Layers in sequence, all with the same condition."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = layers(make)

    def forward(self, x: Tensor, *condition: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *condition)
        return x
