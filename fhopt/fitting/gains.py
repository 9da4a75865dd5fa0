"""Gains of decoders: how far values of few bits are scaled up, because tokens that are read together err alike.

A quantizer of few bits that errs least, one token at a time, shrinks what it encodes: of a unit Gaussian x, 1 bit keeps
r with E[r x] = 0.64, so that a part of the error is -0.36 x. Attention averages many tokens, and those that a query
reads share what it looks for: the rest of their errors averages out, this part does not. With r scaled by 1/0.64 the
error has nothing of x any more, but is larger. In between lies what costs least, and calibration measures it: over a
sequence, with g the gradient of the likelihood and sums before squares (fhopt/calibration/collect.py),

    cost(gamma) = (sum of g (gamma r - x))^2 = gamma^2 A - 2 gamma B + C,   least at gamma = B / A.

Measured on Qwen2.5-Coder-0.5B at 8x: 1.19 for 1 bit, 1.05 for 2, 1.00 for more; the KL that values cost falls by an
eighth. Errors of keys that are alike cancel in the softmax; they get no gain.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from fhopt.fitting.allocation import STEPS, Allocation
from fhopt.fitting.bases import CandidateBases
from fhopt.fitting.costs import Costs
from fhopt.ops import packing
from fhopt.plan.site_plan import TIER_QUANTUM

GAINED = (1, 2, 3)  # bits; with more there is nothing to gain, and a gain would cost more than rounding


def value_gains(
    bases: CandidateBases, costs: Costs, chosen: Mapping[str, str], allocation: Allocation
) -> dict[int, float]:
    """Return the gain of value channels by their bits, one for the whole plan, from measured costs.

    Each lies between 1, which is best for errors that are independent, and `unbiased_gain`. Layouts without values of
    their own (`input`) do not count. Numbers of bits that no channel got, or that were not measured, have none.
    """
    sums = {bits: [0.0, 0.0] for bits in GAINED}  # A, B
    for name, which in chosen.items():
        measured = costs.get((name, which, 1))
        if len(bases[name][which]) < 2 or measured is None or not int(measured.tokens):
            continue
        given = torch.tensor(allocation.bits[name, 1]).repeat_interleave(TIER_QUANTUM)[
            : bases[name][which][1].encode.shape[1]
        ]
        for bits in GAINED:
            if bits in measured.powers:
                here = given == bits
                power, cost, dropped = (
                    float(x[:, here].sum()) for x in (measured.powers[bits], measured.sums[bits], measured.sums[0])
                )
                sums[bits][0] += power
                sums[bits][1] += (power + dropped - cost) / 2
    return {bits: min(max(b / a, 1.0), unbiased_gain(bits)) for bits, (a, b) in sums.items() if a > 0}


@functools.cache
def unbiased_gain(bits: int) -> float:
    """Return 1 / E[r x] of a unit Gaussian x that is quantized to r with `bits` bits, as plans do."""
    x = torch.linspace(-8, 8, 32001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    return float((weight * x.square()).sum() / (weight * x * packing.rounded(x, bits, STEPS[bits])).sum())
