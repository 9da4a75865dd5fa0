"""Layouts and bits for a CPU: what is read in the least time, at a loss that is little more than the least.

A CPU multiplies a latent that all heads share by the queries of each of them, and takes every channel out of its bits,
however few these are. So two plans of one size and of nearly the same loss may differ three times in the time of
attention. With a rate of exchange, r nats for a second of arithmetic, bits and layouts are chosen by loss + r * time
(Lagrange's method, as rates of bits are: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers"): channels that do little are dropped, and latents for each head take the place of shared ones where these
gain least. The rate is raised as long as the loss stays within its bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fhopt.errors import FhoptError
from fhopt.fitting.allocation import Allocation, Sides, choose_layouts
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.choices import Grain
from fhopt.hardware.devices import channel_seconds, find_device
from fhopt.plan.site import AttentionSite

DEARER = 1.5  # times the least loss, and no more, may be given for time
MOST = 3.0  # times, as long as the loss is little: then so many
LITTLE = 5e-4  # nats per token: rounding of bfloat16 costs as much (Qwen2.5-Coder-1.5B)
FIRST, DOUBLINGS, HALVINGS = 0.25, 12, 3  # first rate: of the least loss to its time; rates that are tried
TIME = "time"  # of the provenance: device, share of the time, expected loss of the plan that has the rest


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


def provenance(choice: Choice, allocation: Allocation, budget: int, device: str | None) -> dict[str, Any]:
    """Return what a plan says of loss that was given for time: `TIME` and JSON values, or nothing.

    allocation: of the plan, which may be another one than that of the choice.
    """
    without = choice.without
    if without is None or device is None:
        return {}
    memory = _memory_seconds(budget, device)
    share = max(allocation.seconds, memory) / max(without.seconds, memory)
    return {TIME: {"device": device, "share": share, "predicted_nats_without": without.nats}}


def _memory_seconds(budget: int, device: str) -> float:
    """Estimate the seconds in which so many bits are read: arithmetic that takes less is not waited for."""
    seconds, _ = find_device(device).roofline(budget / 8, 0, 0, 2)
    return float(seconds)


def bound_of(least: float) -> float:
    """Return the nats that may be lost where `least` is what a plan loses for which time does not count."""
    return max(DEARER * least, min(MOST * least, LITTLE))


def choose(bases: CandidateBases, sides: Sides, budget: int, grain: Grain, device: str | None) -> Choice:
    """Choose layouts and bits for a budget of bits per token, where sides take time the fastest found in the bound.

    At each rate layouts compete from those of the best choice so far on, and from the fastest ones. Raises FhoptError
    when the budget is below the least that each side must get.
    """
    layouts, least = choose_layouts(bases, sides, budget, grain)
    best = Choice(layouts, least)
    if device is None or not least.seconds or not least.nats:
        return best
    bound, enough = bound_of(least.nats), _memory_seconds(budget, device)
    fastest = {name: _fastest(name, table, sides) for name, table in bases.items()}

    def is_within(rate: float) -> bool:
        """Try a rate; return whether the cheapest choice at it is within the bound."""
        nonlocal best
        tried = []
        for start in (best.layouts, fastest):
            try:
                tried.append(Choice(*choose_layouts(bases, sides, budget, grain, rate, start), rate, least))
            except FhoptError:  # more latent heads than there are bytes for
                continue
        for choice in tried:
            if choice.allocation.nats <= bound and choice.allocation.seconds < best.allocation.seconds:
                best = choice
        return min(tried, key=lambda c: c.allocation.nats + rate * c.allocation.seconds).allocation.nats <= bound

    low, high = 0.0, FIRST * least.nats / least.seconds
    for _ in range(DOUBLINGS):
        if best.allocation.seconds <= enough or not is_within(high):
            break
        low, high = high, 2 * high
    for _ in range(HALVINGS if low else 0):
        if best.allocation.seconds <= enough:
            break
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return best


def _fastest(name: str, layouts: Mapping[str, Sequence[Basis]], sides: Sides) -> str:
    """Return the layout of a site that takes the least time with all of its channels."""

    def seconds(which: str) -> float:
        return sum(part.seconds for i in range(len(layouts[which])) for part in sides[name, which, i].parts)

    return min(layouts, key=seconds)


def nats_of_another(choice: Choice, bases: CandidateBases, sides: Sides, budget: int, grain: Grain) -> float:
    """Estimate the loss of a choice for another budget, at a rate that is as large for its loss as that of `choice`.

    Raises FhoptError as `choose`.
    """
    layouts, least = choose_layouts(bases, sides, budget, grain)
    if choice.without is None or not least.seconds or not least.nats:
        return least.nats
    before = choice.without.nats / choice.without.seconds
    _, other = choose_layouts(bases, sides, budget, grain, choice.rate * least.nats / least.seconds / before, layouts)
    return min(other.nats, bound_of(least.nats))
