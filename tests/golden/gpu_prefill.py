"""latent_k16b8x32b4_v32b3x16b16_bfloat16_cap_ab5d923f, for many queries

Latent attention for one latent format, on GPUs, with reconstructed keys and values:

    k[t] = D_K z_K[t]    v[t] = D_V z_V[t]
    x[t] = cap(scale * q . k[t]) + mask[t]
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) v[t]             o = 0 and lse = -inf where every token is masked

    q [B,H,S,D]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,E]   lse [B,H,S]

    B batch, H query heads, G kv heads, J latent heads (keys and values may differ in J), S queries, T tokens, R
    channels of a latent, D and E head size (D' and E': up to a power of two). M rows per program: queries of the H/G
    heads of a kv head, in the order (head, query).

    channels of a key row:    16 x 8, 32 x 4 bits
    channels of a value row:  32 x 3, 16 x 16 bits

A code u of b bits represents (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
A word of a plane of w bits holds 16/w consecutive channels (a byte, if a plane is short, 8/w): lane l of all words is a
separate dot operand. Its codes u become 1 + u / 2^w by bit shifts, or u - 2^(w-1); the offset (`bias`) is subtracted
from the sum, and the step is folded into the rows of the decoder.
"""

import triton
import triton.language as tl

DTYPE = tl.constexpr(tl.bfloat16)  # of dot operands: 7 bits of mantissa
INTEGER = tl.constexpr(tl.int16)
ONE = tl.constexpr(0x3F80)  # the bits of 1.0
SOFTCAP = tl.constexpr(True)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEY_OPERANDS = tl.constexpr(48)  # multiplied elements per row, including padding
VALUE_OPERANDS = tl.constexpr(208)
LOWEST = tl.constexpr(-1e38)  # of finite masks, in base e: a fully masked row attends evenly


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
    splits,  # ranges of tokens, each with a separate result
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


@triton.jit
def rebuilt_key(rows, stride, here, factor, table, bias, PACKED: tl.constexpr):
    """Tile [T, D'] of key rows [T]: 48 operands times the rows of the decoder, in the same order."""
    x = tl.zeros([here.shape[0], bias.shape[0]], tl.float32)
    # channels 0 to 15: a plane of 8 bits
    z = load(rows, stride, None, here, 0, 16, 16, False).to(tl.int16)
    x = rebuild(numbers(z, 0, 255, 128), table, 0, x)
    # channels 16 to 47: a plane of 4 bits
    z = load(rows, stride, None, here, 16, 16, 16, False).to(tl.int16)
    x = rebuild(codes(z, -3, 0x78, PACKED), table, 16, x)
    x = rebuild(codes(z, 1, 0x78, PACKED), table, 32, x)
    x = (x - bias[None, :]) * factor[:, None]
    return x.to(DTYPE)


@triton.jit
def rebuilt_value(rows, stride, here, factor, table, bias, PACKED: tl.constexpr):
    """Tile [T, E'] of value rows [T]: 208 operands times the rows of the decoder, in the same order."""
    x = tl.zeros([here.shape[0], bias.shape[0]], tl.float32)
    # channels 0 to 31: a plane of 2 bits
    z = load(rows, stride, None, here, 0, 16, 8, False).to(tl.int16)
    x = rebuild(codes(z, -5, 0x60, PACKED), table, 0, x)
    x = rebuild(codes(z, -3, 0x60, PACKED), table, 16, x)
    x = rebuild(codes(z, -1, 0x60, PACKED), table, 32, x)
    x = rebuild(codes(z, 1, 0x60, PACKED), table, 48, x)
    # channels 0 to 31: a plane of 1 bit
    z = load(rows, stride, None, here, 8, 16, 4, False).to(tl.int16)
    x = rebuild(codes(z, -6, 0x40, PACKED), table, 64, x)
    x = rebuild(codes(z, -5, 0x40, PACKED), table, 80, x)
    x = rebuild(codes(z, -4, 0x40, PACKED), table, 96, x)
    x = rebuild(codes(z, -3, 0x40, PACKED), table, 112, x)
    x = rebuild(codes(z, -2, 0x40, PACKED), table, 128, x)
    x = rebuild(codes(z, -1, 0x40, PACKED), table, 144, x)
    x = rebuild(codes(z, 0, 0x40, PACKED), table, 160, x)
    x = rebuild(codes(z, 1, 0x40, PACKED), table, 176, x)
    x = (x - bias[None, :]) * factor[:, None]
    # channels 32 to 47: float16
    z = load_as(tl.float16, rows, stride, None, here, 6, 16, 16, False)
    x = rebuild(z.to(DTYPE), table, 192, x)
    return x.to(DTYPE)


@triton.jit
def rebuild(z, table, FIRST: tl.constexpr, total):
    """total [T, D'] + operand z [T, n] . n rows of the decoder from FIRST on."""
    c, d = FIRST + tl.arange(0, z.shape[1]), tl.arange(0, total.shape[1])
    part = tl.load(table + (c * total.shape[1])[:, None] + d[None, :])
    return tl.dot(z, part, total, input_precision="ieee")


@triton.jit
def scales(scale, t, stride, here):
    """Scales of tokens t [T]; 1 if rows have none."""
    if scale is None:
        return tl.full(here.shape, 1.0, tl.float32)
    return tl.load(scale + t.to(tl.int64) * stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def numbers(z, SHIFT: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr):
    """Fields of words as values u - HALF."""
    return (((z.to(tl.int32) >> SHIFT) & MASK) - HALF).to(tl.float32).to(DTYPE)


@triton.jit
def capped(x):
    """tanh."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def load(rows, stride, far, here, START: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr, TURNED: tl.constexpr):
    """Elements START to START + USED of the rows of a tile [T, SIZE], or TURNED (transposed) [SIZE, T]; else 0.

    rows: the first row, or one for each token [T]. far: row offset of each token [T]; None: rows are contiguous.
    """
    i, t = tl.arange(0, SIZE), tl.arange(0, here.shape[0])
    if far is not None:
        t = far
    if TURNED:
        at = (rows + t * stride)[None, :] + (START + i)[:, None]
        inside = here[None, :] if USED == SIZE else here[None, :] & (i < USED)[:, None]
    else:
        at = (rows + t * stride)[:, None] + (START + i)[None, :]
        inside = here[:, None] if USED == SIZE else here[:, None] & (i < USED)[None, :]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def load_as(
    TYPE: tl.constexpr,
    rows,
    stride,
    far,
    here,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    USED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """The same for rows of bytes that hold 16-bit values."""
    return load(rows.to(tl.pointer_type(TYPE)), stride // 2, far, here, START, SIZE, USED, TURNED)


@triton.jit
def load_odd_halves(
    rows, stride, far, here, START: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr, TURNED: tl.constexpr
):
    """The same for float16 from byte START on, which may be odd: byte by byte."""
    i, t = 2 * tl.arange(0, SIZE), tl.arange(0, here.shape[0])
    if far is not None:
        t = far
    at = (rows + t * stride)[:, None] + (START + i)[None, :]
    inside = here[:, None] & (i < 2 * USED)[None, :]
    low = tl.load(at, mask=inside, other=0).to(tl.int16)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.int16)
    x = (low | (high << 8)).to(tl.float16, bitcast=True)
    if TURNED:
        x = tl.trans(x)
    return x


@triton.jit
def codes(x, SHIFT: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr):
    """Fields of words as 1 + u / 2^bits: the bits u of a field become the top bits of a mantissa."""
    if PACKED:  # two words of a register at once
        SHIFTED: tl.constexpr = f"shl.b32 t, $1, {-SHIFT};" if SHIFT < 0 else f"shr.b32 t, $1, {SHIFT};"
        MASKED: tl.constexpr = f"lop3.b32 $0, t, {MASK * 65537}, 1065369472, 0xEA;"  # t & mask | ones
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; {SHIFTED} {MASKED} }}", "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    x = x.to(INTEGER)
    x = (x << -SHIFT if SHIFT < 0 else x >> SHIFT) & MASK
    return (x | ONE).to(DTYPE, bitcast=True)
