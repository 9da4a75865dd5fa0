"""From bases and what their channels cost to a plan: one byte budget over all channels of all layers.

Every chunk of channels gets the bits that lower the loss most per byte, until the budget is spent (reverse
water-filling, Cover & Thomas, 10.3.3, on measured rate-distortion points). All costs are in nats, so layer
sensitivities need no weights. Layouts compete: each site takes the one with the least loss at the price of a bit that
the whole model pays, plain rounding (`identity`) among them, so no site is worse off than with plain rounding.

What gets bits at once is a chunk of channels, whatever its neighbours have, but for a GPU: its kernels are slow, or do
not fit, where tiers are many and narrow. There a side as a whole gets another 16 bytes of a plane (`PLANE`): of all
ways to fill so many bytes with tiers of 8, 4 and 2 bits the one with the least loss.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fhopt.bases import Basis, fit_basis, fit_joint, joint_basis
from fhopt.cost import Device, layout_time
from fhopt.errors import FhoptError
from fhopt.evidence import CURVE_RATIOS, KEY, SHARED, SIDES, Evidence, SideEvidence, Size, short, side_evidence
from fhopt.machine import find_device
from fhopt.spec import (
    LAYOUTS,
    SCALE_BYTES,
    TIER_QUANTUM,
    AttentionSite,
    LatentPlan,
    SidePlan,
    SitePlan,
    SiteStatistics,
    Tier,
    sealed_tokens,
    shape_and_signs,
    weight_print,
)

# Of a unit Gaussian under its best uniform quantiser (Max 1960): distortion, and the step in standard deviations.
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.00009, 16: 0.0}
STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
# Tokens are not Gaussian, and what is clipped costs more than what is rounded: measured on SmolLM2 by the effect on
# the likelihood, per number of bits. At 8 bits the Gaussian's range makes clipping 20 times as dear as rounding.
WIDER = {1: 1.0, 2: 1.05, 3: 1.2, 4: 1.2, 5: 1.3, 6: 1.4, 8: 2.0}
STEPS = {bits: STEP[bits] * WIDER[bits] for bits in STEP}
BITS = (1, 2, 3, 4, 5, 6, 8, 16)
GPU_BITS = (2, 4, 8)  # of one plane: nothing is read twice
PLANE = 16  # bytes: for a GPU every tier of a row is a multiple of it, which is what a thread reads at once
AUTO = "auto"
COMPETING = ("band", "identity")  # what "auto" chooses from
SLOWER = 1.5  # for a device, layouts that take more than this many times the fastest one's time do not compete
USED = 0.6  # share of the channels of a basis that get bits, at 4x to 8x
ROUNDS = 4  # of choosing layouts at the price that the last choice led to
# site -> layout -> bases of keys and values; "input" has one for both
Candidates = dict[str, dict[str, tuple[Basis, ...]]]


# --------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Budget:
    """How large a cache may be: `ratio` times smaller than 16-bit keys and values at `tokens` tokens, all counted."""

    ratio: float
    sinks: int = 4
    recent: int = 128
    block: int = 64
    window_bits: int = 8
    tokens: int = 8192

    def code_bits(self, sites: Iterable[AttentionSite]) -> int:
        """Bits of codes and scales per sealed token. Raises FhoptError when every token is exact.

        With cross attention, whose tokens are all sealed, that of the others is counted as if it were sealed as far.
        """
        plans = [_blank(site) for site in sites]
        own = [p for p in plans if p.site.kind == "self"]
        exact = sum(p.open_bytes() for p in own)
        window = sum(p.open_bytes(self.window_bits) for p in own)
        total = self.tokens * sum(p.open_bytes() for p in plans) / self.ratio
        if not own:
            return int(8 * total / self.tokens)
        sealed = sealed_tokens(self.tokens, self.sinks, self.recent, self.block)
        if sealed == 0:
            raise FhoptError(
                f"{self.tokens} tokens are all exact (sinks {self.sinks}, recent {self.recent}); expected a longer "
                "context."
            )
        fixed = self.sinks * exact + (self.tokens - self.sinks - sealed) * window
        return int(8 * (total - fixed) / (sealed if len(own) == len(plans) else self.tokens))


def _blank(site: AttentionSite) -> SitePlan:
    nothing = SidePlan(torch.zeros(1, 0, 0), torch.zeros(1, 0, 0), ())
    return SitePlan(site, "identity", nothing, nothing)


def candidates(
    statistics: Mapping[str, SiteStatistics], layout: str = AUTO, *, context: int, tokens: int = 8192,
    device: str | None = None,
) -> Candidates:  # fmt: skip
    """Bases of every site in the layouts that may be chosen. context: tokens of a calibration sequence.

    With a `device` (`cost.DEVICES`), "auto" has latents per head to choose from too, and leaves out what would be slow
    there: one latent for many heads means more arithmetic, which a CPU feels and a GPU does not. Raises FhoptError when
    the layout `input` is asked for and a site has none, or the device is unknown.
    """
    found: Candidates = {}
    target = None if device is None else find_device(device)
    competing = COMPETING if target is None else (*COMPETING, "head")
    for name, s in statistics.items():
        joint = fit_joint(s) if layout in (AUTO, "input") else None
        if layout == "input" and joint is None:
            raise _no_joint(s)
        found[name] = {"input": (joint,)} if joint is not None else {}
        for which in competing if layout == AUTO else {layout} - {"input"}:
            sides = (fit_basis(s, side, which, tokens, context) for side in ("key", "value"))
            found[name][which] = tuple(sides)
        if layout == AUTO and target is not None:
            found[name] = _fast_enough(found[name], s.site, target, tokens)
    return found


def _fast_enough(
    table: Mapping[str, tuple[Basis, ...]], site: AttentionSite, device: Device, tokens: int
) -> dict[str, tuple[Basis, ...]]:
    """The layouts of a site that are not much slower than the fastest, at a quarter of the bytes; `identity` stays."""
    total = site.exact_numbers_per_token / 2  # bytes: 16-bit numbers, four times smaller

    def seconds(layout: str) -> float:
        share = 1.0 if layout == "identity" else USED
        widths = [int(share * basis.encode.shape[1]) for basis in table[layout]]
        groups = table[layout][0].groups
        shared = len(widths) == 1
        return layout_time(device, site.heads, groups, widths[0], widths[-1], total / groups, tokens, shared=shared)

    times = {layout: seconds(layout) for layout in table}
    limit = SLOWER * min(times.values())
    return {layout: bases for layout, bases in table.items() if layout == "identity" or times[layout] <= limit}


def fit(
    statistics: Mapping[str, SiteStatistics],
    *,
    ratio: float,
    layout: str = AUTO,
    found: Candidates | None = None,
    context: int = 512,
    sinks: int = 4,
    recent: int = 128,
    block: int = 64,
    window_bits: int = 8,
    tokens: int = 8192,
    bits: Sequence[int] = BITS,
    device: str | None = None,
) -> LatentPlan:
    """A plan whose whole cache is `ratio` times smaller than 16-bit keys and values at `tokens` tokens.

    ratio 1 gives uncoded latents of full width; so does the layout `input` up to a ratio of 2, as small as the rank of
    keys and values allows (about 2). `found`: bases of these statistics, with measured costs; without them
    bases are fitted here, and costs are those of a Gaussian. device: what the plan will run on (`cost.DEVICES`); where
    it is a GPU, rows are tiers of `GPU_BITS`, each a multiple of `PLANE` bytes. Raises FhoptError when the ratio cannot
    be reached, when options are not possible, or when the layout `input` is asked for where it does not exist.
    """
    check_options(ratio, layout, bits, device)
    sites = {name: s.site for name, s in statistics.items()}
    lossless = _lossless(statistics, ratio, layout)
    if lossless is not None:
        return LatentPlan(lossless, sinks, recent, block, _provenance("input", ratio, 0.0), 16)
    if found is None:
        found = candidates(statistics, layout, context=context, tokens=tokens, device=device)
    if ratio == 1:
        plans = []
        for name, table in found.items():
            which = next(w for w in table if w != "input")
            plans.append(_site_plan(sites[name], which, [(b.encode, b.decode, ()) for b in table[which]]))
        return LatentPlan(tuple(plans), sinks, recent, block, _provenance(plans[0].layout, 1.0, 0.0), 16)
    budget = Budget(ratio, sinks, recent, block, window_bits, tokens)
    grain = _grain(bits, device)
    sides_of = _sides(found, grain)
    chosen, allocation = _choose(found, sides_of, budget.code_bits(sites.values()), grain)
    plans = []
    for name, which in chosen.items():
        sides = [_coded(basis, allocation.bits[name, i]) for i, basis in enumerate(found[name][which])]
        plans.append(_site_plan(sites[name], which, sides))
    seen = Evidence(_seen(found, chosen, allocation, grain), _curve(found, sides_of, budget, sites.values(), grain))
    provenance = _provenance(layout, ratio, allocation.nats) | {KEY: seen.as_json()}
    return LatentPlan(tuple(plans), sinks, recent, block, provenance, window_bits)


def _seen(
    found: Candidates, chosen: Mapping[str, str], allocation: _Allocation, grain: _Grain
) -> dict[str, tuple[SideEvidence, ...]]:
    """What is worth showing of each site."""
    seen = {}
    for name, which in chosen.items():
        bases = found[name][which]
        names = SIDES if len(bases) == 2 else (SHARED,)
        seen[name] = tuple(
            side_evidence(side, basis.variance, _costs(basis, grain.levels), allocation.bits[name, i])
            for i, (side, basis) in enumerate(zip(names, bases, strict=True))
        )
    return seen


def _curve(
    found: Candidates, sides: _Sides, budget: Budget, sites: Collection[AttentionSite], grain: _Grain
) -> tuple[Size, ...]:
    """Expected losses of plans of other sizes, as far as they can be reached."""
    exact, sizes = 2 * sum(s.exact_numbers_per_token for s in sites), []
    for ratio in sorted({*CURVE_RATIOS, budget.ratio}):
        try:
            _, allocation = _choose(found, sides, replace(budget, ratio=ratio).code_bits(sites), grain)
        except FhoptError:  # smaller than the least that each side must get
            break
        sizes.append(Size(ratio, short(exact / ratio), short(allocation.nats)))
    return tuple(sizes)


def _provenance(layout: str, ratio: float, nats: float) -> dict[str, Any]:
    return {"layout": layout, "ratio": float(ratio), "predicted_nats": nats}


def _lossless(statistics: Mapping[str, SiteStatistics], ratio: float, layout: str) -> tuple[SitePlan, ...] | None:
    """Uncoded plans of the layout `input`, where it is asked for and halves the cache; None otherwise."""
    if ratio > 2 or layout != "input":
        return None
    plans = []
    for s in statistics.values():
        rows = joint_basis(s)
        if rows is None:
            raise _no_joint(s)
        plans.append(_shared(s.site, rows.unsqueeze(0), rows.T.unsqueeze(0), ()))
    return tuple(plans)


def _no_joint(statistics: SiteStatistics) -> FhoptError:
    site = statistics.site
    why = "its keys rotate" if site.rope is not None else "they are as wide as their input, or it is too wide"
    return FhoptError(
        f"{site.name}: keys and values are not maps of one input half as wide ({why}); the layout `input` needs that. "
        "Use another layout."
    )


def _site_plan(site: AttentionSite, layout: str, sides: Sequence[tuple[Tensor, Tensor, tuple[Tier, ...]]]) -> SitePlan:
    """The plan of a site from (encode, decode [J, n*D, R], tiers) of each side, or of the one that serves both."""
    if layout == "input":
        return _shared(site, *sides[0])
    key, value = (SidePlan(_plain(encode), _by_head(decode, site.kv_heads), tiers) for encode, decode, tiers in sides)
    return SitePlan(site, layout, key, value)


def _shared(site: AttentionSite, encode: Tensor, decode: Tensor, tiers: tuple[Tier, ...]) -> SitePlan:
    """The layout `input` from encode [1, R, G*(D+E)] and decode [1, G*(D+E), R]."""
    key, value = _by_head(decode, site.kv_heads).split([site.key_dim, site.value_dim], 1)
    nothing = torch.zeros(1, encode.shape[1], 0)
    sides = SidePlan(_plain(encode), _plain(key), tiers), SidePlan(nothing, _plain(value), tiers)
    return SitePlan(site, "input", *sides)


def _plain(x: Tensor) -> Tensor:
    return x.float().cpu().contiguous()


def exact_plan(sites: Iterable[AttentionSite], *, sinks: int = 4, recent: int = 64, block: int = 64) -> LatentPlan:
    """Uncoded `identity` latents for every site: needs no calibration and changes nothing but where tokens are kept."""
    plans = []
    for site in sites:
        sides = []
        for dim in (site.key_dim, site.value_dim):
            eye = torch.eye(dim).expand(site.kv_heads, dim, dim).contiguous()
            sides.append(SidePlan(eye, eye.clone(), ()))
        plans.append(SitePlan(site, "identity", *sides))
    return LatentPlan(tuple(plans), sinks, recent, block, {"layout": "identity", "ratio": 1.0, "predicted_nats": 0.0})


def fingerprint(parameters: Mapping[str, Tensor], plan_sites: Iterable[AttentionSite]) -> str:
    """Identity of a model as a plan sees it: names, shapes and sampled signs of the projections of its sites.

    Signs survive a change of dtype, so a plan fitted in float32 serves the same model in bfloat16.
    """
    h = hashlib.sha256()
    names = {n for site in plan_sites for role in site.projections.values() for n in role}
    for name in sorted(names):
        weight = parameters.get(name)
        if weight is None:
            h.update(f"{name} absent".encode())
            continue
        h.update(name.encode() + shape_and_signs(weight))
    return h.hexdigest()


def weight_prints(parameters: Mapping[str, Tensor], sites: Iterable[AttentionSite]) -> dict[str, str]:
    """Identity of the weights that the bases of each site belong to, of the sites whose weights are all known."""
    known = {s.name: [parameters.get(n) for n in s.cached_weights] for s in sites}
    return {n: weight_print([w for w in ws if w is not None]) for n, ws in known.items() if ws and None not in ws}


def check_model(plan: LatentPlan, parameters: Mapping[str, Tensor], model: str) -> None:
    """Raise FhoptError when the plan carries a fingerprint and the model's is another."""
    wanted = plan.provenance.get("fingerprint")
    if wanted is not None and fingerprint(parameters, [s.site for s in plan.sites]) != wanted:
        raise FhoptError(
            f"the plan was fitted to another model than {model} (fingerprint {str(wanted)[:12]} does not match). "
            "Fit a plan for this one: fhopt fit MODEL."
        )


def check_reach(sites: Sequence[AttentionSite], budget: Budget, bits: Sequence[int], device: str | None = None) -> None:
    """Raise FhoptError when the budget is below the least that each side of each site must get."""
    asked, sides = budget.code_bits(sites), 2 * len(sites)
    _check_reached(sides * (_grain(bits, device).least + 8 * SCALE_BYTES), asked)


def _check_reached(least: int, asked: int) -> None:
    if least > asked:
        raise FhoptError(
            f"the size leaves {asked / 8:.0f} bytes for a sealed token, the least possible is {least / 8:.0f} (sinks "
            "and window are counted). Lower the ratio, or make the plan for a longer context."
        )


def check_options(ratio: float, layout: str, bits: Sequence[int], device: str | None = None) -> None:
    """Raise FhoptError when a plan cannot have this ratio, layout or choice of bits, on a device if one is given."""
    if not 1 <= ratio < 1000:
        raise FhoptError(f"ratio {ratio:g} is not possible; expected a number from 1 (exact) to 16. Try --ratio 4.")
    if layout not in (AUTO, *LAYOUTS):
        raise FhoptError(f"layout {layout!r} is unknown; expected {AUTO} or one of {', '.join(LAYOUTS)}.")
    if not bits or any(b not in BITS for b in bits):
        raise FhoptError(f"bits {list(bits)} are not possible; expected a choice of {', '.join(map(str, BITS))}.")
    if not _grain(bits, device).levels:
        raise FhoptError(
            f"bits {list(bits)} make no kernel for {device}; expected some of {', '.join(map(str, GPU_BITS))}, or no "
            "device."
        )


# --------------------------------------------------------------------------------------------------- bits


@dataclass(frozen=True)
class _Grain:
    """How finely bits are given: numbers of bits in rising order, and the bytes of a plane, 0 where none are fixed."""

    levels: tuple[int, ...]
    plane: int

    @property
    def least(self) -> int:
        """Bits of one latent head of a side that has the fewest."""
        return 8 * self.plane or TIER_QUANTUM * min(self.levels)


def _grain(bits: Sequence[int], device: str | None) -> _Grain:
    """Chunks of any bits, or for a GPU whole planes of those that its kernels read well."""
    if device is None or find_device(device).kind != "gpu":
        return _Grain(tuple(sorted(set(bits))), 0)
    return _Grain(tuple(b for b in GPU_BITS if b in bits), PLANE)


@dataclass
class _Allocation:
    """Bits per chunk of TIER_QUANTUM channels of each (site, side), the nats left, and what a bit was worth last."""

    bits: dict[tuple[str, int], list[int]]
    nats: float
    price: float  # nats per bit


class _Part(Protocol):
    """What gets bits at once: amounts of them, rising from 0, over J latent heads, and the loss that each leaves."""

    bits: list[int]
    nats: list[float]

    def chunks(self, n: int) -> list[int]:
        """Bits of each chunk with `bits[n]` in all."""


class _Chunk:
    """One chunk, on any of the levels. unit: what one bit per channel takes."""

    def __init__(self, costs: Mapping[int, float], unit: int) -> None:
        self.levels = list(costs)
        self.bits = [b * unit for b in self.levels]
        self.nats = list(costs.values())

    def chunks(self, n: int) -> list[int]:
        """As above."""
        return [self.levels[n]]


class _Planes:
    """A side whose tiers are whole planes: the least loss for every number of planes that are filled.

    Chunks go into tiers in order of what dropping them costs. With the levels b that were gone through, the highest
    first, least[p, u] is the loss of the first p chunks in u planes:
    least_b[p, u] = min(least before[p, u], least_b[p - c, u - 1] + cost_b of chunks p - c to p), c chunks to a plane.
    """

    def __init__(self, costs: Mapping[int, Sequence[float]], groups: int, plane: int) -> None:
        self.levels = sorted(set(costs) - {0}, reverse=True)
        self.steps = [8 * plane // (TIER_QUANTUM * b) for b in self.levels]
        count = -(-len(costs[0]) // self.steps[-1]) * self.steps[-1]  # the last tier may reach past the last chunk
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
        """Costs of the first p chunks in order, p from 0."""
        ordered = [costs[i] if i < len(costs) else 0.0 for i in self.order]
        return torch.tensor([0.0, *ordered], dtype=torch.float64).cumsum(0)

    def chunks(self, n: int) -> list[int]:
        """As above."""
        bits, p, u = [0] * len(self.order), int(self.ends[n]), n
        for at in reversed(range(len(self.levels))):
            while self.least[at + 1][p, u] < self.least[at][p, u]:
                for i in self.order[p - self.steps[at] : p]:
                    bits[i] = self.levels[at]
                p, u = p - self.steps[at], u - 1
        return bits


@dataclass
class _Side:
    """What a side costs, in the parts that get bits, and the bits of its scales per token."""

    parts: Sequence[_Part]
    fixed: int


_Sides = Mapping[tuple[str, str, int], _Side]  # by site, layout, and which of the layout's sides


def _sides(found: Candidates, grain: _Grain) -> _Sides:
    return {
        (name, which, i): _side(basis, grain)
        for name, table in found.items()
        for which, pair in table.items()
        for i, basis in enumerate(pair)
    }


def _choose(found: Candidates, sides: _Sides, budget: int, grain: _Grain) -> tuple[dict[str, str], _Allocation]:
    """(layout of each site, bits): allocate, let layouts compete at the price of the last bit, repeat while it helps.

    The first layouts of each site must fit the budget; others are taken only where the whole plan costs less.
    """

    def allocate(layouts: Mapping[str, str]) -> _Allocation:
        used = {(n, i): sides[n, w, i] for n, w in layouts.items() for i in range(len(found[n][w]))}
        return _allocate(used, budget, fill=grain.plane > 0)

    def cheapest(name: str, price: float) -> str:
        worth = {
            which: sum(_least(sides[name, which, i], price) for i in range(len(pair)))
            for which, pair in found[name].items()
        }
        return min(worth, key=lambda w: worth[w])

    chosen = {name: next(iter(table)) for name, table in found.items()}
    allocation = allocate(chosen)
    for _ in range(ROUNDS):
        others = {name: cheapest(name, allocation.price) for name in found}
        if others == chosen:
            break
        try:
            other = allocate(others)
        except FhoptError:  # layouts with more latent heads need more bytes at the least
            break
        if other.nats >= allocation.nats:
            break
        chosen, allocation = others, other
    return chosen, allocation


def _least(side: _Side, price: float) -> float:
    """Least of nats plus what its bits are worth, for one side."""
    best = (min(nats + price * b for nats, b in zip(p.nats, p.bits, strict=True)) for p in side.parts)
    return sum(best) + price * side.fixed


def _costs(basis: Basis, levels: Sequence[int]) -> dict[int, list[float]]:
    """Nats per token of each chunk with 0 bits and with each of `levels`: measured, or of a Gaussian."""
    costs, tokens = {}, int(basis.tokens)
    for b in (0, *levels):
        per_channel = basis.variance * DISTORTION[b]
        if tokens and b in basis.costs:
            per_channel = basis.costs[b] / tokens
        costs[b] = _per_chunk(0.5 * per_channel)
    return costs


def _side(basis: Basis, grain: _Grain) -> _Side:
    costs = _costs(basis, grain.levels)
    fixed, unit = 8 * SCALE_BYTES * basis.groups, TIER_QUANTUM * basis.groups
    if grain.plane:
        return _Side([_Planes(costs, basis.groups, grain.plane)], fixed)
    return _Side([_Chunk({b: c[i] for b, c in costs.items()}, unit) for i in range(len(costs[0]))], fixed)


def _per_chunk(per_channel: Tensor) -> list[float]:
    """[J, R] -> sums over latent heads and over each chunk of TIER_QUANTUM channels."""
    total = per_channel.sum(0)
    padded = torch.nn.functional.pad(total, (0, -len(total) % TIER_QUANTUM))
    return [float(c) for c in padded.unflatten(0, (-1, TIER_QUANTUM)).sum(1)]


_At = tuple[tuple[str, int], int]  # (site, side), part


def _allocate(sides: Mapping[tuple[str, int], _Side], budget: int, fill: bool) -> _Allocation:
    """Bits per chunk: always the largest fall of loss per bit. fill: use up what is left of the budget then."""
    parts: dict[_At, _Part] = {(key, i): part for key, side in sides.items() for i, part in enumerate(side.parts)}
    now = {at: int(at[1] == 0) for at in parts}  # every side keeps the least: a latent of no channels is no latent
    used = sum(side.fixed for side in sides.values()) + sum(parts[at].bits[n] for at, n in now.items())
    _check_reached(used, budget)
    heap: list[tuple[float, _At, int]] = []

    def push(at: _At) -> None:
        if gains := _gains(parts[at], now[at]):
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
        _fill(parts, now, budget - used)
    nats = sum(part.nats[now[at]] for at, part in parts.items())
    bits: dict[tuple[str, int], list[int]] = {key: [] for key in sides}
    for (key, i), part in parts.items():
        bits[key] += part.chunks(now[key, i])
    return _Allocation(bits, nats, price)


def _gains(part: _Part, now: int, room: float = math.inf) -> list[tuple[float, int]]:
    """(fall of loss per bit, which) of all larger amounts for which there is room."""
    nats, bits = part.nats[now], part.bits[now]
    return [
        ((nats - part.nats[n]) / (part.bits[n] - bits), n)
        for n in range(now + 1, len(part.bits))
        if part.bits[n] - bits <= room
    ]


def _fill(parts: Mapping[_At, _Part], now: dict[_At, int], room: int) -> None:
    """Give what is left, less than the next step of any part that is worth it, to where it helps most."""
    while gains := [(*max(found), at) for at in parts if (found := _gains(parts[at], now[at], room))]:
        gain, n, at = max(gains)
        if gain <= 0:
            return
        room -= parts[at].bits[n] - parts[at].bits[now[at]]
        now[at] = n


def _coded(basis: Basis, bits: Sequence[int]) -> tuple[Tensor, Tensor, tuple[Tier, ...]]:
    """(encode, decode, tiers) with the channels cut to those that got bits, in tiers of falling bits."""
    order = sorted((i for i, b in enumerate(bits) if b), key=lambda i: (-bits[i], i))  # chunks
    channels = [c for i in order for c in range(i * TIER_QUANTUM, (i + 1) * TIER_QUANTUM)]
    spare = TIER_QUANTUM * len(bits) - basis.encode.shape[1]  # the last chunks may reach past the last channel
    encode = torch.nn.functional.pad(basis.encode, (0, 0, 0, spare))[:, channels]
    decode = torch.nn.functional.pad(basis.decode, (0, spare))[:, :, channels]
    widths = {b: TIER_QUANTUM * list(bits).count(b) for b in sorted(set(bits) - {0}, reverse=True)}
    tiers = tuple(Tier(b, w, STEPS.get(b, 1.0)) for b, w in widths.items())
    return encode, decode, tiers


def _by_head(decode: Tensor, kv_heads: int) -> Tensor:
    """[J, n*D, R] -> [G, D, R]."""
    return _plain(decode.reshape(kv_heads, -1, decode.shape[2]))


def describe(plan: LatentPlan) -> list[dict[str, Any]]:
    """One row a site: layout, widths and bits of each side, bytes per token against 16-bit keys and values."""
    return [
        {
            "site": p.site.name,
            "layout": p.layout,
            "key": " + ".join(f"{t.width}x{t.bits}" for t in p.key.tiers) or f"{p.key.width} uncoded",
            "value": " + ".join(f"{t.width}x{t.bits}" for t in p.value.tiers) or f"{p.value.width} uncoded",
            "bytes": p.token_bytes(),
            "exact_bytes": 2 * p.site.exact_numbers_per_token,
        }
        for p in plan.sites
    ]
