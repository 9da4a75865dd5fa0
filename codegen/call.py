"""Call a kernel: from tensors to the C++ struct `Arguments`, and from arguments to the kernel that serves them.

Decoding calls attention once per layer and token, so what is known before the call is not found out again in it.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpp import ARGUMENTS
from fhopt.spec import KernelSpec

_NONE = (0, 0, 0, 0)  # no tensor: address and three strides
_NO_MASK, _BOOL_MASK, _ADDITIVE_MASK = 0, 1, 2
_pack = struct.Struct(ARGUMENTS).pack


class LibraryKernel:
    """A compiled kernel with the signature of `fhopt.ops.latent_attention_reference`; it ignores the tier arguments.

    Computes in float32. Queries and uncoded latents of other types than the spec's are converted. Raises ValueError when
    shapes or types do not fit the spec: the kernel itself trusts its pointers.
    """

    def __init__(self, function: Any, spec: KernelSpec) -> None:
        function.argtypes, function.restype = (ctypes.c_char_p,), None
        self._function: Callable[[bytes], None] = function
        self.spec = spec
        self._key_dtype, self._key_bytes = _row(spec.key_tiers, spec.key_width, spec.dtype)
        self._value_dtype, self._value_bytes = _row(spec.value_tiers, spec.value_width, spec.dtype)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        key_scale: Tensor | None,
        value: Tensor,
        value_scale: Tensor | None,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        **_tiers: object,
    ) -> tuple[Tensor, Tensor]:
        """Attention on latents: o~ [B,H,S,R_V] in the dtype of query, lse [B,H,S] float32."""
        b, h, s, _ = query.shape
        dtype = query.dtype
        query, key, value = _dense(query, torch.float32), _dense(key, self._key_dtype), _dense(value, self._value_dtype)
        self._check(query, key, key_scale, value, value_scale, softcap)
        kind, masking = _mask(mask, (b, h, s, key.shape[2]))
        output, lse = query.new_empty((b, h, s, self.spec.value_width)), query.new_empty((b, h, s))
        self._function(
            _pack(
                b, h, s, key.shape[2], key.shape[1], value.shape[1], torch.get_num_threads(), kind,
                query.data_ptr(), *query.stride()[:3],
                key.data_ptr(), *key.stride()[:3], *_scales(key_scale, self.spec.key_tiers),
                value.data_ptr(), *value.stride()[:3], *_scales(value_scale, self.spec.value_tiers),
                *masking, output.data_ptr(), lse.data_ptr(), scale, softcap,
            )
        )  # fmt: skip
        return (output if dtype == torch.float32 else output.to(dtype)), lse
