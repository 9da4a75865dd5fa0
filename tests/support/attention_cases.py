"""Latent-attention cases that every generated kernel must support, with reference results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.cpu.attention import LIBRARY
from fhopt.codegen.cpu.launch import LibraryKernel
from fhopt.codegen.tiers import Tiers
from fhopt.ops.latent_attention import LatentKernel, latent_attention_reference
from fhopt.ops.packing import pack_reference, unpack_reference
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SUPPORTED_BITS

MIXED: Tiers = ((8, 16, 0.02), (4, 40, 0.3), (2, 8, 0.9))
HALVES: Tiers = ((16, 8, 0.0), (4, 16, 0.3), (16, 16, 0.0), (8, 8, 0.02))
EIGHT: Tiers = ((8, 64, 0.02),)
FOUR: Tiers = ((4, 64, 0.3),)
TWO: Tiers = ((2, 24, 0.9),)
PLANES: Tiers = ((6, 16, 0.08), (5, 24, 0.15), (3, 40, 0.5), (1, 8, 1.6))
ODD: Tiers = ((3, 8, 0.5), (16, 8, 0.0), (1, 24, 1.6), (5, 8, 0.15), (4, 24, 0.3))  # float16 starts at byte 3
EVERY: Tiers = tuple((bits, width, 2 / 2**bits) for bits in SUPPORTED_BITS for width in (8, 16, 24))
LONGEST: Tiers = tuple((bits, 128, math.pi / 2**bits) for bits in reversed(SUPPORTED_BITS))
# Trellis codes with sizes below and above the 64 bytes and 64 channels of one load.
RINGS: Tiers = ((6, 8, 0.1), (4, 16, -0.03), (3, 24, -0.03), (2, 40, -0.025), (1, 40, -0.022))
RING: Tiers = ((2, 16, -0.025),)
LONG_RINGS: Tiers = ((4, 200, -0.03), (3, 104, -0.03), (16, 8, 0.0), (1, 8, -0.022), (2, 8, 0.9))
UNCODED: Tiers = ()

Make = Callable[[KernelSpec], LatentKernel]

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]  # query, key and its scale, value and its scale


@dataclass(frozen=True)
class KernelCase:
    """One kernel and the shapes it runs on."""

    key_tiers: Tiers
    value_tiers: Tiers
    heads: int  # H
    key_heads: int  # J of the keys
    value_heads: int  # J of the values
    queries: int  # S
    tokens: int  # T
    softcap: float = 0.0
    width: int = 24  # R of unquantized sides
    dtype: torch.dtype = torch.float32

    @property
    def key_width(self) -> int:
        return sum(w for _, w, _ in self.key_tiers) or self.width

    @property
    def value_width(self) -> int:
        return sum(w for _, w, _ in self.value_tiers) or self.width

    def spec(self) -> KernelSpec:
        dtype = str(self.dtype).removeprefix("torch.")
        return KernelSpec(
            self.key_tiers, self.value_tiers, self.key_width, self.value_width, dtype, self.softcap != 0.0
        )

    def options(self) -> dict[str, list[int] | list[float] | float]:
        return {
            "key_bits": [b for b, _, _ in self.key_tiers],
            "key_widths": [w for _, w, _ in self.key_tiers],
            "key_steps": [s for _, _, s in self.key_tiers],
            "value_bits": [b for b, _, _ in self.value_tiers],
            "value_widths": [w for _, w, _ in self.value_tiers],
            "value_steps": [s for _, _, s in self.value_tiers],
            "scale": 0.25,
            "softcap": self.softcap,
        }


CASES = {
    "9 heads read one latent": KernelCase(MIXED, MIXED, 9, 1, 1, 1, 203),
    "keys shared by 9 heads, values by 3": KernelCase(FOUR, MIXED, 9, 1, 3, 5, 70),
    "float16 channels beside codes, softcap": KernelCase(HALVES, TWO, 6, 2, 3, 1, 131, softcap=4.0),
    "a head for each latent head, values uncoded": KernelCase(TWO, UNCODED, 4, 4, 4, 5, 77, width=20),
    "tiers of one and two bit planes": KernelCase(PLANES, ODD, 9, 3, 1, 1, 203),
    "tiers of two bit planes, several queries, softcap": KernelCase(ODD, PLANES, 6, 1, 2, 3, 67, softcap=4.0),
    "one token": KernelCase(HALVES, HALVES, 3, 1, 1, 1, 1),
    "uncoded, several queries": KernelCase(UNCODED, UNCODED, 9, 3, 3, 5, 100, width=16),
}
# Cases that only CPU kernels support.
TRELLIS_CASES = {
    "trellis codes beside others": KernelCase(RINGS, RINGS, 9, 1, 1, 1, 203),
    "a short ring, long ones": KernelCase(RING, LONG_RINGS, 6, 2, 3, 5, 131),
    "float16 channels beside rings, softcap": KernelCase(LONG_RINGS, RING, 4, 4, 1, 3, 70, softcap=4.0),
    "one token of a ring": KernelCase(RINGS, RING, 3, 1, 1, 1, 1),
    "rings of keys, values uncoded": KernelCase(RINGS, UNCODED, 4, 2, 4, 1, 77, width=20),
}


def side(tiers: Tiers, heads: int, tokens: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Random latents of one side: codes and scales, or floats."""
    z = torch.randn(batch, heads, tokens, width) * (0.5 + torch.rand(batch, heads, tokens, 1))
    if not tiers:
        return z, None
    return pack_reference(z, [b for b, _, _ in tiers], [w for _, w, _ in tiers], [s for _, _, s in tiers])


def inputs(case: KernelCase) -> Inputs:
    query = torch.randn(2, case.heads, case.queries, case.key_width)
    key, key_scale = side(case.key_tiers, case.key_heads, case.tokens, case.key_width)
    value, value_scale = side(case.value_tiers, case.value_heads, case.tokens, case.value_width)
    key, value = (x if x.dtype == torch.uint8 else x.to(case.dtype) for x in (key, value))
    return query.to(case.dtype), key, key_scale, value, value_scale


def masks(case: KernelCase) -> list[Tensor | None]:
    """None; bool with a fully masked row; additive, full shape; bool, broadcast over queries; additive [T]."""
    whole = torch.rand(2, 1, case.queries, case.tokens) > 0.4
    whole[0, 0, -1] = False
    whole[1, 0, -1, 0] = True
    bias = torch.randn(2, case.heads, case.queries, case.tokens)
    bias[1, :, 0] = -torch.inf
    padding = torch.arange(case.tokens).expand(2, 1, 1, case.tokens) >= torch.tensor([0, 60]).view(2, 1, 1, 1)
    return [None, whole, bias, padding, torch.randn(case.tokens)]


def expected(case: KernelCase, x: Inputs, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the reference on unpacked latents, with float64 matmuls."""
    query, key, key_scale, value, value_scale = x
    unpacked = []
    for rows, scale, tiers in ((key, key_scale, case.key_tiers), (value, value_scale, case.value_tiers)):
        bits, widths, steps = [b for b, _, _ in tiers], [w for _, w, _ in tiers], [s for _, _, s in tiers]
        unpacked.append((rows if scale is None else unpack_reference(rows, scale, bits, widths, steps)).double())
    options = KernelCase(UNCODED, UNCODED, 0, 0, 0, 0, 0, softcap=case.softcap).options()
    return latent_attention_reference(query.double(), unpacked[0], None, unpacked[1], None, mask, **options)  # type: ignore[arg-type]


def build_cpp(spec: KernelSpec) -> LatentKernel:
    """Build the C++ kernel of a spec."""
    library = LIBRARY.load()
    assert library is not None, "it cannot be compiled"
    return LibraryKernel(library, spec)


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    """Tolerance 1e-5: float32 sums of up to 203 products of size 3, on codes whose midpoint is subtracted last."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
