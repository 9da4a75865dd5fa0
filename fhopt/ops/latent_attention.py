"""`fhopt::latent_attention`, the canonical op on latents, and its eager reference.

    q~ [B,H,S,R_K]   z_K [B,J,T,..]   z_V [B,J',T,..]   ->   o~ [B,H,S,R_V], lse [B,H,S]

Latent attention *is* grouped-query attention over J latent heads, so exact tokens of a KV cache (attention sinks,
residual window, new tokens) run through the same op as unquantized latents; parts are merged by log-sum-exp
(`fhopt.ops.algebra.merge`).

Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, J latent heads, R latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.ops import registry
from fhopt.ops.attention import grouped_mix, grouped_scores, safe_softmax
from fhopt.ops.masks import additive, listed, within
from fhopt.ops.packing import unpack_reference, unscaled

_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "latent_attention(Tensor query, Tensor key, Tensor? key_scale, Tensor value, Tensor? value_scale, Tensor? mask, *, "
    "int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, "
    "float scale, float softcap=0.0, Tensor? lengths=None, Tensor? pages=None, int page_tokens=0) -> (Tensor, Tensor)"
)
LatentKernel = Callable[..., tuple[Tensor, Tensor]]


# --------------------------------------------------------------------------------------------------- latent attention


def latent_attention_reference(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    key_bits: Sequence[int],
    key_widths: Sequence[int],
    key_steps: Sequence[float],
    value_bits: Sequence[int],
    value_widths: Sequence[int],
    value_steps: Sequence[float],
    scale: float,
    softcap: float = 0.0,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    page_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute attention on latents, without reconstructing keys and values.

    query [B,H,S,R_K] is absorbed. key: quantized values uint8 [B,J,T,bytes] with key_scale [B,J,T], or unquantized
    latents [B,J,T,R_K] without bit groups and scale. value: in the same two forms, with its own J. mask: bool or
    additive, broadcastable to [B,H,S,T]. lengths int64, [B] or scalar: only this number of leading tokens is attended.
    pages int32 [B,U,N], U a divisor of both J: only tokens of listed pages are attended; page p is the `page_tokens`
    tokens from p * page_tokens on. Query head h uses list h*U//H; page numbers are ascending and unique, with trailing
    -1 for no page. Returns o~ [B,H,S,R_V] in the dtype of query, and lse [B,H,S], the log of the sum of exponentials:
    float32 (float64 for float64 queries, which compute everything in float64); -inf (and o~ = 0) for a query without
    attended tokens.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    mask = within(lengths, key.shape[2], listed(pages, page_tokens, query.shape[1], key.shape[2], mask))
    z_k, k_factor = _operand(key, key_scale, key_bits, key_widths, key_steps, query.dtype)
    z_v, v_factor = _operand(value, value_scale, value_bits, value_widths, value_steps, query.dtype)
    logits = grouped_scores((query * scale).to(z_k.dtype), z_k).to(exact)
    if k_factor is not None:
        logits = logits * _per_head(k_factor, query.shape[1])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bias = additive(mask, exact)
    if bias is not None:
        logits = logits + bias
    weights, lse = safe_softmax(logits)
    if v_factor is not None:
        weights = weights * _per_head(v_factor, query.shape[1])
    return grouped_mix(weights.to(z_v.dtype), z_v).to(query.dtype), lse


def _operand(
    rows: Tensor, scale: Tensor | None, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return latents [B,J,T,R] for the matmul, and a factor per token [B,J,T] for its result.

    The factor is None if the latents include it. Quantized values are unpacked without their scale if possible, since
    scaling the result is cheaper.
    """
    if not bits:
        return rows, None
    if any(b == 16 for b in bits) or scale is None or dtype == torch.float64:
        assert scale is not None, "packed latents have a scale"
        latents = unpack_reference(rows, scale, bits, widths, steps)
        return (latents.double() if dtype == torch.float64 else latents), None
    return unscaled(rows, bits, widths, steps), scale.to(torch.float32)


def _per_head(factor: Tensor, heads: int) -> Tensor:
    """Repeat a latent head's factor for its query heads: [B,J,T] -> [B,H,1,T]."""
    return factor.repeat_interleave(heads // factor.shape[1], 1).unsqueeze(2)


def _latent_attention_fake(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    value_widths: Sequence[int],
    **_: object,
) -> tuple[Tensor, Tensor]:
    width = sum(value_widths) if value_widths else value.shape[-1]
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], width)), query.new_empty(query.shape[:3], dtype=exact)


def _latent_attention(
    query: Tensor, *args: Tensor | None, pages: Tensor | None = None, page_tokens: int = 0, **options: object
) -> tuple[Tensor, Tensor]:
    kernel: LatentKernel = registry.kernel_of("latent_attention", query.device.type) or latent_attention_reference
    if pages is not None:
        options |= dict(pages=pages, page_tokens=page_tokens)
    return kernel(query, *args, **options)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return True if a gradient is required.

    The ops have no gradient in compiled graphs; callers use the references instead.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def latent_attention(
    query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
    mask: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `fhopt::latent_attention`, or its reference if a gradient is required."""
    run: Any = (
        latent_attention_reference if needs_gradient(query, key, value, mask) else torch.ops.fhopt.latent_attention
    )
    result: tuple[Tensor, Tensor] = run(query, key, key_scale, value, value_scale, mask, **options)
    return result


_LIB.impl("latent_attention", _latent_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::latent_attention", _latent_attention_fake, lib=_LIB)
