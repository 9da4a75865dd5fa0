"""Spellings of attention, one function each: contractions, scale, softmax, masks, heads, projections, RoPE, caches.

    core    f(m, q, k, v) -> o     between the projections of a Block; all are [B, heads, T, D]
    heads   f(m, x) -> q, k, v     before a causal scaled_dot_product_attention; the same shapes
    whole   f(m, x) -> y           uses only the weights of the Block

A function's name is the name of its entry. Its docstring names the spelling and code that uses it. Each module
decorates its functions with its own `Spellings`, whose entries are listed here in the order of modules.
Letters: B batch, H query heads, G kv heads, S queries, T keys, D head size, C = H * D channels, N = H // G.
"""

from __future__ import annotations

from model_zoo import Entry
from model_zoo.spellings import (
    caches,
    contractions,
    head_splits,
    kv_heads,
    left_alone,
    masks,
    norms_and_rotations,
    projections,
    scale_and_softmax,
    sdpa_calls,
    surroundings,
)

MODULES = (
    contractions,
    scale_and_softmax,
    masks,
    sdpa_calls,
    kv_heads,
    head_splits,
    projections,
    norms_and_rotations,
    surroundings,
    caches,
    left_alone,
)
ENTRIES: list[Entry] = [entry for module in MODULES for entry in module.SPELLINGS.entries]
