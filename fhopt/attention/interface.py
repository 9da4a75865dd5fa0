"""Attention on what a `LatentCache` gives: for transformers' `AttentionInterface`, and for models that attend by hand.

A cache layer returns `LatentTensor`s in place of keys and values of full length. They have the shape, dtype and device
of these and no memory; attention reads the open tokens and the latents behind them:

    attention of the interface ("fhopt", what `fhopt.apply` sets)    latent_attention(module, q, k, v, mask)
    F.scaled_dot_product_attention(q, k, v)                          the same, in a model that calls it itself
    q @ k.transpose(-1, -2), bmm, baddbmm; p @ v                     scores and mix, in a model that writes it out

Any other operation gets rebuilt keys or values, with a warning: right, but of full length. Under torch.compile the
tensors are the open tokens themselves, with the latents as an attribute that Dynamo follows; only the attention of the
interface reads it.

Letters: B batch, H query heads, G kv heads, S queries, T all tokens, N open ones, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.attention.attend import attend
from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.latent_tensor import LatentTensor, joined_latents
from fhopt.errors import FhoptError
from fhopt.ops import attention, masks

ATTRIBUTE = "fhopt_latents"  # of open keys, under torch.compile
WATCH = "fhopt_watch"  # of a module: what its attention is run by where there are no latents (offloaded_probe.py)


class Reader:
    """What the layers of a cache know of the attention that reads them.

    active: it is `latent_attention`, which reads latents in compiled graphs too. pending: there, latents were offered
    that have not been read yet.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.pending = active, False


# --------------------------------------------------------------------------------------------------- the interface


def latent_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    position_bias: Tensor | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The 'fhopt' attention of transformers' `AttentionInterface`.

    query [B,H,S,D], key and value [B,G,T,D] as the cache returned them, mask [B,1,S,T] or None, position_bias
    broadcastable to [B,H,S,T], s_aux [H] (attention sinks); returns [B,S,H,D] and no weights. Raises FhoptError for
    what it does not know.
    """
    unknown = [name for name in ("head_mask", "output_attentions") if kwargs.get(name) not in (None, False)]
    if unknown:
        raise FhoptError(f"attention on latents has no {unknown[0]}. Call fhopt.unapply(model), or leave it out.")
    opened, values, latents = _open(key, value)
    queries, tokens = query.shape[2], opened.shape[2] if latents is None else latents.length(opened)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    several = True if queries > 1 else False  # noqa: SIM210  # a symbol becomes a guard
    mask = None if attention_mask is None else attention_mask[..., :tokens]
    needs_mask = position_bias is not None or (latents is None and queries < tokens)
    if mask is None and causal and several and needs_mask:
        mask = masks.causal_mask(queries, tokens, query.device)
    if position_bias is not None:
        bias = masks.additive(mask, position_bias.dtype)
        mask = position_bias if bias is None else position_bias + bias
    options: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.reshape(1, -1, 1),
    )
    if latents is None:
        output = getattr(module, WATCH, _exact)(
            query, opened, values, mask, is_causal=mask is None and causal and several, dropout=dropout, **options
        )
    else:
        if mask is None and not causal:
            mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
        output = attend(query, opened, values, latents, mask, **options)
    return output.transpose(1, 2).contiguous(), None


def _exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, sinks: Tensor | None, **options: Any
) -> Tensor:
    return attention.attention_reference(
        query, key, value, mask, None if sinks is None else sinks.unsqueeze(-1), **options
    )


def _open(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, AnyLatents | None]:
    """(open keys, open values, latents)."""
    if isinstance(key, LatentTensor) and isinstance(value, LatentTensor):
        return key.opened, value.opened, joined_latents(key, value)
    latents, reader = getattr(key, ATTRIBUTE, (None, None))
    if reader is not None:
        reader.pending = False
    return key, value, latents


def offer(key: Tensor, value: Tensor, latents: AnyLatents, reader: Reader) -> tuple[Tensor, Tensor]:
    """Open keys and values [B,G,N,D] with latents behind them, as a cache gives them to attention.

    Raises FhoptError in a compiled graph where those of the layer before have not been read: an operation on the keys
    has lost them.
    """
    if not torch.compiler.is_compiling():
        return LatentTensor(key, latents, True), LatentTensor(value, latents, False)
    if reader.pending:
        reader.pending = False
        raise FhoptError(
            "a compiled model changes cached keys before its attention reads them, and loses the latents. Make the "
            "cache with absorb=False, or do not compile."
        )
    reader.pending = True
    offered = key.view_as(key)
    setattr(offered, ATTRIBUTE, (latents, reader))
    return offered, value
