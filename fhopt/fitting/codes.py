"""Quantizers of bit groups: uniform, or trellis codes (fhopt/ops/trellis.py), which have less error at the same bits.

The trellis constants hold for a unit Gaussian and the tables of fhopt/ops/trellis.py, in a bit group of 64 channels, as
`benchmarks/quality/trellis_table.py` measures them. Shorter rings have more error (16 channels at 2 bits: 0.88 of a
uniform quantizer's, not 0.68), so the expected KL of small groups is underestimated by that factor.
"""

from __future__ import annotations

from fhopt.plan.site_plan import BitGroup

UNIFORM, TRELLIS, AUTO = "uniform", "trellis", "auto"
CODES = (UNIFORM, TRELLIS)
CHOICES = (AUTO, *CODES)
TRELLIS_FROM = 5.0  # ratio; below it plans lose little, and trellis codes slow attention down

# Error relative to the best uniform quantizer; the step in standard deviations, slightly above the Gaussian optimum as
# in `allocation.WIDER`; and 1 / E[r x] at that step, see `allocation.UNBIASED`.
SHARE = {1: 0.84, 2: 0.68, 3: 0.575, 4: 0.515}
STEP = {1: 0.0190, 2: 0.0225, 3: 0.0255, 4: 0.0280}
GAIN = {1: 1.380, 2: 1.079, 3: 1.018, 4: 1.004}
MIN_RING = 32  # bits; shorter rings have too few independent windows


def chosen(code: str, ratio: float, is_read: bool) -> str:
    """Resolve a code of `CHOICES`. is_read: whether the plan will run where trellis codes are supported."""
    if code != AUTO:
        return code
    return TRELLIS if is_read and ratio >= TRELLIS_FROM else UNIFORM


def gets_trellis(code: str, bits: int, width: int) -> bool:
    """Return whether a bit group gets a trellis code when `code` is requested."""
    return code == TRELLIS and bits in STEP and bits * width >= MIN_RING


def trellis_tier(bits: int, width: int) -> BitGroup:
    """Return a bit group with a trellis code for channels of unit variance."""
    return BitGroup(bits, width, -STEP[bits])


def relative_error(code: str, bits: int) -> float:
    """Return the error of channels with `code`, relative to uniform quantizers."""
    return SHARE.get(bits, 1.0) if code == TRELLIS else 1.0
