"""Layouts and bits for a CPU: what is read in the least time, at a loss that is little more than the least.

A CPU multiplies a latent that all heads share by the queries of each of them, and takes every channel out of its bits,
however few these are. So two plans of one size and of nearly the same loss may differ three times in the time of
attention. With a rate of exchange, r nats for a second of arithmetic, bits and layouts are chosen by loss + r * time
(Lagrange's method, as rates of bits are: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"): channels that do little are dropped, and latents for each head take the place of shared ones where these
gain least. The rate is raised as long as the loss stays within its bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fhopt.fitting.allocation import Allocation, Sides, choose_layouts
from fhopt.fitting.bases import CandidateBases
from fhopt.fitting.choices import Grain
from fhopt.hardware.devices import channel_seconds, find_device
from fhopt.plan.site import AttentionSite

DEARER = 1.5  # times the least loss, and no more, may be given for time
MOST = 3.0  # times, as long as the loss is little: then so many
LITTLE = 5e-4  # nats per token: rounding of bfloat16 costs as much (Qwen2.5-Coder-1.5B)
FIRST, DOUBLINGS, HALVINGS = 0.25, 12, 3  # first rate: of the least loss to its time; rates that are tried


@dataclass(frozen=True)
class Choice:
    """Layouts of sites by name, their bits, and what led to them.

    rate: nats that a second counts for. without: the choice that does not count time, where this one does.
    """

    layouts: Mapping[str, str]
    allocation: Allocation
    rate: float = 0.0
    without: Allocation | None = None


def channel_times(
    bases: CandidateBases, sites: Mapping[str, AttentionSite], device: str | None
) -> dict[tuple[str, str], float]:
    """Estimate the seconds that a channel of each layout of each site takes, by their names.

    device: None, or a GPU: none, time does not decide there.
    """
    if device is None or (found := find_device(device)).kind != "cpu":
        return {}
    return {
        (name, which): channel_seconds(found, sites[name].heads, sides[0].groups, shared=len(sides) == 1)
        for name, layouts in bases.items()
        for which, sides in layouts.items()
    }


def bound_of(least: float) -> float:
    """Return the nats that may be lost where `least` is what a plan loses for which time does not count."""
    return max(DEARER * least, min(MOST * least, LITTLE))


def choose(bases: CandidateBases, sides: Sides, budget: int, grain: Grain) -> Choice:
    """Choose layouts and bits for a budget of bits per token, where sides take time the fastest within the bound.

    Raises FhoptError when the budget is below the least that each side must get.
    """
    layouts, least = choose_layouts(bases, sides, budget, grain)
    best = Choice(layouts, least)
    if not least.seconds or not least.nats:
        return best
    bound = bound_of(least.nats)

    def at(rate: float) -> Choice:
        layouts, allocation = choose_layouts(bases, sides, budget, grain, rate)
        return Choice(layouts, allocation, rate, least)

    def is_better(other: Choice) -> bool:
        return other.allocation.nats <= bound and other.allocation.seconds < best.allocation.seconds

    low, high = 0.0, FIRST * least.nats / least.seconds
    for _ in range(DOUBLINGS):
        tried = at(high)
        best = tried if is_better(tried) else best
        if tried.allocation.nats > bound:
            break
        low, high = high, 2 * high
    for _ in range(HALVINGS if low else 0):
        middle = (low * high) ** 0.5
        tried = at(middle)
        best = tried if is_better(tried) else best
        low, high = (middle, high) if tried.allocation.nats <= bound else (low, middle)
    return best
