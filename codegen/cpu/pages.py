"""Page selection and attention to the selected pages of a KV cache, in one C++ file for CPUs.

    x[t] = constant + scale[t] sum_c w_c u_c[t]        weight[p] = sum over t in p of exp(x[t])

The quantized values u and their scales are all that is read of pages that are not selected. Sixteen tokens are reckoned
at a time, a token in each lane: their rows are turned into words of four values a lane, and multiplied with the query
in 8 bits, for all query heads that share the latent head. Either the logs of the weights are the result, or the pages
of each unit that weigh most are passed to the attention kernel, and the mean of values represents the others: selecting
and reading are one call, since what lies between two calls of Python costs as much as half of the selection.
`fhopt.attention.sketches` says what the numbers mean, `fhopt.ops.paged_attention` has the reference.

Letters: B batch, J latent heads, M query rows of a latent head, T tokens, P pages, r channels of a sketch, U units, N
pages of a list, R latent width.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.cpu.calls.kernels import MAX_PAGE_TOKENS, MAX_SKETCH_WORDS, Choice, PagedCall, Sketches
from fhopt.codegen.cpu.calls.layouts import packer
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.ops.page_selection import FEWEST, pages_read
from fhopt.ops.paged_attention import PageStep

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are


_pack_sketches, _pack_choice, _pack_step = packer(Sketches), packer(Choice), packer(PagedCall)


def weigh_pages(
    weights: Tensor, constant: Tensor, codes: Tensor, scales: Tensor, bits: Sequence[int], widths: Sequence[int],
    steps: Sequence[float], page_tokens: int, mask: Tensor | None, length: int,
) -> Tensor | None:  # fmt: skip
    """Compute the log of the weight of each page, float32 [B,J,M,P], -inf where it has no token.

    weights float32 [B,J,M,r], constant float32 [B,J,M]; codes uint8 [B,J,T,bytes] in bit groups of `bits`, `widths` and
    `steps`; scales float16 [B,J,T]. mask bool, [1 or B, 1, 1, T]: tokens that count, of the first `length`. The query
    is rounded to 8 bits, which moves the logit of a token by up to 1/254 of the largest weight, times the sum of its
    codes. None where the kernel does not serve.
    """
    library = LIBRARY.load()
    words = _words(tuple(bits), tuple(widths), tuple(steps))
    if library is None or words is None or not _serves(codes, scales, words, page_tokens, mask):
        return None
    if weights.dtype != torch.float32 or weights.shape[3] != sum(widths) or weights.shape[:2] != codes.shape[:2]:
        return None
    weights, constant = weights.contiguous(), constant.contiguous()
    arguments, _kept = _sketches(
        tuple(weights.shape), page_tokens, length, codes, scales, words, mask, weights, constant
    )
    out = weights.new_empty((*weights.shape[:3], -(-codes.shape[2] // page_tokens)))
    library.weigh_pages(arguments, out.data_ptr())
    return out


def call_attend_pages(step: PageStep, kernel: LibraryKernel) -> tuple[Tensor, Tensor, Tensor] | None:
    """Select pages and attend to them by `kernel`, as `attend_pages_reference` does; None where it cannot serve."""
    library = LIBRARY.load()
    words = _words(tuple(step.bits), tuple(step.widths), tuple(step.steps))
    if library is None or words is None or not _fits(step, words):
        return None
    call = kernel.prepared(step.query, *step.latents, step.lengths, None, 0, step.scale, softcap=0.0)
    fill = None if step.values is None or step.fill is None else _floats(step.fill)
    values = None if step.values is None or fill is None else _floats(step.values)
    if values is not None and (len(values), *values.shape[2:]) != (len(call.output), *call.output.shape[2:]):
        return None
    (b, h, _, width), (j, r), count = step.query.shape, step.channels.shape, int(step.available())
    length = step.codes.shape[2] if step.lengths is None else int(step.lengths)
    sketches = step.codes, step.scales, words, step.far, None, None
    arguments, _kept = _sketches((b, j, h // j, r), step.page_tokens, length, *sketches)
    near, counts = None if step.near is None else _floats(step.near), step.codes.new_empty(4, dtype=torch.int64)
    read = pages_read(count, step.share, step.least)
    choice = _pack_choice(step.units, step.most, read, count, FEWEST, step.mass, step.lift, _address(near))
    kept = step.channels.contiguous(), _floats(step.mean), _floats(step.deviation), fill, values, counts
    sizes = width, call.output.shape[3], 0 if values is None else values.shape[1]
    numbers = _pack_step(*sizes, step.scale, kernel.address, *[_address(x) for x in kept])
    library.attend_pages(arguments, choice, call.arguments, numbers)
    return *call.result(step.query.dtype), counts


def _fits(step: PageStep, words: tuple[Tensor, ...]) -> bool:
    """Return True for operands that the C++ file may read as they are said to be."""
    (b, h, s, width), (j, r) = step.query.shape, step.channels.shape
    heads = math.gcd(j, math.gcd(step.key.shape[1], step.value.shape[1]))
    holds = (
        s == 1 and h % j == 0 and step.units > 0 and heads % step.units == 0 and step.most > 0,
        r == sum(step.widths) and step.channels.dtype == torch.int64,
        step.mean.shape == step.deviation.shape == (j, width),
        step.codes.shape[:3] == (b, j, step.key.shape[2]),
        step.near is None or step.near.shape == (b, h, 1),
        step.fill is None or step.fill.shape == (h,),
        step.values is None or h % step.values.shape[1] == 0,
    )
    return all(holds) and _serves(step.codes, step.scales, words, step.page_tokens, step.far)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _floats(x: Tensor) -> Tensor:
    """Convert to dense float32."""
    return x.to(torch.float32).contiguous()


def _serves(codes: Tensor, scales: Tensor, words: tuple[Tensor, ...], page_tokens: int, mask: Tensor | None) -> bool:
    """Return True for rows, pages and masks that the C++ file knows."""
    b, _, tokens, row = codes.shape
    if page_tokens % PAGE_QUANTUM or page_tokens > MAX_PAGE_TOKENS:
        return False
    if row != 4 * len(words[0]) or codes.dtype != torch.uint8:
        return False
    if scales.shape != codes.shape[:3] or scales.dtype != torch.float16:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape in ((1, 1, 1, tokens), (b, 1, 1, tokens)))


def _sketches(
    rows: tuple[int, ...], page_tokens: int, length: int, codes: Tensor, scales: Tensor,
    words: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, weights: Tensor | None, constant: Tensor | None,
) -> tuple[bytes, tuple[Tensor, Tensor]]:  # fmt: skip
    """Fill in the C++ struct; also what must live until it was read. rows: B, J, M, r; length: tokens that count."""
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    scales = scales if scales.stride(2) == 1 else scales.contiguous()
    mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    tokens = codes.shape[2]
    arguments = _pack_sketches(
        *rows, len(words[0]), tokens, min(tokens, length), page_tokens, torch.get_num_threads(),
        *codes.stride()[:3], *scales.stride()[:2], *mask_strides, codes.data_ptr(), scales.data_ptr(), _address(mask),
        *[x.data_ptr() for x in words], _address(weights), _address(constant),
    )  # fmt: skip
    return arguments, (codes, scales)


@functools.cache
def _words(
    bits: tuple[int, ...], widths: tuple[int, ...], steps: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return bits, first channel and step of each word of a row; None for rows that are not whole words."""
    sizes = [b * w // 8 for b, w in zip(bits, widths, strict=True)]
    if any(b not in (2, 4) or size % 4 for b, size in zip(bits, sizes, strict=True)):
        return None
    codes = [32 // b for b, size in zip(bits, sizes, strict=True) for _ in range(size // 4)]
    if not 0 < len(codes) <= MAX_SKETCH_WORDS:
        return None
    counts = torch.tensor(codes, device="cpu")
    each = [s for s, size in zip(steps, sizes, strict=True) for _ in range(size // 4)]
    return (32 // counts).to(torch.int32), (counts.cumsum(0) - counts).to(torch.int32), torch.tensor(each, **FLOATS)


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    library.weigh_pages.argtypes, library.weigh_pages.restype = (ctypes.c_char_p, ctypes.c_void_p), None
    library.attend_pages.argtypes, library.attend_pages.restype = (ctypes.c_char_p,) * 4, None
    return library


LIBRARY = CppLibrary("pages", "pages.cpp", _bind, "Page selection runs on torch operations, which is slower.")
