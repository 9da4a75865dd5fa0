"""`fhopt::pack` and `fhopt::unpack`: quantize latents to packed latents and back, with their eager references.

    fhopt::pack      z [...,R] float            -> codes [...,bytes] uint8, scale [...] float16
    fhopt::unpack    codes, scale               -> z [...,R] float32

A code is a quantized value as an unsigned integer. A token's row is its bit groups in sequence, each group as bit
planes. The plane widths are the powers of two that sum to the group's bits, widest first; the widest holds the
high-order bits: 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2 bits are two planes; 1, 2, 4 and 8 bits are one. A plane holds its
part of all codes of the group, low-order codes first within a byte, and starts on a byte boundary: kernels only handle
lanes of 1, 2, 4 and 8 bits. The 3-bit codes 5, 3, 0, 0, 0, 0, 0, 4 are 10|1, 01|1, 00|0, ..., 10|0, hence

    2-bit plane  00000110 10000000      1-bit plane  00000011

Arguments of both ops, per bit group: bits, widths (channels), steps (quantization steps as shares of the scale;
negative: a trellis code of fhopt/ops/trellis.py with steps of this magnitude).

Letters: B batch, G kv heads, T tokens, D head size, R latent width, W channels of a bit group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fhopt.ops import registry, trellis

_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define("pack(Tensor latent, int[] bits, int[] widths, float[] steps) -> (Tensor, Tensor)")
_LIB.define("unpack(Tensor codes, Tensor scale, int[] bits, int[] widths, float[] steps) -> Tensor")


# --------------------------------------------------------------------------------------------------- pack and unpack


def pack_reference(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Quantize and pack latents [..., R] -> codes uint8 [..., sum(bits*widths)/8], scale float16 [...].

    A token's scale is the root mean square of its channels with fewer than 16 bits. Codes are stored as bit planes
    (module docstring), 16-bit channels as float16 bytes.
    """
    x = latent.to(torch.float32)
    coded = [i for i, b in enumerate(bits) if b < 16]
    parts = list(x.split(list(widths), -1))
    scale = x.new_zeros(x.shape[:-1])
    if coded:
        energy = sum((parts[i] ** 2).sum(-1) for i in coded)
        scale = torch.sqrt((energy / sum(widths[i] for i in coded)).double()).float()  # correctly rounded
    scale = scale.clamp(2.0**-14, 65504.0).to(torch.float16)
    inverse = scale.to(torch.float32).reciprocal().unsqueeze(-1)
    rows = [
        _half_bytes(part) if b == 16 else integer_bytes(part * inverse, b, step)
        for part, b, step in zip(parts, bits, steps, strict=True)
    ]
    return torch.cat(rows, -1), scale


def rounded(x: Tensor, bits: int, step: float) -> Tensor:
    """Round values, already divided by their scale, to the levels of a mid-rise quantizer of `bits` bits."""
    half = 2 ** (bits - 1)
    return (torch.floor(x / step).clamp(-half, half - 1) + 0.5) * step


def _half_bytes(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).to(torch.float16).contiguous().view(torch.uint8)


def planes(bits: int) -> tuple[int, ...]:
    """Return the bit-plane widths of a group of `bits` < 16 bits, high-order bits first: 6 -> (4, 2)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def integer_bytes(x: Tensor, bits: int, step: float) -> Tensor:
    """Quantize with a uniform mid-rise quantizer and split into bit planes: x [..., W] -> uint8 [..., W*bits/8].

    With a negative step: a trellis code, as a ring of bits.
    """
    if step < 0:
        return trellis.encode_rings(x / -step, bits)
    levels = 2**bits
    codes = (torch.floor(x / step) + levels // 2).clamp(0, levels - 1).to(torch.uint8)
    widths = planes(bits)
    rows = [_plane_bytes(codes >> sum(widths[i + 1 :]), width) for i, width in enumerate(widths)]
    return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def _plane_bytes(codes: Tensor, width: int) -> Tensor:
    """Pack the low `width` bits of each code, 8/width codes per byte: uint8 [..., W] -> uint8 [..., W*width/8]."""
    if width == 8:
        return codes
    lanes = (codes & (2**width - 1)).unflatten(-1, (-1, 8 // width))
    out = lanes[..., 0]
    for lane in range(1, 8 // width):
        out = out | (lanes[..., lane] << (width * lane))
    return out


def unpack_reference(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    """Unpack and dequantize latents: codes uint8 [..., bytes], scale [...] -> float32 [..., R]."""
    unit = unscaled(codes, bits, widths, steps)
    factors = scale.to(torch.float32).unsqueeze(-1)
    if all(b < 16 for b in bits):
        return unit * factors
    parts = unit.split(list(widths), -1)
    return torch.cat([p if b == 16 else p * factors for p, b in zip(parts, bits, strict=True)], -1)


def unscaled(codes: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    """Unpack codes uint8 [..., bytes] without applying their scale: float32 [..., R].

    A code u of fewer than 16 bits is (u - (2^bits - 1)/2) * step, that of a trellis (u - 127.5) * -step; a 16-bit
    channel is its float16 value.
    """
    rows = codes.split([w * b // 8 for w, b in zip(widths, bits, strict=True)], -1)
    parts = [_values(row, b, step) for row, b, step in zip(rows, bits, steps, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _values(row: Tensor, bits: int, step: float) -> Tensor:
    if bits == 16:  # copied: a view must start at an even byte, which preceding groups, such as 3-bit ones, may prevent
        return row.clone(memory_format=torch.contiguous_format).view(torch.float16).to(torch.float32)
    if step < 0:
        return trellis.decode_rings(row, bits) * -step
    return (_codes(row, bits).to(torch.float32) - (2**bits - 1) / 2) * step


def _codes(row: Tensor, bits: int) -> Tensor:
    """Join bit planes to codes: uint8 [..., W*bits/8] -> uint8 [..., W]."""
    widths = planes(bits)
    sizes = [row.shape[-1] // bits * width for width in widths]
    codes, *rest = [_lanes(plane, width) for plane, width in zip(row.split(sizes, -1), widths, strict=True)]
    for plane, width in zip(rest, widths[1:], strict=True):
        codes = codes << width | plane
    return codes


def _lanes(plane: Tensor, width: int) -> Tensor:
    """Unpack the values of a bit plane: uint8 [..., W*width/8] -> uint8 [..., W], the inverse of `_plane_bytes`."""
    if width == 8:
        return plane
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    return ((plane.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(-2)


def empty_packed(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Allocate the results of `fhopt::pack` for latents [..., R]: uint8 [..., bytes] and the scale, float16 [...]."""
    size = sum(b * w for b, w in zip(bits, widths, strict=True)) // 8
    shape = latent.shape[:-1]
    return latent.new_empty((*shape, size), dtype=torch.uint8), latent.new_empty(shape, dtype=torch.float16)


def _unpack_fake(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], sum(widths)), dtype=torch.float32)


def _pack(latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    kernel = registry.kernel_of("pack", latent.device.type) or pack_reference
    return kernel(latent, bits, widths, steps)


def _unpack(codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    kernel = registry.kernel_of("unpack", codes.device.type) or unpack_reference
    return kernel(codes, scale, bits, widths, steps)


_LIB.impl("pack", _pack, "CompositeExplicitAutograd")
_LIB.impl("unpack", _unpack, "CompositeExplicitAutograd")


for _name in ("pack", "unpack"):
    _LIB.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # no gradient flows through quantized values


torch.library.register_fake("fhopt::pack", empty_packed, lib=_LIB)
torch.library.register_fake("fhopt::unpack", _unpack_fake, lib=_LIB)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to one 8-bit group of step 1: x [B,G,T,D] -> codes uint8 [B,G,T,D], scale float16 [B,G,T].

    A row's scale is its largest magnitude / 127.5, at least the smallest float16, so that a row of zeros has a valid
    one. No value changes by more than half a scale. Attention kernels load such rows directly. No gradient flows
    through them.
    """
    x = x.detach().to(torch.float32)
    scale = (x.abs().amax(-1) / 127.5).clamp(2.0**-24, 65504.0).to(torch.float16)
    codes = torch.floor(x / scale.unsqueeze(-1) + 128).clamp_(0, 255)
    return codes.to(torch.uint8), scale


def round_rows_into_reference(x: Tensor, mean: Tensor | None, codes: Tensor, scale: Tensor, at: int) -> bool:
    """Write `round_rows` of x [B,G,S,D], less `mean` [B,G,1,D], into rows `at` to at + S of codes and scale.

    codes uint8 [B,G,N,D], scale float16 [B,G,N]. Returns True; a kernel returns False if it does not support the
    arguments.
    """
    rounded, its_scale = round_rows(x if mean is None else x - mean)
    codes[:, :, at : at + x.shape[2]] = rounded
    scale[:, :, at : at + x.shape[2]] = its_scale
    return True


def unround_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize the result of `round_rows`: codes uint8 [B,G,T,D], scale [B,G,T] -> [B,G,T,D] of `dtype`."""
    return ((codes.to(torch.float32) - 127.5) * scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def straight_through(latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]) -> Tensor:
    """Quantize and dequantize latents [..., R], in their dtype; the gradient passes unchanged (straight-through)."""
    with torch.no_grad():
        codes, scale = torch.ops.fhopt.pack(latent.detach(), list(bits), list(widths), list(steps))
        rounded = torch.ops.fhopt.unpack(codes, scale, list(bits), list(widths), list(steps)).to(latent.dtype)
    return latent + (rounded - latent).detach()
