"""Render the Triton kernels of a `KernelSpec` for GPUs: tokens are split over programs and merged.

    x[t] = cap(scale * q . z_K[t]) + mask[t]       lse = log sum_t exp(x[t])       o = sum_t exp(x[t] - lse) z_V[t]

Every bit plane is multiplied where it lies. A word of a plane of w bits holds 16/w consecutive channels, so lane l of
all words of a run is the channels l, l + 16/w, ...: an operand of its own, and nothing is shuffled. No code becomes a
number by conversion: moved to the front of a mantissa, behind the bits of 1.0, a code u *is* 1 + u / 2^w (a shift and a
logical operation for two of them; converting bytes took twice the instructions, which is what bounds a decode step).
Words, not bytes, because the tensor core's operands have 16 bits: they go from shared memory to where it wants them,
transposed for values, before they are taken apart. What a code stands for, (u - (2^b - 1)/2) step scale[token], then is

    step, 2^shift of the plane, 2^w    multiply the query once a program, and the output at the end
    1.5 - 2^-(w+1), the mean code      one number a row, its product with sum q, from the query as it was rounded; for
                                       values with sum p
    scale[token]                       multiplies the logit, and the weight p before it meets the codes

Runs of words (`Piece`) are powers of two from 16 to 128, as products and `tl.arange` want them. What is left of a plane
is read byte by byte where that pads less; the last run may be padded, which costs no bytes: loads are masked. A plane
of a multiple of 16 bytes needs no padding. Features (mask, window, pages, ...) are arguments that may be None
and constants (`tl.constexpr`) of the kernel, so the text does not depend on them.

Tokens, and channels of the output, are the rows of the products (scores [T, M], output [R, M]); queries are columns:
there are few of them, and of columns the tensor core takes 8 at a time, of rows 16 or 64.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, M rows (S queries of the heads that share a latent
head), R latent width.
"""

from __future__ import annotations

from string import Template

from fhopt.codegen.gpu.row_layout import MANTISSA, ONES, Field, Piece, fields, pieces, places
from fhopt.codegen.tiers import PLANES, Tiers, check, is_scaled, legend
from fhopt.ops import planes
from fhopt.spec import KernelSpec

MERGED = 64  # channels of a program of `merge_kernel`
KERNELS = ("attention_kernel", "merge_kernel")


# --------------------------------------------------------------------------------------------------- the text


def render(spec: KernelSpec) -> str:
    """The text of the kernels of `spec`; the same spec gives the same text. Raises FhoptError for odd tiers."""
    check(spec)
    keys, values = pieces(spec.key_tiers, spec.key_width), pieces(spec.value_tiers, spec.value_width)
    return _FILE.substitute(
        name=spec.name,
        planes="\n".join(PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        dtype=spec.dtype,
        mantissa=MANTISSA[spec.dtype],
        reading=reading(spec.dtype),
        integer="int32" if spec.dtype == "float32" else "int16",
        one=f"0x{ONES[spec.dtype]:X}",
        softcap=spec.softcap,
        value_width=spec.value_width,
        places=places(spec),
        queries=_indented(4, _queries(keys, spec.dtype)),
        outputs=_indented(4, _outputs(spec, values)),
        scale_rows=_indented(
            8, [line for side, tiers in sides_of(spec) if is_scaled(tiers) for line in _scale_rows(side)]
        ),
        scores=_indented(8, _scores(spec, keys)),
        mix=_indented(8, _mix(spec, values)),
        store=_indented(4, _store(spec, values)),
        second="".join(line + "\n" for line in _second(spec.value_tiers, spec.value_width)),
    )


def reading(dtype: str) -> str:
    """The functions of a generated file that read rows: `load`, `load_as`, `load_odd_halves` and `codes`."""
    packed = _PACKED.substitute(dtype=dtype, ones=ONES[dtype] * 65537) if dtype != "float32" else ""
    return _READING.substitute(packed=packed)


def _indented(by: int, lines: list[str]) -> str:
    return "".join(" " * by + line + "\n" for line in lines)


def _name(letter: str, index: int, piece: Piece, part: int) -> str:
    """A variable: of one product of a piece, or of its only one."""
    return f"{letter}{index}_{part}" if piece.is_coded else f"{letter}{index}"


def _channels(piece: Piece, first: int) -> str:
    """Arguments that say which channels: first, distance, size, used."""
    return f"{first}, {piece.lanes}, {piece.size}, {piece.used}"


def _queries(keys: tuple[Piece, ...], dtype: str) -> list[str]:
    lines, middles = [], []
    for i, piece in enumerate(keys):
        for n, field in enumerate(fields(piece, dtype)):
            name, unit = _name("q", i, piece, n), "factor"
            if piece.is_coded:
                unit = f"factor * {piece.unit * 2**field.bits * field.times!r}"
                middles.append(f"middle += {field.middle} * tl.sum({name}.to(tl.float32), 0)")
            lines.append(f"{name} = load_query(rows, inside, {unit}, {_channels(piece, piece.channel + field.lane)})")
    if middles:
        middles.insert(0, "middle = tl.zeros([BLOCK_M], tl.float32)  # what the codes of a token are too large by")
    return lines + middles


def _outputs(spec: KernelSpec, values: tuple[Piece, ...]) -> list[str]:
    lines = []
    if is_scaled(spec.value_tiers):
        lines.append("mass = no_sums(BLOCK_T, BLOCK_M)  # of scaled weights, to be multiplied by middles")
    for i, piece in enumerate(values):
        lines += [
            f"{_name('o', i, piece, lane)} = tl.zeros([{piece.size}, BLOCK_M], tl.float32)"
            for lane in range(piece.lanes)
        ]
    return lines


def sides_of(spec: KernelSpec) -> tuple[tuple[str, Tiers], ...]:
    """Names and bit groups of the two sides."""
    return ("key", spec.key_tiers), ("value", spec.value_tiers)


def _scale_rows(side: str) -> list[str]:
    return [
        f"{side}_scales = {side}_scale + entry.to(tl.int64) * {side}_scale_b + first.to(tl.int64) * {side}_scale_t",
        f"{side}_scales += (unit // {side}_group).to(tl.int64) * {side}_scale_h + t_in * {side}_scale_t",
        f"{side}_factor = tl.load({side}_scales, mask=here, other=0.0).to(tl.float32)",
    ]


def _load(side: str, piece: Piece) -> list[str]:
    """The lines that load a run of all rows of a tile."""
    end = piece.channel + piece.lanes * piece.used
    what = {0: "uncoded", 16: "float16"}.get(piece.bits, f"a plane of {piece.bits} bit{'s' * (piece.bits > 1)}")
    rows = f"{side}_rows, {side}_stride, far, here"
    run = f"{piece.start}, {piece.size}, {piece.used}, {side == 'value'}"
    if not piece.bits:
        call = f"load({rows}, {run})"
    elif piece.bits == 16:
        call = f"load_odd_halves({rows}, {run})" if piece.word == 8 else f"load_as(tl.float16, {rows}, {run})"
    else:
        call = f"load_as(tl.int16, {rows}, {run})" if piece.word == 16 else f"load({rows}, {run}).to(tl.int16)"
    return [f"# channels {piece.channel} to {end - 1}: {what}", f"x = {call}"]


def _operand(piece: Piece, field: Field, dtype: str) -> str:
    if not piece.is_coded:
        return "x.to(DTYPE)"
    most = MANTISSA[dtype] - field.bits
    return f"codes(x, {field.shift - most}, 0x{2**field.bits - 1 << most:X}, PACKED)"


def _scores(spec: KernelSpec, keys: tuple[Piece, ...]) -> list[str]:
    sums = [name for name, coded in (("coded", True), ("exact", False)) if any(p.is_coded == coded for p in keys)]
    lines = [f"{name} = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)" for name in sums]
    for i, piece in enumerate(keys):
        total = "coded" if piece.is_coded else "exact"
        lines += _load("key", piece)
        for n, field in enumerate(fields(piece, spec.dtype)):
            lines.append(f"{total} = score({_operand(piece, field, spec.dtype)}, {_name('q', i, piece, n)}, {total})")
    if "coded" in sums:
        lines.append("coded = (coded - middle[None, :]) * key_factor[:, None]")
    return [*lines, f"x = {' + '.join(sums)}  # [T, M], logits in base 2"]


def _mix(spec: KernelSpec, values: tuple[Piece, ...]) -> list[str]:
    times = sorted({field.times for piece in values if piece.is_coded for field in fields(piece, spec.dtype)})
    lines = []
    if times:
        lines.append("scaled = (p * value_factor[:, None]).to(DTYPE)")
        lines.append("mass = add(mass, shrink, scaled.to(tl.float32))")
    lines += [f"scaled{n} = (scaled.to(tl.float32) * {n}.0).to(DTYPE)" for n in times if n > 1]
    if not all(piece.is_coded for piece in values):
        lines.append("p = p.to(DTYPE)")
    for i, piece in enumerate(values):
        lines += _load("value", piece)
        for field in fields(piece, spec.dtype):
            o = _name("o", i, piece, field.lane)
            weights = "p" if not piece.is_coded else f"scaled{field.times}" if field.times > 1 else "scaled"
            total = f"{o} * shrink[None, :]" if field.times == 1 else o
            lines.append(f"{o} = mix({_operand(piece, field, spec.dtype)}, {weights}, {total})")
    return lines


def _store(spec: KernelSpec, values: tuple[Piece, ...]) -> list[str]:
    lines = ["masses = added(mass)"] if is_scaled(spec.value_tiers) else []
    for i, piece in enumerate(values):
        found = fields(piece, spec.dtype)
        for lane in range(piece.lanes):
            x = name = _name("o", i, piece, lane)
            if piece.is_coded:
                middle = sum(field.middle * field.times for field in found if field.lane == lane)
                x = f"({name} - {middle} * masses[None, :]) * {piece.unit * 2 ** found[0].bits!r}"
            lines.append(f"store(outputs, {x} * factor[None, :], inside, {_channels(piece, piece.place + lane)})")
    return lines


def _second(tiers: Tiers, width: int) -> list[str]:
    """Lines of the merge that add what second planes gave, empty where there are none."""
    lines, channel, second = [], 0, width
    for bits, count, _ in tiers:
        if bits < 16 and len(planes(bits)) > 1:
            lines.append(f"    held = (channel >= {channel}) & (channel < {channel + count})")
            lines.append(f"    place = tl.where(held, channel + {second - channel}, place)")
            second += count
        channel += count
    if not lines:
        return []
    return [
        "    place = tl.full([BLOCK_R], -1, tl.int32)  # of the second plane of a channel",
        *lines,
        "    x = tl.load(at + place[None, :], mask=live[:, None] & (place >= 0)[None, :], other=0.0)",
        "    o += tl.sum(x * factor[:, None], 0)",
    ]


_PACKED = Template("""\
    if PACKED:  # two words of a register at once
        SHIFTED: tl.constexpr = f"shl.b32 t, $$1, {-SHIFT};" if SHIFT < 0 else f"shr.b32 t, $$1, {SHIFT};"
        MASKED: tl.constexpr = f"lop3.b32 $$0, t, {MASK * 65537}, $ones, 0xEA;"  # t & mask | ones
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; {SHIFTED} {MASKED} }}", "=r,r", [x], dtype=tl.$dtype, is_pure=True, pack=2
        )
""")

_READING = Template('''\
@triton.jit
def load(rows, stride, far, here, START: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr, TURNED: tl.constexpr):
    """Elements START to START + USED of the rows of a tile [T, SIZE], or TURNED [SIZE, T]; 0 where there are none.

    far: how many rows from the first each is, [T]; None: they lie one behind the other.
    """
    i, t = tl.arange(0, SIZE), tl.arange(0, here.shape[0])
    if far is not None:
        t = far
    if TURNED:
        at = rows + (t * stride)[None, :] + (START + i)[:, None]
        inside = here[None, :] if USED == SIZE else here[None, :] & (i < USED)[:, None]
    else:
        at = rows + (t * stride)[:, None] + (START + i)[None, :]
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
    """The same for rows of bytes that hold numbers of 16 bits."""
    return load(rows.to(tl.pointer_type(TYPE)), stride // 2, far, here, START, SIZE, USED, TURNED)


@triton.jit
def load_odd_halves(
    rows, stride, far, here, START: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr, TURNED: tl.constexpr
):
    """The same for float16 from byte START on, which may be odd: byte by byte."""
    i, t = 2 * tl.arange(0, SIZE), tl.arange(0, here.shape[0])
    if far is not None:
        t = far
    at = rows + (t * stride)[:, None] + (START + i)[None, :]
    inside = here[:, None] & (i < 2 * USED)[None, :]
    low = tl.load(at, mask=inside, other=0).to(tl.int16)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.int16)
    x = (low | (high << 8)).to(tl.float16, bitcast=True)
    if TURNED:
        x = tl.trans(x)
    return x


@triton.jit
def codes(x, SHIFT: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr):
    """Fields of words as 1 + u / 2^bits: the bits u of a field become the first ones of a mantissa."""
$packed\
    x = x.to(INTEGER)
    x = (x << -SHIFT if SHIFT < 0 else x >> SHIFT) & MASK
    return (x | ONE).to(DTYPE, bitcast=True)
''')

_FILE = Template('''\
"""$name

Latent attention for one kind of latent, on GPUs:

    x[t] = cap(scale * q . z_K[t]) + mask[t]
    lse  = log sum_t exp(x[t])
    o    = sum_t exp(x[t] - lse) z_V[t]           o = 0 and lse = -inf where every token is masked

    q [B,H,S,R_K]   z_K [B,J,T,R_K]   z_V [B,J',T,R_V]   mask [B,H,S,T]   ->   o [B,H,S,R_V]   lse [B,H,S]

    B batch, H query heads, J latent heads (keys and values may differ in J), S queries, T tokens, R channels of a
    latent. A unit is a run of query heads that share a latent head of keys and one of values; M the rows of a program:
    queries of the heads of a unit, in the order (head, query).

    channels of a key row:    $key_legend
    channels of a value row:  $value_legend

A code u of b bits stands for (u - (2^b - 1)/2) * step * scale[token]; 16 bits are a float16 without scale.
$planes
A word of a plane of w bits holds 16/w consecutive channels (a byte, where a plane is short, 8/w): lane l of all words
is a product of its own. Its codes u are read as 1 + u / 2^w, by moving bits; what that is too large by, and what a step
is worth, is put right in whole sums.

`attention_kernel`: a program takes BLOCK_M rows of a unit and one of `splits` ranges of tokens. It writes o and lse, or
(not WHOLE) sums and their base for `merge_kernel` to join.
"""

import triton
import triton.language as tl

DTYPE = tl.constexpr(tl.$dtype)  # of what is multiplied: $mantissa bits of mantissa
INTEGER = tl.constexpr(tl.$integer)
ONE = tl.constexpr($one)  # the bits of 1.0
SOFTCAP = tl.constexpr($softcap)
R_V = tl.constexpr($value_width)
PLACES = tl.constexpr($places)  # numbers a row of partial output has: R_V, and one more for a channel of two planes
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # of finite masks, in base e: lets a row attend to what it hides, evenly


@triton.jit(
    do_not_specialize=(
        *("query_b", "query_h", "query_s", "key_b", "key_h", "key_t", "key_scale_b", "key_scale_h"),
        *("value_b", "value_h", "value_t", "value_scale_b", "value_scale_h", "mask_b", "mask_h", "mask_s"),
        *("lengths_b", "positions_b", "table_b", "pages_b", "pages_h", "heads", "units", "queries", "tokens", "slots"),
        *("splits", "key_group", "value_group"),
    )
)
def attention_kernel(
    query,  # [B, H, S, R_K]
    key,  # rows [B, J, T], or [pages of the pool, J, PAGE] with `table`
    key_scale,  # float16, like the rows
    value,
    value_scale,
    mask,  # uint8 or floats [B, H, S, T]; None: all tokens
    slopes,  # float32 [H], ALiBi: slope * (token - position) is added; None: nothing
    sinks,  # float32 [H]: a further logit that takes weight and gives nothing; None: none
    lengths,  # integers [B]: tokens of a sequence; None: T
    positions,  # integers [B]: token at which the first query stands
    table,  # int32 [B, T / PAGE]: where in the pool a page lies; None: rows are in order of token
    pages,  # int32 [B, units, n]: pages to read, -1: none; None: all
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
    positions_b,
    table_b,
    pages_b,
    pages_h,
    heads,  # H
    units,
    queries,  # S
    tokens,  # T
    slots,  # how many tokens are gone through: T, or n * PAGE
    splits,
    key_group,  # units that share a latent head of keys
    value_group,
    scale,
    softcap,
    CAUSAL: tl.constexpr,  # token <= position
    WINDOW: tl.constexpr,  # position - token < WINDOW; 0: no window
    PAGE: tl.constexpr,  # tokens of a page, a multiple of BLOCK_T, or any number where there are `pages`; 0: no pages
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

    # The query with everything folded in that may be, a piece for each lane of each run: [size, M].
    factor = scale / softcap if SOFTCAP else scale * LOG2E
    rows = query + b.to(tl.int64) * query_b + head.to(tl.int64) * query_h + s.to(tl.int64) * query_s
$queries
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # largest logit so far, base 2
    weights = no_sums(BLOCK_T, BLOCK_M)  # of 2^(logit - top)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        once = tl.where((split == 0) & (tl.arange(0, BLOCK_T) == 0), 1.0, 0.0)  # [T]
        weights = add(weights, tl.zeros_like(top), once[:, None] + tl.zeros_like(top)[None, :])
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
$outputs    position = s
    if positions is not None:
        position += tl.load(positions + b * positions_b).to(tl.int32)
    begin, end, length = 0, slots, tokens
    if lengths is not None:
        length = tl.minimum(tokens, tl.load(lengths + b * lengths_b).to(tl.int32))
    if pages is None:
        end = tl.minimum(end, length)
        if CAUSAL:
            end = tl.minimum(end, tl.max(tl.where(inside, position, -1), 0) + 1)
        if WINDOW:
            begin = tl.maximum(tl.min(tl.where(inside, position, 2147483647), 0) - WINDOW + 1, 0) // BLOCK_T * BLOCK_T
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_T) * BLOCK_T
    begin += split * share
    end = tl.minimum(end, begin + share)

    key += (unit // key_group).to(tl.int64) * key_h * KEY_ALIGN
    value += (unit // value_group).to(tl.int64) * value_h * VALUE_ALIGN
    key_stride, value_stride = key_t * KEY_ALIGN, value_t * VALUE_ALIGN
    within = tl.arange(0, BLOCK_T)  # [T]
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK_T)):
        start = begin + i * BLOCK_T
        first, entry = start, b  # token, and which of the storages
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
        if table is not None:
            entry = tl.load(table + b.to(tl.int64) * table_b + first // PAGE, mask=first < length, other=0)
            first = first % PAGE
        key_rows = key + (entry.to(tl.int64) * key_b + first.to(tl.int64) * key_t) * KEY_ALIGN
        value_rows = value + (entry.to(tl.int64) * value_b + first.to(tl.int64) * value_t) * VALUE_ALIGN
$scale_rows
        # scores
$scores        if SOFTCAP:
            x = capped(x) * (softcap * LOG2E)
        if slopes is not None:
            x += slope[None, :] * (t[:, None] - position[None, :]).to(tl.float32)
        seen = here[:, None]
        if CAUSAL:
            seen = seen & (t[:, None] <= position[None, :])
        if WINDOW:
            seen = seen & (position[None, :] - t[:, None] < WINDOW)
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
$mix
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
$store

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
    """Sums over tokens [M]; where rows are few [T, M], added up at the end: until then threads need not meet."""
    return tl.zeros([BLOCK_T, BLOCK_M] if BLOCK_M < 32 else [BLOCK_M], tl.float32)


@triton.jit
def add(sums, shrink, x):
    """sums * shrink [M] + x [T, M]."""
    return sums * shrink[None, :] + x if len(sums.shape) == 2 else sums * shrink + tl.sum(x, 0)


@triton.jit
def added(sums):
    """Sums as [M]."""
    return tl.sum(sums, 0) if len(sums.shape) == 2 else sums


$reading

@triton.jit
def load_query(rows, inside, factor, FIRST: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Channels FIRST, FIRST + LANES, ... of the queries [SIZE, M], times factor; 0 where there are none."""
    i = tl.arange(0, SIZE)
    x = tl.load(rows[None, :] + (FIRST + LANES * i)[:, None], mask=inside[None, :] & (i < USED)[:, None], other=0.0)
    return (x.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def store(rows, x, inside, FIRST: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Store x [SIZE, M] to numbers FIRST, FIRST + LANES, ... of the rows."""
    i = tl.arange(0, SIZE)
    at = rows[None, :] + (FIRST + LANES * i)[:, None]
    tl.store(at, x.to(rows.dtype.element_ty), mask=inside[None, :] & (i < USED)[:, None])


@triton.jit
def capped(x):
    """tanh."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def log_sum(top, weight):
    """log of weight * 2^top; -inf where the weight is 0."""
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
    """Join the ranges of tokens of one row, BLOCK_R channels of it."""
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
$second\
    o = o / tl.where(weight == 0.0, 1.0, weight)
    tl.store(output + row * R_V + channel, o.to(output.dtype.element_ty), mask=channel < R_V)
    if tl.program_id(1) == 0:
        tl.store(lse + row, log_sum(highest, weight))
''')
