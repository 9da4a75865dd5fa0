"""What attention may read of a cache: open keys and values, and latents of sealed tokens; and attention that reads it.

    attend     softmax(q K^T) V    latents and open tokens apart, through the canonical op, merged by log-sum-exp
    scores     q K^T               for attention that is written out, in order of position
    mix        p V

K and V are never rebuilt: queries are absorbed (q . D z = D^T q . z), outputs expanded. Both kinds of `Latents` say
which places of [sinks | sealed | window] are open and which are latents: `split` cuts what has a number per token,
`place` puts it together again.

Where there is an index of pages, a query alone reads the latents of those that it chooses (fhopt/attention/paged.py).

Where the window is rounded to 8 bits, its tokens are rows too, and those of the open tokens that are given as numbers
are the others: the sinks and what is new. `SideRows.open` gives all of them as numbers.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T all tokens, N open ones, M of these in the
window, V rows of latents, D head size, R latent width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents, Latents
from fhopt.attention.exact_tokens import exact_parts, split_off
from fhopt.attention.paged import attend_selected_pages, selects_pages
from fhopt.ops import algebra, latent_attention, prefill_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, mask: Tensor | None, *, scale: float,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention over open keys and values [B,G,N,D] and over latents. query [B,H,S,D] -> [B,H,S,E].

    mask, broadcastable to [B,H,S,T]: bool or additive, over all tokens in order of position; None: causal. sinks,
    broadcastable to [B,H,S]: one further logit that takes weight and gives nothing.
    """
    near, far = _masks(query, key, latents, mask)
    near, inside = split_off(near, latents.sinks, latents.key.rounded)
    sides = latents.key, latents.value
    operands: Any = (
        query, key, value,
        *[x for side in sides for x in (side.rows, side.scale, side.decode)],
        *[x for side in sides for x in (side.window or (None, None))],
        near, inside, far, latents.lengths,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        **algebra.tier_options(*[side.tiers for side in sides]), scale=scale, softcap=softcap
    )
    causal = mask is None and isinstance(latents, Latents)
    index = latents.index
    observer = latents.observer if isinstance(latents, Latents) else None
    if observer is not None:
        observer(query, key, value, latents, scale, softcap)
    elif index is not None and selects_pages(query, index):
        return attend_selected_pages(*operands, index=index, sinks=sinks, causal=causal, **options)
    if sinks is None and _is_step(query, key, latents):
        output: Tensor = torch.ops.fhopt.attend_latents(*operands, **options)
        return output
    return attend_parts(*operands, **options, sinks=sinks, causal=causal)


def attend_parts(
    query: Tensor, key: Tensor, value: Tensor,
    key_rows: Tensor, key_scale: Tensor | None, key_decode: Tensor,
    value_rows: Tensor, value_scale: Tensor | None, value_decode: Tensor,
    window_keys: Tensor | None, window_key_scale: Tensor | None,
    window_values: Tensor | None, window_value_scale: Tensor | None,
    near: Tensor | None, inside: Tensor | None, far: Tensor | None, lengths: Tensor | None,
    *, sinks: Tensor | None = None, causal: bool = False, scale: float, softcap: float = 0.0, **tiers: Any,
) -> Tensor:  # fmt: skip
    """Attention over latents, a window of codes and open tokens, merged. Masks: near of the open tokens, inside of the
    window, far of the latents, of which the first `lengths` count. causal: near and inside say nothing more."""
    numbers, parts, coded = dict(scale=scale, softcap=softcap), [], bool(tiers["key_bits"] or tiers["value_bits"])
    if key_rows.shape[2] and prefill_attention.rebuilds(
        query, key_rows, key_decode, value_rows, value_decode, far, coded
    ):
        sides = key_rows, key_scale, key_decode, value_rows, value_scale, value_decode
        parts.append(torch.ops.fhopt.rebuilt_attention(query, *sides, far, lengths, **tiers, **numbers))
    elif key_rows.shape[2]:
        output, lse = latent_attention.latent_attention(
            algebra.absorb(query, key_decode), key_rows, key_scale, value_rows, value_scale, far,
            **tiers, **numbers, lengths=lengths,
        )  # fmt: skip
        parts.append((algebra.expand(output, value_decode), lse))
    window = window_keys, window_key_scale, window_values, window_value_scale
    parts += exact_parts(query, key, value, window, (near, inside), sinks, causal, numbers)
    return algebra.merge(parts) if len(parts) > 1 else parts[0][0]


_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(
    "attend_latents(Tensor query, Tensor key, Tensor value, Tensor key_rows, Tensor? key_scale, Tensor key_decode, "
    "Tensor value_rows, Tensor? value_scale, Tensor value_decode, Tensor? window_keys, Tensor? window_key_scale, "
    "Tensor? window_values, Tensor? window_value_scale, Tensor? near, Tensor? inside, Tensor? far, Tensor? lengths, *, "
    "int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, "
    "float scale, float softcap=0.0) -> Tensor"
)


def _attend_latents_fake(query: Tensor, key: Tensor, value: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_LIB.impl("attend_latents", attend_parts, "CompositeExplicitAutograd")
torch.library.register_fake("fhopt::attend_latents", _attend_latents_fake, lib=_LIB)


def _is_step(query: Tensor, key: Tensor, latents: AnyLatents) -> bool:
    """True in compiled graphs where all of it is one op (`codegen.cpu.graph_kernels`): decoding on a CPU."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or query.device.type != "cpu":
        return False
    typed = query.dtype == key.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return typed and query.shape[2] == 1 and key.shape[2] != 0 and latents.key.rows.shape[2] != 0


def _masks(query: Tensor, key: Tensor, latents: AnyLatents, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(mask of the open tokens, mask of the latents)."""
    if mask is None:
        return latents.causal(query.shape[2], key)
    if mask.shape[-1] == 1:  # one rule for all tokens
        mask = mask.expand(*mask.shape[:-1], latents.length(key))
    near, far = latents.split(mask, False if mask.dtype == torch.bool else -math.inf)
    if latents.lengths is not None:  # says the rest
        far = mask[..., latents.sinks : latents.sinks + latents.key.rows.shape[2]]
    return near, far
