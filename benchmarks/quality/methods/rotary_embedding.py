"""Removal and reapplication of a model's RoPE, and observation of its attention inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WATCHED = "watched"  # name of an attention implementation
Watch = Callable[[torch.nn.Module, Tensor, Tensor, Tensor, float], None]


@dataclass(frozen=True)
class Rotary:
    """The rotary position embedding that all layers of a model share.

    module: computes (cos, sin) [1, N, R] from positions; None for a model without one, or with several of them, whose
    keys then stay unmodified. Channels f and f + R / 2 of the first R are a pair; their scaling is left unchanged.
    """

    module: Any

    @staticmethod
    def of(model: Any) -> Rotary:
        """Return the embedding of a transformers decoder."""
        module = getattr(model.get_decoder(), "rotary_emb", None)
        plain = module is not None and list(inspect.signature(module.forward).parameters) == ["x", "position_ids"]
        return Rotary(module if plain else None)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys or queries x [..., N, D] at `positions` [N] back to position zero."""
        return self._turned(x, positions, -1)

    def redo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., N, D] from position zero to `positions` [N]."""
        return self._turned(x, positions, 1)

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin [N, R] at `positions`, of unit length; None for another pair layout."""
        if self.module is None:
            return None
        cos, sin = (part[0] for part in self.module(x.float(), positions[None].to(x.device)))
        first, second = cos.chunk(2, -1)
        if not torch.equal(first, second):
            return None
        length = (cos.square() + sin.square()).sqrt()
        return cos / length, sin / length

    def _turned(self, x: Tensor, positions: Tensor, direction: int) -> Tensor:
        found = self.angles(x, positions)
        if found is None:
            return x
        cos, sin = found
        turned, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + direction * torch.cat([-second, first], -1) * sin
        return torch.cat([turned.to(x.dtype), rest], -1)


@contextmanager
def watched(model: Any, watch: Watch) -> Iterator[None]:
    """Call `watch`(module, query [B,H,S,D], key, value [B,G,T,D], scale) after each attention of the model inside.

    Attention itself is torch's scaled_dot_product_attention, as transformers calls it.
    """

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        result = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
        scale = options.get("scaling")
        watch(module, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return result

    before = model.config._attn_implementation
    AttentionInterface.register(WATCHED, attention)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    model.set_attn_implementation(WATCHED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
