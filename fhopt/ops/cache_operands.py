"""The operands of attention on a KV cache, named once: for the op, its reference and its C++ kernel.

    fhopt::attend_latents(OPERANDS, *, bit groups, scale, softcap)    fhopt/ops/cache_attention.py
    fhopt::attend_kernel(kernels, OPERANDS, scale, softcap)           fhopt/codegen/cpu/graph_kernels.py, and its C++

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, N exact tokens, M tokens of the 8-bit window,
V packed latents, F rotary frequencies, D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class CacheOperands(NamedTuple):
    """Operands of attention on a KV cache, in the order of schemas.

    query [B,H,S,D]; key [B,G,N,D], value [B,G,N,E]: exact tokens. ..._rows, ..._scale, ..._decode, ..._mean: as in
    `fhopt.attention.cache_view.SideRows`. window_...: the 8-bit window, uint8 [B,G,M,D] with scales float16 [B,G,M].
    near, inside, far: masks of exact tokens, window and latents; only the first `lengths` latents count. turn_pairs,
    turn_phases, segment: pairs and phases of the keys' `SegmentRotation`, and tokens per segment; 0: no rotation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_rows: Tensor
    key_scale: Tensor | None
    key_decode: Tensor
    value_rows: Tensor
    value_scale: Tensor | None
    value_decode: Tensor
    window_keys: Tensor | None = None
    window_key_scale: Tensor | None = None
    window_values: Tensor | None = None
    window_value_scale: Tensor | None = None
    near: Tensor | None = None
    inside: Tensor | None = None
    far: Tensor | None = None
    lengths: Tensor | None = None
    key_mean: Tensor | None = None
    value_mean: Tensor | None = None
    turn_pairs: Tensor | None = None
    turn_phases: Tensor | None = None
    segment: int = 0


_IN_A_SCHEMA: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int"}
_IN_CPP: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "std::optional<Tensor>", int: "int64_t"}


def _parameters(types: Mapping[Any, str]) -> str:
    return ", ".join(f"{types[hint]} {name}" for name, hint in get_type_hints(CacheOperands).items())


OPERANDS = _parameters(_IN_A_SCHEMA)  # of a schema
CPP_OPERANDS = _parameters(_IN_CPP)  # of a function in C++
