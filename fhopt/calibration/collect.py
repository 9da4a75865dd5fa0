"""Calibration: second moments of keys and values, what an error in them costs, and what quantizing them costs.

The captured graph is run on calibration batches with every `fhopt::attention` node instrumented; a model that is spread
over several devices runs as it is (fhopt/calibration/offloaded_probe.py). Nothing per token is kept; two passes stream
sums in float64:

    collect         moment  sum over tokens of x x^T         what is there
                    metric  sum over tokens of g g^T         what an error costs: g = d s / d x, s a random score
    measure_costs   cost[b] sum over sequences of (sum over tokens of (D^T g)_c e_c)^2, e: error of channel c at b bits

with g of some queries at a time, whose squares are summed (`probe.Watch`).

A score is random such that the squares of its gradients at the logits are their Fisher information in expectation, as
are those of log p(y) for labels y that are drawn (fhopt/calibration/probe.py says why not these). So the metric is the
Fisher information of the key (value): to second order, an error e of a cached key changes the predicted distribution by
KL = 1/2 e^T F e. It holds everything that other weightings put in by hand: query energy, softmax, the spread of values,
the output projection, and all layers above. One backward pass gives it for all sites at once. Only positions that a
cache would see compressed count: the gradient through attention sinks and recent tokens, which stay exact, is left out.

The metric assumes that errors of tokens are independent. They are not: a dropped channel is wrong in the same direction
in all tokens that attention reads together, and a clipped one is wrong where it matters most. So bits are chosen by the
second pass, which sums over a sequence *before* it squares: scores of different positions are independent, so this
square is, in expectation, the whole second-order cost of the channel at b bits, clipping, token scale and coherence
included.

Sequences of a calibration are short, and stand where a long context begins. Attention depends on differences of
positions alone, so the same keys further on are these, rotated, and so are their gradients; the means, which are of the
first tokens, stay where they are. With `span` both passes count tokens as if they stood all over a long context: a
constant in the keys, as of a bias, turns away from its mean there, and must not be cut off. Where keys are relative to
segments (fhopt/plan/segment_rotation.py) they are so in both passes, and need no span.

Source of the idea: optimal brain surgeon (Hassibi & Stork 1992), Fisher-weighted rank allocation in Palu (2407.21118).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fhopt.calibration.probe import Batch, Probed, run_probed
from fhopt.calibration.probed_attention import OnGradients
from fhopt.fitting.bases import Basis, CandidateBases
from fhopt.fitting.costs import Costs, SideCosts, empty_costs
from fhopt.fitting.statistics import SiteStatistics, differences, empty_statistics, joined, placed, turned
from fhopt.models.capture import Captured
from fhopt.ops import packing
from fhopt.passes.outcome import Outcome
from fhopt.plan.site import AttentionSite


def collect(
    captured: Captured | Probed,
    outcome: Outcome,
    batches: Iterable[tuple[int, Batch]],
    *,
    sinks: int,
    recent: int,
    seed: int = 0,
    mean_tokens: int = 0,
    span: int = 0,
    into: dict[str, SiteStatistics] | None = None,
    done: Callable[[int], None] = lambda number: None,
) -> dict[str, SiteStatistics]:
    """Collect statistics of every site over numbered batches (each: argument name -> tensor of the captured shape).

    mean_tokens: as of `LatentPlan`; moments are then of differences from the means of each sequence. span: keys that
    turn count as up to so many positions later than they stand, the means as they are; but not where statistics are of
    keys relative to segments. into: add to these (to resume, or to merge). `done(number)` is called after each batch.
    Raises FhoptError when a batch does not fit the graph.
    """
    statistics = empty_statistics(outcome.sites.values()) if into is None else into

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        stats, count = statistics[name], k.shape[0] * k.shape[2]
        later = placed(stats.segment, span, k.shape[2])
        k, v = differences(stats.site, k, v, 0, mean_tokens, later)
        for side, x in ((stats.key, k), (stats.value, v)):
            _add(side.moment, x, side.groups)
            side.count += count
        _add_cross(stats.cross, k, v)

        def add(key_gradient: Tensor, value_gradient: Tensor) -> None:
            key_gradient = _turned(stats.site, key_gradient, later)
            _add(stats.key.metric, key_gradient, stats.key.groups)
            _add(stats.value.metric, value_gradient, stats.value.groups)
            _add_cross(stats.cross_metric, key_gradient, value_gradient)

        return add

    run_probed(captured, outcome, batches, (sinks, recent), seed, see, done)
    return statistics


def _turned(site: AttentionSite, gradient: Tensor, later: Tensor | None) -> Tensor:
    """Return gradients of the first tokens as of `turned`; later: as of `placed`, of all tokens."""
    return gradient if later is None else turned(site, gradient, later[:, : gradient.shape[2]])


def _rows(x: Tensor, groups: int) -> Tensor:
    """Stack tokens in float64: [B,G,T,D] -> [J, B*T, n*D]."""
    return joined(x, groups).flatten(1, 2).double()


@torch.no_grad()
def _add(total: Tensor, x: Tensor, groups: int) -> None:
    rows = _rows(x, groups)
    total += (rows.mT @ rows).to(total.device)


@torch.no_grad()
def _add_cross(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    if total is not None:
        total += (_rows(left, 1)[0].mT @ _rows(right, 1)[0]).to(total.device)


# --------------------------------------------------------------------------------------------------- costs


def measure_costs(
    captured: Captured | Probed,
    outcome: Outcome,
    batches: Iterable[tuple[int, Batch]],
    bases: CandidateBases,
    steps: Mapping[int, float],
    *,
    sinks: int,
    recent: int,
    seed: int = 0,
    mean_tokens: int = 0,
    span: int = 0,
    segments: Mapping[str, int] = MappingProxyType({}),
    into: Costs | None = None,
    done: Callable[[int], None] = lambda number: None,
) -> Costs:
    """Measure what channels of every basis cost at 0 bits and at each number of bits in `steps` (bits -> step).

    batches: numbered, argument name -> tensor of the captured shape; others than the bases were fitted to. mean_tokens:
    as of `collect`, for the statistics of the bases. span: whole sequences count as up to so many positions later.
    segments: by site name, as of these statistics. into: add to these costs, which have the same bases and numbers of
    bits (to resume, or to merge). Raises FhoptError when a batch does not fit the graph.
    """
    levels = {0: 0.0, **steps}
    costs = empty_costs(bases, levels) if into is None else into
    sites = {site.name: site for site in outcome.sites.values()}
    current = 0  # number of the batch

    def counted() -> Iterator[tuple[int, Batch]]:
        nonlocal current
        for number, batch in batches:
            current = number
            yield number, batch

    def see(name: str, k: Tensor, v: Tensor) -> OnGradients:
        later = placed(segments.get(name, 0), span, k.shape[2], current * len(k), len(k))
        k, v = differences(sites[name], k, v, 0, mean_tokens, later)
        measured = []
        for layout, sides in bases[name].items():
            for i, (basis, x) in enumerate(zip(sides, _read_by(sides, k, v), strict=True)):
                measured.append((costs[name, layout, i], basis, _errors(basis, x, levels)))
                costs[name, layout, i].tokens.add_(x.shape[0] * x.shape[2])

        def add(key_gradient: Tensor, value_gradient: Tensor) -> None:
            key_gradient = _turned(sites[name], key_gradient, later)
            read = [x for sides in bases[name].values() for x in _read_by(sides, key_gradient, value_gradient)]
            for (total, basis, errors), gradient in zip(measured, read, strict=True):
                _add_costs(total, basis, errors, gradient, levels)

        return add

    run_probed(captured, outcome, counted(), (sinks, recent), seed, see, done)
    return costs


def _exact(x: Tensor) -> torch.dtype:
    """Return the dtype in which latents of x are made: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _read_by(sides: Sequence[Basis], keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return what each basis of a layout reads: keys and values, or both side by side."""
    return (keys, values) if len(sides) == 2 else (torch.cat([keys, values], -1),)


@torch.no_grad()
def _errors(basis: Basis, x: Tensor, levels: Mapping[int, float]) -> Tensor:
    """Return the errors of latents of x [B,G,T,D] at each number of bits in `levels`: [levels, J, B, T, R]."""
    latent = joined(x.to(_exact(x)), basis.groups) @ basis.encode.to(x.device, _exact(x)).unsqueeze(1).mT
    used = max(1, latent.shape[-1] // 2)  # about the channels that share a token's scale in a plan
    scale = latent[..., :used].square().mean(-1, keepdim=True).sqrt().clamp_min(2.0**-14)
    unit = latent / scale
    errors = unit.new_empty((len(levels), *unit.shape))
    for out, (bits, step) in zip(errors, levels.items(), strict=True):
        torch.mul(scale, packing.rounded(unit, bits, step) - unit if bits else -unit, out=out)
    return errors


@torch.no_grad()
def _add_costs(costs: SideCosts, basis: Basis, errors: Tensor, gradient: Tensor, bits: Iterable[int]) -> None:
    """Add the squares of what errors [levels, J, B, T, R], as of `_errors`, do with gradients of the first tokens.

    gradient: [B,G,N,D]. bits: the levels.
    """
    decode = basis.decode.to(gradient.device, _exact(gradient)).unsqueeze(1)
    effect = joined(gradient.to(_exact(gradient)), basis.groups) @ decode  # [J, B, N, R]
    # Products of all levels are as large as the errors, which exist for all layouts at once.
    summed = (effect * errors[:, :, :, : effect.shape[2]]).sum(3).double()  # [levels, J, B, R]
    for level, cost in zip(bits, summed.square().sum(2).cpu(), strict=True):
        costs.sums[level].add_(cost)
