"""Pack and unpack latents on CPUs: `fhopt::pack` and `fhopt::unpack` in one C++ file for all plans.

It is compiled at the first call; the reference serves where it cannot be. Bit groups are arguments, not
text: a row is passed over twice at most, and knowing its bit groups beforehand gains little. The results are those of
`fhopt.ops.pack_reference` and `unpack_reference` bit for bit, whatever the number of threads: every number is rounded
where torch rounds it, and squares are added in the order of torch on x86 (where torch has another order, a scale may be
off by one in the last place of its float16).

Letters: B batch, J latent heads, T tokens, R latent width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fhopt.codegen.background import builder
from fhopt.codegen.cpu.calls.kernels import TYPES, Pack, Tier
from fhopt.codegen.cpu.calls.layouts import packer
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.ops.packing import pack_reference, unpack_reference
from fhopt.plan.site_plan import SUPPORTED_BITS, TIER_QUANTUM, TRELLIS_BITS, is_trellis

_arguments = packer(Pack)


class BitGroupTable(NamedTuple):
    """The bit groups of a row, checked, as the kernels read them."""

    tiers: Any  # memory that holds an array of the C++ struct `Tier`
    address: int
    tier_count: int
    width: int  # R
    row_bytes: int


def pack_cpu(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pack latents as `fhopt.ops.pack_reference` does, compiled.

    Calls that it does not serve run the reference: without a compiler, with gradients, on latents that are not float32,
    bfloat16 or float16, with bit groups that no plan has.
    """
    table = tier_table(tuple(bits), tuple(widths), tuple(steps))
    functions = _built() if table is not None and latent.is_cpu and can_pack(latent, table) else None
    if table is None or functions is None:
        return pack_reference(latent, bits, widths, steps)
    shape = latent.shape[:-1]
    if len(shape) > 3:
        codes, scale = pack_cpu(latent.flatten(0, -4), bits, widths, steps)
        return codes.view(*shape, table.row_bytes), scale.view(shape)
    rows = latent if latent.stride(-1) == 1 else latent.contiguous()
    codes = latent.new_empty((*shape, table.row_bytes), dtype=torch.uint8)
    scale = latent.new_empty(shape, dtype=torch.float16)
    functions[0](_arguments_of(shape, TYPES[latent.dtype], table, rows, codes, scale))
    return codes, scale


def unpack_cpu(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    """Unpack latents as `fhopt.ops.unpack_reference` does, compiled; other calls run the reference."""
    table = tier_table(tuple(bits), tuple(widths), tuple(steps))
    functions = _built() if table is not None and codes.is_cpu and can_unpack(codes, scale, table) else None
    if table is None or functions is None:
        return unpack_reference(codes, scale, bits, widths, steps)
    shape = codes.shape[:-1]
    if len(shape) > 3:
        latent = unpack_cpu(codes.flatten(0, -4), scale.flatten(0, -3), bits, widths, steps)
        return latent.view(*shape, table.width)
    rows = codes if codes.stride(-1) == 1 else codes.contiguous()
    latent = codes.new_empty((*shape, table.width), dtype=torch.float32)
    functions[1](_arguments_of(shape, TYPES[torch.float32], table, latent, rows, scale))
    return latent


def _built() -> tuple[Any, Any] | None:
    """Return `LIBRARY.load()`; None if it cannot be compiled."""
    functions: tuple[Any, Any] | None = builder.get(LIBRARY.name, LIBRARY.load, LIBRARY.compiles)
    return functions


@functools.cache
def tier_table(bits: tuple[int, ...], widths: tuple[int, ...], steps: tuple[float, ...]) -> BitGroupTable | None:
    """Make the table of bit groups that kernels read; None for those that only the reference takes, or refuses."""
    tiers = tuple(zip(bits, widths, steps, strict=False))
    if not tiers or not len(bits) == len(widths) == len(steps):
        return None
    if any(b not in SUPPORTED_BITS or w < 1 or w % TIER_QUANTUM for b, w, _ in tiers):
        return None
    if any(is_trellis(b, step) and b not in TRELLIS_BITS for b, _, step in tiers):
        return None
    memory = (Tier * len(tiers))(*[Tier(*tier) for tier in tiers])
    return BitGroupTable(
        memory, ctypes.addressof(memory), len(tiers), sum(widths), sum(b * w for b, w, _ in tiers) // 8
    )


def can_pack(latent: Tensor, table: BitGroupTable) -> bool:
    """Return True for latents that kernels read, without gradients."""
    shape = latent.shape
    fits = len(shape) > 0 and shape[-1] == table.width and latent.dtype in TYPES
    return fits and not (latent.requires_grad and torch.is_grad_enabled())


def can_unpack(codes: Tensor, scale: Tensor, table: BitGroupTable) -> bool:
    """Return True for quantized values and scales as `pack` gives them, without gradients."""
    shape = codes.shape
    fits = len(shape) > 0 and shape[-1] == table.row_bytes and scale.shape == shape[:-1]
    typed = codes.dtype == torch.uint8 and scale.dtype == torch.float16 and scale.device == codes.device
    return fits and typed and not (scale.requires_grad and torch.is_grad_enabled())


def _arguments_of(
    shape: Sequence[int], kind: int, table: BitGroupTable, latent: Tensor, codes: Tensor, scale: Tensor
) -> bytes:
    """Fill in the struct `Pack` for tensors whose at most 3 leading dimensions are `shape`."""
    ones = (1, 1, 1)[len(shape) :]
    return _arguments(
        *(*ones, *shape, torch.get_num_threads(), kind),
        *(table.address, table.tier_count, table.width),
        *(latent.data_ptr(), *ones, *latent.stride()[:-1]),
        *(codes.data_ptr(), *ones, *codes.stride()[:-1]),
        *(scale.data_ptr(), *ones, *scale.stride()),
    )


def _bind(library: ctypes.CDLL) -> tuple[Any, Any]:
    for function in (library.pack, library.unpack):
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    return library.pack, library.unpack


# The flag: a product and a sum are rounded one after the other.
LIBRARY = CppLibrary("pack", "packing.cpp", _bind, flags=("-ffp-contract=off",))
