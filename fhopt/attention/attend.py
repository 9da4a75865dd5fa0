"""Attention on a KV cache: exact tokens, an 8-bit residual window and packed latents, merged by log-sum-exp.

    attend         softmax(q K^T) V, with a mask over all tokens, or causal
    attend_parts   softmax(q K^T) V, with masks of the parts; a decode step on CPU is one native call, in compiled
                   graphs the op fhopt::attend_latents (fhopt/ops/cache_attention.py)

K and V are not reconstructed: queries are absorbed (q . D z = D^T q . z) and outputs expanded. Only prefill may run on
reconstructed K/V, a tile at a time (fhopt/ops/prefill_attention.py). If the cache has a page index, a single query
attends only to the latents of the pages that it selects (fhopt/attention/paged.py).

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T all tokens, N exact tokens, M tokens of the
8-bit window, V packed latents, D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fhopt.attention.cache_view import AnyLatents, CacheView, SideRows
from fhopt.attention.exact_tokens import exact_parts, split_off
from fhopt.attention.latent_parts import latent_parts
from fhopt.attention.operands import AttentionOperands, PartMasks
from fhopt.attention.paged import attend_selected_pages, selects_pages
from fhopt.ops import algebra, registry
from fhopt.ops.cache_operands import CacheOperands
from fhopt.plan.segment_rotation import SegmentRotation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend(
    query: Tensor, key: Tensor, value: Tensor, latents: AnyLatents, mask: Tensor | None, *, scale: float,
    softcap: float = 0.0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend to exact keys [B,G,N,D] and values [B,G,N,E] and to latents. query [B,H,S,D] -> [B,H,S,E].

    mask, broadcastable to [B,H,S,T]: bool or additive, over all tokens in position order; None: causal. sinks,
    broadcastable to [B,H,S]: a sink logit.
    """
    operands = AttentionOperands(
        query, key, value, latents.key, latents.value, _part_masks(query, key, latents, mask), scale, softcap, sinks,
        causal=mask is None and isinstance(latents, CacheView),
    )  # fmt: skip
    index = latents.index
    observer = latents.observer if isinstance(latents, CacheView) else None
    if observer is not None:
        observer(query, key, value, latents, scale, softcap)
    elif index is not None and selects_pages(query, index):
        return attend_selected_pages(operands, index)
    if sinks is None and _is_decode_step(query, key, latents):
        output = _attend_at_once(operands)
        if output is not None:
            return output
    return attend_parts(operands)


def attend_parts(operands: AttentionOperands) -> Tensor:
    """Attend to packed latents, the 8-bit window and exact tokens, and merge: [B,H,S,E]."""
    parts = latent_parts(operands) if operands.key_side.rows.shape[2] else []
    parts += exact_parts(operands)
    return algebra.merge(parts) if len(parts) > 1 else parts[0][0]


# --------------------------------------------------------------------------------------------------- the op


def _attend_at_once(operands: AttentionOperands) -> Tensor | None:
    """Run `fhopt::attend_latents` in a graph, its kernel in eager mode; None if no kernel applies."""
    kernel: Any = torch.ops.fhopt.attend_latents
    if not torch.compiler.is_compiling():
        kernel = registry.kernel_of("attend_latents", "cpu")
    return None if kernel is None else _with_flat_operands(kernel, operands)


def _with_flat_operands(kernel: Any, operands: AttentionOperands) -> Tensor | None:
    """Call `kernel` with the operands in the order of `cache_attention.SCHEMA`."""
    key, value, masks = operands.key_side, operands.value_side, operands.masks
    window_keys, window_key_scale = key.window or (None, None)
    window_values, window_value_scale = value.window or (None, None)
    turn_pairs, turn_phases, segment = key.turning or (None, None, 0)
    flat = CacheOperands(
        query=operands.query, key=operands.key, value=operands.value, key_rows=key.rows, key_scale=key.scale,
        key_decode=key.decode, value_rows=value.rows, value_scale=value.scale, value_decode=value.decode,
        window_keys=window_keys, window_key_scale=window_key_scale, window_values=window_values,
        window_value_scale=window_value_scale, near=masks.exact, inside=masks.window, far=masks.latents,
        lengths=masks.lengths, key_mean=key.mean, value_mean=value.mean, turn_pairs=turn_pairs,
        turn_phases=turn_phases, segment=segment,
    )  # fmt: skip
    output: Tensor | None = kernel(*flat, **algebra.group_options(key.bit_groups, value.bit_groups), **operands.numbers)
    return output


def attend_latents_reference(
    *operands: Any, key_bits: list[int], key_widths: list[int], key_steps: list[float], value_bits: list[int],
    value_widths: list[int], value_steps: list[float], scale: float, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `attend_parts` from the flat operands of `fhopt::attend_latents`, the fields of `CacheOperands`."""
    x = CacheOperands(*operands)
    rotation = None
    if x.turn_pairs is not None and x.turn_phases is not None:
        rotation = SegmentRotation.from_phases(x.segment, x.turn_pairs, x.turn_phases)
    key_side = SideRows(
        algebra.BitGroups(key_bits, key_widths, key_steps), x.key_rows, x.key_scale, x.key_decode,
        _window(x.window_keys, x.window_key_scale), x.key_mean, rotation,
    )  # fmt: skip
    value_side = SideRows(
        algebra.BitGroups(value_bits, value_widths, value_steps), x.value_rows, x.value_scale, x.value_decode,
        _window(x.window_values, x.window_value_scale), x.value_mean,
    )  # fmt: skip
    masks = PartMasks(x.near, x.inside, x.far, x.lengths)
    return attend_parts(AttentionOperands(x.query, x.key, x.value, key_side, value_side, masks, scale, softcap))


def _window(values: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if values is None or scale is None else (values, scale)


torch.library.impl("fhopt::attend_latents", "default", attend_latents_reference)


def _is_decode_step(query: Tensor, key: Tensor, latents: AnyLatents) -> bool:
    """Return True for decode steps on CPU, which run all parts as one call of compiled kernels.

    In graphs the call is one op that `codegen.cpu.graph_kernels` replaces.
    """
    some = latents.key.rows.shape[2] != 0 or latents.key.window is not None
    single = query.shape[2] == 1 and key.shape[2] != 0 and query.dtype == key.dtype
    return single and some and _is_served(query)


def reads_at_once(new_keys: Tensor) -> bool:
    """Return whether a decode step with this key [B,G,1,D] is one native call in eager mode."""
    if torch.compiler.is_compiling() or registry.kernel_of("attend_latents", "cpu") is None:
        return False
    return _is_served(new_keys)


def _is_served(x: Tensor) -> bool:
    """Return whether CPU kernels support tensors like this one: no gradients, 32-bit or 16-bit floats."""
    return not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in _DTYPES


# --------------------------------------------------------------------------------------------------- masks


def _part_masks(query: Tensor, key: Tensor, latents: AnyLatents, mask: Tensor | None) -> PartMasks:
    """Split a mask over all tokens (None: causal) into masks of the parts."""
    if mask is None:
        exact, far = latents.causal(query.shape[2], key)
    else:
        if mask.shape[-1] == 1:  # the same for all tokens
            mask = mask.expand(*mask.shape[:-1], latents.length(key))
        mask = latents.by_place(mask)
        exact, far = latents.split(mask, False if mask.dtype == torch.bool else -math.inf)
        if latents.lengths is not None:  # lengths mask the remaining rows
            far = mask[..., latents.sinks : latents.sinks + latents.key.rows.shape[2]]
    exact, window = split_off(exact, latents.sinks, latents.key.rounded)
    return PartMasks(exact, window, far, latents.lengths)
