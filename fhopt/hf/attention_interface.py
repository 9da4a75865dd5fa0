"""The attention implementation "fhopt" for transformers' `AttentionInterface`, set by `fhopt.apply`.

Letters: B batch, H query heads, G kv heads, S queries, T all tokens, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fhopt.attention import exact_tokens
from fhopt.attention.attend import attend
from fhopt.attention.offered_latents import read_offered
from fhopt.attention.recorded import recorded
from fhopt.errors import FhoptError
from fhopt.ops import algebra, attention, masks, prefill_attention

IMPLEMENTATION = "fhopt"
WATCH = "fhopt_watch"  # attribute of a module: a function that replaces its full-precision attention


def latent_attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    position_bias: Tensor | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention of a transformers model, with or without a latent cache.

    query [B,H,S,D]; key and value [B,G,T,D] as returned by the cache; attention_mask [B,1,S,T] or None; position_bias
    broadcastable to [B,H,S,T]; s_aux [H], sink logits. Returns [B,S,H,D], and None for the attention weights. Raises
    FhoptError for unsupported options.
    """
    stand_in = None if torch.compiler.is_compiling() else getattr(recorded, "attention", None)
    if stand_in is not None:
        options = dict(scaling=scaling, dropout=dropout, softcap=softcap, position_bias=position_bias, s_aux=s_aux)
        attended: Tensor = stand_in(module, query, key, value, attention_mask, options | kwargs)
        return attended, None
    unknown = [name for name in ("head_mask", "output_attentions") if kwargs.get(name) not in (None, False)]
    if unknown:
        raise FhoptError(f"attention on latents does not support {unknown[0]}. Drop it, or call fhopt.unapply(model).")
    keys, values, latents = read_offered(key, value)
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
    """Attend to full-precision keys and values: a CPU kernel for prefill if one applies, else torch.

    is_causal: aligned to the last key, for at most T queries; the last query sees all tokens.
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


# --------------------------------------------------------------------------------------------------- registration


def register_attention() -> None:
    """Register `latent_attention_forward` with transformers as IMPLEMENTATION."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, latent_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)  # without it transformers would drop padding masks


def _mask(*args: Any, **options: Any) -> Any:
    """Make transformers' mask; None if it is only causal.

    `latent_attention_forward` applies causality itself, also with a cache; `sdpa_mask` would make a mask for it.
    """
    from transformers.masking_utils import sdpa_mask

    if not torch.compiler.is_compiling():
        defaults = _defaults(sdpa_mask)
        if _is_causal({**defaults, **dict(zip(defaults, args, strict=False)), **options}):
            return None
    return sdpa_mask(*args, **options)


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's parameters and their defaults. Cached: inspection takes as long as half a layer."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def _is_causal(of: dict[str, Any]) -> bool:
    """Return whether `sdpa_mask` would be only causal with these arguments: new tokens last, no padding."""
    from transformers.masking_utils import causal_mask_function

    padding = of.get("attention_mask")
    if of.get("mask_function") is not causal_mask_function or of.get("local_size") is not None:
        return False
    numbers: list[Any] = [of.get(name) for name in ("q_offset", "q_length", "kv_offset", "kv_length")]
    if not of.get("allow_is_causal_skip") or not all(isinstance(n, int) for n in numbers):
        return False
    at_the_end = numbers[0] + numbers[1] == numbers[2] + numbers[3]
    return at_the_end and (padding is None or (padding.device.type == "cpu" and bool(padding.all())))
