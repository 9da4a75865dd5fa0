"""Operands of attention on a KV cache: exact tokens, 8-bit residual window, packed latents, and their masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.ops import algebra, latent_attention


@dataclass(frozen=True, eq=False)
class PartMasks:
    """Masks of the parts of a cache, bool or additive; None: every query sees the whole part.

    exact [..., N]: of exact tokens. window [..., M]: of the 8-bit window. latents [..., V]: of packed latents. lengths:
    number of leading packed latents to use (int64, scalar or [B]; None: all).
    """

    exact: Tensor | None = None
    window: Tensor | None = None
    latents: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionOperands:
    """Operands of attention on a KV cache.

    query [B,H,S,D]; key [B,G,N,D] and value [B,G,N,E] of exact tokens; key_side, value_side: latents and windows.
    softcap: 0 for none. sinks, broadcastable to [B,H,S]: a sink logit. causal: the masks of exact tokens and window are
    only causal.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_side: SideRows
    value_side: SideRows
    masks: PartMasks
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    causal: bool = False

    def of_segment(self, number: int, query: Tensor) -> AttentionOperands:
        """Return the operands of one segment's packed latents. query: rotated to it."""
        key, value, masks = self.key_side, self.value_side, self.masks
        rotation = key.rotation
        assert rotation is not None
        start, end = number * rotation.segment, min((number + 1) * rotation.segment, key.rows.shape[2])
        latents, lengths = masks.latents, masks.lengths
        if latents is not None and latents.shape[-1] != 1:
            latents = latents[..., start:end]
        if lengths is not None:
            lengths = (lengths - start).clamp(0, end - start)
        return replace(
            self, query=query,
            key_side=replace(key.part(start, end), rotation=None, first=0),
            value_side=value.part(start, end), masks=replace(masks, latents=latents, lengths=lengths),
        )  # fmt: skip

    @property
    def numbers(self) -> dict[str, Any]:
        """Scale and softcap, as keyword arguments."""
        return {"scale": self.scale, "softcap": self.softcap}


def attend_latents(
    query: Tensor, key: SideRows, value: SideRows, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attend to packed latents: query [B,H,S,R] (absorbed) -> (output [B,H,S,R_V] (not expanded), lse [B,H,S]).

    mask: broadcastable to [B,H,S,V]. options: further keyword arguments of `fhopt::latent_attention`.
    """
    groups = algebra.group_options(key.bit_groups, value.bit_groups)
    return latent_attention.latent_attention(
        query, key.rows, key.scale, value.rows, value.scale, mask, **groups, **options
    )


def with_means(operands: AttentionOperands, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Add the means of keys and values back to attention on differences: output [B,H,S,E] (expanded), lse.

    softmax(q (k + m)^T) over these tokens is softmax(q k^T), and their lse grows by q . m. A mean of values adds to
    every output.
    """
    key_mean, value_mean = operands.key_side.mean, operands.value_side.mean
    if key_mean is not None:
        lse = lse + operands.scale * algebra.mean_logits(operands.query, key_mean).to(lse.dtype)
    if value_mean is not None:
        output = (output + algebra.mean_outputs(value_mean, output.shape[1])).to(operands.query.dtype)
    return output, lse
