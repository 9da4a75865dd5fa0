"""What attention on a KV cache reads: exact tokens, a residual window in 8 bits, packed latents, and their masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fhopt.attention.cache_view import SideRows
from fhopt.ops import algebra, latent_attention


@dataclass(frozen=True, eq=False)
class PartMasks:
    """Masks of the parts of a cache, bool or additive; None: every query sees the whole part.

    exact [..., N]: of tokens kept as they came; window [..., M]: of the window in 8 bits; latents [..., V]: of packed
    latents, of which the first `lengths` count (int64, one number or [B]; None: all of them).
    """

    exact: Tensor | None = None
    window: Tensor | None = None
    latents: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionOperands:
    """Operands of attention on a KV cache.

    query [B,H,S,D]; key [B,G,N,D] and value [B,G,N,E] of exact tokens; key_side, value_side: latents and windows.
    softcap: 0 for none. sinks, broadcastable to [B,H,S]: one further logit that takes weight and gives nothing. causal:
    the masks of exact tokens and window say no more than that no query sees what follows it.
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
        """Return the operands of packed latents of one segment. query: turned to it."""
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

    mask broadcastable to [B,H,S,V]; options: other keyword arguments of `fhopt::latent_attention`.
    """
    groups = algebra.group_options(key.bit_groups, value.bit_groups)
    return latent_attention.latent_attention(
        query, key.rows, key.scale, value.rows, value.scale, mask, **groups, **options
    )


def with_means(operands: AttentionOperands, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Add the means that tokens are differences from to attention on them: output [B,H,S,E] (expanded), lse.

    softmax(q (k + m)^T) over these tokens is softmax(q k^T), and the log of their weight grows by q . m; a mean of
    values is the same in every output.
    """
    key_mean, value_mean = operands.key_side.mean, operands.value_side.mean
    if key_mean is not None:
        lse = lse + operands.scale * algebra.mean_logits(operands.query, key_mean).to(lse.dtype)
    if value_mean is not None:
        output = (output + algebra.mean_outputs(value_mean, output.shape[1])).to(operands.query.dtype)
    return output, lse
