"""Rendering of the Triton attention kernels of a `KernelSpec`: tokens are split over programs and merged.

    x[t] = cap(scale * q . z_K[t]) + mask[t]       lse = log sum_t exp(x[t])       o = sum_t exp(x[t] - lse) z_V[t]

Bit planes are multiplied without shuffling channels. A word of a plane of w bits holds 16/w consecutive channels, so
lane l of all words of a run holds the channels l, l + 16/w, ... and is a separate dot operand. No value is converted to
a float: shifted to the top of a mantissa, below the bits of 1.0, a quantized value u *is* 1 + u / 2^w (a shift and a
logical operation for two of them; converting bytes took twice the instructions, and instructions bound a decode step).
Words rather than bytes, because the tensor core's operands have 16 bits: they are loaded from shared memory into its
operand layout, transposed for values, before they are split. The dequantized value (u - (2^b - 1)/2) step scale[token]
is then factored:

    step, 2^shift of the plane, 2^w    multiply the query once per program, and the output at the end
    1.5 - 2^-(w+1), the mean of u      one number per row, multiplied by sum q of the rounded query; for values by sum p
    scale[token]                       multiplies the logit, and the weight p before its product with the values

Runs of words are those of row_layout.py. Features (mask, lengths, pages, ...) are optional arguments and constants
(`tl.constexpr`) of the kernel, so the text does not depend on them.

Tokens, and channels of the output, are the rows of the matmuls (scores [T, M], output [R, M]); queries are columns,
because there are few of them and tensor cores take columns in multiples of 8, rows in multiples of 16 or 64.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, M rows (S queries of the heads that share a latent
head), R latent width.
"""

from __future__ import annotations

from string import Template

from fhopt.codegen.gpu.row_layout import MANTISSA, ONES, OperandField, Piece, fields, pieces, places
from fhopt.codegen.source_files import read_package_source
from fhopt.codegen.tiers import PLANES, Tiers, check_uniform, is_scaled, legend
from fhopt.ops.packing import planes
from fhopt.plan.kernel_spec import KernelSpec

MERGED = 64  # channels per program of `merge_kernel`


# --------------------------------------------------------------------------------------------------- rendering


def render_triton(spec: KernelSpec) -> str:
    """Render the Triton file of `spec`, deterministically. Raises FhoptError for unsupported bit groups."""
    check_uniform(spec, "a GPU")
    keys, values = pieces(spec.key_tiers, spec.key_width), pieces(spec.value_tiers, spec.value_width)
    return read_package_source("fhopt.codegen.gpu", "attention.py.in").substitute(
        name=spec.name,
        planes="".join(f"{line}\n" for line in PLANES),
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
    """Render the functions that load rows: `load`, `load_as`, `load_odd_halves` and `codes`."""
    packed = _PACKED.substitute(dtype=dtype, ones=ONES[dtype] * 65537) if dtype != "float32" else ""
    return read_package_source("fhopt.codegen.gpu", "read_rows.py.in").substitute(packed=packed)


def _indented(by: int, lines: list[str]) -> str:
    return "".join(" " * by + line + "\n" for line in lines)


def _name(letter: str, index: int, piece: Piece, part: int) -> str:
    """Return the variable name of one dot operand of a piece, or of its only one."""
    return f"{letter}{index}_{part}" if piece.is_coded else f"{letter}{index}"


def _channels(piece: Piece, first: int) -> str:
    """Render the arguments that select channels: first, stride, size, used."""
    return f"{first}, {piece.lanes}, {piece.size}, {piece.used}"


def _queries(keys: tuple[Piece, ...], dtype: str) -> list[str]:
    """Render the lines that load the queries, one operand each, and their sums times mean values."""
    lines, middles = [], []
    for i, piece in enumerate(keys):
        for n, field in enumerate(fields(piece, dtype)):
            name, unit = _name("q", i, piece, n), "factor"
            if piece.is_coded:
                unit = f"factor * {piece.unit * 2**field.bits * field.times!r}"
                middles.append(f"middle += {field.middle} * tl.sum({name}.to(tl.float32), 0)")
            lines.append(f"{name} = load_query(rows, inside, {unit}, {_channels(piece, piece.channel + field.lane)})")
    if middles:
        middles.insert(0, "middle = tl.zeros([BLOCK_M], tl.float32)  # sum of q times the mean of the codes")
    return lines + middles


def _outputs(spec: KernelSpec, values: tuple[Piece, ...]) -> list[str]:
    """Render the lines that initialize the output sums to 0."""
    lines = []
    if is_scaled(spec.value_tiers):
        lines.append("mass = no_sums(BLOCK_T, BLOCK_M)  # sum of scaled weights, multiplied by middles at the end")
    for i, piece in enumerate(values):
        lines += [
            f"{_name('o', i, piece, lane)} = tl.zeros([{piece.size}, BLOCK_M], tl.float32)"
            for lane in range(piece.lanes)
        ]
    return lines


def sides_of(spec: KernelSpec) -> tuple[tuple[str, Tiers], ...]:
    """Return names and bit groups of the two sides."""
    return ("key", spec.key_tiers), ("value", spec.value_tiers)


def _scale_rows(side: str) -> list[str]:
    """Render the lines that load the scales of a tile of tokens."""
    return [
        f"{side}_scales = {side}_scale + entry.to(tl.int64) * {side}_scale_b + first.to(tl.int64) * {side}_scale_t",
        f"{side}_scales += (unit // {side}_group).to(tl.int64) * {side}_scale_h + t_in * {side}_scale_t",
        f"{side}_factor = tl.load({side}_scales, mask=here, other=0.0).to(tl.float32)",
    ]


def _load(side: str, piece: Piece) -> list[str]:
    """Render the lines that load a run of all rows of a tile."""
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


def _operand(piece: Piece, field: OperandField, dtype: str) -> str:
    """Render the expression for an operand extracted from loaded words."""
    if not piece.is_coded:
        return "x.to(DTYPE)"
    most = MANTISSA[dtype] - field.bits
    return f"codes(x, {field.shift - most}, 0x{2**field.bits - 1 << most:X}, PACKED)"


def _scores(spec: KernelSpec, keys: tuple[Piece, ...]) -> list[str]:
    """Render the lines that compute the logits of a tile."""
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
    """Render the lines that add the weighted values of a tile to the output."""
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
    """Render the lines that store the output."""
    lines = ["masses = added(mass)"] if is_scaled(spec.value_tiers) else []
    for i, piece in enumerate(values):
        operands = fields(piece, spec.dtype)
        for lane in range(piece.lanes):
            x = name = _name("o", i, piece, lane)
            if piece.is_coded:
                middle = sum(field.middle * field.times for field in operands if field.lane == lane)
                x = f"({name} - {middle} * masses[None, :]) * {piece.unit * 2 ** operands[0].bits!r}"
            lines.append(f"store(outputs, {x} * factor[None, :], inside, {_channels(piece, piece.place + lane)})")
    return lines


def _second(tiers: Tiers, width: int) -> list[str]:
    """Render the lines of the merge that add the outputs of second planes; none without second planes."""
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
