"""A decode step on the blocks of a serving engine.

Letters: G kv heads, J latent heads, R latent width, D and E head size of keys and values.
"""

from __future__ import annotations

import ctypes
from typing import Annotated, Any

from fhopt.codegen.cpu.calls.caches import CacheBasis, Turning
from fhopt.codegen.cpu.calls.kernels import (
    ByteMemory,
    Bytes,
    Data,
    Four,
    Ints,
    Longs,
    Two,
    Type,
)
from fhopt.codegen.cpu.calls.layouts import layout


@layout
class BlockSide(ctypes.Structure):
    """Packed latents of keys or of values.

    heads: J. bytes: of one head's row. start, scale: bytes in a token's row before quantized values, before scales.
    tier_count: 0 where they are not quantized. encode [J,n*D,R]; decode: of keys [G,D,R], of values [G,R,E].
    """

    heads: int
    width: int
    bytes: int
    start: int
    scale: int
    tiers: Annotated[int, "const Tier*"]
    tier_count: int
    encode: CacheBasis
    decode: CacheBasis


@layout
class BlockKernel(ctypes.Structure):
    """A kernel and the table of its kind of latents."""

    run: Annotated[int, "void (*)(const Attention*)"]
    table: Data


@layout
class BlockLayer(ctypes.Structure):
    """A layer on an engine's blocks.

    sizes: D and E. type: of the model. window: bytes in a row before keys,
    values, scales of keys, scales of values; sink_starts, mean_starts: in a page.
    """

    heads: int
    kv_heads: int
    sizes: Two
    type: Type
    sinks: int
    means_from: int
    is_shared: int
    is_rounded: int
    digits: int
    scale: float
    sides: Annotated[Any, (BlockSide, 2)]
    window: Four
    sink_starts: Two
    mean_starts: Two
    latents_kernel: BlockKernel
    window_kernel: BlockKernel
    sinks_kernel: BlockKernel
    pack: Annotated[int, "void (*)(const Pack*)"]
    turn: Turning


@layout
class BlockStep(ctypes.Structure):
    """The sequences of a step, of `numbers` [4,count].

    Their new token in the batch, their row in the tables, the token's position, how many tokens its query reads as
    latents.
    """

    count: int
    threads: int
    numbers: Longs


@layout
class BlockCache(ctypes.Structure):
    """A layer's memory in blocks. block, row: bytes from one block, one token to the next."""

    data: ByteMemory
    block: int
    row: int


@layout
class BlockTable(ctypes.Structure):
    """Blocks of a batch's sequences. row: numbers from one sequence to the next. size: tokens of a block."""

    blocks: Ints
    row: int
    size: int


@layout
class BlockNumbers(ctypes.Structure):
    """Numbers [tokens,heads,dense], with strides in numbers."""

    data: ByteMemory
    token: int
    head: int
    number: int


@layout
class BlockCall(ctypes.Structure):
    """A decode step of one layer.

    Everything but the numbers is the same for many calls: of a layer, of a step, of layers that share blocks.
    caches, tables: packed latents, residual window, first tokens. writes: the new tokens have to be written.
    """

    layer: Annotated[int, "const BlockLayer*"]
    step: Annotated[int, "const BlockStep*"]
    caches: Annotated[int, "const BlockCache*"]
    tables: Annotated[Any, (Annotated[int, "const BlockTable*"], 3)]
    writes: int
    query: BlockNumbers
    key: BlockNumbers
    value: BlockNumbers
    output: BlockNumbers


@layout
class RowRounding(ctypes.Structure):
    """Numbers x [tokens,heads,size] to be rounded into rows of 8 bits.

    row: bytes from one row to the next; start, scale: bytes in a row before the heads, before their scales.
    """

    x: BlockNumbers
    type: Type
    tokens: int
    heads: int
    size: int
    threads: int
    rows: ByteMemory
    row: int
    start: int
    scale: int


@layout
class RowPlacing(ctypes.Structure):
    """Rows to be written into blocks.

    blocks, offsets: of each row. row: bytes from one row to the next; bytes: of a row.
    """

    cache: BlockCache
    blocks: Longs
    offsets: Longs
    count: int
    threads: int
    rows: Bytes
    row: int
    bytes: int


OF_BLOCKS = (  # in the order in which C++ declares them
    BlockSide, BlockKernel, BlockLayer, BlockStep, BlockCache, BlockTable, BlockNumbers, BlockCall,
    RowRounding, RowPlacing,
)  # fmt: skip
