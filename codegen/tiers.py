"""Bit groups of a `KernelSpec`: checks, and their description at the head of a generated file."""

from __future__ import annotations

from fhopt.errors import FhoptError
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.site_plan import SUPPORTED_BITS, TIER_QUANTUM, TRELLIS_BITS, is_trellis, trellis_unsupported

Tiers = tuple[tuple[int, int, float], ...]  # bit groups (bits, width, step) in channel order; empty: not quantized
PLANES = (  # the format of quantized values (fhopt/ops/latent_attention.py), for the head of a generated file
    "A tier is stored as bit planes: one for 1, 2, 4 and 8 bits, two for 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2, the wider",
    "one first and with the high-order bits. A plane holds its part of all codes of the tier, low-order codes first.",
)
UNCODED_DTYPES = ("float32", "bfloat16", "float16")


def check_spec(spec: KernelSpec) -> None:
    """Raise FhoptError if no kernel can be generated for `spec`."""
    for side, tiers, width in (("key", spec.key_tiers, spec.key_width), ("value", spec.value_tiers, spec.value_width)):
        if any(bits not in SUPPORTED_BITS or w < 1 or w % TIER_QUANTUM for bits, w, _ in tiers):
            raise FhoptError(
                f"the {side} tiers {tiers} have no kernel; expected bits in {SUPPORTED_BITS} and widths that "
                f"are multiples of {TIER_QUANTUM}. Fit the plan again, or round the widths."
            )
        if tiers and sum(w for _, w, _ in tiers) != width:
            raise FhoptError(f"the {side} tiers {tiers} do not add up to the width {width}. Pass widths that do.")
        if any(is_trellis(bits, step) and bits not in TRELLIS_BITS for bits, _, step in tiers):
            raise FhoptError(f"the {side} tiers {tiers} have trellis codes; expected bits of {TRELLIS_BITS} for these.")
    if spec.dtype not in UNCODED_DTYPES:
        raise FhoptError(
            f"no kernel supports unquantized {spec.dtype}; expected {UNCODED_DTYPES}. Convert the tensors."
        )


def spec_has_trellis(spec: KernelSpec) -> bool:
    """Return True if channels have a trellis code (fhopt/ops/trellis.py), which only CPU kernels support."""
    return any(is_trellis(bits, step) for bits, _, step in (*spec.key_tiers, *spec.value_tiers))


def check_uniform(spec: KernelSpec, what: str) -> None:
    """Raise FhoptError as `check_spec` does, and if `spec` has trellis codes, which `what` does not support."""
    check_spec(spec)
    if spec_has_trellis(spec):
        raise trellis_unsupported(what)


def is_scaled(tiers: Tiers) -> bool:
    """Return True if a token has a scale that matters: some channels are quantized, not float16."""
    return any(bits < 16 for bits, _, _ in tiers)


def legend(tiers: Tiers, width: int) -> str:
    """Describe the bit groups of one side, for the head of a generated file."""
    return ", ".join(f"{w} x {bits}" for bits, w, _ in tiers) + " bits" if tiers else f"{width} uncoded"
