"""Layouts and bits for a CPU: the fastest attention whose KL stays within a bound of the minimum.

On a CPU, every query head multiplies a latent that all heads share, and every channel must be unpacked, however few
bits it has. Two plans of one size and nearly the same KL may therefore differ threefold in the time of attention. With
an exchange rate of r nats per second of arithmetic, bits and layouts minimize KL + r * time (Lagrange multipliers, as
for bit rates: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Channels of little
effect are dropped, and per-head latents replace shared ones where these gain least. The rate is raised as long as the
KL stays within its bound.
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

DEARER = 1.5  # max KL relative to the minimum
MAX_KL_RATIO = 3.0  # the same while the KL stays below LITTLE
LITTLE = 5e-4  # nats/token; about the KL of rounding to bfloat16 (Qwen2.5-Coder-1.5B)
FIRST, DOUBLINGS, HALVINGS = 0.25, 12, 3  # first rate, relative to (minimum KL / its time); and search steps
TIME = "time"  # provenance key: device, relative time, expected KL of the plan that ignores time


@dataclass(frozen=True)
class LayoutChoice:
    """Layouts of sites by name, their bits, and how they were chosen.

    rate: nats per second of decode time. without: the allocation that ignores time, if this one does not.
    """

    layouts: Mapping[str, str]
    allocation: Allocation
    rate: float = 0.0
    without: Allocation | None = None


def channel_times(
    bases: CandidateBases, sites: Mapping[str, AttentionSite], device: str | None
) -> dict[tuple[str, str], float]:
    """Estimate seconds per channel by (site, layout).

    device: for None or a GPU the result is empty, since time does not decide there.
    """
    if device is None or (found := find_device(device)).kind != "cpu":
        return {}
    return {
        (name, which): channel_seconds(found, sites[name].heads, sides[0].groups, shared=len(sides) == 1)
        for name, layouts in bases.items()
        for which, sides in layouts.items()
    }


def provenance(choice: LayoutChoice, allocation: Allocation, budget: int, device: str | None) -> dict[str, Any]:
    """Return provenance for KL traded for time: JSON values under `TIME`, or nothing.

    allocation: of the plan, which may differ from that of the choice.
    """
    without = choice.without
    if without is None or device is None:
        return {}
    memory = _memory_seconds(budget, device)
    share = max(allocation.seconds, memory) / max(without.seconds, memory)
    return {TIME: {"device": device, "share": share, "predicted_nats_without": without.nats}}


def _memory_seconds(budget: int, device: str) -> float:
    """Estimate the seconds to load `budget` bits; faster arithmetic does not shorten decode."""
    seconds, _ = find_device(device).roofline(budget / 8, 0, 0, 2)
    return float(seconds)


def bound_of(least: float) -> float:
    """Return the max nats for a plan when `least` is the KL of the plan that ignores time."""
    return max(DEARER * least, min(MAX_KL_RATIO * least, LITTLE))


def choose_fastest(bases: CandidateBases, sides: Sides, budget: int, grain: Grain, device: str | None) -> LayoutChoice:
    """Choose layouts and bits for a budget of bits per token: the fastest found within the bound if sides have a time.

    At each rate layouts compete starting from the best choice so far, and from the fastest layouts. Raises FhoptError
    if the budget is below the minimum that all sides need.
    """
    layouts, least = choose_layouts(bases, sides, budget, grain)
    best = LayoutChoice(layouts, least)
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
                tried.append(LayoutChoice(*choose_layouts(bases, sides, budget, grain, rate, start), rate, least))
            except FhoptError:  # too few bytes for that many latent heads
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
    """Return the layout of a site that is fastest with all of its channels."""

    def seconds(which: str) -> float:
        return sum(part.seconds for i in range(len(layouts[which])) for part in sides[name, which, i].parts)

    return min(layouts, key=seconds)


def nats_of_another(choice: LayoutChoice, bases: CandidateBases, sides: Sides, budget: int, grain: Grain) -> float:
    """Estimate the KL of a choice at another budget, with the rate scaled in proportion to KL over time.

    Raises FhoptError like `choose_fastest`.
    """
    layouts, least = choose_layouts(bases, sides, budget, grain)
    if choice.without is None or not least.seconds or not least.nats:
        return least.nats
    before = choice.without.nats / choice.without.seconds
    _, other = choose_layouts(bases, sides, budget, grain, choice.rate * least.nats / least.seconds / before, layouts)
    return min(other.nats, bound_of(least.nats))
