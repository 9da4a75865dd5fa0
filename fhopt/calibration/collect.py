"""Calibration statistics: second moments of keys and values, their Fisher information, and quantization costs.

The captured graph runs on calibration batches with every `fhopt::attention` node instrumented. A model that is spread
over several devices runs directly instead (fhopt/calibration/offloaded_probe.py). No per-token data is stored; two
passes accumulate sums in float64:

    collect         moment  sum over tokens of x x^T         what is there
                    metric  sum over tokens of g g^T         what an error costs: g = d s / d x, s a random score
    measure_costs   cost[b] sum over sequences of (sum over tokens of (D^T g)_c e_c)^2, e: error of channel c at b bits

Each g comes from a tile of queries; the squares of the tiles are summed (`probe.Watch`).

The score is random and chosen such that the expected squares of its gradients at the logits are the Fisher information
of the logits. Gradients of log p(y) with sampled labels y have the same expectation; fhopt/calibration/probe.py says
why they are not used. The metric is thus the Fisher information of the key (value): to second order, an error e of a
cached key changes the predicted distribution by KL = 1/2 e^T F e. It includes everything that other methods weight by
hand: query energy, softmax, the spread of values, the output projection, and all later layers. One backward pass gives
it for all sites at once. Gradients through attention sinks and recent tokens are left out, because a cache stores these
in full precision.

The metric assumes that errors of tokens are independent, but they are not. A dropped channel has the same error
direction in all tokens that a query attends to, and clipping errors occur in the tokens that matter most. Bits are
therefore chosen by the second pass, which sums over a sequence *before* it squares. Scores of different positions are
independent, so the expectation of this square is the whole second-order cost of the channel at b bits, including
clipping, token scale and coherence.

Calibration sequences are short and start at position 0 of a long context. Attention depends only on position
differences, so keys and their gradients at later positions are the same ones, rotated. The means do not move, since
they are taken over the first tokens. With `span` both passes count tokens as if they were spread over a long context:
RoPE rotates a constant part of the keys, such as a bias, away from its mean there, and its channels must not be
dropped. Keys that are relative to segments (fhopt/plan/segment_rotation.py) are encoded so in both passes and need no
span.

Sources: optimal brain surgeon (Hassibi & Stork 1992); Fisher-weighted rank allocation in Palu (2407.21118).
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
from fhopt.fitting.statistics import SiteStatistics, concatenate_heads, differences, empty_statistics, placed, turned
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

    mean_tokens: as in `LatentPlan`; moments are then taken of differences from the means of each sequence. span: count
    rotated keys as up to this many positions later, with unchanged means; ignored if the statistics are of keys
    relative to segments. into: statistics to add to (to resume or to merge). `done(number)` is called after each batch.
    Raises FhoptError if a batch does not fit the graph.
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
    """Rotate gradients of the first tokens by `turned`; later: result of `placed` for all tokens."""
    return gradient if later is None else turned(site, gradient, later[:, : gradient.shape[2]])


def _rows(x: Tensor, groups: int) -> Tensor:
    """Flatten tokens and convert to float64: [B,G,T,D] -> [J, B*T, n*D]."""
    return concatenate_heads(x, groups).flatten(1, 2).double()


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
    """Measure the cost of every channel of every basis at 0 bits and at each bit width in `steps` (bits -> step).

    batches: numbered, argument name -> tensor of the captured shape; not those that the bases were fitted to.
    mean_tokens: as passed to `collect` for the statistics of the bases. span: count whole sequences as up to this many
    positions later. segments: segment length by site name, as in these statistics. into: costs to add to, with the same
    bases and bit widths (to resume or to merge). Raises FhoptError if a batch does not fit the graph.
    """
    levels = {0: 0.0, **steps}
    costs = empty_costs(bases, levels) if into is None else into
    sites = {site.name: site for site in outcome.sites.values()}
    current = 0  # number of the current batch

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
    """Return the dtype for latents of x: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _read_by(sides: Sequence[Basis], keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Return the input of each basis of a layout: keys and values, or both concatenated."""
    return (keys, values) if len(sides) == 2 else (torch.cat([keys, values], -1),)


@torch.no_grad()
def _errors(basis: Basis, x: Tensor, levels: Mapping[int, float]) -> Tensor:
    """Return quantization errors of latents of x [B,G,T,D] at each bit width in `levels`: [levels, J, B, T, R]."""
    latent = concatenate_heads(x.to(_exact(x)), basis.groups) @ basis.encode.to(x.device, _exact(x)).unsqueeze(1).mT
    used = max(1, latent.shape[-1] // 2)  # about the number of channels that share a token's scale in a plan
    scale = latent[..., :used].square().mean(-1, keepdim=True).sqrt().clamp_min(2.0**-14)
    unit = latent / scale
    errors = unit.new_empty((len(levels), *unit.shape))
    for out, (bits, step) in zip(errors, levels.items(), strict=True):
        torch.mul(scale, packing.rounded(unit, bits, step) - unit if bits else -unit, out=out)
    return errors


@torch.no_grad()
def _add_costs(costs: SideCosts, basis: Basis, errors: Tensor, gradient: Tensor, bits: Iterable[int]) -> None:
    """Add the squared effect of `errors` [levels, J, B, T, R] on the score, through gradients of the first tokens.

    errors: from `_errors`. gradient: [B,G,N,D]. bits: the levels.
    """
    decode = basis.decode.to(gradient.device, _exact(gradient)).unsqueeze(1)
    effect = concatenate_heads(gradient.to(_exact(gradient)), basis.groups) @ decode  # [J, B, N, R]
    # The product for all levels is no larger than `errors`, which exist for all layouts at once.
    summed = (effect * errors[:, :, :, : effect.shape[2]]).sum(3).double()  # [levels, J, B, R]
    for level, cost in zip(bits, summed.square().sum(2).cpu(), strict=True):
        costs.sums[level].add_(cost)
