"""From statistics to a plan: bases by optimal transform coding in the metric of the loss, bits by water-filling.

Per block of channels that may mix (calibrate.families), with C the moment and F the metric per token:

    encode = U^H F^{1/2}, decode = F^{-1/2} U,  where  F^{1/2} C F^{1/2} = U diag(lambda) U^H

In these coordinates an error costs the same in every direction, and channel c rounded to b bits costs
1/2 lambda_c d(b) nats per token (d: distortion of a unit Gaussian). All channels of all layers then compete for one
budget: reverse water-filling (Cover & Thomas, 10.3.3), which makes layer sensitivities part of the variances.
Rotary frequencies are complex blocks: their bases commute with the rotation (TransMLA's RoRoPE, PhasorKV's `freq`).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.spec import (
    SCALE_BYTES,
    TIER_QUANTUM,
    AttentionSite,
    LatentPlan,
    SidePlan,
    SideStatistics,
    SitePlan,
    SiteStatistics,
    Tier,
)

DISTORTION = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 0.00009}  # of a unit Gaussian under its best uniform quantiser
STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308}  # that quantiser's step, in standard deviations (Max 1960)
WIDER = {2: 1.3, 4: 1.2, 8: 1.2}  # tokens are not Gaussian: a wider range clips less (SmolLM2 at 8x: 1.4 beats 1.0)
SHRINKAGE = 0.01
LAYOUTS = ("freq", "identity")


@dataclass
class _Fitted:
    """A basis before bits are chosen: channels in order of falling variance, all latent heads alike in length."""

    encode: Tensor  # [J, R, n*D] float64, unit variance per channel
    decode: Tensor  # [G, D, R] float64
    variance: Tensor  # [J, R] nats: cost of dropping the channel, twice


# --------------------------------------------------------------------------------------------------- plans


def fit(
    statistics: Mapping[str, SiteStatistics],
    *,
    ratio: float,
    layout: str = "freq",
    sinks: int = 4,
    recent: int = 64,
    block: int = 64,
    tokens: int = 8192,
    bits: Sequence[int] = (2, 4, 8),
) -> LatentPlan:
    """A plan whose whole cache is `ratio` times smaller than 16-bit keys and values at `tokens` tokens.

    ratio 1 gives uncoded latents of full width. Bytes count codes, scales, sinks and window. Raises FhoptError when
    the ratio cannot be reached or is not a number of at least 1.
    """
    check_options(ratio, layout, bits)
    fitted = {name: _fit_site(s, layout) for name, s in statistics.items()}
    if ratio == 1:
        plans = [_uncoded(statistics[name].site, layout, *sides) for name, sides in fitted.items()]
        return LatentPlan(tuple(plans), sinks, recent, block, {"layout": layout, "ratio": 1.0, "predicted_nats": 0.0})
    budget = _code_budget(statistics, fitted, ratio, sinks, recent, block, tokens)
    chosen, loss = _allocate(fitted, budget, tuple(bits))
    plans = [
        SitePlan(statistics[n].site, layout, _coded(k, chosen[n, 0]), _coded(v, chosen[n, 1]))
        for n, (k, v) in fitted.items()
    ]
    provenance = {"layout": layout, "ratio": float(ratio), "predicted_nats": loss}
    return LatentPlan(tuple(plans), sinks, recent, block, provenance)


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
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256] > 0
        h.update(f"{name}{tuple(weight.shape)}".encode() + bytes(sample.cpu().to(torch.uint8).tolist()))
    return h.hexdigest()


def check_model(plan: LatentPlan, parameters: Mapping[str, Tensor], model: str) -> None:
    """Raise FhoptError when the plan carries a fingerprint and the model's is another."""
    wanted = plan.provenance.get("fingerprint")
    if wanted is not None and fingerprint(parameters, [s.site for s in plan.sites]) != wanted:
        raise FhoptError(
            f"the plan was fitted to another model than {model} (fingerprint {str(wanted)[:12]} does not match). "
            "Fit a plan for this one: fhopt fit MODEL."
        )


def check_options(ratio: float, layout: str, bits: Sequence[int]) -> None:
    """Raise FhoptError when a plan cannot have this ratio, layout or choice of bits."""
    if not 1 <= ratio < 1000:
        raise FhoptError(f"ratio {ratio:g} is not possible; expected a number from 1 (exact) to 16. Try --ratio 4.")
    if layout not in LAYOUTS:
        raise FhoptError(f"layout {layout!r} is unknown; expected one of {', '.join(LAYOUTS)}.")
    if not bits or any(b not in STEP for b in bits):
        raise FhoptError(f"bits {list(bits)} are not possible; expected a choice of {', '.join(map(str, STEP))}.")


# --------------------------------------------------------------------------------------------------- bases


def _fit_site(statistics: SiteStatistics, layout: str) -> tuple[_Fitted, _Fitted]:
    site = statistics.site
    build = _transform_basis if layout == "freq" else _identity_basis
    return build(statistics.key, site.kv_heads, site.key_dim), build(statistics.value, site.kv_heads, site.value_dim)


def _transform_basis(side: SideStatistics, kv_heads: int, dim: int) -> _Fitted:
    """The basis of the module docstring, families side by side."""
    groups, heads = side.groups, kv_heads // side.groups
    encoders, decoders, variances = [], [], []
    for family, moment, metric in zip(side.families, side.moments, side.metrics, strict=True):
        halves = 2 if family.is_complex else 1
        root, inverse = _square_roots(_shrunk(metric / side.count / halves))
        values, vectors = torch.linalg.eigh(root @ (moment / side.count) @ root)
        encode, decode = vectors.mH @ root, inverse @ vectors  # [J, P, c, c]
        rows, columns = _real_rows(encode, decode, family.channels, family.is_complex, heads, dim)
        encoders.append(rows)
        decoders.append(columns)
        variances.append((values.clamp_min(0) / halves).flatten(1).repeat(1, halves))
    encode, decode, variance = torch.cat(encoders, 1), torch.cat(decoders, 2), torch.cat(variances, 1)
    return _sorted(encode, decode.unflatten(1, (heads, dim)).flatten(0, 1), variance, groups)


def _real_rows(
    encode: Tensor, decode: Tensor, channels: Sequence[Sequence[int]], is_complex: bool, heads: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Dense real bases [J, P*r, n*D] and [J, n*D, P*r] of block bases [J, P, c, c]."""
    groups, count, width, _ = encode.shape
    index = torch.tensor(channels)  # [P, d]
    places = (torch.arange(heads).view(1, -1, 1) * dim + index.unsqueeze(1)).to(encode.device)  # [P, n, d]
    if not is_complex:
        rows = encode.new_zeros(groups, count, width, heads * dim)
        flat = places.flatten(1)  # [P, n*d]: the order in which calibrate.blocks lays channels out
        rows.scatter_(3, flat.view(1, count, 1, -1).expand(groups, -1, width, -1), encode)
        columns = decode.new_zeros(groups, count, heads * dim, width)
        columns.scatter_(2, flat.view(1, count, -1, 1).expand(groups, -1, -1, width), decode)
        return rows.flatten(1, 2), columns.permute(0, 2, 1, 3).flatten(2)
    real, imaginary = places[..., 0], places[..., 1]  # [P, n]
    rows = torch.zeros(groups, count, 2, width, heads * dim, dtype=torch.float64, device=encode.device)
    columns = torch.zeros_like(rows)
    for out, (on_real, on_imaginary) in enumerate(((encode.real, -encode.imag), (encode.imag, encode.real))):
        _place(rows[:, :, out], real, on_real)
        _place(rows[:, :, out], imaginary, on_imaginary)
    turned = decode.mT  # [J, P, r, n]
    for out, (on_real, on_imaginary) in enumerate(((turned.real, turned.imag), (-turned.imag, turned.real))):
        _place(columns[:, :, out], real, on_real)
        _place(columns[:, :, out], imaginary, on_imaginary)
    order = (0, 2, 1, 3, 4)  # all real parts, then all imaginary parts, as the variances are repeated
    return rows.permute(order).flatten(1, 3), columns.permute(order).flatten(1, 3).mT


def _place(target: Tensor, columns: Tensor, values: Tensor) -> None:
    """target [J, P, r, n*D], columns [P, n], values [J, P, r, n]: write values into those columns."""
    target.scatter_(3, columns.view(1, columns.shape[0], 1, -1).expand_as(values), values)


def _identity_basis(side: SideStatistics, kv_heads: int, dim: int) -> _Fitted:
    """J = G latent heads; a latent channel is a channel, divided by its deviation."""
    heads = kv_heads // side.groups
    power, cost = torch.zeros(kv_heads, dim, dtype=torch.float64), torch.zeros(kv_heads, dim, dtype=torch.float64)
    for family, moment, metric in zip(side.families, side.moments, side.metrics, strict=True):
        for total, matrix in ((power, moment), (cost, _shrunk(metric))):
            diagonal = matrix.diagonal(dim1=-2, dim2=-1).real.cpu() / side.count  # [J, P, c]
            for block, channels in enumerate(family.channels):
                per_head = diagonal[:, block].reshape(side.groups * heads, -1)  # [G, d] or [G, 1]
                share = 2 if family.is_complex else 1
                total[:, list(channels)] = per_head.expand(-1, len(channels)) / share
    eye = torch.eye(dim, dtype=torch.float64).expand(kv_heads, dim, dim)
    root = cost.clamp_min(1e-30).sqrt()
    return _sorted(eye * root.unsqueeze(-1), (eye / root.unsqueeze(-1)).mT, power * cost, kv_heads)


def _sorted(encode: Tensor, decode: Tensor, variance: Tensor, groups: int) -> _Fitted:
    """Channels in falling order of variance within each latent head, scaled to unit variance."""
    order = torch.argsort(variance, dim=1, descending=True, stable=True)  # [J, R]
    variance = variance.gather(1, order)
    deviation = variance.clamp_min(float(variance.max()) * 1e-12 + 1e-300).sqrt()
    encode = encode.gather(1, order.unsqueeze(-1).expand_as(encode)) / deviation.unsqueeze(-1)
    heads = decode.shape[0] // groups
    per_head = order.repeat_interleave(heads, 0).unsqueeze(1).expand_as(decode)
    decode = decode.gather(2, per_head) * deviation.repeat_interleave(heads, 0).unsqueeze(1)
    return _Fitted(encode, decode, variance)


def _shrunk(matrix: Tensor) -> Tensor:
    """(1 - s) A + s tr(A)/c I per block, and a floor far below the largest block: never singular."""
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).real.mean(-1)  # [J, P]
    floor = mean.max() * 1e-9 + 1e-300
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return (1 - SHRINKAGE) * matrix + (SHRINKAGE * mean + floor)[..., None, None] * eye


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A^{1/2} and A^{-1/2} of positive Hermitian blocks."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-300).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


# --------------------------------------------------------------------------------------------------- bits


def _code_budget(
    statistics: Mapping[str, SiteStatistics], fitted: Mapping[str, tuple[_Fitted, _Fitted]],
    ratio: float, sinks: int, recent: int, block: int, tokens: int,
) -> int:  # fmt: skip
    """Bits of codes per sealed token that make the whole cache `ratio` times smaller at `tokens` tokens."""
    exact = 2 * sum(s.site.exact_numbers_per_token for s in statistics.values())
    sealed = max(0, (tokens - sinks - recent) // block) * block
    if sealed == 0:
        raise FhoptError(f"{tokens} tokens are all exact (sinks {sinks}, recent {recent}); expected a longer context.")
    scales = SCALE_BYTES * sum(len(side.variance) for sides in fitted.values() for side in sides)
    return int(8 * ((tokens * exact / ratio - (tokens - sealed) * exact) / sealed - scales))


def _allocate(
    fitted: Mapping[str, tuple[_Fitted, _Fitted]], budget: int, levels: tuple[int, ...]
) -> tuple[dict[tuple[str, int], list[int]], float]:
    """Bits per chunk of TIER_QUANTUM channels: always the largest fall of loss per bit. Returns (bits, nats left)."""
    keys = [(name, side) for name in fitted for side in (0, 1)]
    chunks = {(n, s): _chunk_costs(fitted[n][s]) for n, s in keys}
    lowest = min(levels)
    bits = {key: [0] * len(costs) for key, costs in chunks.items()}
    price = {(n, s): TIER_QUANTUM * len(fitted[n][s].variance) for n, s in keys}
    used = 0
    for key in keys:  # every side keeps at least one chunk: a latent of no channels is no latent
        bits[key][0] = lowest
        used += lowest * price[key]
    if used > budget:
        raise FhoptError(
            f"the ratio asks for {budget / 8:.0f} bytes a token, the least possible is {used / 8:.0f}. Lower the ratio."
        )
    heap: list[tuple[float, tuple[str, int], int, int]] = []

    def push(key: tuple[str, int], chunk: int) -> None:
        now = bits[key][chunk]
        gains = [
            (chunks[key][chunk] * (DISTORTION[now] - DISTORTION[b]) / ((b - now) * price[key]), b)
            for b in levels
            if b > now
        ]
        if gains:
            gain, level = max(gains)
            heapq.heappush(heap, (-gain, key, chunk, level))

    for key in keys:
        for chunk in range(len(chunks[key])):
            push(key, chunk)
    while heap:
        _, key, chunk, level = heapq.heappop(heap)
        more = (level - bits[key][chunk]) * price[key]
        if used + more <= budget:
            used += more
            bits[key][chunk] = level
            push(key, chunk)
    ordered = {key: sorted(b, reverse=True) for key, b in bits.items()}
    loss = sum(0.5 * c * DISTORTION[b] for key in keys for c, b in zip(chunks[key], ordered[key], strict=True))
    return ordered, loss


def _chunk_costs(side: _Fitted) -> list[float]:
    """Sum of variances of each chunk of TIER_QUANTUM channels, over latent heads."""
    total = side.variance.sum(0)
    padded = torch.nn.functional.pad(total, (0, -len(total) % TIER_QUANTUM))
    return [float(c) for c in padded.unflatten(0, (-1, TIER_QUANTUM)).sum(1)]


def _coded(side: _Fitted, bits: Sequence[int]) -> SidePlan:
    """The side with its channels cut to those that got bits, in tiers of falling bits."""
    widths = {b: TIER_QUANTUM * list(bits).count(b) for b in sorted(set(bits) - {0}, reverse=True)}
    width = sum(widths.values())
    spare = max(0, width - side.encode.shape[1])  # the last chunk may reach past the last channel
    encode = torch.nn.functional.pad(side.encode, (0, 0, 0, spare))[:, :width]
    decode = torch.nn.functional.pad(side.decode, (0, spare))[:, :, :width]
    tiers = tuple(Tier(b, w, STEP[b] * WIDER[b]) for b, w in widths.items())
    return SidePlan(encode.float().cpu().contiguous(), decode.float().cpu().contiguous(), tiers)


def _uncoded(site: AttentionSite, layout: str, key: _Fitted, value: _Fitted) -> SitePlan:
    sides = [
        SidePlan(f.encode.float().cpu().contiguous(), f.decode.float().cpu().contiguous(), ()) for f in (key, value)
    ]
    return SitePlan(site, layout, *sides)


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
