"""Render the prefill kernels of a `KernelSpec` in Triton: many queries attend to reconstructed keys and values.

    k[t] = D_K z_K[t]     x[t] = cap(scale * q . k[t]) + mask[t]     o = sum_t softmax(x)[t] v[t]     v[t] = D_V z_V[t]

A decode step multiplies queries by D_K^T instead (attention.py), and never meets a key. A prefill has hundreds of
queries of every kv head for the same tokens, and where latents are wider than keys, or where unpacking them anew for
every 32 queries costs more than the products, it is cheaper to reconstruct keys and values
(fhopt/ops/prefill_attention.py counts):

    rebuild_kernel   keys or values of a range of tokens, into memory that the L2 cache holds: once for all queries
    chunk_kernel     attention of BLOCK_M rows to keys and values as they are, or reconstructed by each program

Quantized values are read as in attention.py: lane l of the words of a plane is an operand of its own, whose rows of the
decoder are taken together. What a value u stands for, (u - (2^b - 1)/2) step scale[token], becomes

    step, 2^shift of the plane, 2^w    multiply the rows of the decoder, before a call (`Table`)
    the mean of u                      a row of its own, taken off the sum: from the decoder as it was rounded
    scale[token]                       multiplies what is reconstructed, and float16 channels are added to that

A value of 8 bits is converted where the mantissa has 7: a product of two halves would cost more than the conversion,
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
from fhopt.codegen.source_files import read_source
from fhopt.codegen.tiers import PLANES, Tiers, check_uniform, is_scaled, legend
from fhopt.plan.kernel_spec import KernelSpec

# --------------------------------------------------------------------------------------------------- operands


def operands(piece: Piece, dtype: str) -> tuple[Field, ...]:
    """Split a piece into operands as a decode step does, but values that are wider than the mantissa stay whole."""
    if not is_converted(piece, dtype):
        return fields(piece, dtype)
    return tuple(Field(lane, piece.bits * lane, piece.bits, 1) for lane in range(piece.lanes))


def is_converted(piece: Piece, dtype: str) -> bool:
    """Return True for quantized values u that become the numbers u - 2^(b-1), by conversion."""
    return piece.is_coded and piece.bits > MANTISSA[dtype]


@dataclass(frozen=True)
class Table:
    """Rows of a decoder in the order of operands, K of them: which channel (R: none), times what, and the mean of u."""

    channels: tuple[int, ...]
    factors: tuple[float, ...]
    middles: tuple[float, ...]


@functools.cache
def table(tiers: Tiers, width: int, dtype: str) -> Table:
    """Make the table of one side, for products of `dtype`."""
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
    """Order the pieces of a row: quantized values, which a token's scale multiplies, before what it does not."""
    return sorted(pieces(tiers, width), key=lambda piece: not piece.is_coded)


def padded(size: int) -> int:
    """Round a head size up to what products want: a power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


# --------------------------------------------------------------------------------------------------- the text


def render(spec: KernelSpec) -> str:
    """Render the Triton file of `spec`; the same spec gives the same text. Raises FhoptError for odd bit groups."""
    check_uniform(spec, "a GPU")
    sides = (("key", "D", spec.key_tiers, spec.key_width), ("value", "E", spec.value_tiers, spec.value_width))
    return read_source("fhopt.codegen.gpu", "prefill.py.in").substitute(
        name=spec.name,
        planes="".join(f"{line}\n" for line in PLANES),
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
    """Render the function that reconstructs keys or values."""
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
    """Render the lines that load a run of all rows of a tile [T, size]."""
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
    """Render the expression for an operand of what was loaded."""
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
