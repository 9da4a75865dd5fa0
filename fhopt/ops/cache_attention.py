"""fhopt::attend_latents: one decode step of attention on all parts of a KV cache.

    query [B,H,1,D], exact tokens, 8-bit window, packed latents, masks, means, rotation  ->  output [B,H,1,E]

Compiled graphs have one such node per attention site, which fhopt/codegen/cpu/graph_kernels.py replaces by one native
call. Otherwise fhopt/attention/attend.py runs it on torch operations. That module imports this package and registers
its `attend_latents_reference` as the implementation.

Letters: B batch, H query heads, D and E head size of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fhopt.ops.cache_operands import OPERANDS

SCHEMA = (
    f"attend_latents({OPERANDS}, *, "
    "int[] key_bits, int[] key_widths, float[] key_steps, int[] value_bits, int[] value_widths, float[] value_steps, "
    "float scale, float softcap=0.0) -> Tensor"
)
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define(SCHEMA)


def _attend_latents_fake(query: Tensor, key: Tensor, value: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


torch.library.register_fake("fhopt::attend_latents", _attend_latents_fake, lib=_LIB)
