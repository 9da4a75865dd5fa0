"""Calibration of page selection: probe queries measure the cost of selecting fewer pages at each attention site.

    sketches    means and deviations of key latents, and the energy of queries in each channel, decide which channels
                a sketch stores (page_sketches.py)
    curves      every PIECE tokens of a calibration sequence, the last queries compare, at each site and for each lift,
                the expected weight of the selected pages with their true weight, and with the weight of all tokens
    fill        for each head, the factor of value-mean fill that minimizes the error of the probes' outputs; if a head
                puts weight on tokens with small values, filling in the whole weight left out is too much
    costs       one site at a time selects the requested share, with fill, for the last tokens of a sequence: the KL of
                the model's predictions over the square of the weight left out; doubling the share on SmolLM2 leaves out
                0.43 of the weight, and costs 0.17 of the KL
    repeated    curves and costs again on the repeated-token probe: tokens of a text in random order, twice; only heads
                that copy can predict the second half (Olsson et al. 2022, arXiv 2209.11895)
    budgets     sites get lower lifts where the cost falls most per byte, until the share is used up (page_budget.py)
    mass        if the mass is set instead of the share: the smallest expected weight with which a site covered the
                requested weight

The share is a mean over queries. With a lift, a query that looks for one token selects few pages, and a query that
attends everywhere selects as many as the list can hold. Sum over sites of cost times squared weight left out (SmolLM2,
4x plan, source at 8,192 tokens, one page in eight):

    same number of pages for every query                            0.0130
    budgets per site                                                0.0073
    ranked by shares of all weight, not of quantized tokens only    0.0067
    pages above a lift                                              0.0038
    sketches from 4,096 instead of 2,048 tokens of a sequence       0.0025

With the true weights, the last two would be 0.0015.

Costs of the same weight left out differ between sites by two orders of magnitude: a head that copies from afar attends
to one token, and loses everything if its page is missing. A text has few tokens that can only be predicted by copying,
hence the repeated-token probe. One layer of SmolLM2 has a copying head that sketches serve badly: the page it needs
ranks 50th to 120th of 492 pages of 16 tokens. In this probe that layer costs 7 times as much as on text. It selects
0.40 of its pages, up from 0.27, and the loss on answers copied from a distance of 8,064 tokens falls from 0.098 to
0.017 nats/token (12 questions). Costs of several sites are assumed to add up.

Dimensions: B batch, H query heads, U units, S queries, P pages, T quantized tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fhopt.attention import paged as attention_paged
from fhopt.attention.cache_view import CacheView
from fhopt.attention.exact_tokens import attend_open_tokens
from fhopt.attention.manual_attention import latent_logits
from fhopt.attention.paged import mean_values
from fhopt.attention.sketches import PageIndex
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.evaluation.perplexity import new_cache, switched
from fhopt.models.model_facts import cache_argument
from fhopt.ops import algebra, attention, page_selection
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import PagePlan
from fhopt.refine.page_options import LAST, MIN_PAGES, PIECE, QUERIES, PagingOptions

LIFTS = (*(2.0 ** (n / 2) for n in range(12, -13, -1)), 0.0)  # candidates for a site
ALL = len(LIFTS)  # index past these: a site selects all its pages
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)  # candidates for a site
MIN_KL, MIN_LEFT = 1e-9, 1e-12  # rounding: nats, and squared weight left out
FILLS = (*(i / 8 for i in range(9)), 1.25, 1.5, 2.0)  # candidates for a head, see `PagePlan.fill`

# --------------------------------------------------------------------------------------------------- probes


@dataclass
class Curves:
    """Weight that one site leaves out, as shares of all weight, summed over queries, sequences and units.

    left [LIFTS]: weight left out at each lift; squares: its squares; read: share of pages selected. by_mass, used
    [MASSES]: weight left out and share of pages selected at each mass. cost: nats/token per squared weight left out; 1
    if not measured. errors [FILLS, H]: squared errors of the heads' outputs. repeated: curves on the second half of a
    repeated-token probe.
    """

    left: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    read: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    by_mass: Tensor = field(default_factory=lambda: torch.zeros(len(MASSES), dtype=torch.float64))
    used: Tensor = field(default_factory=lambda: torch.zeros(len(MASSES), dtype=torch.float64))
    count: int = 0
    cost: float = 1.0
    errors: Tensor | float = 0.0
    repeated: Curves | None = None

    @property
    def fill(self) -> tuple[float, ...]:
        """The one of FILLS with the least error for each head; empty if not measured."""
        return tuple(FILLS[i] for i in self.errors.argmin(0).tolist()) if isinstance(self.errors, Tensor) else ()

    def add(self, expected: Tensor, weights: Tensor, room: float) -> None:
        """Add probes: expected and true page weights [B,U,S,P], as shares of all weight. room: max share of pages."""
        count = expected.shape[-1]
        best, order = expected.double().sort(-1, descending=True)
        kept = torch.nn.functional.pad(weights.double().gather(-1, order).cumsum(-1), (1, 0))  # [..., P+1]
        most = page_selection.pages_read(count, room, page_selection.FEWEST)

        def without(needed: Tensor) -> tuple[Tensor, Tensor]:
            left = kept[..., -1:] - kept.gather(-1, needed)
            return left, needed.double().sum() / count

        for i, needed in enumerate(_needed_by_lift(best, most)):
            left, read = without(needed)
            self.left[i] += left.sum()
            self.squares[i] += left.square().sum()
            self.read[i] += read
        for i, mass in enumerate(MASSES):
            left, read = without(_needed_by_mass(best, mass))
            self.by_mass[i] += left.sum()
            self.used[i] += read
        self.count += expected.numel() // count

    def share(self, at: int) -> float:
        """Return the mean share of pages selected with one of LIFTS, or ALL."""
        return 1.0 if at == ALL else float(self.read[at]) / self.count

    def left_out(self, at: int) -> float:
        """Return the mean weight left out with one of LIFTS, or ALL."""
        return 0.0 if at == ALL else float(self.left[at]) / self.count

    def loss(self, at: int) -> float:
        """Return the cost of the weight left out in nats/token: the mean over text and repeated-token probe."""
        if at == ALL:
            return 0.0
        own = self.cost * float(self.squares[at]) / self.count
        return own if self.repeated is None else (own + self.repeated.loss(at)) / 2

    def lift_for(self, share: float) -> int:
        """Return the index of the one of LIFTS whose share of pages is closest to `share`."""
        return int((self.read / max(1, self.count) - share).abs().argmin())

    def mass_for(self, left_out: float) -> int:
        """Return the index of the least of MASSES that leaves out at most `left_out`; the last leaves out nothing."""
        means = (self.by_mass / self.count).tolist()
        return next(i for i, mean in enumerate(means) if mean <= left_out or i == len(MASSES) - 1)


def _needed_by_lift(best: Tensor, most: int) -> Iterator[Tensor]:
    """Yield the number of pages per query for each of LIFTS, [..., 1], from descending expected weights [..., P]."""
    count = best.shape[-1]
    fewest = torch.arange(count) < page_selection.FEWEST
    for lift in LIFTS:
        yield ((best * count >= lift) | fewest).sum(-1, keepdim=True).clamp(max=most)


def _needed_by_mass(best: Tensor, mass: float) -> Tensor:
    """Count the pages [..., 1] that leave out at most 1 - mass, from descending expected weights [..., P]."""
    if mass == 1:
        return torch.full_like(best[..., :1], best.shape[-1], dtype=torch.int64)
    before = best.cumsum(-1) - best
    return (best.sum(-1, keepdim=True) - before > 1 - mass).sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class _FullAttention:
    """Attention of probes to all quantized tokens, attention sinks and the recent window up to the query.

    logits [B,H,S,T]: of the quantized tokens, without a mean of keys. near: (output [B,H,S,E], lse [B,H,S]) of
    attention sinks and recent window, with weights relative to that mean.
    """

    logits: Tensor
    near: tuple[Tensor, Tensor]

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, latents: CacheView, **numbers: float) -> _FullAttention:
        """Attend with query [B,H,S,D] to exact keys and values and to latents; numbers: scale and softcap."""
        centred = replace(latents, key=replace(latents.key, mean=None))  # as the estimates from sketches are
        far = latent_logits(query, centred, **numbers)
        output, lse = attend_open_tokens(query, key, value, latents, **numbers)
        return _FullAttention(far, (output, algebra.counted_from_mean(lse, query, latents.key.mean, numbers["scale"])))

    def page_weights(self, tokens: int) -> Tensor:
        """Return each page's share of all weight, [B,H,S,P]."""
        sums = page_selection.page_logits(self.logits, tokens)
        total = torch.logaddexp(sums.logsumexp(-1), self.near[1])
        return (sums - total.unsqueeze(-1)).exp()


def fill_errors(
    full: _FullAttention, absorbed: Tensor, latents: CacheView, estimates: Tensor, index: PageIndex
) -> Tensor:
    """Return summed squared errors of each head's output with each of FILLS, for the pages that `index` selects.

    absorbed [B,H,S,R]: queries; estimates [B,H,S,P]: page logits from sketches -> [FILLS, H].
    """
    logits, near, key, value = full.logits, full.near, latents.key, latents.value
    heads, values = absorbed.shape[1], value.reconstruct()
    chosen, _ = page_selection.select_pages(estimates, index.rule, index.count, near[1])
    seen = attention_paged.page_mask(chosen, index.tokens, heads, logits.shape[-1])
    odds = page_selection.odds_left_out(estimates, chosen)

    def part(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = attention.safe_softmax(x)
        return attention.grouped_mix(weights, values.to(weights.dtype)), lse

    read, whole = part(logits.masked_fill(~seen, -math.inf)), algebra.merge([near, part(logits)])
    mean = mean_values(absorbed, key, value, None, None, index.tokens).to(read[0].dtype)
    expanded = algebra.expand(mean.repeat_interleave(heads // mean.shape[1], 1), value.decode)
    if value.mean is not None:
        expanded = expanded + algebra.mean_outputs(value.mean, heads).to(expanded.dtype)
    errors = []
    for fill in FILLS:
        parts = torch.full((heads,), fill, device=absorbed.device).log()
        filled = algebra.merge([near, page_selection.fill_with_mean(*read, expanded, odds, parts)])
        errors.append((filled - whole).double().square().sum((0, 2, 3)))
    return torch.stack(errors)


class _Probe:
    """Observer of one site's attention. fills: also measure value-mean fill for pages that are not selected."""

    def __init__(self, curves: Curves, options: PagingOptions, fills: bool = True) -> None:
        self.curves, self.options, self.fills = curves, options, fills

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, latents: CacheView, scale: float, softcap: float
    ) -> None:
        """Add the last QUERIES queries of a call to the curves."""
        index, query = latents.index, query[:, :, -QUERIES:]
        if index is None or index.count < MIN_PAGES:
            return
        absorbed = algebra.absorb(query, latents.key.decode)
        numbers: Any = dict(scale=scale, softcap=softcap)
        estimates = page_selection.page_logits(
            attention_paged.token_logits(absorbed, index, None, None, **numbers), index.tokens
        )
        full = _FullAttention.of(query, key, value, latents, **numbers)
        weights = full.page_weights(index.tokens)
        expected = page_selection.expected_weights(estimates, index.units, full.near[1])
        self.curves.add(expected, weights.unflatten(1, (index.units, -1)).mean(2), self.options.room)
        if self.fills:
            lift = LIFTS[self.curves.lift_for(self.options.share)]
            selecting = replace(index, share=self.options.room, lift=lift)
            self.curves.errors += fill_errors(full, absorbed, latents, estimates, selecting)


@torch.inference_mode()
def measure_pages(
    model: Any, plan: LatentPlan, ids: Tensor, options: PagingOptions, progress: Callable[[int], None] = lambda n: None
) -> dict[str, Curves]:
    """Measure the weight that each site of `plan` with a sketch leaves out, and its cost.

    ids [N, T]: sequences of token ids; the repeated-token probe is built from the first. progress counts sequences and,
    for the first sequence and the probe, sites. Raises FhoptError if the plan is not for this model.
    """
    names = [site.site.name for site in plan.sites if site.sketch is not None]
    on_text, on_probe = {name: Curves() for name in names}, {name: Curves() for name in names}
    everywhere = tuple(0.5 if site.sketch is not None else 1.0 for site in plan.sites)
    plan = replace(plan, pages=PagePlan(options.tokens, everywhere, (1.0,) * len(everywhere), least=0))
    name, end = cache_argument(model), ids.shape[1] - LAST
    with switched(model, plan):
        for number, row in enumerate([*ids, repeated_tokens(ids[0])]):
            repeats = number == len(ids)
            measured = on_probe if repeats else on_text
            cache = new_cache(model, plan, each_query=False)
            probes = {x: _Probe(measured[x.site.site.name], options, fills=not repeats) for _, x in _selecting(cache)}
            for start in range(0, end, PIECE):
                stop = min(end, start + PIECE)
                looks = not repeats or stop - QUERIES >= len(row) // 2  # in the probe, only positions that need copying
                for layer, probe in probes.items():
                    layer.observer = probe if looks else None
                model(row[None, start:stop].to(model.device), **{name: cache}, use_cache=True)
            progress(1)
            if number == 0 or repeats:
                _measure_costs(model, cache, row[end:], on_text, measured, options, progress)
    return {name: replace(c, repeated=on_probe[name] if on_probe[name].count else None) for name, c in on_text.items()}


def repeated_tokens(ids: Tensor) -> Tensor:
    """Build a repeated-token probe [T] from token ids [T]: its second half repeats the first.

    The tokens are drawn from `ids` in random order after the first one, which some models require at the start.
    """
    half = len(ids) // 2
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    drawn = ids[order[order != 0][:half]]
    return torch.cat([ids[:1], drawn[1:], drawn, ids[: len(ids) - 2 * half]])


def _selecting(cache: Any) -> list[tuple[int, LatentLayer]]:
    """Return (index, layer) of a cache's layers that have sketches."""
    return [(i, x) for i, x in enumerate(cache.layers) if isinstance(x, LatentLayer) and x.sketches is not None]


def _measure_costs(
    model: Any, cache: Any, ids: Tensor, on_text: Mapping[str, Curves], measured: Mapping[str, Curves],
    options: PagingOptions, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Set the costs of `measured` to the KL on token ids [LAST] after a cache, with one selecting site at a time.

    on_text: curves of texts, which set the sites' lifts. measured: curves of the sequence, which get the costs.
    """
    selecting = _selecting(cache)
    for _, layer in selecting:
        layer.observer, layer.share = None, 1.0
    expected = _predictions(model, copy.deepcopy(cache), ids)
    for at, layer in selecting:
        text, curves = on_text[layer.site.site.name], measured[layer.site.site.name]
        nearest = text.lift_for(options.share)
        trial = copy.deepcopy(cache)
        reader = trial.layers[at]
        reader.share, reader.lift, reader.each_query = options.room, LIFTS[nearest], True
        if options.limit == 1:
            reader.fill = attention_paged.log_fill(text.fill, layer.device)
        changed = _predictions(model, trial, ids)
        kl = float((expected.exp() * (expected - changed)).sum(-1).mean())
        if curves.count:
            curves.cost = max(kl, MIN_KL) / max(float(curves.squares[nearest]) / curves.count, MIN_LEFT)
        progress(1)


def _predictions(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Return log-probabilities [LAST, V] after a cache, float64, in forward passes of the plan's block."""
    name, step = cache_argument(model), cache.plan.block
    cuts = range(0, len(ids), step)
    parts = [model(ids[None, i : i + step].to(model.device), **{name: cache}, use_cache=True).logits[0] for i in cuts]
    return torch.cat(parts).double().log_softmax(-1)
