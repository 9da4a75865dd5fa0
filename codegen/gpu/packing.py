"""Packing and unpacking of latents on GPUs: `fhopt::pack` and `fhopt::unpack` in two Triton kernels for all plans.

    s    = sqrt(mean z[c]^2), over the channels with fewer than 16 bits; a float16 in [2^-14, 65504]
    u[c] = clamp(floor(z[c] / s / step) + 2^(b-1), 0, 2^b - 1)          a channel of b < 16 bits
    z[c] = (u[c] - (2^b - 1)/2) * step * s                              and back

Bit groups are a small table in GPU memory rather than kernel constants: each layer has its own bit groups, and each
would need a compilation. A program takes BLOCK_T rows and processes their channels in groups of 8: the width of every
bit group is a multiple of 8, and a bit plane of w bits holds a group in w bytes (format: fhopt/ops/packing.py).

The scale may differ from the reference in the last place: sums have no fixed order on a GPU. All other results are
rounded as in the reference, hence the `_rn` functions: plain division and square root are approximate on GPUs.

Letters: T rows (tokens of all latent heads), G groups of 8 channels, R latent width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fhopt.codegen.cpu.packing import can_pack, can_unpack, tier_table
from fhopt.ops.packing import pack_reference, unpack_reference
from fhopt.plan.site_plan import is_trellis, trellis_unsupported

BLOCK_T, BLOCK_G = 16, 8
_jit: Callable[..., Any] = triton.jit
_jit_entry: Callable[..., Any] = triton.jit(
    do_not_specialize=("rows", "tier_count", "coded")
)  # one compilation for all


# ----------------------------------------------------------------------------------------------- torch entry points


def pack_triton(
    latent: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pack latents on a GPU; see `fhopt.ops.pack_reference`, which runs calls that the kernel does not support."""
    tiers = (tuple(bits), tuple(widths), tuple(steps))
    table = tier_table(*tiers)
    if table is None or not can_pack(latent, table) or groups_have_trellis(bits, steps):
        return pack_reference(latent, bits, widths, steps)
    shape = latent.shape[:-1]
    rows = _rows(latent)
    codes = latent.new_empty((*shape, table.row_bytes), dtype=torch.uint8)
    scale = latent.new_empty(shape, dtype=torch.float16)
    coded = max(1, sum(w for b, w in zip(bits, widths, strict=True) if b < 16))
    with torch.cuda.device_of(latent):
        pack_kernel[_grid(rows)](
            rows, codes, scale, device_table(*tiers, latent.device),
            rows.shape[0], table.tier_count, coded, rows.stride(0), table.row_bytes, BLOCK_T, BLOCK_G,
        )  # fmt: skip
    return codes, scale


def groups_have_trellis(bits: Sequence[int], steps: Sequence[float]) -> bool:
    """Return whether a bit group has a trellis code, which GPU kernels do not support."""
    return any(map(is_trellis, bits, steps))


def packs_right(device: torch.device) -> bool:
    """Return whether packing some latents on a GPU gives the reference result. Raises what Triton raises."""
    rows, options = torch.ones(16, 64), ((4,), (64,), (0.4,))
    packed, _ = pack_triton(rows.to(device), *options)
    return torch.equal(packed.cpu(), pack_reference(rows, *options)[0])


def unpack_triton(
    codes: Tensor, scale: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> Tensor:
    """Unpack latents on a GPU; see `fhopt.ops.unpack_reference`, which runs calls that the kernel does not support."""
    tiers = (tuple(bits), tuple(widths), tuple(steps))
    table = tier_table(*tiers)
    if table is None or not can_unpack(codes, scale, table) or groups_have_trellis(bits, steps):
        return unpack_reference(codes, scale, bits, widths, steps)
    rows = _rows(codes)
    latent = codes.new_empty((*codes.shape[:-1], table.width), dtype=torch.float32)
    with torch.cuda.device_of(codes):
        unpack_kernel[_grid(rows)](
            rows, scale.contiguous(), latent, device_table(*tiers, codes.device),
            rows.shape[0], table.tier_count, rows.stride(0), table.width, BLOCK_T, BLOCK_G,
        )  # fmt: skip
    return latent


@functools.cache
def device_table(
    bits: tuple[int, ...], widths: tuple[int, ...], steps: tuple[float, ...], device: torch.device
) -> Tensor:
    """Create the table int32 [groups, 5]: bits, width, first channel, first byte, the step as the bits of a float32."""
    if groups_have_trellis(bits, steps):
        raise trellis_unsupported("a GPU")
    lines, channel, byte = [], 0, 0
    for b, w in zip(bits, widths, strict=True):
        lines.append((b, w, channel, byte))
        channel, byte = channel + w, byte + b * w // 8
    fifth = torch.tensor(steps, dtype=torch.float32).view(torch.int32).unsqueeze(1)
    return torch.cat((torch.tensor(lines, dtype=torch.int32), fifth), 1).to(device)


def _rows(x: Tensor) -> Tensor:
    """Flatten [..., n] to [T, n], the last dimension dense."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(rows.shape[0], BLOCK_T)),)


# --------------------------------------------------------------------------------------------------- kernels


@_jit_entry
def pack_kernel(
    latent: tl.tensor,  # float32, bfloat16 or float16 [T, R]
    codes: tl.tensor,  # uint8 [T, bytes]
    scale: tl.tensor,  # float16 [T]
    tiers: tl.tensor,  # int32 [tiers, 5]
    rows: tl.tensor,
    tier_count: tl.tensor,
    coded: tl.tensor,  # channels with fewer than 16 bits, at least 1
    latent_stride: tl.tensor,
    codes_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Pack BLOCK_T rows: one pass over the channels for the scale, one for the codes."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    z = latent + t.to(tl.int64) * latent_stride
    row = codes + t.to(tl.int64) * codes_stride

    energy = tl.zeros([BLOCK_T], tl.float32)
    for i in range(tier_count):
        bits, width, channel, byte, step = tier(tiers, i)
        if bits < 16:
            for first in range(0, width // 8, BLOCK_G):
                g = first + tl.arange(0, BLOCK_G)  # [G]
                inside = (t < rows)[:, None] & (g < width // 8)[None, :]  # [T, G]
                x = load_channels(z + channel, g, inside)  # [T, G, 8]
                energy += tl.sum(tl.sum(x * x, 2), 1)
    mean = tl.div_rn(energy, tl.zeros([BLOCK_T], tl.float32) + coded)
    half = limited(tl.sqrt_rn(mean), 2.0**-14, 65504.0).to(tl.float16)
    tl.store(scale + t, half, mask=t < rows)
    inverse = tl.div_rn(tl.full([BLOCK_T], 1.0, tl.float32), half.to(tl.float32))[:, None, None]

    for i in range(tier_count):
        bits, width, channel, byte, step = tier(tiers, i)
        for first in range(0, width // 8, BLOCK_G):
            g = first + tl.arange(0, BLOCK_G)
            inside = (t < rows)[:, None] & (g < width // 8)[None, :]
            x = load_channels(z + channel, g, inside)
            if bits == 16:
                store_halves(row + byte, x, g, inside)
            else:
                middle = ((1 << bits) >> 1).to(tl.float32)
                u = tl.floor(tl.div_rn(x * inverse, tl.zeros_like(x) + step)) + middle
                u = tl.where(u > 0, tl.where(u < 2 * middle, u, 2 * middle - 1), 0).to(tl.int32)  # NaN: 0
                store_plane(row + byte, u, bits, width, g, inside, 8)
                store_plane(row + byte, u, bits, width, g, inside, 4)
                store_plane(row + byte, u, bits, width, g, inside, 2)
                store_plane(row + byte, u, bits, width, g, inside, 1)


@_jit_entry
def unpack_kernel(
    codes: tl.tensor,  # uint8 [T, bytes]
    scale: tl.tensor,  # float16 [T]
    latent: tl.tensor,  # float32 [T, R]
    tiers: tl.tensor,  # int32 [tiers, 5]
    rows: tl.tensor,
    tier_count: tl.tensor,
    codes_stride: tl.tensor,
    latent_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Unpack BLOCK_T rows to latents."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    row = codes + t.to(tl.int64) * codes_stride
    z = latent + t.to(tl.int64) * latent_stride
    s = tl.load(scale + t, mask=t < rows, other=0.0).to(tl.float32)[:, None, None]

    for i in range(tier_count):
        bits, width, channel, byte, step = tier(tiers, i)
        for first in range(0, width // 8, BLOCK_G):
            g = first + tl.arange(0, BLOCK_G)  # [G]
            inside = (t < rows)[:, None] & (g < width // 8)[None, :]  # [T, G]
            if bits == 16:
                store_channels(z + channel, load_halves(row + byte, g, inside), g, inside)
            else:
                u = tl.zeros([BLOCK_T, BLOCK_G, 8], tl.int32)
                u = load_plane(row + byte, u, bits, width, g, inside, 8)
                u = load_plane(row + byte, u, bits, width, g, inside, 4)
                u = load_plane(row + byte, u, bits, width, g, inside, 2)
                u = load_plane(row + byte, u, bits, width, g, inside, 1)
                x = (u.to(tl.float32) - ((1 << bits) - 1).to(tl.float32) * 0.5) * step * s
                store_channels(z + channel, x, g, inside)


# --------------------------------------------------------------------------------------------------- helpers


@_jit
def tier(tiers: tl.tensor, i: tl.tensor) -> tl.tensor:
    """Load line i of the table: bits, width, first channel, first byte, step."""
    line = tiers + 5 * i
    channel = tl.multiple_of(tl.load(line + 2), 8)
    step = tl.load(line + 4).to(tl.float32, bitcast=True)
    return tl.load(line), tl.load(line + 1), channel, tl.load(line + 3), step


@_jit
def limited(x: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """Clamp x between low and high; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@_jit
def load_channels(z: tl.tensor, g: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load runs g of 8 channels of a bit group, whose rows start at z [T]: float32 [T, G, 8]."""
    channel = 8 * g[None, :, None] + tl.arange(0, 8)[None, None, :]
    return tl.load(z[:, None, None] + channel, mask=inside[:, :, None], other=0.0).to(tl.float32)


@_jit
def store_channels(z: tl.tensor, x: tl.tensor, g: tl.tensor, inside: tl.tensor) -> None:
    """Store runs g of 8 channels of a bit group, whose rows start at z [T], from float32 [T, G, 8]."""
    channel = 8 * g[None, :, None] + tl.arange(0, 8)[None, None, :]
    tl.store(z[:, None, None] + channel, x, mask=inside[:, :, None])


@_jit
def store_plane(
    row: tl.tensor,
    u: tl.tensor,
    bits: tl.tensor,
    width: tl.tensor,
    g: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    """Store WIDTH bits of quantized values u [T, G, 8], if this bit width has such a plane."""
    if bits & WIDTH:
        LANES: tl.constexpr = 8 // WIDTH  # codes per byte
        part = (u >> (bits & (WIDTH - 1))) & (2**WIDTH - 1)  # the lower bits belong to later planes
        lanes = tl.reshape(part, [u.shape[0], u.shape[1], WIDTH, LANES])
        x = tl.sum(lanes << (WIDTH * tl.arange(0, LANES))[None, None, None, :], 3)  # [T, G, WIDTH]
        plane = row + width // 8 * (bits & (16 - 2 * WIDTH))  # after the planes of higher bits
        byte = WIDTH * g[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
        tl.store(plane[:, None, None] + byte, x.to(tl.uint8), mask=inside[:, :, None])


@_jit
def load_plane(
    row: tl.tensor,
    u: tl.tensor,
    bits: tl.tensor,
    width: tl.tensor,
    g: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Add the bits of a plane to quantized values u [T, G, 8], if this bit width has such a plane."""
    if bits & WIDTH:
        LANES: tl.constexpr = 8 // WIDTH
        plane = row + width // 8 * (bits & (16 - 2 * WIDTH))
        byte = WIDTH * g[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
        x = tl.load(plane[:, None, None] + byte, mask=inside[:, :, None], other=0).to(tl.int32)  # [T, G, WIDTH]
        lanes = x[:, :, :, None] >> (WIDTH * tl.arange(0, LANES))[None, None, None, :]
        part = tl.reshape(lanes, [u.shape[0], u.shape[1], 8]) & (2**WIDTH - 1)
        u = u | (part << (bits & (WIDTH - 1)))
    return u


@_jit
def store_halves(row: tl.tensor, x: tl.tensor, g: tl.tensor, inside: tl.tensor) -> None:
    """Store 16-bit channels byte by byte, since they may start at an odd address."""
    half = limited(x, -65504.0, 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    byte = 16 * g[None, :, None] + 2 * tl.arange(0, 8)[None, None, :]
    to = row[:, None, None] + byte
    tl.store(to, (half & 255).to(tl.uint8), mask=inside[:, :, None])
    tl.store(to + 1, ((half >> 8) & 255).to(tl.uint8), mask=inside[:, :, None])


@_jit
def load_halves(row: tl.tensor, g: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load 16-bit channels, byte by byte, as float32 [T, G, 8]."""
    byte = 16 * g[None, :, None] + 2 * tl.arange(0, 8)[None, None, :]
    at = row[:, None, None] + byte
    low = tl.load(at, mask=inside[:, :, None], other=0).to(tl.int16)
    high = tl.load(at + 1, mask=inside[:, :, None], other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
