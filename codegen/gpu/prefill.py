"""Render the Triton kernels for many queries behind a cache: keys and values of a tile of tokens are rebuilt.

    k[t] = D_K z_K[t]     x[t] = cap(scale * q . k[t]) + mask[t]     o = sum_t softmax(x)[t] v[t]     v[t] = D_V z_V[t]

A decode step multiplies queries by D_K^T instead (triton_attention.py), and never meets a key. A chunk of a prompt has
hundreds of queries of every kv head for the same tokens, and where latents are wider than keys, or where unpacking
codes anew for every 32 queries costs more than the products, it is cheaper to rebuild (fhopt/chunks.py counts):

    rebuild_kernel   keys or values of a range of tokens, into memory that the L2 cache holds: once for all queries
    chunk_kernel     attention of BLOCK_M rows, of keys and values as they are; or of latents, rebuilt by each program

Codes are read as in triton_attention.py: lane l of the words of a plane is an operand of its own, whose rows of the
decoder are taken together. What a code u stands for, (u - (2^b - 1)/2) step scale[token], becomes

    step, 2^shift of the plane, 2^w    multiply the rows of the decoder, before a call (`Table`)
    the mean code                      a row of its own, taken off the sum: from the decoder as it was rounded
    scale[token]                       multiplies what is rebuilt, and float16 channels are added to that

A code of 8 bits is converted where the mantissa has 7: a product of two halves would cost more than the conversion,
which serves BLOCK_M queries here.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T tokens, D and E head size of keys and values,
R latent width, M rows (S queries of the H/G heads of a kv head), K operands of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from string import Template

from fhopt.codegen.gpu.attention import reading
from fhopt.codegen.gpu.row_layout import MANTISSA, ONES, Field, Piece, fields, pieces
from fhopt.codegen.tiers import PLANES, Tiers, check, is_scaled, legend
from fhopt.spec import KernelSpec

KERNELS = ("rebuild_kernel", "chunk_kernel")


# --------------------------------------------------------------------------------------------------- operands


def operands(piece: Piece, dtype: str) -> tuple[Field, ...]:
    """The operands of a piece: those of a decode step, but codes that are wider than the mantissa stay whole."""
    if not is_converted(piece, dtype):
        return fields(piece, dtype)
    return tuple(Field(lane, piece.bits * lane, piece.bits, 1) for lane in range(piece.lanes))


def is_converted(piece: Piece, dtype: str) -> bool:
    """True for codes u that become the numbers u - 2^(b-1), by conversion."""
    return piece.is_coded and piece.bits > MANTISSA[dtype]


@dataclass(frozen=True)
class Table:
    """Rows of a decoder in the order of operands, K of them: which channel (R: none), times what, and the mean code."""

    channels: tuple[int, ...]
    factors: tuple[float, ...]
    middles: tuple[float, ...]


@functools.cache
def table(tiers: Tiers, width: int, dtype: str) -> Table:
    """The table of one side, for products of `dtype`."""
    channels, factors, middles = list[int](), list[float](), list[float]()
    for piece in _ordered(tiers, width):
        for field in operands(piece, dtype):
            first = piece.channel + field.lane
            channels += [first + piece.lanes * i if i < piece.used else width for i in range(piece.size)]
            factor, middle = 1.0, 0.0
            if is_converted(piece, dtype):
                factor, middle = piece.unit, -0.5
            elif piece.is_coded:
                factor, middle = piece.unit * 2**field.bits, field.middle
            factors += [factor] * piece.size
            middles += [middle] * piece.size
    return Table(tuple(channels), tuple(factors), tuple(middles))


def _ordered(tiers: Tiers, width: int) -> list[Piece]:
    """The pieces of a row: codes, which a token's scale multiplies, before what it does not."""
    return sorted(pieces(tiers, width), key=lambda piece: not piece.is_coded)


def padded(size: int) -> int:
    """A head size as products want it: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


# --------------------------------------------------------------------------------------------------- the text


def render(spec: KernelSpec) -> str:
    """The text of the kernels of `spec`; the same spec gives the same text. Raises FhoptError for odd tiers."""
    check(spec)
    sides = (("key", "D", spec.key_tiers, spec.key_width), ("value", "E", spec.value_tiers, spec.value_width))
    return _FILE.substitute(
        name=spec.name,
        planes="\n".join(PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        dtype=spec.dtype,
        mantissa=MANTISSA[spec.dtype],
        integer="int32" if spec.dtype == "float32" else "int16",
        one=f"0x{ONES[spec.dtype]:X}",
        softcap=spec.softcap,
        key_operands=len(table(spec.key_tiers, spec.key_width, spec.dtype).channels),
        value_operands=len(table(spec.value_tiers, spec.value_width, spec.dtype).channels),
        rebuilding="\n\n".join(_rebuild(*side, spec.dtype) for side in sides),
        reading=reading(spec.dtype),
    )


def _rebuild(side: str, letter: str, tiers: Tiers, width: int, dtype: str) -> str:
    """The function that rebuilds one side."""
    lines, at, scaled = list[str](), 0, is_scaled(tiers)
    for piece in _ordered(tiers, width):
        if scaled and not piece.is_coded:
            lines.append(_SCALED)
            scaled = False
        lines += _load(piece)
        for field in operands(piece, dtype):
            lines.append(f"x = rebuild({_operand(piece, field, dtype)}, table, {at}, x)")
            at += piece.size
    if scaled:
        lines.append(_SCALED)
    return _REBUILD.substitute(side=side, letter=letter, count=at, lines="".join(f"    {line}\n" for line in lines))


_SCALED = "x = (x - bias[None, :]) * factor[:, None]"


def _load(piece: Piece) -> list[str]:
    """The lines that load a run of all rows of a tile [T, size]."""
    end = piece.channel + piece.lanes * piece.used
    what = {0: "uncoded", 16: "float16"}.get(piece.bits, f"a plane of {piece.bits} bit{'s' * (piece.bits > 1)}")
    run = f"rows, stride, None, here, {piece.start}, {piece.size}, {piece.used}, False"
    if not piece.bits:
        call = f"load({run})"
    elif piece.bits == 16:
        call = f"load_odd_halves({run})" if piece.word == 8 else f"load_as(tl.float16, {run})"
    else:
        call = f"load_as(tl.int16, {run})" if piece.word == 16 else f"load({run}).to(tl.int16)"
    return [f"# channels {piece.channel} to {end - 1}: {what}", f"z = {call}"]


def _operand(piece: Piece, field: Field, dtype: str) -> str:
    if not piece.is_coded:
        return "z.to(DTYPE)"
    if is_converted(piece, dtype):
        return f"numbers(z, {field.shift}, {2**field.bits - 1}, {2 ** (field.bits - 1)})"
    most = MANTISSA[dtype] - field.bits
    return f"codes(z, {field.shift - most}, 0x{2**field.bits - 1 << most:X}, PACKED)"


_REBUILD = Template('''\
@triton.jit
def rebuilt_$side(rows, stride, here, factor, table, bias, PACKED: tl.constexpr):
    """Tile [T, $letter'] of $side rows [T]: $count operands times the rows of the decoder, in the same order."""
    x = tl.zeros([here.shape[0], bias.shape[0]], tl.float32)
$lines\
    return x.to(DTYPE)
''')

_FILE = Template('''\
"""$name, for many queries

Latent attention for one kind of latent, on GPUs, with keys and values rebuilt:

    k[t] = D_K z_K[t]    v[t] = D_V z_V[t]
    x[t] = cap(scale * q . k[t]) + mask[t]
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) v[t]             o = 0 and lse = -inf where every token is masked

    q [B,H,S,D]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,E]   lse [B,H,S]

    B batch, H query heads, G kv heads, J latent heads (keys and values may differ in J), S queries, T tokens, R
    channels of a latent, D and E head size (D' and E': up to a power of two). M the rows of a program: queries of the
    H/G heads of a kv head, in the order (head, query).

    channels of a key row:    $key_legend
    channels of a value row:  $value_legend

A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
$planes
A word of a plane of w bits holds 16/w consecutive channels (a byte, where a plane is short, 8/w): lane l of all words
is a product of its own. Its codes u are read as 1 + u / 2^w, by moving bits, or as u - 2^(w-1); what that is too large
by (`bias`) is taken off the sum, and what a step is worth is in the rows of the decoder.
"""

import triton
import triton.language as tl

DTYPE = tl.constexpr(tl.$dtype)  # of what is multiplied: $mantissa bits of mantissa
INTEGER = tl.constexpr(tl.$integer)
ONE = tl.constexpr($one)  # the bits of 1.0
SOFTCAP = tl.constexpr($softcap)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEY_OPERANDS = tl.constexpr($key_operands)  # numbers of a row that are multiplied, padding among them
VALUE_OPERANDS = tl.constexpr($value_operands)
LOWEST = tl.constexpr(-1e38)  # of finite masks, in base e: lets a row attend to what it hides, evenly


@triton.jit(
    do_not_specialize=(
        *("query_b", "query_h", "query_s", "key_b", "key_h", "key_t", "key_scale_b", "key_scale_h"),
        *("value_b", "value_h", "value_t", "value_scale_b", "value_scale_h", "mask_b", "mask_h", "mask_s"),
        *("lengths_b", "heads", "groups", "queries", "tokens", "splits", "key_group", "value_group"),
    )
)
def chunk_kernel(
    query,  # [B, H, S, D]
    key,  # rows [B, J, T]
    key_scale,  # float16, like the rows; None: rows have none
    key_table,  # [G, operands, D']: rows of the decoder; None: the rows are keys
    key_bias,  # float32 [G, D']
    value,
    value_scale,
    value_table,
    value_bias,
    mask,  # uint8 or floats [B, H, S, T'], T up to a multiple of BLOCK_T; None: all tokens
    lengths,  # integers [B]: tokens of a sequence; None: T
    output,  # [splits, B, H, S, E]
    lse,  # float32 [splits, B, H, S]
    query_b,  # strides
    query_h,
    query_s,
    key_b,  # in units of KEY_ALIGN elements
    key_h,
    key_t,
    key_scale_b,
    key_scale_h,
    key_scale_t,
    value_b,  # in units of VALUE_ALIGN elements
    value_h,
    value_t,
    value_scale_b,
    value_scale_h,
    value_scale_t,
    mask_b,  # in units of 16 elements
    mask_h,
    mask_s,
    lengths_b,
    heads,  # H
    groups,  # G
    queries,  # S
    tokens,  # T
    splits,  # ranges of tokens, each with a result of its own
    key_group,  # kv heads that share a latent head of keys
    value_group,
    scale,
    softcap,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D'
    BLOCK_E: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    PACKED: tl.constexpr,  # NVIDIA: codes by PTX
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One range of tokens for BLOCK_M rows of a kv head."""
    group = heads // groups
    tiles = tl.cdiv(group * queries, BLOCK_M)
    g = tl.program_id(0) // tiles % groups
    b = tl.program_id(0) // tiles // groups
    split = tl.program_id(1)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    inside = m < group * queries
    head, s = g * group + m // queries, m % queries
    d, e, t_in = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_T)

    rows = query + b.to(tl.int64) * query_b + head.to(tl.int64) * query_h + s.to(tl.int64) * query_s
    q = tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)  # [M, D']
    factor = scale / softcap if SOFTCAP else scale * LOG2E
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # largest logit so far, base 2
    weight = tl.zeros([BLOCK_M], tl.float32)  # sum of 2^(logit - top)
    o = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    end = tokens
    if lengths is not None:
        end = tl.minimum(tokens, tl.load(lengths + b * lengths_b).to(tl.int32))
    share = tl.cdiv(tl.cdiv(tl.maximum(end, 0), splits), BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.minimum(end, begin + share)

    key += (b.to(tl.int64) * key_b + (g // key_group).to(tl.int64) * key_h) * KEY_ALIGN
    value += (b.to(tl.int64) * value_b + (g // value_group).to(tl.int64) * value_h) * VALUE_ALIGN
    key_stride, value_stride = key_t * KEY_ALIGN, value_t * VALUE_ALIGN
    if key_scale is not None:
        key_scale += b.to(tl.int64) * key_scale_b + (g // key_group).to(tl.int64) * key_scale_h
    if value_scale is not None:
        value_scale += b.to(tl.int64) * value_scale_b + (g // value_group).to(tl.int64) * value_scale_h
    mask_rows = mask
    if mask is not None:
        mask_rows += (b.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + s.to(tl.int64) * mask_s) * 16  # [M]
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_T)):
        start = begin + i * BLOCK_T
        t = start + t_in
        here = t < end

        # keys and values
        key_rows = key + start.to(tl.int64) * key_stride
        if key_table is None:
            k = load(key_rows, key_stride, None, here, 0, BLOCK_D, D, False).to(DTYPE)
        else:
            factors, bias = scales(key_scale, t, key_scale_t, here), tl.load(key_bias + g * BLOCK_D + d)
            decoder = key_table + g.to(tl.int64) * (KEY_OPERANDS * BLOCK_D)
            k = rebuilt_key(key_rows, key_stride, here, factors, decoder, bias, PACKED)  # [T, D']
        value_rows = value + start.to(tl.int64) * value_stride
        if value_table is None:
            v = load(value_rows, value_stride, None, here, 0, BLOCK_E, E, False).to(DTYPE)
        else:
            factors, bias = scales(value_scale, t, value_scale_t, here), tl.load(value_bias + g * BLOCK_E + e)
            decoder = value_table + g.to(tl.int64) * (VALUE_OPERANDS * BLOCK_E)
            v = rebuilt_value(value_rows, value_stride, here, factors, decoder, bias, PACKED)  # [T, E']

        # scores
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [M, T], logits in base 2
        if SOFTCAP:
            x = capped(x) * (softcap * LOG2E)
        seen = here[None, :]
        if mask is not None:
            y = tl.load(mask_rows[:, None] + t[None, :], mask=inside[:, None], other=0)
            if mask.dtype.element_ty.is_floating():
                y = y.to(tl.float32)
                x += tl.where(y == -float("inf"), y, tl.maximum(y, LOWEST) * LOG2E)
            else:
                seen = seen & (y != 0)
        x = tl.where(seen, x, -float("inf"))

        # softmax
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # all masked so far: weights are 0, not NaN
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(top - base)
        weight = weight * shrink + tl.sum(p, 1)
        top = new_top

        # output
        o = tl.dot(p.to(DTYPE), v, o * shrink[:, None], input_precision="ieee")  # [M, E']

    row = ((split * (tl.num_programs(0) // tiles // groups) + b) * heads + head).to(tl.int64) * queries + s
    o *= (1.0 / tl.where(weight == 0.0, 1.0, weight))[:, None]
    at = output + (row * E)[:, None] + e[None, :]
    tl.store(at, o.to(output.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
    some = weight > 0.0
    total = tl.where(some, (top + tl.log2(tl.where(some, weight, 1.0))) * LN2, -float("inf"))
    tl.store(lse + row, total, mask=inside)


@triton.jit(do_not_specialize=("rows_b", "rows_h", "rows_t", "scale_b", "scale_h", "tokens", "group"))
def rebuild_kernel(
    rows,  # [B, J, T], of keys or values
    scale,  # float16, like the rows; None: rows have none
    table,  # [G, operands, BLOCK_D]: rows of the decoder
    bias,  # float32 [G, BLOCK_D]
    output,  # [B, G, T, D]
    rows_b,  # strides, in units of ALIGN elements
    rows_h,
    rows_t,
    scale_b,
    scale_h,
    scale_t,
    tokens,  # T
    group,  # kv heads that share a latent head
    VALUES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Keys (or VALUES) of BLOCK_T tokens in one kv head."""
    start, g, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2)
    d, t = tl.arange(0, BLOCK_D), start + tl.arange(0, BLOCK_T)
    here = t < tokens
    j = (g // group).to(tl.int64)
    stride = rows_t * ALIGN
    rows += (b.to(tl.int64) * rows_b + j * rows_h) * ALIGN + start.to(tl.int64) * stride
    if scale is not None:
        scale += b.to(tl.int64) * scale_b + j * scale_h
    factors = scales(scale, t, scale_t, here)
    base = tl.load(bias + g * BLOCK_D + d)
    table += g.to(tl.int64) * ((VALUE_OPERANDS if VALUES else KEY_OPERANDS) * BLOCK_D)
    if VALUES:
        x = rebuilt_value(rows, stride, here, factors, table, base, PACKED)
    else:
        x = rebuilt_key(rows, stride, here, factors, table, base, PACKED)
    at = output + ((b * tl.num_programs(1) + g).to(tl.int64) * tokens + t) * D
    tl.store(at[:, None] + d[None, :], x.to(output.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])


$rebuilding

@triton.jit
def rebuild(z, table, FIRST: tl.constexpr, total):
    """total [T, D'] + operand z [T, n] . n rows of the decoder from FIRST on."""
    c, d = FIRST + tl.arange(0, z.shape[1]), tl.arange(0, total.shape[1])
    part = tl.load(table + (c * total.shape[1])[:, None] + d[None, :])
    return tl.dot(z, part, total, input_precision="ieee")


@triton.jit
def scales(scale, t, stride, here):
    """Scales of tokens t [T]; 1 where rows have none."""
    if scale is None:
        return tl.full(here.shape, 1.0, tl.float32)
    return tl.load(scale + t.to(tl.int64) * stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def numbers(z, SHIFT: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr):
    """Fields of words as the numbers u - HALF."""
    return (((z.to(tl.int32) >> SHIFT) & MASK) - HALF).to(tl.float32).to(DTYPE)


@triton.jit
def capped(x):
    """tanh."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


$reading\
''')
