"""How bit groups are quantized: uniformly, or by a trellis code (fhopt/ops/trellis.py), which errs less with as many.

Numbers of trellis codes are of a unit Gaussian and the tables of fhopt/ops/trellis.py, in a bit group of 64 channels,
as `benchmarks/quality/trellis_table.py` measures them. Shorter rings err more (of 16 channels at 2 bits 0.88 of a
uniform quantizer, not 0.68): by so much the expected loss of small groups is too low.
"""

from __future__ import annotations

from fhopt.plan.site_plan import Tier

UNIFORM, TRELLIS, AUTO = "uniform", "trellis", "auto"
CODES = (UNIFORM, TRELLIS)
CHOICES = (AUTO, *CODES)
TRELLIS_FROM = 5.0  # ratio: what plans lose below it is little, and attention takes longer with trellis codes

# Error relative to that of the best uniform quantizer; the step in standard deviations, a little more than is best for
# a Gaussian, as with `allocation.WIDER`; and with that step 1 / E[r x], see `allocation.UNBIASED`.
SHARE = {1: 0.84, 2: 0.68, 3: 0.575, 4: 0.515}
STEP = {1: 0.0190, 2: 0.0225, 3: 0.0255, 4: 0.0280}
GAIN = {1: 1.380, 2: 1.079, 3: 1.018, 4: 1.004}
LEAST_RING = 32  # bits: shorter rings have too few windows that are independent


def chosen(code: str, ratio: float, is_read: bool) -> str:
    """Return the code that one of `CHOICES` stands for. is_read: where the plan will run, trellis codes are read."""
    if code != AUTO:
        return code
    return TRELLIS if is_read and ratio >= TRELLIS_FROM else UNIFORM


def is_trellis(code: str, bits: int, width: int) -> bool:
    """Return whether a bit group gets a trellis code where `code` is chosen."""
    return code == TRELLIS and bits in STEP and bits * width >= LEAST_RING


def trellis_tier(bits: int, width: int) -> Tier:
    """Return a bit group with a trellis code, of channels of unit variance."""
    return Tier(bits, width, -STEP[bits])


def share(code: str, bits: int) -> float:
    """Return what channels lose with `code`, relative to what they lose with uniform quantizers."""
    return SHARE.get(bits, 1.0) if code == TRELLIS else 1.0
