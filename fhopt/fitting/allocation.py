"""Allocation of bits to channels and layouts to sites under a budget of bytes (reverse water-filling)."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.fitting import codes
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.choices import Grain, grain_of
from fhopt.fitting.costs import Costs, SideCosts, SideKey
from fhopt.plan.cache_size import window_bytes
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SCALE_BYTES, TIER_QUANTUM, SidePlan, SitePlan
from fhopt.plan.window import ResidualWindow

# Of a unit Gaussian under the best uniform quantizer (Max 1960): distortion, and step in standard deviations.
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.00009, 16: 0.0}
STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}

# Latents have heavier tails than a Gaussian, and clipping costs more likelihood than rounding (measured on SmolLM2 per
# bit width). At 8 bits the Gaussian-optimal range makes clipping 20 times as costly as rounding.
WIDER = {1: 1.0, 2: 1.05, 3: 1.2, 4: 1.2, 5: 1.3, 6: 1.4, 8: 2.0}
STEPS = {bits: STEP[bits] * WIDER[bits] for bits in STEP}

# 1 / E[r x] of a unit Gaussian x quantized to r: with r scaled by it, the error is uncorrelated with x. A minimum-MSE
# quantizer shrinks each token, and values that a query attends to together shrink by the same factor, so this error
# does not average out. On Qwen2.5-Coder-0.5B at 8x, KL on law 0.0130 -> 0.0075, chat 0.0058 -> 0.0044, elsewhere the
# same. A common factor of keys cancels in the softmax: keys get no gain.
UNBIASED = {1: 1.5706, 2: 1.1109, 3: 1.0121}
ROUNDS = 4  # of choosing layouts at the price from the previous round


# --------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Budget:
    """Size of a KV cache: `ratio` times smaller than 16-bit keys and values at `tokens` tokens, everything included.

    sliding: sliding-window tokens of each site's layer by site name; 0 or missing for full attention.
    """

    ratio: float
    window: ResidualWindow
    tokens: int = 8192
    has_means: bool = False  # whether means of each sequence are stored, see `LatentPlan.mean_tokens`
    sliding: Mapping[str, int] = field(default_factory=dict)

    def _split(self, site: AttentionSite) -> tuple[int, int, int]:
        """Return how many tokens of a site are attention sinks, in its recent window, and quantized."""
        sliding = self.sliding.get(site.name, 0)
        return self.window.within(sliding).split(self.tokens, sliding)

    def weights(self, sites: Iterable[AttentionSite]) -> dict[str, float]:
        """Return the quantized tokens of each site by name, relative to the site with the most."""
        quantized = {s.name: self._split(s)[2] if s.kind == "self" else self.tokens for s in sites}
        own = [quantized[s.name] for s in sites if s.kind == "self"]
        most = max(own) if own and len(own) == len(quantized) else self.tokens
        return {name: min(1.0, count / max(1, most)) for name, count in quantized.items()}

    def exact_bytes(self, sites: Iterable[AttentionSite]) -> int:
        """Return the bytes of 16-bit keys and values of the sites at `tokens` tokens."""
        windows = ((site, self.sliding.get(site.name, 0) or self.tokens) for site in sites)
        return 2 * sum(min(self.tokens, window) * site.exact_numbers_per_token for site, window in windows)

    def quantized_token_bits(self, sites: Iterable[AttentionSite]) -> int:
        """Return the bits of a quantized token: values and scales. Raises FhoptError if every token is exact.

        Cross attention quantizes all of its tokens; if there is any, tokens of self-attention count as quantized to the
        same length. Bits of a site with fewer quantized tokens are weighted by `weights`.
        """
        plans = [_blank(site) for site in sites]
        own = [p for p in plans if p.site.kind == "self"]
        total = self.exact_bytes(p.site for p in plans) / self.ratio
        if not own:
            return int(8 * total / self.tokens)
        window, quantized = self.window, max(self._split(p.site)[2] for p in own)
        if quantized == 0:
            raise FhoptError(
                f"a context of {self.tokens} tokens is covered by sinks ({window.sinks}) and residual window "
                f"({window.recent}). Raise --tokens."
            )
        fixed = sum(p.mean_bytes() for p in own) if self.has_means else 0
        for p in own:
            sliding = self.sliding.get(p.site.name, 0)
            fixed += window_bytes(window.within(sliding), self.tokens, [p], sliding=sliding)
        return int(8 * (total - fixed) / (quantized if len(own) == len(plans) else self.tokens))


def _blank(site: AttentionSite) -> SitePlan:
    nothing = SidePlan(torch.zeros(1, 0, 0), torch.zeros(1, 0, 0), ())
    return SitePlan(site, "identity", nothing, nothing)


def check_reach(sites: Sequence[AttentionSite], budget: Budget, bits: Sequence[int], device: str | None = None) -> None:
    """Raise FhoptError if the budget is below the minimum that all sides of all sites need."""
    asked, sides = budget.quantized_token_bits(sites), 2 * sum(budget.weights(sites).values())
    _check_reached(sides * (grain_of(bits, device).least + 8 * SCALE_BYTES), asked)


def _check_reached(least: float, asked: int) -> None:
    if least > asked:
        raise FhoptError(
            f"ratio too high: {asked / 8:.0f} bytes per quantized token remain after sinks and residual "
            f"window; expected at least {least / 8:.0f}. Lower --ratio, or raise --tokens."
        )


# --------------------------------------------------------------------------------------------------- bits


@dataclass
class Allocation:
    """Bits per chunk of TIER_QUANTUM channels of each (site, side), the resulting nats, and the final price of a bit.

    seconds: arithmetic time per quantized token, if parts have a time.
    """

    bits: dict[tuple[str, int], list[int]]
    nats: float
    price: float  # nats per bit
    seconds: float = 0.0


class _Part(Protocol):
    """Channels that get bits together: possible totals of bits over J latent heads, ascending from 0, with nats.

    seconds: decode time of these channels if they have any bits.
    """

    bits: list[float]
    nats: list[float]
    seconds: float

    def chunks(self, n: int) -> list[int]:
        """Return the bits of each chunk at a total of `bits[n]`."""


class _Chunk:
    """One chunk, with any supported bit width. unit: weighted bits for one bit per channel."""

    def __init__(self, costs: Mapping[int, float], unit: float, seconds: float) -> None:
        self.levels, self.seconds = list(costs), seconds
        self.bits = [b * unit for b in self.levels]
        self.nats = list(costs.values())

    def chunks(self, n: int) -> list[int]:
        """Return the bits of the chunk at a total of `bits[n]`."""
        return [self.levels[n]]


class _Planes:
    """A side whose bit groups are whole planes, with the minimum nats for each number of filled planes.

    Chunks go into bit groups in descending order of what dropping them costs. Dynamic programming over the levels b,
    the highest first; least[p, u] is the minimum nats of the first p chunks in u planes:

      least_b[p, u] = min(least before[p, u], least_b[p - c, u - 1] + cost_b of chunks p - c to p)

    where a plane of b bits has c chunks.
    """

    seconds = 0.0  # GPU attention is memory-bound

    def __init__(self, costs: Mapping[int, Sequence[float]], groups: float, plane: int) -> None:
        self.levels = sorted(set(costs) - {0}, reverse=True)
        self.steps = [8 * plane // (TIER_QUANTUM * b) for b in self.levels]
        count = -(-len(costs[0]) // self.steps[-1]) * self.steps[-1]  # the last group may extend past the last chunk
        self.order = sorted(range(count), key=lambda i: -costs[0][i] if i < len(costs[0]) else 0.0)
        sums = {b: self._sums(c, count) for b, c in costs.items()}
        planes = count // self.steps[0]
        least = torch.full((count + 1, planes + 1), torch.inf, dtype=torch.float64)
        least[0, 0] = 0.0
        self.least = [least]
        for level, step in zip(self.levels, self.steps, strict=True):
            least, total = least.clone(), sums[level]
            for p in range(step, count + 1):
                longer = least[p - step, :-1] + (total[p] - total[p - step])
                least[p, 1:] = torch.minimum(least[p, 1:], longer)
            self.least.append(least)
        nats, self.ends = (least + (sums[0][-1] - sums[0]).unsqueeze(1)).min(0)
        self.bits = [u * 8 * plane * groups for u in range(planes + 1)]
        self.nats = nats.tolist()

    def _sums(self, costs: Sequence[float], count: int) -> Tensor:
        """Return cumulative costs of the first p chunks in order, from p = 0."""
        ordered = [costs[i] if i < len(costs) else 0.0 for i in self.order]
        return torch.tensor([0.0, *ordered], dtype=torch.float64).cumsum(0)

    def chunks(self, n: int) -> list[int]:
        """Return the bits of each chunk at a total of `bits[n]`."""
        bits, p, u = [0] * len(self.order), int(self.ends[n]), n
        for at in reversed(range(len(self.levels))):
            while self.least[at + 1][p, u] < self.least[at][p, u]:
                for i in self.order[p - self.steps[at] : p]:
                    bits[i] = self.levels[at]
                p, u = p - self.steps[at], u - 1
        return bits


@dataclass
class PartedSide:
    """Costs of a side by the parts that get bits; fixed: bits of its scales per token. Bits are weighted."""

    parts: Sequence[_Part]
    fixed: float


Sides = Mapping[SideKey, PartedSide]


def candidate_sides(
    bases: CandidateBases,
    costs: Costs,
    grain: Grain,
    weights: Mapping[str, float],
    seconds: Mapping[tuple[str, str], float] = MappingProxyType({}),
) -> Sides:
    """Divide the sides of every candidate layout into parts of `grain`; sides missing in `costs` get Gaussian costs.

    weights: of the bits of each site (`Budget.weights`). seconds: time per channel by (site, layout); missing: time
    does not count.
    """
    return {
        (name, which, i): side_of(
            chunk_nats(basis, costs.get((name, which, i)), grain),
            basis.groups,
            grain,
            weights[name],
            seconds.get((name, which), 0.0),
        )
        for name, layouts in bases.items()
        for which, pair in layouts.items()
        for i, basis in enumerate(pair)
    }


def choose_layouts(
    bases: CandidateBases, sides: Sides, budget: int, grain: Grain, rate: float = 0.0,
    start: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], Allocation]:  # fmt: skip
    """Choose (layout of each site, bits) for a budget of bits per token.

    Allocates bits, lets layouts compete at the price of the last bit, and repeats while that helps. The layouts of
    `start` (default: the first of each site) must fit the budget; others are chosen only if the whole plan costs less.
    rate: nats per second of decode time.
    """

    def allocate(layouts: Mapping[str, str]) -> Allocation:
        used = {(n, i): sides[n, w, i] for n, w in layouts.items() for i in range(len(bases[n][w]))}
        return allocate_sides(used, budget, fill=grain.plane > 0, rate=rate)

    def cheapest(name: str, price: float) -> str:
        worth = {
            which: sum(_least(sides[name, which, i], price, rate) for i in range(len(pair)))
            for which, pair in bases[name].items()
        }
        return min(worth, key=lambda w: worth[w])

    chosen = dict(start) if start is not None else {name: next(iter(table)) for name, table in bases.items()}
    allocation = allocate(chosen)
    for _ in range(ROUNDS):
        others = {name: cheapest(name, allocation.price) for name in bases}
        if others == chosen:
            break
        try:
            other = allocate(others)
        except FhoptError:  # layouts with more latent heads have a larger minimum size
            break
        if other.nats + rate * other.seconds >= allocation.nats + rate * allocation.seconds:
            break
        chosen, allocation = others, other
    return chosen, allocation


def _least(side: PartedSide, price: float, rate: float) -> float:
    """Return the minimum of nats plus the price of bits and time for one side: `price` nats/bit, `rate` nats/second."""
    best = (min(_cost(p, n, rate) + price * b for n, b in enumerate(p.bits)) for p in side.parts)
    return sum(best) + price * side.fixed


def _cost(part: _Part, n: int, rate: float) -> float:
    """Return the nats of a part at its n-th total of bits, plus the price of its time."""
    return part.nats[n] + (rate * part.seconds if n else 0.0)


def channel_nats(basis: Basis, costs: SideCosts | None, bits: int) -> Tensor:
    """Return the cost of each channel at `bits` bits, [J, R] nats/token: measured if available, else Gaussian."""
    if costs is not None and bits in costs.sums and int(costs.tokens):
        return 0.5 * (costs.sums[bits] / int(costs.tokens))
    return 0.5 * (basis.variance * DISTORTION[bits])


def chunk_nats(basis: Basis, costs: SideCosts | None, grain: Grain) -> dict[int, list[float]]:
    """Return nats/token of each chunk at 0 bits and at each of the grain's levels, with the grain's code."""
    share = functools.partial(codes.relative_error, grain.code)
    return {bits: _per_chunk(share(bits) * channel_nats(basis, costs, bits)) for bits in (0, *grain.levels)}


def side_of(
    costs: Mapping[int, Sequence[float]], groups: int, grain: Grain, weight: float = 1.0, seconds: float = 0.0
) -> PartedSide:
    """Divide a side of J = `groups` latent heads into parts of `grain`, from nats by bits and chunk.

    seconds: decode time per channel.
    """
    weighted = groups if weight == 1 else groups * weight
    fixed, unit = 8 * SCALE_BYTES * weighted, TIER_QUANTUM * weighted
    if grain.plane:
        return PartedSide([_Planes(costs, weighted, grain.plane)], fixed)
    chunks = ({b: c[i] for b, c in costs.items()} for i in range(len(costs[0])))
    return PartedSide([_Chunk(chunk, unit, TIER_QUANTUM * weight * seconds) for chunk in chunks], fixed)


def _per_chunk(per_channel: Tensor) -> list[float]:
    """Sum [J, R] over latent heads and over each chunk of TIER_QUANTUM channels."""
    total = per_channel.sum(0)
    padded = torch.nn.functional.pad(total, (0, -len(total) % TIER_QUANTUM))
    return [float(c) for c in padded.unflatten(0, (-1, TIER_QUANTUM)).sum(1)]


_At = tuple[tuple[str, int], int]  # (site, side), part


def allocate_sides(
    sides: Mapping[tuple[str, int], PartedSide], budget: int, fill: bool, rate: float = 0.0
) -> Allocation:
    """Allocate bits to chunks greedily by the largest reduction of nats per bit; sides are keyed by (name, index).

    fill: spend the rest of the budget afterwards. rate: nats per second of decode time. Raises FhoptError if the budget
    is below the minimum that all sides need.
    """
    parts: dict[_At, _Part] = {(key, i): part for key, side in sides.items() for i, part in enumerate(side.parts)}
    now = {at: int(at[1] == 0) for at in parts}  # every side gets at least the minimum: a latent needs a channel
    used = sum(side.fixed for side in sides.values()) + sum(parts[at].bits[n] for at, n in now.items())
    _check_reached(used, budget)
    heap: list[tuple[float, _At, int]] = []

    def push(at: _At) -> None:
        if gains := _gains(parts[at], now[at], rate):
            gain, n = max(gains)
            heapq.heappush(heap, (-gain, at, n))

    for at in parts:
        push(at)
    price = 0.0
    while heap:
        gain, at, n = heapq.heappop(heap)
        more = parts[at].bits[n] - parts[at].bits[now[at]]
        if gain < 0 and used + more <= budget:
            used += more
            now[at] = n
            price = -gain
            push(at)
    if fill:
        _fill(parts, now, budget - used, rate)
    nats = sum(part.nats[now[at]] for at, part in parts.items())
    seconds = sum(part.seconds for at, part in parts.items() if now[at])
    bits: dict[tuple[str, int], list[int]] = {key: [] for key in sides}
    for (key, i), part in parts.items():
        bits[key] += part.chunks(now[key, i])
    return Allocation(bits, nats, price, seconds)


def _gains(part: _Part, now: int, rate: float, room: float = math.inf) -> list[tuple[float, int]]:
    """Return (reduction of cost per bit, index) for all larger totals of bits that fit into `room`."""
    cost, bits = _cost(part, now, rate), part.bits[now]
    return [
        ((cost - _cost(part, n, rate)) / (part.bits[n] - bits), n)
        for n in range(now + 1, len(part.bits))
        if part.bits[n] - bits <= room
    ]


def _fill(parts: Mapping[_At, _Part], now: dict[_At, int], room: float, rate: float) -> None:
    """Spend the rest of the budget, too small for the best next step of any part, on the best steps that still fit."""
    while gains := [(*max(larger), at) for at in parts if (larger := _gains(parts[at], now[at], rate, room))]:
        gain, n, at = max(gains)
        if gain <= 0:
            return
        room -= parts[at].bits[n] - parts[at].bits[now[at]]
        now[at] = n
