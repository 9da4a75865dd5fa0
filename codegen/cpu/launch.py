"""Launch compiled attention kernels: check tensors, then hand their addresses and strides over in one struct.

Decoding calls attention once per layer and token, so a call does nothing that `build_kernel` could have done before.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.codegen.cpu.attention import new_kernel
from fhopt.codegen.cpu.calls.kernels import Attention, MaskKind, Rows
from fhopt.codegen.cpu.calls.layouts import packer
from fhopt.codegen.rows import NO_TENSOR, PAGE_QUANTUM, RowFormat
from fhopt.ops.masks import within
from fhopt.plan.kernel_spec import KernelSpec

_pack = packer(Attention)
_NO_PAGES = (*NO_TENSOR, 0, 0, 0)  # and how many heads, pages and tokens of a page


class PreparedCall(NamedTuple):
    """A call that has been checked and not yet made.

    arguments: its struct. output [B,H,S,R_V] and lse [B,H,S], both float32. kept: tensors that must live until the call
    is made (query, rows of keys and of values, mask and lists, as the kernel reads them).
    """

    arguments: bytes
    output: Tensor
    lse: Tensor
    kept: tuple[Tensor | None, ...]

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return output in the type of the query, and lse, once the call was made."""
        return (self.output if dtype == torch.float32 else self.output.to(dtype)), self.lse


class LibraryKernel:
    """The compiled kernel of a spec, with the signature of `fhopt.ops.latent_attention_reference`.

    It ignores the arguments for bit groups, and computes in float32; queries and uncoded latents of other types are
    converted. Raises ValueError when a shape or type does not fit the spec: the machine code trusts its pointers.
    """

    def __init__(self, library: ctypes.CDLL, spec: KernelSpec) -> None:
        self._function = function = library.latent_attention
        function.argtypes, function.restype = (ctypes.c_char_p,), None
        library.new_kernel.argtypes = (*(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64) * 2, *(ctypes.c_int64,) * 2)
        library.new_kernel.restype = ctypes.c_void_p
        self.address = address_of(function)
        self.table = new_kernel(library.new_kernel, spec)  # its address
        self._spec = spec
        self._key = RowFormat("key", spec.key_tiers, spec.key_width, spec.dtype)
        self._value = RowFormat("value", spec.value_tiers, spec.value_width, spec.dtype)

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
        lengths: Tensor | None = None,
        pages: Tensor | None = None,
        page_tokens: int = 0,
        **_tiers: object,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention on latents: o~ [B,H,S,R_V] in the dtype of query, lse [B,H,S] float32."""
        call = self.prepared(
            query, key, key_scale, value, value_scale, mask, lengths, pages, page_tokens, scale, softcap
        )
        self._function(call.arguments)
        return call.result(query.dtype)

    def prepared(
        self, query: Tensor, key: Tensor, key_scale: Tensor | None, value: Tensor, value_scale: Tensor | None,
        mask: Tensor | None, lengths: Tensor | None, pages: Tensor | None, page_tokens: int, scale: float,
        softcap: float,
    ) -> PreparedCall:  # fmt: skip
        """Check all tensors and fill in the struct of a call. Raises ValueError."""
        b, h, s, width = shape = tuple(query.shape)
        tokens = key.shape[2]
        if width != self._spec.key_width or (softcap != 0.0) != self._spec.softcap:
            raise ValueError(f"{self._spec.name} takes no queries {shape} with softcap {softcap}; build their kernel.")
        q, k, v = _queries(query), self._key.rows(key), self._value.rows(value)
        self._key.check(k, key_scale, shape, tokens)
        self._value.check(v, value_scale, shape, tokens)
        if lengths is not None and lengths.numel() != 1:
            mask, lengths = within(lengths, tokens, mask), None
        kind, masking = mask_operand(mask, (b, h, s, tokens))
        heads = math.gcd(k.shape[1], v.shape[1])
        if pages is not None and not pages.shape[2]:
            pages = pages.new_full((*pages.shape[:2], 1), -1)  # an empty list has no address, and none means all pages
        listing = _NO_PAGES if pages is None else _pages(pages, page_tokens, (b, heads, tokens))
        if lengths is not None:
            tokens = min(tokens, max(0, int(lengths)))
        output, lse = q.new_empty((b, h, s, self._spec.value_width)), q.new_empty((b, h, s))
        arguments = _pack(
            *(b, h, s, tokens, k.shape[1], v.shape[1], torch.get_num_threads(), kind),
            *(q.data_ptr(), *q.stride()[:3]),
            *self._key.addresses(k, key_scale),
            *self._value.addresses(v, value_scale),
            *((0, 0, 0, 0, 0) if masking is None else (masking.data_ptr(), *masking.stride())),
            *listing,
            *(output.data_ptr(), lse.data_ptr(), scale, softcap, self.table),
            *(3 if query.dtype == torch.float32 else 2, 0, 0),  # `digits`, and nothing that is read later
            *(0, 0, 0),  # no segments: `attend_kernel` has them
        )
        return PreparedCall(arguments, output, lse, (q, k, v, masking, pages))

    def read(self, call: Attention, key: tuple[Tensor, Tensor | None], value: tuple[Tensor, Tensor | None]) -> None:
        """Let a call read other rows and scales of keys and values, like those for which it was prepared."""
        rows, scales = self._key.addresses(*key), self._value.addresses(*value)
        call.key, call.key_scale, call.value, call.value_scale = (
            Rows(*x) for x in (rows[:4], rows[4:], scales[:4], scales[4:])
        )


def address_of(function: Any) -> int:
    """Return the address of a compiled function."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _queries(query: Tensor) -> Tensor:
    query = query if query.dtype == torch.float32 else query.to(torch.float32)
    return query if query.stride(3) == 1 else query.contiguous()


def _pages(pages: Tensor, page_tokens: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Return address, strides and sizes of page lists [B,U,N]. Raises ValueError for what the kernel cannot read."""
    batch, heads, tokens = shape
    fits = pages.dim() == 3 and pages.shape[0] == batch and pages.shape[1] > 0 and heads % pages.shape[1] == 0
    if not fits or pages.dtype != torch.int32 or pages.stride(2) != 1 or page_tokens <= 0 or page_tokens % PAGE_QUANTUM:
        raise ValueError(
            f"pages are {pages.dtype} {tuple(pages.shape)} of {page_tokens} tokens; expected torch.int32, dense, "
            f"[{batch}, a divisor of {heads}, N], pages of a multiple of {PAGE_QUANTUM} tokens."
        )
    if pages.numel() and int(pages.max()) * page_tokens >= max(tokens, 1):
        raise ValueError(f"page {int(pages.max())} of {page_tokens} tokens is listed, but there are {tokens} tokens.")
    return (pages.data_ptr(), *pages.stride(), pages.shape[1], pages.shape[2], page_tokens)


def mask_operand(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[MaskKind, Tensor | None]:
    """Return the kind of a mask, and the mask as kernels read it: expanded to `shape`."""
    if mask is None:
        return MaskKind.NO_MASK, None
    if mask.dtype == torch.bool:
        return MaskKind.BOOL_MASK, mask.expand(shape)
    return MaskKind.ADDITIVE_MASK, mask.to(torch.float32).expand(shape)
