"""Layout of packed latents in GPU kernels: runs of words of bit planes, and the fields of a word.

Runs of words (`Piece`) are powers of two from 16 to 128, as matmuls and `tl.arange` require. The rest of a plane is
loaded byte by byte if that pads less; the last run may be padded, which costs no bytes: loads are masked. A plane of a
multiple of 16 bytes needs no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from fhopt.codegen.tiers import Tiers
from fhopt.ops.packing import planes
from fhopt.plan.kernel_spec import KernelSpec

LARGEST_PIECE = 128  # channels per matmul
SMALLEST_PIECE = 16  # min length of a matmul's inner dimension
MANTISSA = {"float32": 23, "bfloat16": 7, "float16": 10}  # bits
ONES = {"float32": 0x3F800000, "bfloat16": 0x3F80, "float16": 0x3C00}  # the bits of 1.0


@dataclass(frozen=True)
class Piece:
    """A run of words of a row, with one dot operand per lane of a word.

    bits: of the plane; 16: float16; 0: uncoded. word: bits of a loaded word. start: index of the first word in the row.
    used: words. size: the same, padded. channel: of the first lane of the first word. place: of that channel's output.
    unit: value of a step of the plane.
    """

    bits: int
    word: int
    start: int
    used: int
    size: int
    channel: int
    place: int
    unit: float

    @property
    def lanes(self) -> int:
        """Number of channels per word."""
        return self.word // self.bits if self.is_coded else 1

    @property
    def is_coded(self) -> bool:
        """Whether it has quantized values rather than floats."""
        return 0 < self.bits < 16


@dataclass(frozen=True)
class OperandField:
    """An operand: `bits` bits of a word from `shift` on. They belong to channel `lane` and count `times` as much."""

    lane: int
    shift: int
    bits: int
    times: int

    @property
    def middle(self) -> float:
        """Mean of 1 + u / 2^bits over all quantized values u."""
        return 1.5 - 0.5 ** (self.bits + 1)


def pieces(tiers: Tiers, width: int) -> tuple[Piece, ...]:
    """Split a row into runs, in the order of its bytes."""
    if not tiers:
        return tuple(Piece(0, 0, i, used, size, i, i, 1.0) for i, used, size in _runs(width))
    even = row_size(tiers, width) % 2 == 0
    runs: list[Piece] = []
    channel = byte = 0
    second = width  # outputs of second planes follow those of all channels
    for bits, count, step in tiers:
        rest = bits
        for plane, w in enumerate((16,) if bits == 16 else planes(bits)):
            rest -= w
            size = count * w // 8
            place = second if plane else channel
            second += count if plane else 0
            done = 0  # bytes
            for word, part in _words(size, w, even and byte % 2 == 0):
                lanes, first = max(1, word // w), done * 8 // w
                runs += [
                    Piece(
                        w,
                        word,
                        (byte + done) * 8 // word + i * max(1, w // word),
                        used,
                        padded,
                        channel + first + lanes * i,
                        place + first + lanes * i,
                        step * 2.0**rest,
                    )
                    for i, used, padded in _runs(part * 8 // (w * lanes))
                ]
                done += part
            byte += size
        channel += count
    return tuple(runs)


def fields(piece: Piece, dtype: str) -> tuple[OperandField, ...]:
    """Split a piece into operands. An 8-bit value becomes two if the mantissa has 7 bits."""
    if not piece.is_coded:
        return (OperandField(0, 0, piece.bits, 1),)
    split = piece.bits > MANTISSA[dtype]
    bits = piece.bits // 2 if split else piece.bits
    return tuple(
        OperandField(lane, piece.bits * lane + part, bits, 2**part)
        for lane in range(piece.lanes)
        for part in ((0, bits) if split else (0,))
    )


def row_size(tiers: Tiers, width: int) -> int:
    """Return the elements of a storage row: bytes of quantized values, or R."""
    return sum(bits * w for bits, w, _ in tiers) // 8 or width


def places(spec: KernelSpec) -> int:
    """Return the partial results of a program per output row: R_V, plus one per channel of two bit planes."""
    second = sum(w for bits, w, _ in spec.value_tiers if bits < 16 and len(planes(bits)) > 1)
    return spec.value_width + second


def is_crowded(spec: KernelSpec) -> bool:
    """Return True if rows need padding or channels have two bit planes.

    With many bit groups, the operands then exceed the registers. Plans fitted for a GPU avoid both.
    """
    sides = pieces(spec.key_tiers, spec.key_width), pieces(spec.value_tiers, spec.value_width)
    planed = any(len(planes(bits)) > 1 for bits, _, _ in (*spec.key_tiers, *spec.value_tiers) if bits < 16)
    return planed or any(piece.used < piece.size for side in sides for piece in side)


def _words(size: int, bits: int, even: bool) -> list[tuple[int, int]]:
    """Split a plane of `size` bytes into (bits of a word, bytes): 16-bit words if it is at an `even` byte, then 8."""
    if not even or size % 2:
        return [(8, size)]
    rest = size % (2 * SMALLEST_PIECE)
    rest = rest if rest <= SMALLEST_PIECE and bits < 16 else 0
    return [(word, part) for word, part in ((16, size - rest), (8, rest)) if part]


def _runs(count: int) -> list[tuple[int, int, int]]:
    """Split `count` into powers of two: (begin, used, size); only the last is partially used."""
    runs, begin = [], 0
    whole = -(-count // SMALLEST_PIECE) * SMALLEST_PIECE
    while begin < count:
        size = min(LARGEST_PIECE, 1 << ((whole - begin).bit_length() - 1))
        runs.append((begin, min(size, count - begin), size))
        begin += size
    return runs
