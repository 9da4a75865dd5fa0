"""Rendering of the Triton prefill kernels of a `KernelSpec`: many queries attend to reconstructed keys and values.

    k[t] = D_K z_K[t]     x[t] = cap(scale * q . k[t]) + mask[t]     o = sum_t softmax(x)[t] v[t]     v[t] = D_V z_V[t]

A decode step instead multiplies queries by D_K^T (attention.py), and never computes keys. A prefill has hundreds of
queries per kv head for the same tokens. If latents are wider than keys, or if unpacking them for every 32 queries costs
more than the matmuls, it is cheaper to reconstruct keys and values (cost model: fhopt/ops/prefill_attention.py):

    rebuild_kernel   keys or values of a range of tokens, into memory that the L2 cache holds: once for all queries
    chunk_kernel     attention of BLOCK_M rows to given keys and values, or to those that each program reconstructs

Quantized values are extracted as in attention.py: lane l of the words of a plane is a separate operand, multiplied by
the matching rows of the decoder. The dequantized value (u - (2^b - 1)/2) step scale[token] is factored:

    step, 2^shift of the plane, 2^w    multiply the rows of the decoder, before a call (`OperandTable`)
    the mean of u                      a separate row, subtracted from the sum: computed from the rounded decoder
    scale[token]                       multiplies the reconstruction; float16 channels are added afterwards

An 8-bit value is converted if the mantissa has 7 bits: multiplying two halves would cost more than the conversion,
which is shared by BLOCK_M queries here.

Letters: B batch, H query heads, G kv heads, J latent heads, S queries, T tokens, D and E head size of keys and values,
R latent width, M rows (S queries of the H/G heads of a kv head), K operands of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from string import Template

from fhopt.codegen.gpu.attention import reading
from fhopt.codegen.gpu.row_layout import MANTISSA, ONES, OperandField, Piece, fields, pieces
from fhopt.codegen.source_files import read_package_source
from fhopt.codegen.tiers import PLANES, Tiers, check_uniform, is_scaled, legend
from fhopt.plan.kernel_spec import KernelSpec

# --------------------------------------------------------------------------------------------------- operands


def operands(piece: Piece, dtype: str) -> tuple[OperandField, ...]:
    """Split a piece into operands as a decode step does, except that values wider than the mantissa stay whole."""
    if not is_converted(piece, dtype):
        return fields(piece, dtype)
    return tuple(OperandField(lane, piece.bits * lane, piece.bits, 1) for lane in range(piece.lanes))


def is_converted(piece: Piece, dtype: str) -> bool:
    """Return True for quantized values u that are converted to the numbers u - 2^(b-1)."""
    return piece.is_coded and piece.bits > MANTISSA[dtype]


@dataclass(frozen=True)
class OperandTable:
    """Rows of a decoder in operand order, K of them: channel (R: padding), factor, and the mean of u."""

    channels: tuple[int, ...]
    factors: tuple[float, ...]
    middles: tuple[float, ...]


@functools.cache
def operand_table(tiers: Tiers, width: int, dtype: str) -> OperandTable:
    """Create the table of one side, for matmuls of `dtype`."""
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
    return OperandTable(tuple(channels), tuple(factors), tuple(middles))


def _ordered(tiers: Tiers, width: int) -> list[Piece]:
    """Order the pieces of a row: quantized values, which a token's scale multiplies, before unquantized ones."""
    return sorted(pieces(tiers, width), key=lambda piece: not piece.is_coded)


def padded(size: int) -> int:
    """Round a head size up to a size that matmuls support: a power of two from 16."""
    return max(16, 1 << (size - 1).bit_length())


# --------------------------------------------------------------------------------------------------- rendering


def render_prefill(spec: KernelSpec) -> str:
    """Render the Triton file of `spec`, deterministically. Raises FhoptError for unsupported bit groups."""
    check_uniform(spec, "a GPU")
    sides = (("key", "D", spec.key_tiers, spec.key_width), ("value", "E", spec.value_tiers, spec.value_width))
    return read_package_source("fhopt.codegen.gpu", "prefill.py.in").substitute(
        name=spec.name,
        planes="".join(f"{line}\n" for line in PLANES),
        key_legend=legend(spec.key_tiers, spec.key_width),
        value_legend=legend(spec.value_tiers, spec.value_width),
        dtype=spec.dtype,
        mantissa=MANTISSA[spec.dtype],
        integer="int32" if spec.dtype == "float32" else "int16",
        one=f"0x{ONES[spec.dtype]:X}",
        softcap=spec.softcap,
        key_operands=len(operand_table(spec.key_tiers, spec.key_width, spec.dtype).channels),
        value_operands=len(operand_table(spec.value_tiers, spec.value_width, spec.dtype).channels),
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


def _operand(piece: Piece, field: OperandField, dtype: str) -> str:
    """Render the expression for an operand extracted from loaded words."""
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
