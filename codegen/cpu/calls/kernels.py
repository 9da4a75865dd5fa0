"""Calls of the kernels: attention, packing, prefill, pages, products.

A docstring of a class is the comment of the struct in C++. Addresses are 0 where something is optional.

Letters: B batch, H query heads, J latent heads, G kv heads, S queries, T tokens, R latent width, D and E head size of
keys and values, M rows, K and N width of the input and of the output of a product, C and V of hidden states and of the
vocabulary.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Annotated, Any

import torch

from fhopt.codegen.cpu.calls.layouts import layout

Data = Annotated[int, "const void*"]
Memory = Annotated[int, "void*"]
Floats = Annotated[int, "const float*"]
FloatMemory = Annotated[int, "float*"]
Bytes = Annotated[int, "const uint8_t*"]
ByteMemory = Annotated[int, "uint8_t*"]
Halves = Annotated[int, "const uint16_t*"]
Ints = Annotated[int, "const int32_t*"]
Longs = Annotated[int, "const int64_t*"]
Two = Annotated[Any, (int, 2)]
Three = Annotated[Any, (int, 3)]
Four = Annotated[Any, (int, 4)]


class Type(IntEnum):
    """Types of numbers."""

    FLOAT32, BFLOAT16, FLOAT16 = range(3)


TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16, torch.float16: Type.FLOAT16}

# --------------------------------------------------------------------------------------------------- attention


class MaskKind(IntEnum):
    """What a mask holds: nothing, whether a token is seen, or what is added to its logit."""

    NO_MASK, BOOL_MASK, ADDITIVE_MASK = range(3)


@layout
class Tier(ctypes.Structure):
    """A bit group: 16 bits are float16, not codes.

    With a negative step it has a trellis code, of steps of its magnitude.
    """

    bits: int
    width: int
    step: float


@layout
class Rows(ctypes.Structure):
    """Rows whose last dimension is dense, and the strides of the others, in numbers."""

    data: Data
    batch: int
    head: int
    token: int


@layout
class Extent(ctypes.Structure):
    """Memory from an address on."""

    data: Bytes
    bytes: int


@layout
class Attention(ctypes.Structure):
    """A call of attention.cpp.

    query: float [B,H,S,R_K]; key, value, their float16 scales: [B,J,T,...]; mask: bool or float [B,H,S,T],
    mask_token its stride of T. pages: int32 [B,U,pages], a list for each U-th of the heads; none: all tokens.
    output, lse: float [B,H,S,R_V] and [B,H,S], dense. kernel: of `new_kernel`. digits: max bytes of an element
    of queries and weights that are multiplied: 3, or 2 for 16-bit queries. later: memory that the thread loads after
    this call, prefetched instead of later rows. segment: tokens for which the queries are the same, 0: all;
    query_segment: stride of the queries between segments, in elements; shift: of the logits of a segment, float
    [segments,B,H,S], dense.
    """

    batch: int
    heads: int
    queries: int
    tokens: int
    key_heads: int
    value_heads: int
    threads: int
    mask_kind: MaskKind
    query: Rows
    key: Rows
    key_scale: Rows
    value: Rows
    value_scale: Rows
    mask: Rows
    mask_token: int
    pages: Rows
    page_heads: int
    page_count: int
    page_tokens: int
    output: FloatMemory
    lse: FloatMemory
    scale: float
    softcap: float
    kernel: Data
    digits: int
    later: Annotated[int, "const Extent*"]
    later_count: int
    segment: int
    query_segment: int
    shift: Floats


@layout
class Pack(ctypes.Structure):
    """A call of packing.cpp. latent [B,J,T,R] of a type, codes uint8 [B,J,T,bytes], scale float16 [B,J,T]."""

    batch: int
    heads: int
    tokens: int
    threads: int
    type: Type
    tiers: Annotated[int, "const Tier*"]
    tier_count: int
    width: int
    latent: Rows
    codes: Rows
    scale: Rows


@layout
class OpenAttention(ctypes.Structure):
    """A call of prefill.cpp.

    type: of query [B,H,S,D], key [B,G,T,D] and value [B,G,T,E]. mask_strides: the last is 0 or 1. spans [S,2]:
    which keys a query may see, from the first to before the second. output [B,H,S,E]; lse: float [B,H,S], dense.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    tokens: int
    key_size: int
    value_size: int
    threads: int
    type: Type
    query: Rows
    key: Rows
    value: Rows
    mask_kind: MaskKind
    mask: Data
    mask_strides: Four
    spans: Longs
    output_type: Type
    output: ByteMemory
    output_strides: Three
    lse: FloatMemory
    scale: float
    softcap: float


# --------------------------------------------------------------------------------------------------- pages

MAX_PAGE_TOKENS = 1024
MAX_SKETCH_WORDS = 64  # of four bytes of codes, of a token


@layout
class Sketches(ctypes.Structure):
    """Quantized sketches of tokens, uint8 [B,J,T,4 words], their scales and mask, with strides.

    length: tokens that count. Of each word of a row its bits, first channel and step. weights float
    [B,J,M,channels], constant [B,J,M].
    """

    batch: int
    heads: int
    rows: int
    channels: int
    words: int
    tokens: int
    length: int
    page_tokens: int
    threads: int
    code_b: int
    code_j: int
    code_t: int
    scale_b: int
    scale_j: int
    mask_b: int
    mask_t: int
    codes: Bytes
    scales: Halves
    mask: Bytes
    word_bits: Ints
    word_channels: Ints
    word_steps: Floats
    weights: Floats
    constant: Floats


@layout
class Choice(ctypes.Structure):
    """Which pages are read.

    pages: that there are to choose from; fewest: that are listed however little they weigh. near: float [B,J,M],
    log of the weight of what is read in any case.
    """

    units: int
    most: int
    read: int
    pages: int
    fewest: int
    mass: float
    lift: float
    near: Floats


@layout
class PagedCall(ctypes.Structure):
    """What attention to pages needs beside its call.

    width, value_width: R_K, R_V. channels [J,r]; mean, deviation [J,R_K]; fill [H] and values [B,value_heads,R_V].
    counts [4]: lists, 0, pages in them, pages they were chosen from.
    """

    width: int
    value_width: int
    value_heads: int
    scale: float
    attend: Annotated[int, "void (*)(const Attention*)"]
    channels: Longs
    mean: Floats
    deviation: Floats
    fill: Floats
    values: Floats
    counts: Annotated[int, "int64_t*"]


# --------------------------------------------------------------------------------------------------- products


@layout
class Skinny(ctypes.Structure):
    """A skinny GEMM: rows times a weight.

    input [M,K] and weight [N,K], `..._row` their row strides in elements, bias [N], output [M,N], dense. type: of
    all tensors, plus SIGNED_BYTES if the weight is signed bytes, with scale float [N], plus FORMATS times the format
    if it is in GGUF blocks. is_float: input and output are float32, whatever the type.
    """

    rows: int
    width: int
    columns: int
    threads: int
    type: int
    input: Data
    input_row: int
    weight: Data
    weight_row: int
    bias: Data
    output: Memory
    scale: Floats
    is_float: int


SIGNED_BYTES, FORMATS = 3, 16
HEAD_BLOCK = 16  # rows of a block of a quantized language-model head


@layout
class HeadSearch(ctypes.Structure):
    """A call of lm_head.cpp.

    type: of hidden [M,C], weight [V,C], bias [V] and logits [M,V], -inf where none was computed. transform:
    bfloat16 [R,C], none: h' = h. centre [C]. codes [blocks]. centroids: bfloat16 [K,R]; radii [K]. probes: clusters
    to look at, 0: all. ids, values: [M,budget]; counts [M]; estimates, bounds: [M,V].
    """

    rows: int
    width: int
    rank: int
    lead: int
    blocks: int
    vocabulary: int
    clusters: int
    threads: int
    type: Type
    hidden: Data
    hidden_row: int
    weight: Data
    weight_row: int
    bias: Data
    transform: Halves
    centre: Floats
    codes: Bytes
    block_bytes: int
    centroids: Halves
    radii: Floats
    cluster_blocks: int
    probes: int
    spread: float
    transform_norm: float
    largest: float
    keep: int
    budget: int
    margin: float
    softcap: float
    ids: Annotated[int, "int32_t*"]
    values: FloatMemory
    counts: Annotated[int, "int32_t*"]
    estimates: FloatMemory
    bounds: FloatMemory
    logits: Memory
