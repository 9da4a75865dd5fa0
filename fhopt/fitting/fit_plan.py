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

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.fitting.allocation import (
    AUTO,
    BITS,
    STEPS,
    Allocation,
    Budget,
    Candidates,
    Grain,
    Sides,
    candidate_sides,
    check_options,
    choose_layouts,
    chunk_costs,
    grain_of,
)
from fhopt.fitting.bases import Basis, fit_basis, fit_joint, joint_basis
from fhopt.fitting.fit_summary import (
    CURVE_RATIOS,
    KEY,
    SHARED,
    SIDES,
    Evidence,
    SideEvidence,
    Size,
    short,
    side_evidence,
)
from fhopt.fitting.statistics import SiteStatistics
from fhopt.hardware.devices import Device, layout_time
from fhopt.hardware.this_cpu import find_device
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import TIER_QUANTUM, SidePlan, SitePlan, Tier
from fhopt.plan.window import ResidualWindow

COMPETING = ("band", "identity")  # what "auto" chooses from
SLOWER = 1.5  # for a device, layouts that take more than this many times the fastest one's time do not compete
USED = 0.6  # share of the channels of a basis that get bits, at 4x to 8x


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
    budget = Budget(ratio, ResidualWindow(sinks, recent, block, window_bits), tokens)
    grain = grain_of(bits, device)
    sides_of = candidate_sides(found, grain)
    chosen, allocation = choose_layouts(found, sides_of, budget.code_bits(sites.values()), grain)
    plans = []
    for name, which in chosen.items():
        sides = [_coded(basis, allocation.bits[name, i]) for i, basis in enumerate(found[name][which])]
        plans.append(_site_plan(sites[name], which, sides))
    seen = Evidence(_seen(found, chosen, allocation, grain), _curve(found, sides_of, budget, sites.values(), grain))
    provenance = _provenance(layout, ratio, allocation.nats) | {KEY: seen.as_json()}
    return LatentPlan(tuple(plans), sinks, recent, block, provenance, window_bits)


def _seen(
    found: Candidates, chosen: Mapping[str, str], allocation: Allocation, grain: Grain
) -> dict[str, tuple[SideEvidence, ...]]:
    """What is worth showing of each site."""
    seen = {}
    for name, which in chosen.items():
        bases = found[name][which]
        names = SIDES if len(bases) == 2 else (SHARED,)
        seen[name] = tuple(
            side_evidence(side, basis.variance, chunk_costs(basis, grain.levels), allocation.bits[name, i])
            for i, (side, basis) in enumerate(zip(names, bases, strict=True))
        )
    return seen


def _curve(
    found: Candidates, sides: Sides, budget: Budget, sites: Collection[AttentionSite], grain: Grain
) -> tuple[Size, ...]:
    """Expected losses of plans of other sizes, as far as they can be reached."""
    exact, sizes = 2 * sum(s.exact_numbers_per_token for s in sites), []
    for ratio in sorted({*CURVE_RATIOS, budget.ratio}):
        try:
            _, allocation = choose_layouts(found, sides, replace(budget, ratio=ratio).code_bits(sites), grain)
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
