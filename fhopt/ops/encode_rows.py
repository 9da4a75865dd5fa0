"""`fhopt::encode_rows`: keys or values to packed latents in one kernel, if this machine has one.

    x [B,G,T,D]   basis [J,R,n*D]   ->   codes [B,J,T,bytes]   scale [B,J,T]       pack(E x), see fhopt/ops/packing.py

On GPUs this is the Triton kernel of codegen/gpu/encode_rows.py, which does not store latents in between. It computes
each latent twice, for the scale and for the quantized values, on vector units instead of tensor cores, since a
quantized value is the floor of a dot product. Large batches of tokens (above LARGEST) use `encode` and `pack` instead.

Letters: B batch, G kv heads, T new tokens, D head size, J latent heads, n = G/J, R latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fhopt.ops import algebra, packing, registry

LARGEST = 2**29  # maximum FLOPs computed twice: 8 us at the 67 TFLOP/s of an H100; chosen, not measured
_LIB = torch.library.Library("fhopt", "FRAGMENT")
_LIB.define("encode_rows(Tensor x, Tensor basis, int[] bits, int[] widths, float[] steps) -> (Tensor, Tensor)")


def encodes_at_once(x: Tensor, basis: Tensor) -> bool:
    """Return True if x [B,G,T,D] should run through `fhopt::encode_rows`: a kernel exists and tokens are few."""
    if not x.is_cuda and (torch.compiler.is_compiling() or registry.kernel_of("encode_rows", x.device.type) is None):
        return False  # in this order a compiled graph has no guard on the registry
    return 2 * x.shape[0] * x.shape[2] * basis.numel() <= LARGEST


def encode_rows_reference(
    x: Tensor, basis: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Encode, then pack: x [B,G,T,D], basis [J,R,n*D] -> codes uint8 [B,J,T,bytes], scale float16 [B,J,T]."""
    codes, scale = torch.ops.fhopt.pack(algebra.encode(x.to(basis.dtype), basis), list(bits), list(widths), list(steps))
    return codes, scale


def _encode_rows(
    x: Tensor, basis: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    kernel = registry.kernel_of("encode_rows", x.device.type) or encode_rows_reference
    return kernel(x, basis, bits, widths, steps)


def empty_rows(
    x: Tensor, basis: Tensor, bits: Sequence[int], widths: Sequence[int], steps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Allocate uninitialized packed latents: codes uint8 [B,J,T,bytes] and scale float16 [B,J,T]."""
    shape = (x.shape[0], basis.shape[0], x.shape[2])
    size = sum(b * w for b, w in zip(bits, widths, strict=True)) // 8
    return x.new_empty((*shape, size), dtype=torch.uint8), x.new_empty(shape, dtype=torch.float16)


def pack_window_reference(
    rounded: tuple[Tensor, Tensor], mean: Tensor | None, dtype: torch.dtype, basis: Tensor,
    places: tuple[Tensor, Tensor], at: int, tiers: algebra.BitGroups, turning: tuple[Tensor, Tensor, int] | None,
) -> float | None:  # fmt: skip
    """Encode and pack tokens of an 8-bit residual window, writing them after the first `at` packed latents of a cache.

    rounded: values uint8 [B,G,T,D] and scales float16 [B,G,T] of tokens in `dtype`, less `mean` [B,G,1,D]. basis
    [J,R,n*D]. places: packed latents [B,J,N,bytes] and their scales [B,J,N]. turning: for keys relative to segments,
    channels [2,F], cosines and sines [N,2,F] or [B,N,2,F], and tokens per segment. Returns the mean square of the
    latents; a kernel returns None if it does not support the arguments.
    """
    if mean is None:
        x = packing.unround_rows(*rounded, dtype)
    else:
        x = (packing.unround_rows(*rounded, torch.float32) + mean).to(dtype)
    if turning is not None:
        (real, imaginary), phases, segment = turning
        numbers = (torch.arange(x.shape[2], device=x.device) + at) // segment
        cos, sin = [part if part.dim() == 2 else part.unsqueeze(1) for part in phases[..., numbers, :, :].unbind(-2)]
        x = x.to(torch.promote_types(dtype, torch.float32))
        a, b, x = x[..., real], x[..., imaginary], x.clone()
        x[..., real], x[..., imaginary] = a * cos - b * sin, b * cos + a * sin
    latent = algebra.encode((x if mean is None else x - mean).to(basis.dtype), basis)
    for part, new in zip(places, torch.ops.fhopt.pack(latent, *tiers), strict=True):
        part[:, :, at : at + new.shape[2]] = new
    return float(latent.float().square().mean())


_LIB.impl("encode_rows", _encode_rows, "CompositeExplicitAutograd")
_LIB.impl("encode_rows", torch.library.fallthrough_kernel, "Autograd")  # no gradient flows through quantized values
torch.library.register_fake("fhopt::encode_rows", empty_rows, lib=_LIB)
