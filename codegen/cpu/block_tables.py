"""A decode step of one layer on the blocks of a serving engine, in one native call.

    BlockLayout                  BlockAttention(layout)           called once per layer and step
    fields of a row         ->   bases, addresses         ->   writes the new tokens, attends with their queries

The C++ file (sources/block_tables.cpp) follows block tables. The kernels of cpu/attention.py attend to the rows, and
cpu/packing.py packs them. The file is the same for all plans, and compiled once per machine.

Letters: B sequences, H query heads, G kv heads, J latent heads, D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.codegen.block_layout import BlockLayout, SideLayout
from fhopt.codegen.build import build_kernel
from fhopt.codegen.cpu import packing
from fhopt.codegen.cpu.calls.blocks import (
    BlockCache,
    BlockCall,
    BlockKernel,
    BlockLayer,
    BlockNumbers,
    BlockSide,
    BlockStep,
    BlockTable,
    RowPlacing,
    RowRounding,
)
from fhopt.codegen.cpu.calls.caches import CacheBasis, Turning, basis_of
from fhopt.codegen.cpu.calls.kernels import TYPES
from fhopt.codegen.cpu.calls.layouts import packer
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.segment_rotation import MAX_TOKENS, SegmentRotation

_call = packer(BlockCall)
_FEW = 1 << 16  # numbers, or bytes, for which other threads do not pay


class Struct:
    """Memory of a C++ struct, and the tensors that it points to."""

    __slots__ = ("_kept", "address")

    def __init__(self, memory: ctypes.Structure | ctypes.Array[Any], *kept: Any) -> None:
        self._kept, self.address = (memory, *kept), ctypes.addressof(memory)


def step_of(numbers: list[tuple[int, int, int, int]]) -> Struct:
    """Return the sequences of a decode step, the same for all layers, of one tuple a sequence.

    A tuple: token in the batch, row of the block tables, position, tokens that are read as latents.
    """
    table = torch.tensor(numbers, dtype=torch.int64).view(-1, 4).t().contiguous()
    return Struct(BlockStep(len(numbers), torch.get_num_threads(), table.data_ptr()), table)


def table_of(table: Tensor, size: int) -> Struct:
    """Return the blocks of `size` tokens of a batch's sequences in one cache, int32 [sequences, blocks].

    It is the same for all layers that share these blocks.
    """
    return Struct(BlockTable(table.data_ptr(), table.stride(0), size), table)


class BlockMemory:
    """The memory of a layer's packed latents, residual window and first tokens, uint8 [blocks,1,size,bytes] each."""

    __slots__ = ("caches", "struct")

    def __init__(self, latents: Tensor, window: Tensor, first: Tensor) -> None:
        self.caches = latents, window, first
        self.struct = Struct(
            (BlockCache * 3)(*[BlockCache(x.data_ptr(), x.stride(0), x.stride(2)) for x in self.caches])
        )


class BlockAttention:
    """Writing and attention of decode steps on a layer's blocks."""

    def __init__(self, layout: BlockLayout, library: ctypes.CDLL, kernels: list[LibraryKernel], pack: int) -> None:
        self.layout, self._function = layout, library.attend_blocks
        self._kept: list[Any] = []  # memory that the struct points to
        self._memory: BlockMemory | None = None  # of the last call
        sides = (
            self._side(layout.key, layout.key.decode),
            self._side(layout.value, layout.value.decode.transpose(1, 2)),
        )
        latents, window, sinks = (BlockKernel(kernel.address, kernel.table) for kernel in kernels)
        made = BlockLayer(
            heads=layout.heads, kv_heads=layout.kv_heads, sizes=layout.sizes, type=TYPES[layout.dtype],
            sinks=layout.window.sinks, means_from=layout.means_from, is_shared=layout.is_shared,
            is_rounded=layout.window.bits == 8, digits=3 if layout.dtype == torch.float32 else 2,
            scale=layout.scale, sides=sides, window=layout.window_rows, sink_starts=layout.first_rows[:2],
            mean_starts=layout.first_rows[2:], latents_kernel=latents, window_kernel=window, sinks_kernel=sinks,
            pack=pack, turn=self._turning(layout.rotation),
        )  # fmt: skip
        self._kept.append(made)
        self._layer = ctypes.addressof(made)

    def _side(self, side: SideLayout, decode: Tensor) -> BlockSide:
        table = packing.tier_table(*(tuple(x) for x in zip(*side.tiers, strict=True))) if side.tiers else None
        self._kept.append(table)
        return BlockSide(
            heads=side.encode.shape[0], width=side.decode.shape[2], bytes=side.bytes, start=side.start,
            scale=side.scale, tiers=table.address if table else 0, tier_count=table.tier_count if table else 0,
            encode=self._basis(side.encode.transpose(1, 2)), decode=self._basis(decode.to(self.layout.dtype)),
        )  # fmt: skip

    def _turning(self, rotation: SegmentRotation | None) -> Turning:
        """Return the rotation of queries: the same for all sequences, none of which begins with padding."""
        if rotation is None:
            return Turning(0, 0, 0, 0, 0)
        phases = rotation.phases(rotation.segments(MAX_TOKENS))
        self._kept += [rotation.pairs, phases]
        return Turning(rotation.pairs.data_ptr(), phases.data_ptr(), rotation.pairs.shape[1], rotation.segment, 0)

    def _basis(self, basis: Tensor) -> CacheBasis:
        dense = basis.contiguous()
        self._kept.append(dense)
        return basis_of(dense)

    def serves(self, query: Tensor, latents: Tensor, window: Tensor, first: Tensor) -> bool:
        """Return whether queries and caches are of the type, and on the device, that the code is made for."""
        return query.dtype == self.layout.dtype and self._memory_of(latents, window, first) is not None

    def _memory_of(self, latents: Tensor, window: Tensor, first: Tensor) -> BlockMemory | None:
        """Return the memory of caches, which is checked once; None if the kernel does not support it."""
        known = self._memory
        if (
            known is None
            or known.caches[0] is not latents
            or known.caches[1] is not window
            or known.caches[2] is not first
        ):
            itemsize = self.layout.dtype.itemsize
            aligned = all(cache.is_cpu and cache.stride(2) % itemsize == 0 for cache in (latents, window, first))
            self._memory = known = BlockMemory(latents, window, first) if aligned else None
        return known

    def __call__(
        self, step: Struct, caches: tuple[Tensor, Tensor, Tensor], tables: tuple[Struct, Struct, Struct],
        query: Tensor, key: Tensor, value: Tensor, output: Tensor, writes: bool,
    ) -> None:  # fmt: skip
        """Write the new tokens of a step, if `writes`, and attend with their queries, into `output`.

        caches, tables: memory and blocks of packed latents, residual window and first tokens. query [T,H,D], key
        [T,G,D], value [T,G,E], output [T,H,E]: of all tokens of the batch, dense in the last dimension.
        """
        memory = self._memory_of(*caches)
        assert memory is not None, "`serves` was asked"
        latents, window, first = tables
        self._function(
            _call(
                *(self._layer, step.address, memory.struct.address, latents.address, window.address, first.address),
                *(writes, query.data_ptr(), *query.stride(), key.data_ptr(), *key.stride()),
                *(value.data_ptr(), *value.stride(), output.data_ptr(), *output.stride()),
            )
        )


def round_window_rows(x: Tensor, rows: Tensor, start: int, scale: int) -> bool:
    """Round numbers x [T,G,D] into rows uint8 [T,bytes] of a residual window in 8 bits; return whether that was done.

    start, scale: bytes of a row before numbers and before scales, one float16 for each head. Not where nothing can be
    compiled, or numbers are not of 32 or 16 bits on a CPU.
    """
    loaded = LIBRARY.load() if x.is_cpu and x.dtype in TYPES else None
    if loaded is None:
        return False
    x = x if x.stride(2) == 1 else x.contiguous()
    threads = torch.get_num_threads() if x.numel() > _FEW else 1
    tokens, heads, size = x.shape
    call = RowRounding(
        x=BlockNumbers(x.data_ptr(), *x.stride()), type=TYPES[x.dtype], tokens=tokens, heads=heads, size=size,
        threads=threads, rows=rows.data_ptr(), row=rows.stride(0), start=start, scale=scale,
    )  # fmt: skip
    loaded.round_rows(ctypes.byref(call))
    return True


def write_block_rows(cache: Tensor, blocks: Tensor, offsets: Tensor, rows: Tensor) -> bool:
    """Write rows uint8 [N,bytes] into a cache uint8 [blocks,1,size,bytes]; return whether that was done.

    blocks, offsets int64 [N]: where each row goes. Not where nothing can be compiled, or memory is not a CPU's.
    """
    loaded = LIBRARY.load() if cache.is_cpu else None
    if loaded is None:
        return False
    blocks, offsets = blocks.contiguous(), offsets.contiguous()
    threads = torch.get_num_threads() if rows.numel() > _FEW else 1
    call = RowPlacing(
        cache=BlockCache(cache.data_ptr(), cache.stride(0), cache.stride(2)), blocks=blocks.data_ptr(),
        offsets=offsets.data_ptr(), count=len(rows), threads=threads, rows=rows.data_ptr(), row=rows.stride(0),
        bytes=rows.shape[1],
    )  # fmt: skip
    loaded.place_rows(ctypes.byref(call))
    return True


def attention_of(layout: BlockLayout) -> BlockAttention | None:
    """Build the decode step of a layer; None where nothing can be compiled, or a plan has odd bit groups."""
    if layout.dtype not in TYPES:
        return None
    functions, loaded = packing.LIBRARY.load(), LIBRARY.load()
    kernels = [build_kernel(_for_floats(spec)) for spec in layout.specs()]
    if functions is None or loaded is None:
        return None
    served = [kernel for kernel in kernels if isinstance(kernel, LibraryKernel)]
    pack = ctypes.cast(functions[0], ctypes.c_void_p).value
    return BlockAttention(layout, loaded, served, pack or 0) if len(served) == len(kernels) else None


def _for_floats(spec: KernelSpec) -> KernelSpec:
    """Return the spec of a kernel that is called with queries of float32, as all are here."""
    return replace(spec, dtype="float32") if spec.key_tiers and spec.value_tiers else spec


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    library.attend_blocks.argtypes, library.attend_blocks.restype = (ctypes.c_char_p,), None
    for function in (library.round_rows, library.place_rows):
        function.argtypes, function.restype = (ctypes.c_void_p,), None
    return library


LIBRARY = CppLibrary(
    "block_tables", "block_tables.cpp", _bind, "Decode steps on block tables run on torch operations, which is slower."
)
