"""Attention of many queries on keys and values as they are, in one C++ file for CPUs: what a prompt asks for.

    open_attention      exact keys and values, or those of a cache that were reconstructed
    rebuilt_attention   keys and values that are reconstructed from packed latents, a tile at a time

torch computes such attention by products of small matrices with scores in between; here both products stay in registers
and caches, with AMX or AVX-512 BF16 on pairs of bfloat16 (sources/prefill.cpp). Results are those of the references in
fhopt/ops/prefill_attention.py within the rounding of the type.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D and E head size of keys and values.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.codegen.background import builder
from fhopt.codegen.cpu import packing
from fhopt.codegen.cpu.calls.kernels import TYPES, OpenAttention, Rows
from fhopt.codegen.cpu.launch import mask_operand
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.ops import algebra
from fhopt.ops.masks import within

NUMBERS, MIN_TOKENS = 1 << 22, 256  # of keys and values that are reconstructed at once; tokens, however wide
MIN_LANES = 8


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the kernel takes these tensors: of one type of 32 or 16 bits, and none of them empty."""
    alike = query.dtype == key.dtype == value.dtype and query.dtype in TYPES and query.is_cpu
    shaped = query.dim() == key.dim() == value.dim() == 4 and 0 not in (*query.shape, *key.shape, *value.shape)
    return alike and shaped and query.shape[1] % key.shape[1] == 0


def open_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False, scale: float,
    softcap: float = 0.0, spans: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Attend with queries [B,H,S,D] to keys [B,G,T,D] and values [B,G,T,E]; None where no kernel serves.

    mask: bool or additive, broadcastable to [B,H,S,T]. causal: in its place, the last query sees everything, the one
    before all but the last key, and so on. spans, int64 [S,2]: each query sees no keys but those from the first number
    to before the second; then output is float32, for it is a part of something. Returns o [B,H,S,E] in the dtype of
    query, and lse [B,H,S] float32: -inf, and o = 0, where a query sees nothing. For calls without gradients.
    """
    function = builder.get(LIBRARY.name, LIBRARY.load, LIBRARY.compiles) if can_attend(query, key, value) else None
    if function is None:
        return None
    dtype = query.dtype if spans is None else torch.float32
    if causal:
        mask, spans = None, causal_spans(query.shape[2], key.shape[2])
    return _call(function, (query, key, value), mask, dtype, spans, scale, softcap)


@functools.lru_cache(maxsize=8)
def causal_spans(queries: int, tokens: int) -> Tensor:
    """Return which keys the newest `queries` of `tokens` tokens see: int64 [S,2]."""
    ends = torch.arange(tokens - queries + 1, tokens + 1)
    return torch.stack([torch.zeros_like(ends), ends], -1)


def rebuilt_attention_cpu(
    query: Tensor, key: Tensor, key_scale: Tensor | None, key_decode: Tensor | None, value: Tensor,
    value_scale: Tensor | None, value_decode: Tensor | None, mask: Tensor | None, lengths: Tensor | None, *,
    key_bits: Sequence[int], key_widths: Sequence[int], key_steps: Sequence[float], value_bits: Sequence[int],
    value_widths: Sequence[int], value_steps: Sequence[float], scale: float, softcap: float = 0.0,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Attend to keys and values that are reconstructed from latents, with the arguments of its reference.

    None where no kernel serves.
    """
    function = builder.get(LIBRARY.name, LIBRARY.load, LIBRARY.compiles) if query.dtype in TYPES else None
    if function is None:
        return None
    tokens = key.shape[2]
    if lengths is not None:
        mask, tokens = within(lengths, tokens, mask), min(tokens, max(1, int(lengths.max())))
    sides = (
        PrefillRows(key, key_scale, key_decode, (key_bits, key_widths, key_steps)),
        PrefillRows(value, value_scale, value_decode, (value_bits, value_widths, value_steps)),
    )
    at_once = max(MIN_TOKENS, NUMBERS // max(1, sum(side.numbers for side in sides)) // MIN_TOKENS * MIN_TOKENS)
    parts = []
    for start in range(0, tokens, at_once):
        part = slice(start, min(tokens, start + at_once))
        operands = (query, *(side.reconstruct(part, query.dtype) for side in sides))
        masked = mask if mask is None or mask.shape[-1] == 1 else mask[..., part]
        parts.append(_call(function, operands, masked, torch.float32, None, scale, softcap))
    output, lse = parts[0]
    if len(parts) > 1:
        output, lse = algebra.merge(parts), torch.stack([lse for _, lse in parts], -1).logsumexp(-1)
    return output.to(query.dtype), lse


class PrefillRows(NamedTuple):
    """Latents of keys or of values, and how they are read: see `SideRows` of fhopt/attention/cache_view.py."""

    rows: Tensor
    scale: Tensor | None
    decode: Tensor | None  # None: they are keys or values
    groups: tuple[Sequence[int], Sequence[int], Sequence[float]]

    @property
    def numbers(self) -> int:
        """Of the keys or values of one token."""
        batch, heads = self.rows.shape[:2]
        width = sum(self.groups[1]) or self.rows.shape[3]
        return batch * (heads * width if self.decode is None else self.decode.shape[0] * self.decode.shape[1])

    def reconstruct(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Reconstruct keys or values [B,G,T,D] of `dtype` from a part of the rows."""
        rows = self.rows[:, :, part]
        latent = rows if self.scale is None else packing.unpack_cpu(rows, self.scale[:, :, part], *self.groups)
        if self.decode is None:
            return latent.to(dtype)
        exact = algebra.product_dtype(dtype, latent.device)
        return algebra.decode(latent.to(exact), self.decode.to(exact)).to(dtype)


def _call(
    function: Any, operands: Sequence[Tensor], mask: Tensor | None, dtype: torch.dtype, spans: Tensor | None,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the kernel: output of `dtype` [B,H,S,E], whose memory is that of [B,S,H,E], and lse [B,H,S].

    operands: queries, keys and values. spans: as of `open_attention`.
    """
    query, key, value = operands = [x if x.stride(3) == 1 else x.contiguous() for x in operands]
    (b, h, s, d), (_, g, t, _), e = query.shape, key.shape, value.shape[3]
    if mask is not None and mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) > 1:
        mask = mask.contiguous()
    kind, masking = mask_operand(mask, (b, h, s, t))
    seen = 0 if spans is None else spans.data_ptr()
    output = query.new_empty((b, s, h, e), dtype=dtype).transpose(1, 2)
    lse = query.new_empty((b, h, s), dtype=torch.float32)
    call = OpenAttention(
        batch=b, heads=h, groups=g, queries=s, tokens=t, key_size=d, value_size=e, threads=torch.get_num_threads(),
        type=TYPES[query.dtype], query=_rows(query), key=_rows(key), value=_rows(value), mask_kind=kind,
        mask=0 if masking is None else masking.data_ptr(),
        mask_strides=(0,) * 4 if masking is None else masking.stride(), spans=seen, output_type=TYPES[dtype],
        output=output.data_ptr(), output_strides=output.stride()[:3], lse=lse.data_ptr(), scale=scale, softcap=softcap,
    )  # fmt: skip
    function(ctypes.byref(call))
    return output, lse


def _rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), *x.stride()[:3])


def _bind(library: ctypes.CDLL) -> Any:
    if library.lanes() < MIN_LANES:  # torch is faster: 0.44 times as long with 4, on x86
        return None
    library.open_attention.argtypes, library.open_attention.restype = (ctypes.c_void_p,), None
    return library.open_attention


LIBRARY = CppLibrary("prefill", "prefill.cpp", _bind, "Prefill attention runs on torch operations, which is slower.")
