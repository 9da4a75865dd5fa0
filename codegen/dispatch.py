"""Dispatch of op calls to kernels, which are built at the first call.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.background import builder
from fhopt.codegen.build import build_triton, without_compiler
from fhopt.codegen.cpu import gguf_blocks, graph_kernels, skinny_linear, wide_linear
from fhopt.codegen.cpu import packing as cpu_packing
from fhopt.codegen.cpu import pages as cpu_pages
from fhopt.codegen.cpu import prefill as cpu_prefill
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.gpu.launch import TritonKernel
from fhopt.codegen.programs import program as decode_program
from fhopt.codegen.rows import PAGE_QUANTUM
from fhopt.codegen.tiers import UNCODED_DTYPES
from fhopt.ops import registry
from fhopt.ops.algebra import BitGroups
from fhopt.ops.cache_operands import CacheOperands
from fhopt.ops.encode_rows import empty_rows
from fhopt.ops.latent_attention import LatentKernel, latent_attention_reference, needs_gradient
from fhopt.ops.masks import listed, within
from fhopt.ops.paged_attention import PageStep
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.system import has_triton

_DTYPES = {getattr(torch, name): name for name in UNCODED_DTYPES}
_kernels: dict[tuple[object, ...], LatentKernel] = {}


def register_kernels() -> None:
    """Register the generated kernels of this machine in `fhopt.ops.registry`, so that the ops run through them.

    On GPUs without Triton, attention runs on plain torch operations, one tile of tokens at a time.
    """
    registry.use("latent_attention", "cpu", dispatch_latent_attention)
    registry.use("latent_attention", "cuda", dispatch_latent_attention)
    registry.use("pack", "cpu", cpu_packing.pack_cpu)
    registry.use("unpack", "cpu", cpu_packing.unpack_cpu)
    registry.use("page_weights", "cpu", cpu_pages.weigh_pages)
    registry.use("attend_pages", "cpu", dispatch_attend_pages)
    registry.use("attend_latents", "cpu", dispatch_attend_latents)
    registry.use("round_rows_into", "cpu", round_rows_into)
    registry.use("pack_window", "cpu", pack_window)
    registry.use("open_attention", "cpu", cpu_prefill.open_attention_cpu)
    registry.use("rebuilt_attention", "cpu", cpu_prefill.rebuilt_attention_cpu)
    if has_triton():
        registry.use("pack", "cuda", _pack_by_triton)
        registry.use("unpack", "cuda", _unpack_by_triton)
        registry.use("encode_rows", "cuda", encode_rows_by_triton)
        registry.use("rebuilt_attention", "cuda", _rebuilt_by_triton)


def start_builds() -> None:
    """Start to build the libraries that a model with a plan needs on a CPU, if this machine lacks them."""
    builder.start_attention()
    for library in (cpu_packing.LIBRARY, cpu_prefill.LIBRARY):
        builder.start(library.name, library.load)
    builder.start(graph_kernels.LIBRARY.name, graph_kernels.serve_linear)
    builder.start(decode_program.LIBRARY.name, decode_program.is_built)


def build_all() -> None:
    """Build the libraries that a model with a plan needs on a CPU, and wait for them."""
    start_builds()
    builder.wait()


def prepare_linear() -> None:
    """Build the kernels of linear layers, and wait for them."""
    _has_ops()


def dispatch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Compute a linear layer with a compiled kernel; None if none is applicable, or none can be built.

    x [..., K], weight [N, K], bias [N], all of the same type -> [..., N]; the weight may also be int8, or in GGUF
    blocks (`skinny_linear.quantized`). Kernels take few rows (cpu/skinny_linear.py), more with blocks
    (`gguf_blocks.most_rows`), and many if torch has no native GEMM for their type (cpu/wide_linear.py). For calls
    without gradients.
    """
    rows, scale, format = x.numel() // max(x.shape[-1], 1) if x.dim() else 0, None, 0
    is_wide = wide_linear.takes_many_rows(rows, x.dtype)
    if not is_wide and not skinny_linear.takes_rows(rows, weight):
        return None
    if not skinny_linear.takes(x, weight, bias):
        quantized = skinny_linear.quantized(x, weight, bias)
        if quantized is None:
            return None
        weight = quantized.values
        if isinstance(quantized, skinny_linear.BlockedWeight):
            if not _has_blocks() or rows > gguf_blocks.most_rows(quantized.format, x.dtype):
                return None
            format = quantized.format
        else:
            scale = quantized.scale
    if not _has_ops() or (is_wide and not format and not graph_kernels.serve_wide()):
        return None
    output: Tensor = torch.ops.fhopt.linear_kernel.default(x, weight, bias, scale, format)
    return output


def dispatch_attend_latents(*operands: Any, **options: Any) -> Tensor | None:
    """Attend to a KV cache in one native call; see `fhopt.attention.attend.attend_latents_reference`.

    None if it is not applicable, or its libraries cannot be built.
    """
    builder.load_attention()
    if not _has_ops():
        return None
    return graph_kernels.call_attend_latents(CacheOperands(*operands), options)


def round_rows_into(x: Tensor, mean: Tensor | None, codes: Tensor, scale: Tensor, at: int) -> bool:
    """Round rows into a window in one native call; see `ops.packing.round_rows_into_reference`.

    Returns whether it did: not if its library cannot be built, or values are 64-bit.
    """
    if x.dtype not in _DTYPES or not _has_ops():
        return False
    torch.ops.fhopt.round_rows_into.default(x, mean, codes, scale, at)
    return True


def pack_window(
    rounded: tuple[Tensor, Tensor], mean: Tensor | None, dtype: torch.dtype, basis: Tensor,
    places: tuple[Tensor, Tensor], at: int, tiers: BitGroups, turning: tuple[Tensor, Tensor, int] | None,
) -> float | None:  # fmt: skip
    """Encode and pack window tokens in one native call; see `ops.encode_rows.pack_window_reference`.

    None if its library cannot be built, or a type has no native code.
    """
    table = cpu_packing.tier_table(tuple(tiers.bits), tuple(tiers.widths), tuple(tiers.steps))
    if table is None or dtype not in _DTYPES or basis.dtype != torch.float32 or not _has_ops():
        return None
    kind = tuple(_DTYPES).index(dtype)
    energy: float = torch.ops.fhopt.pack_window.default(
        *rounded, mean, kind, basis, *places, at, *(turning or (None, None, 0)), *tiers
    )
    return energy


def _has_ops() -> bool:
    """Return whether the C++ ops are callable; False if they cannot be built."""
    return bool(builder.get(graph_kernels.LIBRARY.name, graph_kernels.serve_linear, graph_kernels.compiles_linear))


def _has_blocks() -> bool:
    """Return whether matmuls with GGUF blocks are callable; False if their libraries cannot be built."""
    return bool(builder.get(gguf_blocks.LIBRARY.name, graph_kernels.serve_blocks, graph_kernels.compiles_blocks))


def start_blocks() -> None:
    """Start to build the libraries for matmuls with GGUF blocks."""
    builder.start(gguf_blocks.LIBRARY.name, graph_kernels.serve_blocks)


def prepare_blocks() -> bool:
    """Build the libraries for matmuls with GGUF blocks, wait for them, and return whether they are callable."""
    return _has_blocks()


def programs_are_built() -> bool:
    """Return whether decode programs can run; False without a compiler."""
    return bool(builder.get(decode_program.LIBRARY.name, decode_program.is_built, decode_program.compiles_programs))


def dispatch_latent_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    mask: Tensor | None,
    *,
    key_bits: Sequence[int],
    key_widths: Sequence[int],
    key_steps: Sequence[float],
    value_bits: Sequence[int],
    value_widths: Sequence[int],
    value_steps: Sequence[float],
    scale: float,
    softcap: float = 0.0,
    lengths: Tensor | None = None,
    pages: Tensor | None = None,
    page_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute attention on latents with a generated kernel; see `fhopt.ops.latent_attention_reference`.

    Calls without a kernel (gradients, float64) run the reference.
    """
    sides = key_bits, key_widths, key_steps, value_bits, value_widths, value_steps
    kernel = _known_kernel(query, key, value, sides, softcap != 0.0)
    if kernel is latent_attention_reference or needs_gradient(query, key, value, mask):
        return latent_attention_reference(
            query, key, key_scale, value, value_scale, mask,
            key_bits=key_bits, key_widths=key_widths, key_steps=key_steps,
            value_bits=value_bits, value_widths=value_widths, value_steps=value_steps,
            scale=scale, softcap=softcap, lengths=lengths, pages=pages, page_tokens=page_tokens,
        )  # fmt: skip
    generated = isinstance(kernel, (LibraryKernel, TritonKernel))
    if pages is not None and (not generated or page_tokens % PAGE_QUANTUM):
        mask, pages = listed(pages, page_tokens, query.shape[1], key.shape[2], mask), None
    if not generated:
        mask, lengths = within(lengths, key.shape[2], mask), None
    paged = {} if pages is None else dict(pages=pages, page_tokens=page_tokens)
    return kernel(
        query, key, key_scale, value, value_scale, mask, scale=scale, softcap=softcap, lengths=lengths, **paged
    )


def _known_kernel(
    query: Tensor, key: Tensor, value: Tensor, sides: tuple[Sequence[float], ...], softcap: bool
) -> LatentKernel:
    """Return the kernel of these options, built once.

    sides: bits, widths and steps of keys, then of values.
    """
    if query.dtype == torch.float64:
        return latent_attention_reference
    tiers = tuple(map(tuple, sides))
    place = query.is_cpu or query.dtype  # GPU kernels multiply in the type of the query
    options = (key.shape[-1], value.shape[-1], key.dtype, value.dtype, softcap, place, *tiers)
    kernel = _kernels.get(options)
    if kernel is None:
        kernel = _kernels[options] = _kernel(query, key, value, tiers, softcap)
    return kernel


def dispatch_attend_pages(step: PageStep) -> tuple[Tensor, Tensor, Tensor] | None:
    """Select pages and attend to them, with mean values for the other pages, in one native call.

    The reference is `fhopt.ops.paged_attention.attend_pages_reference`. None if one of the kernels is not applicable.
    """
    if needs_gradient(step.query, step.key, step.value):
        return None
    sides = step.key_bits, step.key_widths, step.key_steps, step.value_bits, step.value_widths, step.value_steps
    kernel = _known_kernel(step.query, step.key, step.value, sides, False)
    return cpu_pages.call_attend_pages(step, kernel) if isinstance(kernel, LibraryKernel) else None


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, tiers: tuple[tuple[float, ...], ...], softcap: bool
) -> LatentKernel:
    """Return the kernel of these options; the reference if no kernel can be built."""
    key_tiers, value_tiers = (tuple(zip(*tiers[i : i + 3], strict=True)) for i in (0, 3))
    uncoded = {x.dtype for x, coded in ((key, key_tiers), (value, value_tiers)) if not coded}
    if not uncoded <= _DTYPES.keys():
        return latent_attention_reference
    dtype = _DTYPES[uncoded.pop()] if len(uncoded) == 1 else "float32"  # used only for uncoded sides
    width = int(sum(tiers[4])) or value.shape[-1]
    spec = KernelSpec(key_tiers, value_tiers, query.shape[-1], width, dtype, softcap)
    if query.is_cpu:
        return builder.kernel(spec)
    if not has_triton():
        return without_compiler(spec)
    return build_triton(replace(spec, dtype=_DTYPES[query.dtype]))


def _pack_by_triton(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    from fhopt.codegen.gpu import packing  # lazy: importing Triton takes a second, and only GPUs need it

    return packing.pack_triton(latent, bits, widths, steps)


def _unpack_by_triton(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    from fhopt.codegen.gpu import packing

    return packing.unpack_triton(codes, scale, bits, widths, steps)


def encode_rows_by_triton(
    x: Tensor, basis: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Encode and pack with one Triton kernel, on a GPU or under Triton's interpreter; see `fhopt.ops.encode_rows`.

    x [B,G,T,D], basis [J,R,n*D] -> codes uint8 [B,J,T,bytes], scale float16 [B,J,T].
    """
    from fhopt.codegen.gpu import encode_rows

    rows = empty_rows(x, basis, bits, widths, steps)
    encode_rows.encode_triton(x, basis, bits, widths, steps, *rows)
    return rows


def _rebuilt_by_triton(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from fhopt.codegen.gpu.prefill_launch import rebuilt_attention_triton

    return rebuilt_attention_triton(query, *args, **options)
