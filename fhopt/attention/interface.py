"""Attention on what a `LatentCache` returns: for transformers' `AttentionInterface`, and for models that spell it out.

A cache layer returns `LatentTensor`s in place of keys and values of full length. They have the shape, dtype and device
of these but no memory; attention reads the exact tokens and the latents behind them:

    attention of the interface ("fhopt", set by `fhopt.apply`)       latent_attention(module, q, k, v, mask)
    F.scaled_dot_product_attention(q, k, v)                          `attend`, in a model that calls it itself
    q @ k.transpose(-1, -2), bmm, baddbmm; p @ v                     `scores` and `mix`, in a model that spells it out

Any other operation gets reconstructed keys or values, with a warning: right, but of full length. Under torch.compile
the tensors are the exact tokens themselves, with the latents as an attribute that Dynamo follows; only the attention of
the interface reads it.

Letters: B batch, H query heads, G kv heads, S queries, T all tokens, N exact tokens, D head size.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from fhopt.attention import exact_tokens
from fhopt.attention.attend import attend
from fhopt.attention.cache_view import AnyLatents
from fhopt.attention.latent_tensor import LatentTensor, joined_latents
from fhopt.errors import FhoptError
from fhopt.ops import algebra, attention, masks, prefill_attention

ATTRIBUTE = "fhopt_latents"  # of exact keys, under torch.compile
WATCH = "fhopt_watch"  # of a module: the function that computes its attention where there are no latents


rehearsed = threading.local()  # .attention: what stands in for `latent_attention` in this thread, while it is set


class Reader:
    """The attention that reads the layers of a cache, as far as these know it.

    active: it is `latent_attention`, which reads latents in compiled graphs, too. pending: in a compiled graph, latents
    were offered and have not been read yet.
    """

    def __init__(self, active: bool = False) -> None:
        self.active, self.pending = active, False


# --------------------------------------------------------------------------------------------------- the interface


def latent_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    position_bias: Tensor | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention on a latent cache: 'fhopt' of transformers' `AttentionInterface`.

    query [B,H,S,D], key and value [B,G,T,D] as the cache returned them, mask [B,1,S,T] or None, position_bias
    broadcastable to [B,H,S,T], s_aux [H] (attention sinks). Returns [B,S,H,D], and None in place of weights. Raises
    FhoptError for options that it does not support.
    """
    stand_in = None if torch.compiler.is_compiling() else getattr(rehearsed, "attention", None)
    if stand_in is not None:
        options = dict(scaling=scaling, dropout=dropout, softcap=softcap, position_bias=position_bias, s_aux=s_aux)
        attended: Tensor = stand_in(module, query, key, value, attention_mask, options | kwargs)
        return attended, None
    unknown = [name for name in ("head_mask", "output_attentions") if kwargs.get(name) not in (None, False)]
    if unknown:
        raise FhoptError(f"attention on latents has no {unknown[0]}. Call fhopt.unapply(model), or leave it out.")
    keys, values, latents = _exact_tokens(key, value)
    queries, tokens = query.shape[2], keys.shape[2] if latents is None else latents.length(keys)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    several = True if queries > 1 else False  # noqa: SIM210  # a symbol becomes a guard
    mask = None if attention_mask is None else attention_mask[..., :tokens]
    watch = getattr(module, WATCH, None)
    needs_mask = position_bias is not None or (watch is not None and latents is None and queries < tokens)
    if mask is None and causal and several and needs_mask:
        mask = masks.causal_mask(queries, tokens, query.device)
    if position_bias is not None:
        bias = masks.additive(mask, position_bias.dtype)
        mask = position_bias if bias is None else position_bias + bias
    numbers: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.reshape(1, -1, 1),
    )
    if latents is None:
        output = (watch or _attend_exactly)(
            query, keys, values, mask, is_causal=mask is None and causal and several, dropout=dropout, **numbers
        )
    else:
        if mask is None and not causal:
            mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
        output = attend(query, keys, values, latents, mask, **numbers)
    return output.transpose(1, 2).contiguous(), None


def _attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, sinks: Tensor | None, is_causal: bool = False,
    dropout: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Attend to all tokens: on a CPU many queries by their kernel, others by torch.

    is_causal: the last of at most T queries sees all tokens, the one before all but the last, and so on.
    """
    queries, tokens = query.shape[2], key.shape[2]
    if not dropout and queries <= tokens and all(type(x) is Tensor for x in (query, key, value)):
        given = options | {"causal": is_causal}
        part = prefill_attention.attend_on_cpu("open_attention", query, key, value, mask, **given)
        if part is not None:
            return part[0] if sinks is None else algebra.merge([part, exact_tokens.no_token(query, value, sinks)])
    if is_causal and queries < tokens:
        mask, is_causal = masks.causal_mask(queries, tokens, query.device), False
    options |= {"is_causal": is_causal, "dropout": dropout}
    return attention.attention_reference(
        query, key, value, mask, None if sinks is None else sinks.unsqueeze(-1), **options
    )


def _exact_tokens(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, AnyLatents | None]:
    """Return exact keys and values [B,G,N,D], and the latents behind them; without latents, all keys and values."""
    if isinstance(key, LatentTensor) and isinstance(value, LatentTensor):
        return key.exact, value.exact, joined_latents(key, value)
    latents, reader = getattr(key, ATTRIBUTE, (None, None))
    if reader is not None:
        reader.pending = False
    return key, value, latents


def offer(key: Tensor, value: Tensor, latents: AnyLatents, reader: Reader) -> tuple[Tensor, Tensor]:
    """Offer exact keys and values [B,G,N,D] with latents behind them to attention.

    Raises FhoptError in a compiled graph where the latents of the layer before have not been read: an operation on its
    keys has lost them.
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
