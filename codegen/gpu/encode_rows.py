"""Encoding of new keys or values directly into the rows of a KV cache, in one Triton kernel.

    z    = E x                                         per latent head, from the n = G/J kv heads that share it
    s    = sqrt(mean z[c]^2), over the channels with fewer than 16 bits; a float16 in [2^-14, 65504]
    u[c] = clamp(floor(z[c] / s / step) + 2^(b-1), 0, 2^b - 1)                     a channel of b < 16 bits

    x [B,G,T,D]   E [J,R,n*D]   ->   codes [B,J,rows,bytes]   scale [B,J,rows], or pages of both

No latent is stored: a program passes twice over the channels of its tokens, for the scale and for the codes, and
recomputes them. Matmuls are float32 ("ieee"), since a quantized value is a floor: a latent is as exact as that of
`fhopt.ops.encode`, and a value differs only if z is at a rounding boundary.

Bit groups are a table in memory, as in packing.py, whose functions do the packing: one compilation serves all layers.

Letters: B batch, G kv heads, T new tokens, D head size, J latent heads, n = G/J, R latent width, C channels at a time,
P tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fhopt.codegen.cpu.packing import tier_table
from fhopt.codegen.gpu.packing import device_table, limited, store_halves, store_plane, tier
from fhopt.ops import algebra, packing

BLOCK_T, BLOCK_G, BLOCK_D = 16, 8, 32  # tokens of a program, groups of 8 channels and head elements per iteration
OPTIONS = {"num_warps": 4, "num_stages": 1}
CUDA_OPTIONS = OPTIONS | {"maxnreg": 255}  # by default ptxas uses fewer registers for higher occupancy, and spills
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_jit: Callable[..., Any] = triton.jit
_jit_entry: Callable[..., Any] = triton.jit(  # specialize on the alignment of the strides of x and of the basis
    do_not_specialize=(
        *("tokens", "tier_count", "coded", "at", "heads", "table_b"),
        *("codes_b", "codes_j", "codes_t", "scale_b", "scale_j", "scale_t"),
    )
)


# ----------------------------------------------------------------------------------------------- torch entry points


def encode_triton(
    x: Tensor,
    basis: Tensor,
    bits: Sequence[int],
    widths: Sequence[int],
    steps: Sequence[float],
    codes: Tensor,
    scale: Tensor,
    *,
    at: int = 0,
    places: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """Encode x [B,G,T,D] by basis [J,R,n*D] into rows `at` to `at + T` of codes [B,J,rows,bytes] and scale [B,J,rows].

    places: int64 [T], the rows instead; tokens with a negative one are skipped. table: int32 [B, pages]: row r of a
    sequence is row r % P of page table[b, r // P] of codes [pool,J,P,bytes] and scale [pool,J,P]; rows in negative
    pages are skipped. Calls that the kernel does not support (float64, bit groups of no plan) run the reference.
    """
    tiers = (tuple(bits), tuple(widths), tuple(steps))
    _check(x, basis, codes, scale, places, table)
    known = tier_table(*tiers)
    if known is None or x.dtype not in _TYPES or basis.dtype == torch.float64 or codes.stride(-1) != 1:
        return encode_reference(x, basis, bits, widths, steps, codes, scale, at=at, places=places, table=table)
    if codes.shape[-1] != known.row_bytes or basis.shape[1] != known.width:
        raise ValueError(
            f"codes have {codes.shape[-1]} bytes per row and basis has {basis.shape[1]} channels; expected "
            f"{known.row_bytes} and {known.width}. Pass the storage and the basis of one plan."
        )
    batch, groups, tokens, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    basis = basis.to(torch.float32)
    basis = basis if basis.stride(2) == 1 else basis.contiguous()
    coded = max(1, sum(w for b, w in zip(bits, widths, strict=True) if b < 16))
    grid = (triton.cdiv(tokens, BLOCK_T), basis.shape[0], batch)
    if 0 in grid:
        return None
    with torch.cuda.device_of(x):
        encode_rows_kernel[grid](
            x, basis, codes, scale, device_table(*tiers, x.device), places, table,
            tokens, known.tier_count, coded, at, groups // basis.shape[0], size,
            *x.stride()[:3], *basis.stride()[:2], *codes.stride()[:3], *scale.stride(),
            0 if table is None else table.stride(0),
            PAGE=0 if table is None else codes.shape[2], BLOCK_T=BLOCK_T, BLOCK_G=BLOCK_G, BLOCK_D=BLOCK_D,
            **(OPTIONS if torch.version.hip else CUDA_OPTIONS),
        )  # fmt: skip
    return None


def encode_reference(
    x: Tensor,
    basis: Tensor,
    bits: Sequence[int],
    widths: Sequence[int],
    steps: Sequence[float],
    codes: Tensor,
    scale: Tensor,
    *,
    at: int = 0,
    places: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """Encode x as `encode_triton` does, in torch operations."""
    new = packing.pack_reference(
        algebra.encode(x.to(basis.dtype), basis), bits, widths, steps
    )  # [B,J,T,bytes], [B,J,T]
    rows = torch.arange(at, at + x.shape[2], device=x.device) if places is None else places
    kept = rows >= 0
    for storage, part in zip((codes, scale), new, strict=True):
        if table is None:
            storage[:, :, rows[kept]] = part[:, :, kept]
            continue
        for b in range(x.shape[0]):
            pages, within = table[b, (rows // storage.shape[2]).clamp(min=0)].long(), rows % storage.shape[2]
            here = kept & (pages >= 0)
            storage[pages[here], :, within[here]] = part[b].transpose(0, 1)[here]


def _check(x: Tensor, basis: Tensor, codes: Tensor, scale: Tensor, places: Tensor | None, table: Tensor | None) -> None:
    """Raise ValueError if shapes or types do not match: the kernel trusts its pointers."""
    batch, groups, tokens, size = x.shape
    heads = basis.shape[0]
    if groups % heads or basis.shape[2] != groups // heads * size:
        raise ValueError(
            f"basis has shape {tuple(basis.shape)}; expected [J, R, {groups}/J * {size}], J a divisor of "
            f"{groups}, for x {tuple(x.shape)}. Pass the encoder of this site."
        )
    if codes.dtype != torch.uint8 or scale.dtype != torch.float16 or codes.shape[:3] != scale.shape:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)} and scale {scale.dtype} {tuple(scale.shape)}; "
            "expected torch.uint8 [..., rows, bytes] and torch.float16 [..., rows]. Pass the storage of one "
            "cache."
        )
    if codes.shape[1] != heads or (table is None and codes.shape[0] != batch):
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}; expected, for {batch} sequences and {heads} latent "
            f"heads, [{'pool' if table is not None else batch}, {heads}, rows, bytes]. Pass the storage of "
            "this site."
        )
    if places is not None and (places.dtype != torch.int64 or places.shape != (tokens,) or not places.is_contiguous()):
        raise ValueError(f"places are {places.dtype} {tuple(places.shape)}; expected torch.int64 {(tokens,)}, dense.")
    if table is not None and (table.dtype != torch.int32 or table.shape[:1] != (batch,) or table.stride(1) != 1):
        raise ValueError(
            f"table is {table.dtype} {tuple(table.shape)}; expected torch.int32 {(batch, 'pages')}, dense."
        )


# --------------------------------------------------------------------------------------------------- kernel


@_jit_entry
def encode_rows_kernel(
    x: tl.tensor,  # float32, bfloat16 or float16 [B, G, T, D]
    basis: tl.tensor,  # float32 [J, R, n*D]
    codes: tl.tensor,  # uint8 [B, J, rows, bytes], or [pool, J, P, bytes] with `table`
    scale: tl.tensor,  # float16, like the rows
    tiers: tl.tensor,  # int32 [tiers, 5]
    places: tl.tensor,  # int64 [T]: rows of the tokens; None: consecutive from `at`
    table: tl.tensor,  # int32 [B, pages]; None: no pages
    tokens: tl.tensor,  # T
    tier_count: tl.tensor,
    coded: tl.tensor,  # channels with fewer than 16 bits, at least 1
    at: tl.tensor,
    heads: tl.tensor,  # n
    size: tl.tensor,  # D
    x_b: tl.tensor,  # strides
    x_h: tl.tensor,
    x_t: tl.tensor,
    basis_j: tl.tensor,
    basis_r: tl.tensor,
    codes_b: tl.tensor,
    codes_j: tl.tensor,
    codes_t: tl.tensor,
    scale_b: tl.tensor,
    scale_j: tl.tensor,
    scale_t: tl.tensor,
    table_b: tl.tensor,
    PAGE: tl.constexpr,  # P; 0: no pages
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Encode BLOCK_T tokens in one latent head: one pass over the channels for the scale, one for quantized values."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    j, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    live = t < tokens
    rows = x + b * x_b + (j * heads).to(tl.int64) * x_h + t.to(tl.int64) * x_t
    bases = basis + j.to(tl.int64) * basis_j
    entry, place, here = destination(t, b, live, at, places, table, table_b, PAGE)
    row = codes + entry * codes_b + j.to(tl.int64) * codes_j + place * codes_t  # [T]

    source = (rows, None, None, x_h, 0, 0, size)
    half = scales_of(
        source, None, bases, size, basis_r, heads, tiers, tier_count, coded, live, BLOCK_T, BLOCK_G, BLOCK_D
    )
    tl.store(scale + entry * scale_b + j.to(tl.int64) * scale_j + place * scale_t, half, mask=here)
    store_codes(
        source, None, bases, size, basis_r, heads, tiers, tier_count, half, row, live, here, BLOCK_T, BLOCK_G, BLOCK_D
    )


@_jit
def scales_of(
    x: tl.tensor,
    y: tl.tensor,
    bases: tl.tensor,
    basis_h: tl.tensor,
    basis_r: tl.tensor,
    heads: tl.tensor,
    tiers: tl.tensor,
    tier_count: tl.tensor,
    coded: tl.tensor,
    live: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Return the scales of `live` tokens in a latent head, float16 [T]. x, y: as in `project`."""
    energy = tl.zeros([BLOCK_T], tl.float32)
    for i in range(tier_count):
        bits, width, channel, _, _ = tier(tiers, i)
        if bits < 16:
            for first in range(0, width // 8, BLOCK_G):
                z = project(
                    x, y, bases, basis_h, basis_r, heads, channel, first, width, live, BLOCK_T, BLOCK_G, BLOCK_D
                )
                energy += tl.sum(tl.sum(z * z, 2), 1)
    mean = tl.div_rn(energy, tl.zeros([BLOCK_T], tl.float32) + coded)
    return limited(tl.sqrt_rn(mean), 2.0**-14, 65504.0).to(tl.float16)


@_jit
def store_codes(
    x: tl.tensor,
    y: tl.tensor,
    bases: tl.tensor,
    basis_h: tl.tensor,
    basis_r: tl.tensor,
    heads: tl.tensor,
    tiers: tl.tensor,
    tier_count: tl.tensor,
    half: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    here: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Quantize tokens [T] by their scales and store those that are `here` in their rows [T]."""
    inverse = tl.div_rn(tl.full([BLOCK_T], 1.0, tl.float32), half.to(tl.float32))
    for i in range(tier_count):
        bits, width, channel, byte, step = tier(tiers, i)
        for first in range(0, width // 8, BLOCK_G):
            g = first + tl.arange(0, BLOCK_G)  # [G]
            z = project(x, y, bases, basis_h, basis_r, heads, channel, first, width, live, BLOCK_T, BLOCK_G, BLOCK_D)
            store_tier(row + byte, z, inverse, bits, width, step, g, here)


@_jit
def destination(
    t: tl.tensor,
    b: tl.tensor,
    live: tl.tensor,
    at: tl.tensor,
    places: tl.tensor,
    table: tl.tensor,
    table_b: tl.tensor,
    PAGE: tl.constexpr,
) -> tl.tensor:
    """Return the destination of tokens t [T]: sequence or page of the pool, row in it, and whether to store."""
    place = at + t.to(tl.int64)
    if places is not None:
        place = tl.load(places + t, mask=live, other=-1)
    here = live & (place >= 0)
    entry = tl.zeros(t.shape, tl.int64) + b
    if PAGE:
        entry = tl.load(table + b * table_b + place // PAGE, mask=here, other=-1).to(tl.int64)
        here, place = here & (entry >= 0), place % PAGE
    return entry, place, here


@_jit
def project(
    x: tl.tensor,
    y: tl.tensor,
    bases: tl.tensor,
    basis_h: tl.tensor,
    basis_r: tl.tensor,
    heads: tl.tensor,
    channel: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    live: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Project tokens of n heads to BLOCK_G runs of 8 channels of a bit group: float32 [T, G, 8]; 0 outside.

    x: keys or values as a tuple: addresses of the first head's elements [T], of the scales of 8-bit elements [T] or
    None, of subtracted means [T] or None, head strides of each, head size. y: the values if keys and values share a
    latent, whose basis has both side by side per head; None: only x.
    """
    z = tl.zeros([BLOCK_T, 8 * BLOCK_G], tl.float32)
    z = add_projected(z, x, bases, basis_h, basis_r, heads, channel, first, width, live, BLOCK_G, BLOCK_D)
    if y is not None:
        z = add_projected(z, y, bases + x[6], basis_h, basis_r, heads, channel, first, width, live, BLOCK_G, BLOCK_D)
    return tl.reshape(z, [BLOCK_T, BLOCK_G, 8])


@_jit
def add_projected(
    z: tl.tensor,
    x: tl.tensor,
    bases: tl.tensor,
    basis_h: tl.tensor,
    basis_r: tl.tensor,
    heads: tl.tensor,
    channel: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    live: tl.tensor,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Add to z [T, C] the projection of keys or values x, a tuple as in `project`."""
    rows, scales, means, rows_h, scales_h, means_h, size = x
    c = 8 * first + tl.arange(0, 8 * BLOCK_G)  # [C], of the tier
    column = bases + (channel + c).to(tl.int64) * basis_r  # [C]
    for _ in range(heads):
        for start in range(0, size, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)  # [D]
            real = d < size
            inside = live[:, None] & real[None, :]
            v = tl.load(rows[:, None] + d[None, :], mask=inside, other=0)  # load both before use, or ptxas spills
            e = tl.load(column[None, :] + d[:, None], mask=(c < width)[None, :] & real[:, None], other=0.0)
            v = v.to(tl.float32)
            if scales is not None:
                v = (v - 127.5) * tl.load(scales, mask=live, other=0.0).to(tl.float32)[:, None]
            if means is not None:
                v -= tl.load(means[:, None] + d[None, :], mask=inside, other=0.0)
            z = tl.dot(v, e, z, input_precision="ieee")
        rows += rows_h
        if scales is not None:
            scales += scales_h
        if means is not None:
            means += means_h
        column += basis_h
    return z


@_jit
def store_tier(
    row: tl.tensor,
    z: tl.tensor,
    inverse: tl.tensor,
    bits: tl.tensor,
    width: tl.tensor,
    step: tl.tensor,
    g: tl.tensor,
    here: tl.tensor,
) -> None:
    """Quantize latents z [T, G, 8] of a bit group and store them; `row` [T] is the address of the group."""
    inside = here[:, None] & (g < width // 8)[None, :]  # [T, G]
    if bits == 16:
        store_halves(row, z, g, inside)
    else:
        middle = ((1 << bits) >> 1).to(tl.float32)
        u = tl.floor(tl.div_rn(z * inverse[:, None, None], tl.zeros_like(z) + step)) + middle
        u = tl.where(u > 0, tl.where(u < 2 * middle, u, 2 * middle - 1), 0).to(tl.int32)  # NaN: 0
        store_plane(row, u, bits, width, g, inside, 8)
        store_plane(row, u, bits, width, g, inside, 4)
        store_plane(row, u, bits, width, g, inside, 2)
        store_plane(row, u, bits, width, g, inside, 1)
