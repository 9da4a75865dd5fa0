"""A decode step on a KV cache, and the programs of layers around it.

Letters: B batch, H query heads, G kv heads, S queries, N exact tokens, M tokens of the window, F rotary frequencies, D
and E head size of keys and values.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Annotated, Any

from torch import Tensor

from fhopt.codegen.cpu.calls.kernels import (
    TYPES,
    Attention,
    ByteMemory,
    Data,
    FloatMemory,
    Floats,
    Four,
    Longs,
    Memory,
    Rows,
    Three,
    Type,
)
from fhopt.codegen.cpu.calls.layouts import layout


@layout
class Turning(ctypes.Structure):
    """How queries turn to read the keys of a segment.

    pairs [2,F]: channels of each frequency. phases [N,2,F]: cosines and sines of each segment; sequence: numbers
    from those of one sequence to the next, 0: all have the same.
    """

    pairs: Longs
    phases: Floats
    frequencies: int
    segment: int
    sequence: int


@layout
class CachePart(ctypes.Structure):
    """A kernel and what it is called with, but for queries and results. run: null where there is no such part."""

    run: Annotated[int, "void (*)(const Attention*)"]
    call: Attention


@layout
class CacheBasis(ctypes.Structure):
    """A basis [G,n,m], dense."""

    data: Data
    type: Type
    groups: int
    n: int
    m: int


def basis_of(dense: Tensor) -> CacheBasis:
    """Return a basis [G,n,m] as a struct; the tensor must live as long as it."""
    return CacheBasis(dense.data_ptr(), TYPES[dense.dtype], *dense.shape)


@layout
class CacheMean(ctypes.Structure):
    """Means of keys or values of each sequence, float [B,G,1,D], from which latents and window are differences.

    group: query heads of a mean.
    """

    data: Floats
    sequence: int
    head: int
    group: int
    width: int


@layout
class CacheAttention(ctypes.Structure):
    """A decode step's attention on a KV cache. query: float [B,H,S,D]; output: float [B,H,S,E], dense."""

    batch: int
    heads: int
    queries: int
    head_size: int
    value_size: int
    scale: float
    query: Rows
    latents: CachePart
    window: CachePart
    opened: CachePart
    encode: CacheBasis
    decode: CacheBasis
    key_mean: CacheMean
    value_mean: CacheMean
    turn: Turning
    output: FloatMemory


OF_CACHES = Turning, CachePart, CacheBasis, CacheMean, CacheAttention  # in the order in which C++ declares them


# --------------------------------------------------------------------------------------------------- programs of layers


class Code(IntEnum):
    """Operations of instructions."""

    (
        LOAD, STORE, COPY, FILL, ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, MINIMUM, NEGATE, ABSOLUTE, SQUARE_ROOT,
        INVERSE_ROOT, INVERSE, EXPONENTIAL, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, COSINE, SINE, MEAN, SUM, LINEAR,
    ) = range(27)  # fmt: skip


@layout
class View(ctypes.Structure):
    """A value in the arena: where it begins, and its strides, in floats."""

    offset: int
    strides: Four


@layout
class PackedInstruction(ctypes.Structure):
    """An instruction.

    external, type: of LOAD, STORE and LINEAR, which tensor (the weight), and numbers of which type. strides,
    offset: of that tensor, in its numbers. number: of FILL. bias, scale, weight_row, joined: of LINEAR, externals
    or -1; how many instructions read the same input.
    """

    code: Code
    sizes: Four
    out: View
    a: View
    b: View
    external: int
    type: int
    strides: Four
    offset: int
    number: float
    bias: int
    scale: int
    weight_row: int
    joined: int


@layout
class ProgramRun(ctypes.Structure):
    """Instructions, the floats of their arena, and the tensors that they read and write."""

    instructions: Annotated[int, "const PackedInstruction*"]
    count: int
    arena: int
    threads: int
    externals: Annotated[int, "void* const*"]
    skinny: Annotated[int, "void (*)(const Skinny*, int64_t)"]


@layout
class CacheAppend(ctypes.Structure):
    """Keys or values: the new token of each sequence, [B,G,1,D], dense, of the type of the step, and where it goes.

    opened [B,G,N,D], dense: what is kept exactly, and the new token behind. codes uint8 [B,G,M,D], scale float16
    [B,G,M]: of the window, in which it has the place `at`.
    """

    tokens: Data
    heads: int
    width: int
    opened: Memory
    open_tokens: int
    codes: ByteMemory
    code_strides: Three
    scale: Memory
    scale_strides: Three
    at: int


@layout
class LayerStep(ctypes.Structure):
    """A layer's decode step.

    type: of query [B,H,1,D], attended [B,1,H,E], both dense, and of the sides, keys and values.
    """

    before: ProgramRun
    after: ProgramRun
    type: Type
    query: Data
    attended: Memory
    attention: CacheAttention
    sides: Annotated[Any, (CacheAppend, 2)]


@layout
class SpentSeconds(ctypes.Structure):
    """Seconds that products with weights and attention take; they are added to."""

    linear: float
    attention: float


@layout
class Access(ctypes.Structure):
    """Functions of Python, and its None. item: null where there is none; no reference is made."""

    item: Annotated[int, "void* (*)(void* dictionary, void* name)"]
    size: Annotated[int, "int64_t (*)(void* dictionary)"]
    none: Memory


@layout
class HeldEntry(ctypes.Structure):
    """A dictionary of Python, a name in it, and what stands there."""

    dictionary: Memory
    name: Memory
    value: Memory


OF_PROGRAMS = (
    Code, View, PackedInstruction, ProgramRun, CacheAppend, LayerStep, SpentSeconds, Access, HeldEntry,
)  # fmt: skip
