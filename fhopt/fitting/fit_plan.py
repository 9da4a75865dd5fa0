"""Plans from bases and channel costs: one byte budget over all channels of all layers.

Every chunk of channels gets the bits that reduce the KL most per byte, until the budget is spent (reverse
water-filling, Cover & Thomas, 10.3.3, on measured rate-distortion points). All costs are in nats, so layers need no
sensitivity weights. Layouts compete: each site takes the one with the least KL at the price of a bit that is common to
the model. Plain rounding (`identity`) is one of them, so no site is worse off than with plain rounding.

For a CPU, each chunk of channels gets its bits independently, and KL is traded for time within a bound
(fhopt/fitting/fast_choice.py). GPU kernels are slow, or do not fit, with many narrow bit groups. For a GPU, a side
therefore grows by planes of 16 bytes (`PLANE`): each number of planes is filled with the groups of 8, 4 and 2 bits that
have the least KL. GPU kernels also have constant widths, so sites share a few kernel shapes
(fhopt/fitting/kernel_shapes.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.fitting import codes, fast_choice
from fhopt.fitting.allocation import (
    STEPS,
    UNBIASED,
    Allocation,
    Budget,
    Sides,
    candidate_sides,
    chunk_nats,
)
from fhopt.fitting.bases import Basis, CandidateBases, joint_basis
from fhopt.fitting.candidates import fit_bases, no_joint_basis
from fhopt.fitting.choices import AUTO, BITS, Grain, check_options, grain_of
from fhopt.fitting.codes import UNIFORM
from fhopt.fitting.costs import Costs
from fhopt.fitting.fit_summary import (
    CURVE_RATIOS,
    KEY,
    SHARED,
    SIDES,
    Evidence,
    PlanSize,
    SideEvidence,
    round_digits,
    side_evidence,
)
from fhopt.fitting.kernel_shapes import GPU_SHAPES, SiteChunks, share_shapes
from fhopt.fitting.statistics import SiteStatistics
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import TIER_QUANTUM, BitGroup, SidePlan, SitePlan
from fhopt.plan.window import ResidualWindow


def fit_ratio(
    statistics: Mapping[str, SiteStatistics],
    *,
    ratio: float,
    layout: str = AUTO,
    bases: CandidateBases | None = None,
    costs: Costs | None = None,
    context: int = 512, tokens: int = 8192,
    sinks: int = 4, recent: int = 128, block: int = 64, window_bits: int = 8,
    bits: Sequence[int] = BITS,
    device: str | None = None,
    mean_tokens: int = 0,
    kernel_shapes: int | None = None,
    sliding: Mapping[str, int] | None = None,
    code: str = UNIFORM,
) -> LatentPlan:  # fmt: skip
    """Fit a plan whose whole KV cache is `ratio` times smaller than 16-bit keys and values at `tokens` tokens.

    Ratio 1 gives unquantized latents of full width. So does the layout `input` up to a ratio of 2, as small as the rank
    of keys and values allows (about 2x). bases: fitted to these statistics (`fit_bases`); None: fit them here. costs:
    measured costs of these bases; missing ones are Gaussian. device: what the plan will run on
    (`hardware.devices.DEVICES`). For a GPU, packed latents have bit groups of `GPU_BITS`, each a multiple of `PLANE`
    bytes. For a CPU, the plan is the fastest within a bound of the KL (`fast_choice.choose`). mean_tokens: of the plan
    and of the statistics. kernel_shapes: max number of different kernels for the sites; None: `GPU_SHAPES` for a GPU,
    else unlimited. sliding: sliding-window tokens of each site's layer by site name, for layers that have a window.
    code: of bit groups (`fhopt.fitting.codes`). Raises FhoptError if the ratio cannot be reached, an option is invalid,
    or a site does not support the layout `input` when it is requested.
    """
    check_options(ratio, layout, bits, device, code)
    sites = {name: s.site for name, s in statistics.items()}
    lossless = _lossless(statistics, ratio, layout, mean_tokens)
    if lossless is not None:
        return LatentPlan(lossless, sinks, recent, block, _provenance("input", ratio, 0.0), 16)
    if bases is None:
        bases = fit_bases(statistics, layout, context=context, tokens=tokens, device=device)
    costs = costs or {}
    if ratio == 1:
        whole = _full_width(sites, bases)
        return LatentPlan(whole, sinks, recent, block, _provenance(whole[0].layout, 1.0, 0.0), 16)
    budget = Budget(ratio, ResidualWindow(sinks, recent, block, window_bits), tokens, mean_tokens > 0, sliding or {})
    grain, counted = grain_of(bits, device, code), budget.weights(sites.values())
    weights = {name: counted[site.name] for name, site in sites.items()}
    times = fast_choice.channel_times(bases, sites, device)
    candidates = candidate_sides(bases, costs, grain, weights, times)
    most, asked = kernel_shapes or (GPU_SHAPES if grain.plane else None), budget.quantized_token_bits(sites.values())
    choice = fast_choice.choose_fastest(bases, candidates, asked, grain, device)
    chosen, free = choice.layouts, choice.allocation
    chunks = _chunks(sites, chosen, bases, costs, grain, weights, times)
    allocation = free if most is None else share_shapes(chunks, free, asked, grain, most, choice.rate)
    plans = _site_plans(statistics, bases, chosen, allocation, code)
    evidence = Evidence(
        _evidence_of_sites(bases, chunks, chosen, allocation),
        _curve(bases, candidates, budget, sites.values(), grain, choice),
    )
    provenance = _provenance(layout, ratio, allocation.nats) | {KEY: evidence.as_json()}
    if allocation is not free:
        provenance["kernel_shapes"] = {"most": most, "predicted_nats_without": free.nats}
    provenance |= fast_choice.provenance(choice, allocation, asked, device)
    return LatentPlan(plans, sinks, recent, block, provenance, window_bits, mean_tokens=mean_tokens)


def _chunks(
    sites: Mapping[str, AttentionSite], chosen: Mapping[str, str], bases: CandidateBases, costs: Costs, grain: Grain,
    weights: Mapping[str, float], times: Mapping[tuple[str, str], float],
) -> dict[str, SiteChunks]:  # fmt: skip
    """Collect the chunk costs of each site, in its chosen layout. weights, times: as in `SiteChunks`, by layout."""
    chunks = {}
    for name, which in chosen.items():
        pair, seconds = bases[name][which], times.get((name, which), 0.0)
        nats = tuple(chunk_nats(basis, costs.get((name, which, i)), grain) for i, basis in enumerate(pair))
        groups = tuple(basis.groups for basis in pair)
        chunks[name] = SiteChunks(nats, groups, bool(sites[name].softcap), weights[name], seconds)
    return chunks


def _site_plans(
    statistics: Mapping[str, SiteStatistics], bases: CandidateBases, chosen: Mapping[str, str], allocation: Allocation,
    code: str,
) -> tuple[SitePlan, ...]:  # fmt: skip
    """Build the plan of each site, in its chosen layout, from the bits of its chunks."""
    plans = []
    for name, which in chosen.items():
        sides = [_coded(basis, allocation.bits[name, i], i == 1, code) for i, basis in enumerate(bases[name][which])]
        plans.append(replace(_site_plan(statistics[name].site, which, sides), segment=statistics[name].segment))
    return tuple(plans)


def _evidence_of_sites(
    bases: CandidateBases,
    chunks: Mapping[str, SiteChunks],
    chosen: Mapping[str, str],
    allocation: Allocation,
) -> dict[str, tuple[SideEvidence, ...]]:
    """Collect the evidence of each site, in its chosen layout."""
    evidence = {}
    for name, which in chosen.items():
        pair = bases[name][which]
        sides = []
        for i, (side, basis) in enumerate(zip(SIDES if len(pair) == 2 else (SHARED,), pair, strict=True)):
            sides.append(side_evidence(side, basis.variance, chunks[name].nats[i], allocation.bits[name, i]))
        evidence[name] = tuple(sides)
    return evidence


def _curve(
    bases: CandidateBases,
    sides: Sides,
    budget: Budget,
    sites: Collection[AttentionSite],
    grain: Grain,
    choice: fast_choice.LayoutChoice,
) -> tuple[PlanSize, ...]:
    """Return the expected KL of plans of other sizes, up to the largest ratio that can be reached."""
    exact, sizes = budget.exact_bytes(sites) / budget.tokens, []
    for ratio in sorted({*CURVE_RATIOS, budget.ratio}):
        try:
            asked = replace(budget, ratio=ratio).quantized_token_bits(sites)
            nats = choice.allocation.nats
            if ratio != budget.ratio:
                nats = fast_choice.nats_of_another(choice, bases, sides, asked, grain)
        except FhoptError:  # below the minimum that all sides need
            break
        sizes.append(PlanSize(ratio, round_digits(exact / ratio), round_digits(nats)))
    return tuple(sizes)


def _provenance(layout: str, ratio: float, nats: float) -> dict[str, Any]:
    return {"layout": layout, "ratio": float(ratio), "predicted_nats": nats}


def _full_width(sites: Mapping[str, AttentionSite], bases: CandidateBases) -> tuple[SitePlan, ...]:
    """Return unquantized full-width plans in the first layout of each site other than `input`."""
    plans = []
    for name, layouts in bases.items():
        which = next((w for w in layouts if w != "input"), None)
        if which is None:
            raise FhoptError(
                f"ratio 1 stores every channel of {name}, but the statistics have only the layout input; "
                "expected another layout. Calibrate again with --layout identity."
            )
        plans.append(_site_plan(sites[name], which, [(b.encode, b.decode, ()) for b in layouts[which]]))
    return tuple(plans)


def _lossless(
    statistics: Mapping[str, SiteStatistics], ratio: float, layout: str, mean_tokens: int
) -> tuple[SitePlan, ...] | None:
    """Return exact plans in the layout `input` if requested at a ratio up to 2; otherwise None."""
    if ratio > 2 or layout != "input":
        return None
    if mean_tokens:
        raise FhoptError(
            "these statistics have sequence means subtracted, but an unquantized plan with layout input "
            "needs the means of keys and values; expected statistics without subtracted means. Calibrate "
            "again with --mean-tokens 0."
        )
    plans = []
    for s in statistics.values():
        rows = joint_basis(s)
        if rows is None:
            raise no_joint_basis(s.site)
        plans.append(_shared(s.site, rows.unsqueeze(0), rows.T.unsqueeze(0), ()))
    return tuple(plans)


def _site_plan(
    site: AttentionSite, layout: str, sides: Sequence[tuple[Tensor, Tensor, tuple[BitGroup, ...]]]
) -> SitePlan:
    """Build the plan of a site from (encode, decode [J, n*D, R], tiers) of each side, or of one side for both."""
    if layout == "input":
        return _shared(site, *sides[0])
    key, value = (SidePlan(_plain(encode), _by_head(decode, site.kv_heads), tiers) for encode, decode, tiers in sides)
    return SitePlan(site, layout, key, value)


def _shared(site: AttentionSite, encode: Tensor, decode: Tensor, tiers: tuple[BitGroup, ...]) -> SitePlan:
    """Build a plan in the layout `input` from encode [1, R, G*(D+E)] and decode [1, G*(D+E), R]."""
    key, value = _by_head(decode, site.kv_heads).split([site.key_dim, site.value_dim], 1)
    nothing = torch.zeros(1, encode.shape[1], 0)
    sides = SidePlan(_plain(encode), _plain(key), tiers), SidePlan(nothing, _plain(value), tiers)
    return SitePlan(site, "input", *sides)


def _plain(x: Tensor) -> Tensor:
    return x.float().cpu().contiguous()


def exact_plan(sites: Iterable[AttentionSite], *, sinks: int = 4, recent: int = 64, block: int = 64) -> LatentPlan:
    """Build a plan of exact `identity` latents for every site.

    It needs no calibration and changes only where tokens are stored. sinks, recent, block: sizes in tokens.
    """
    plans = []
    for site in sites:
        sides = []
        for dim in (site.key_dim, site.value_dim):
            eye = torch.eye(dim).expand(site.kv_heads, dim, dim).contiguous()
            sides.append(SidePlan(eye, eye.clone(), ()))
        plans.append(SitePlan(site, "identity", *sides))
    return LatentPlan(tuple(plans), sinks, recent, block, {"layout": "identity", "ratio": 1.0, "predicted_nats": 0.0})


def _coded(basis: Basis, bits: Sequence[int], unbiased: bool, code: str) -> tuple[Tensor, Tensor, tuple[BitGroup, ...]]:
    """Return (encode, decode, tiers) of the channels that got bits, in bit groups of descending bits.

    unbiased: scale decoders by the gains that make errors uncorrelated with the input.
    """
    order = sorted((i for i, b in enumerate(bits) if b), key=lambda i: (-bits[i], i))  # chunk indices
    channels = [c for i in order for c in range(i * TIER_QUANTUM, (i + 1) * TIER_QUANTUM)]
    spare = TIER_QUANTUM * len(bits) - basis.encode.shape[1]  # the last chunk may extend past the last channel
    encode = torch.nn.functional.pad(basis.encode, (0, 0, 0, spare))[:, channels]
    decode = torch.nn.functional.pad(basis.decode, (0, spare))[:, :, channels]
    widths = {b: TIER_QUANTUM * list(bits).count(b) for b in sorted(set(bits) - {0}, reverse=True)}
    tiers, gains = [], []
    for b, w in widths.items():
        is_trellis = codes.gets_trellis(code, b, w)
        tiers.append(codes.trellis_tier(b, w) if is_trellis else BitGroup(b, w, STEPS.get(b, 1.0)))
        gains += [(codes.GAIN if is_trellis else UNBIASED).get(b, 1.0) if unbiased else 1.0] * w
    decode = decode.float() * torch.tensor(gains, device=decode.device)
    return encode, decode, tuple(tiers)


def _by_head(decode: Tensor, kv_heads: int) -> Tensor:
    """Divide decoders among kv heads: [J, n*D, R] -> [G, D, R]."""
    return _plain(decode.reshape(kv_heads, -1, decode.shape[2]))
