"""latent_k16b8x32b4_v32b3x16b16_bfloat16_cap_ab5d923f

Latent attention for one latent format, on GPUs:

    x[t] = cap(scale * q . z_K[t]) + mask[t]
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked

    q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]

    B batch, H query heads, J latent heads (keys and values may differ in J), S queries, T tokens, R channels of a
    latent. A unit is a run of query heads that share a latent head of keys and one of values; M rows per program:
    queries of the heads of a unit, in the order (head, query).

    channels of a key row:    16 x 8, 32 x 4 bits
    channels of a value row:  32 x 3, 16 x 16 bits

A code u of b bits represents (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider
one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.
A word of a plane of w bits holds 16/w consecutive channels (a byte, if a plane is short, 8/w): lane l of all words is a
separate dot operand. Its codes u become 1 + u / 2^w by bit shifts; the offset and the step are corrected in whole sums.

`attention_kernel`: a program takes BLOCK_M rows of a unit and one of `splits` ranges of tokens. It writes o and lse, or
(not WHOLE) sums and their base for `merge_kernel`.
"""

import triton
import triton.language as tl

DTYPE = tl.constexpr(tl.bfloat16)  # of dot operands: 7 bits of mantissa
INTEGER = tl.constexpr(tl.int16)
ONE = tl.constexpr(0x3F80)  # the bits of 1.0
SOFTCAP = tl.constexpr(True)
R_V = tl.constexpr(48)
PLACES = tl.constexpr(80)  # elements of a row of partial output: R_V, plus one per channel of two planes
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # of finite masks, in base e: a fully masked row attends evenly


@triton.jit(
    do_not_specialize=(
        *("query_b", "query_h", "query_s", "key_b", "key_h", "key_t", "key_scale_b", "key_scale_h"),
        *("value_b", "value_h", "value_t", "value_scale_b", "value_scale_h", "mask_b", "mask_h", "mask_s"),
        *("lengths_b", "table_b", "pages_b", "pages_h", "heads", "units", "queries", "tokens", "slots"),
        *("splits", "key_group", "value_group", "kept_first", "kept_last", "leaving"),
    )
)
def attention_kernel(
    query,  # [B, H, S, R_K]
    key,  # rows [B, J, T], or [pages of the pool, J, PAGE] with a SPAN
    key_scale,  # float16, like the rows
    value,
    value_scale,
    mask,  # uint8 or floats [B, H, S, T]; None: all tokens
    lengths,  # integers [B]: tokens of a sequence; None: T
    table,  # int32 [B, T / PAGE]: pool index of each page; None without a SPAN: rows are in token order
    pages,  # int32 [B, units, n]: selected pages, -1: no page; None: all
    output,  # [B, H, S, R_V], or float32 [B, H, S, splits, PLACES]
    lse,  # float32 [B, H, S], or the largest logit (base 2) [B, H, S, splits]
    total,  # float32 [B, H, S, splits]: sum of weights; not used if WHOLE
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
    mask_b,
    mask_h,
    mask_s,
    mask_t,
    lengths_b,
    table_b,
    pages_b,
    pages_h,
    heads,  # H
    units,
    queries,  # S
    tokens,  # T
    slots,  # number of tokens to process: T, or n * PAGE
    splits,
    key_group,  # units that share a latent head of keys
    value_group,
    kept_first,  # rule of the recent window: sinks, recent tokens, and tokens quantized at once
    kept_last,
    leaving,
    scale,
    softcap,
    SPAN: tl.constexpr,  # tokens by that rule: 1: quantized, 2: recent, 3: sinks; 0: all
    PAGE: tl.constexpr,  # tokens of a page; 0: no pages
    WHOLE: tl.constexpr,  # one range of tokens, and no channel of two planes
    PACKED: tl.constexpr,  # NVIDIA: codes by PTX
    KEY_ALIGN: tl.constexpr,
    VALUE_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One range of tokens for BLOCK_M rows of a unit."""
    group = heads // units
    tiles = tl.cdiv(group * queries, BLOCK_M)
    unit = tl.program_id(0) // tiles % units
    b = tl.program_id(0) // tiles // units
    split = tl.program_id(1)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    inside = m < group * queries
    head, s = unit * group + m // queries, m % queries
    row = (b * heads + head).to(tl.int64) * queries + s

    # The query with all factors folded in, one operand per lane of each run: [size, M].
    factor = scale / softcap if SOFTCAP else scale * LOG2E
    rows = query + b.to(tl.int64) * query_b + head.to(tl.int64) * query_h + s.to(tl.int64) * query_s
    q0_0 = load_query(rows, inside, factor * 0.32, 0, 1, 16, 16)
    q0_1 = load_query(rows, inside, factor * 5.12, 0, 1, 16, 16)
    q1_0 = load_query(rows, inside, factor * 4.0, 16, 2, 16, 16)
    q1_1 = load_query(rows, inside, factor * 4.0, 17, 2, 16, 16)
    middle = tl.zeros([BLOCK_M], tl.float32)  # sum of q times the mean of the codes
    middle += 1.46875 * tl.sum(q0_0.to(tl.float32), 0)
    middle += 1.46875 * tl.sum(q0_1.to(tl.float32), 0)
    middle += 1.46875 * tl.sum(q1_0.to(tl.float32), 0)
    middle += 1.46875 * tl.sum(q1_1.to(tl.float32), 0)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # largest logit so far, base 2
    weights = no_sums(BLOCK_T, BLOCK_M)  # of 2^(logit - top)
    mass = no_sums(BLOCK_T, BLOCK_M)  # sum of scaled weights, multiplied by middles at the end
    o0_0 = tl.zeros([16, BLOCK_M], tl.float32)
    o0_1 = tl.zeros([16, BLOCK_M], tl.float32)
    o0_2 = tl.zeros([16, BLOCK_M], tl.float32)
    o0_3 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_0 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_1 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_2 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_3 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_4 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_5 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_6 = tl.zeros([16, BLOCK_M], tl.float32)
    o1_7 = tl.zeros([16, BLOCK_M], tl.float32)
    o2 = tl.zeros([16, BLOCK_M], tl.float32)
    begin, end, length = 0, slots, tokens
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + b * lengths_b).to(tl.int32))
    if SPAN:
        begin, length = span(length, kept_first, kept_last, leaving, SPAN)
    if pages is None:
        end = tl.minimum(end, length)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_T) * BLOCK_T
    begin += split * share
    end = tl.minimum(end, begin + share)

    key += (unit // key_group).to(tl.int64) * key_h * KEY_ALIGN
    value += (unit // value_group).to(tl.int64) * value_h * VALUE_ALIGN
    key_stride, value_stride = key_t * KEY_ALIGN, value_t * VALUE_ALIGN
    within = tl.arange(0, BLOCK_T)  # [T]
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_T)):
        start = begin + i * BLOCK_T
        first, entry = start, b  # token, and index of its sequence or page
        t_in, far = within, None
        if pages is not None:
            of_unit = pages + b.to(tl.int64) * pages_b + unit * pages_h
            if PAGE % BLOCK_T == 0:
                listed = tl.load(of_unit + start // PAGE)
                first = tl.where(listed < 0, length, listed * PAGE + start % PAGE)
            else:  # a tile has tokens of several pages
                slot = start + within
                listed = tl.load(of_unit + slot // PAGE, mask=slot < end, other=-1)
                first = start * 0
                t_in = tl.where(listed < 0, length, listed * PAGE + slot % PAGE)
                far = t_in.to(tl.int64)
        t = first + t_in
        here = t < (length if pages is not None else end)
        if SPAN:  # a tile has tokens of several pages, each with its own address
            entry = tl.load(table + b.to(tl.int64) * table_b + t // PAGE, mask=here, other=0)
            first, t_in = start * 0, t % PAGE
            far = t_in.to(tl.int64)
        key_rows = key + (entry.to(tl.int64) * key_b + first.to(tl.int64) * key_t) * KEY_ALIGN
        value_rows = value + (entry.to(tl.int64) * value_b + first.to(tl.int64) * value_t) * VALUE_ALIGN
        key_scales = key_scale + entry.to(tl.int64) * key_scale_b + first.to(tl.int64) * key_scale_t
        key_scales += (unit // key_group).to(tl.int64) * key_scale_h + t_in * key_scale_t
        key_factor = tl.load(key_scales, mask=here, other=0.0).to(tl.float32)
        value_scales = value_scale + entry.to(tl.int64) * value_scale_b + first.to(tl.int64) * value_scale_t
        value_scales += (unit // value_group).to(tl.int64) * value_scale_h + t_in * value_scale_t
        value_factor = tl.load(value_scales, mask=here, other=0.0).to(tl.float32)

        # scores
        coded = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
        # channels 0 to 15: a plane of 8 bits
        x = load(key_rows, key_stride, far, here, 0, 16, 16, False).to(tl.int16)
        coded = score(codes(x, -3, 0x78, PACKED), q0_0, coded)
        coded = score(codes(x, 1, 0x78, PACKED), q0_1, coded)
        # channels 16 to 47: a plane of 4 bits
        x = load(key_rows, key_stride, far, here, 16, 16, 16, False).to(tl.int16)
        coded = score(codes(x, -3, 0x78, PACKED), q1_0, coded)
        coded = score(codes(x, 1, 0x78, PACKED), q1_1, coded)
        coded = (coded - middle[None, :]) * key_factor[:, None]
        x = coded  # [T, M], logits in base 2
        if SOFTCAP:
            x = capped(x) * (softcap * LOG2E)
        seen = here[:, None]
        if mask is not None:
            at = mask + b.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h + s.to(tl.int64) * mask_s
            y = tl.load(at[None, :] + t.to(tl.int64)[:, None] * mask_t, mask=here[:, None] & inside[None, :], other=0)
            if mask.dtype.element_ty.is_floating():
                y = y.to(tl.float32)
                x += tl.where(y == -float("inf"), y, tl.maximum(y, LOWEST) * LOG2E)
            else:
                seen = seen & (y != 0)
        x = tl.where(seen, x, -float("inf"))

        # softmax
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # all masked so far: weights are 0, not NaN
        p = tl.exp2(x - base[None, :])
        shrink = tl.exp2(top - base)
        weights = add(weights, shrink, p)
        top = new_top

        # output
        scaled = (p * value_factor[:, None]).to(DTYPE)
        mass = add(mass, shrink, scaled.to(tl.float32))
        p = p.to(DTYPE)
        # channels 0 to 31: a plane of 2 bits
        x = load(value_rows, value_stride, far, here, 0, 16, 8, True).to(tl.int16)
        o0_0 = mix(codes(x, -5, 0x60, PACKED), scaled, o0_0 * shrink[None, :])
        o0_1 = mix(codes(x, -3, 0x60, PACKED), scaled, o0_1 * shrink[None, :])
        o0_2 = mix(codes(x, -1, 0x60, PACKED), scaled, o0_2 * shrink[None, :])
        o0_3 = mix(codes(x, 1, 0x60, PACKED), scaled, o0_3 * shrink[None, :])
        # channels 0 to 31: a plane of 1 bit
        x = load(value_rows, value_stride, far, here, 8, 16, 4, True).to(tl.int16)
        o1_0 = mix(codes(x, -6, 0x40, PACKED), scaled, o1_0 * shrink[None, :])
        o1_1 = mix(codes(x, -5, 0x40, PACKED), scaled, o1_1 * shrink[None, :])
        o1_2 = mix(codes(x, -4, 0x40, PACKED), scaled, o1_2 * shrink[None, :])
        o1_3 = mix(codes(x, -3, 0x40, PACKED), scaled, o1_3 * shrink[None, :])
        o1_4 = mix(codes(x, -2, 0x40, PACKED), scaled, o1_4 * shrink[None, :])
        o1_5 = mix(codes(x, -1, 0x40, PACKED), scaled, o1_5 * shrink[None, :])
        o1_6 = mix(codes(x, 0, 0x40, PACKED), scaled, o1_6 * shrink[None, :])
        o1_7 = mix(codes(x, 1, 0x40, PACKED), scaled, o1_7 * shrink[None, :])
        # channels 32 to 47: float16
        x = load_as(tl.float16, value_rows, value_stride, far, here, 6, 16, 16, True)
        o2 = mix(x.to(DTYPE), p, o2 * shrink[None, :])

    weight = added(weights)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if WHOLE:
        outputs = output + row * R_V
        factor = 1.0 / tl.where(weight == 0.0, 1.0, weight)
        tl.store(lse + row, log_sum(top, weight), mask=inside)
    else:
        outputs = output + (row * splits + split) * PLACES
        tl.store(lse + row * splits + split, top, mask=inside)
        tl.store(total + row * splits + split, weight, mask=inside)
    masses = added(mass)
    store(outputs, (o0_0 - 1.375 * masses[None, :]) * 4.0 * factor[None, :], inside, 0, 4, 16, 8)
    store(outputs, (o0_1 - 1.375 * masses[None, :]) * 4.0 * factor[None, :], inside, 1, 4, 16, 8)
    store(outputs, (o0_2 - 1.375 * masses[None, :]) * 4.0 * factor[None, :], inside, 2, 4, 16, 8)
    store(outputs, (o0_3 - 1.375 * masses[None, :]) * 4.0 * factor[None, :], inside, 3, 4, 16, 8)
    store(outputs, (o1_0 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 48, 8, 16, 4)
    store(outputs, (o1_1 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 49, 8, 16, 4)
    store(outputs, (o1_2 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 50, 8, 16, 4)
    store(outputs, (o1_3 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 51, 8, 16, 4)
    store(outputs, (o1_4 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 52, 8, 16, 4)
    store(outputs, (o1_5 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 53, 8, 16, 4)
    store(outputs, (o1_6 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 54, 8, 16, 4)
    store(outputs, (o1_7 - 1.25 * masses[None, :]) * 1.0 * factor[None, :], inside, 55, 8, 16, 4)
    store(outputs, o2 * factor[None, :], inside, 32, 1, 16, 16)


@triton.jit
def span(length, kept_first, kept_last, leaving, SPAN: tl.constexpr):
    """Begin and end of the tokens of kind SPAN that the last of `length` tokens of a sequence attends to."""
    quantized = tl.maximum(length - 1 - kept_first - kept_last, 0) // leaving * leaving
    begin, end = kept_first, kept_first + quantized
    if SPAN == 2:
        begin, end = end, length
    if SPAN == 3:
        begin, end = 0, tl.minimum(kept_first, length)
    return begin, end


@triton.jit
def score(x, q, total):
    """x [T, n] . query [n, M] + total [T, M]."""
    return tl.dot(x, q, total, input_precision="ieee")


@triton.jit
def mix(x, p, total):
    """x [n, T] . weights [T, M] + total [n, M]."""
    return tl.dot(x, p, total, input_precision="ieee")


@triton.jit
def no_sums(BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sums over tokens [M]; for few rows [T, M], reduced at the end: until then threads need not synchronize."""
    return tl.zeros([BLOCK_T, BLOCK_M] if BLOCK_M < 32 else [BLOCK_M], tl.float32)


@triton.jit
def add(sums, shrink, x):
    """sums * shrink [M] + x [T, M]."""
    return sums * shrink[None, :] + x if len(sums.shape) == 2 else sums * shrink + tl.sum(x, 0)


@triton.jit
def added(sums):
    """Sums as [M]."""
    return tl.sum(sums, 0) if len(sums.shape) == 2 else sums


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


@triton.jit
def load_query(rows, inside, factor, FIRST: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Channels FIRST, FIRST + LANES, ... of the queries [SIZE, M], times factor; 0 out of range."""
    i = tl.arange(0, SIZE)
    x = tl.load(rows[None, :] + (FIRST + LANES * i)[:, None], mask=inside[None, :] & (i < USED)[:, None], other=0.0)
    return (x.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def store(rows, x, inside, FIRST: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Store x [SIZE, M] to elements FIRST, FIRST + LANES, ... of the rows."""
    i = tl.arange(0, SIZE)
    at = rows[None, :] + (FIRST + LANES * i)[:, None]
    tl.store(at, x.to(rows.dtype.element_ty), mask=inside[None, :] & (i < USED)[:, None])


@triton.jit
def capped(x):
    """tanh."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def log_sum(top, weight):
    """log of weight * 2^top; -inf if the weight is 0."""
    some = weight > 0.0
    return tl.where(some, (top + tl.log2(tl.where(some, weight, 1.0))) * LN2, -float("inf"))


@triton.jit(do_not_specialize=("splits",))
def merge_kernel(
    partial,  # float32 [B, H, S, splits, PLACES]
    tops,  # float32 [B, H, S, splits]
    totals,  # float32 [B, H, S, splits]
    output,  # [B, H, S, R_V]
    lse,  # float32 [B, H, S]
    splits,
    BLOCK_S: tl.constexpr,  # all ranges, padded
    BLOCK_R: tl.constexpr,
):
    """Merge the ranges of tokens of one row, BLOCK_R channels of it."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    live = split < splits
    top = tl.load(tops + row * splits + split, mask=live, other=-float("inf"))  # [splits]
    highest = tl.max(top, 0)
    factor = tl.exp2(top - tl.where(highest == -float("inf"), 0.0, highest))
    weight = tl.sum(tl.load(totals + row * splits + split, mask=live, other=0.0) * factor, 0)

    channel = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    at = partial + ((row * splits + split) * PLACES)[:, None]
    x = tl.load(at + channel[None, :], mask=live[:, None] & (channel < R_V)[None, :], other=0.0)
    o = tl.sum(x * factor[:, None], 0)
    place = tl.full([BLOCK_R], -1, tl.int32)  # of the second plane of a channel
    held = (channel >= 0) & (channel < 32)
    place = tl.where(held, channel + 48, place)
    x = tl.load(at + place[None, :], mask=live[:, None] & (place >= 0)[None, :], other=0.0)
    o += tl.sum(x * factor[:, None], 0)
    o = o / tl.where(weight == 0.0, 1.0, weight)
    tl.store(output + row * R_V + channel, o.to(output.dtype.element_ty), mask=channel < R_V)
    if tl.program_id(1) == 0:
        tl.store(lse + row, log_sum(highest, weight))
