"""How many pages each attention may read: measured on probe queries, then shared out (fhopt/pages.py reads them).

    sketches   what key latents are like (mean, deviation) and what queries ask of each channel tell which to keep
    curves     every PIECE tokens of a calibration sequence some queries compare, at each site and for each lift, what
               the pages that are expected to weigh so much really weigh, and what all tokens do, open ones included
    fill       for each head, the part of the weight left out with which the mean of values brings the probes' outputs
               closest to those of all pages: where heads park weight on tokens of small values, all of it is too much
    costs      each site alone reads the share that was asked for, filled so, in the last tokens of a sequence: what
               that does to the model's predictions (KL), for the square of the weight that it left out: twice the share
               of SmolLM2's pages leaves out 0.43 of the weight, and costs 0.17 of the KL
    echo       both again where some of a text's tokens, without order, are said twice: of the second time, only heads
               that look back know anything (Olsson et al. 2022, arXiv 2209.11895)
    budgets    sites get lower lifts where the cost falls most for a byte, until the share is used up
    mass       where the weight is to be kept rather than the number: the smallest expected weight with which a site
               really kept as much as was asked for

The share is a mean. What queries read differs: by a lift, one that looks for a token reads little, and one that looks
at everything reads as much as a list has room for. SmolLM2, 4x plan, source at 8,192 tokens, one page in eight; costs
times squares of the weight left out, summed over sites: as many pages for every query 0.0130, at sites by budgets
0.0073; ranked by shares in the weight of all tokens rather than of sealed ones 0.0067; pages above a lift 0.0038;
sketches from 4,096 instead of 2,048 tokens of a sequence 0.0025. Knowing true weights, the last two would be 0.0015.

Costs differ between sites by two orders of magnitude for the same weight left out: heads that copy from afar read one
token, and if its page is missing, everything. A text has little that can only be copied; hence the echo. One layer of
SmolLM2 has a copying head that sketches serve badly: the page it wants is the 50th to 120th of 492 pages of 16 tokens.
That layer costs 7 times as much in the echo as in text, reads 0.40 of its pages in place of 0.27, and answers that are
copied from 8,064 tokens lose 0.017 nats a token in place of 0.098 (12 questions). Costs of several sites are taken to
add up.

Letters: B batch, H query heads, U units, S queries, P pages, T sealed tokens.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fhopt import data, ops, page_ops, pages
from fhopt.applying import cache_argument
from fhopt.errors import FhoptError
from fhopt.evaluate import check_length, new_cache, positions_of, switched
from fhopt.fitting import STEPS
from fhopt.latents import Latents, far_logits, mean_values, open_part
from fhopt.layers import LatentLayer
from fhopt.models import LoadedModel
from fhopt.pages import PageIndex
from fhopt.pipeline import Progress, silent
from fhopt.spec import SKETCH_BITS, TIER_QUANTUM, LatentPlan, PagePlan, SitePlan, SketchPlan, Tier

LIFTS = (*(2.0 ** (n / 2) for n in range(12, -13, -1)), 0.0)  # that sites may get
ALL = len(LIFTS)  # and beyond these: a site reads all its pages
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)  # likewise
MASS_SHARE = 0.5  # of the pages, that may be read where only a mass is asked for
PIECE, QUERIES = 512, 16  # tokens read at once, and how many at the end of them are probes
LEAST_KL, LEAST_LEFT = 1e-9, 1e-12  # nats, and the square of weight left out, of rounding
LAST = 256  # tokens of a sequence in which sites read less, one after the other
WORD = 4  # bytes of a row of a sketch that are read at once
FILLS = (*(i / 8 for i in range(9)), 1.25, 1.5, 2.0)  # that heads may have, see `PagePlan.fill`
LEAST_PAGES = 16  # behind which a probe says something


@dataclass(frozen=True)
class PagingOptions:
    """What `calibrate` needs beside a model and a plan.

    share: of the bytes of sealed tokens that a step reads on average. mass: of attention's weight that is to be kept,
    with at most that share; None: the share is used up. tokens: of a page. sketch: bytes of codes of a token in each
    latent head. least, limit: see `PagePlan`. texts: calibration texts, of which `sequences` sequences of `context`
    tokens are read.
    """

    share: float = 1 / 8
    mass: float | None = None
    tokens: int = 8
    sketch: int = 12
    least: int = 512
    limit: float = 1.0
    texts: tuple[str, ...] = ("topics",)
    sequences: int = 2
    context: int = 4096

    @property
    def room(self) -> float:
        """Share of the pages that a query may read: more than the mean, less than all."""
        return min(4 * self.share, (1 + self.share) / 2)

    def check(self, block: int, exact: int) -> None:
        """Raise FhoptError for values that cannot work, before anything slow starts.

        block: of the plan. exact: tokens that it keeps outside of latents, sinks and window.
        """
        if not 0 < self.share <= 1 or not 0 < self.limit <= 1 or not 0 < (self.mass or 1.0) <= 1:
            raise FhoptError(
                f"pages {self.share:g}, mass {self.mass}, limit {self.limit:g}: expected shares above 0 and at most 1, "
                "such as --pages 1/8 or --mass 0.99."
            )
        if self.tokens < 1 or block % self.tokens:
            raise FhoptError(f"pages of {self.tokens} tokens: expected a divisor of the plan's block, {block}.")
        if self.sketch < WORD or self.sketch % WORD:
            raise FhoptError(f"sketches of {self.sketch} bytes: expected a multiple of {WORD}.")
        if self.context < self.needed(exact, block) or self.sequences < 1:
            raise FhoptError(
                f"{self.sequences} sequences of {self.context} tokens: expected one or more, of at least "
                f"{self.needed(exact, block)} tokens, so that there are pages to choose from. Use longer sequences."
            )

    def needed(self, exact: int, block: int) -> int:
        """Tokens of a sequence that has pages to choose from, sealed in blocks."""
        return exact + -(-LEAST_PAGES * self.tokens // block) * block + PIECE + LAST


def read_options(pages: str | None, mass: str | None, texts: tuple[str, ...]) -> PagingOptions | None:
    """From shares as a user writes them; None where neither is given. With a mass alone, half of the pages may be read.

    Raises FhoptError.
    """
    if pages is None and mass is None:
        return None
    share = MASS_SHARE if pages is None else parse_share(pages)
    return PagingOptions(share=share, mass=None if mass is None else parse_share(mass), texts=texts)


def for_model(loaded: LoadedModel, options: PagingOptions, block: int, exact: int) -> PagingOptions:
    """`options` with no longer sequences than the model has positions for; block, exact: as of `PagingOptions.check`.

    Raises FhoptError, before anything slow starts, where positions or texts do not suffice.
    """
    positions = positions_of(loaded.language_model())
    if positions is not None and positions < options.needed(exact, block):
        raise FhoptError(
            f"{loaded.name} has {positions} positions; expected {options.needed(exact, block)} or more to calibrate "
            "pages on. Leave --pages and --mass out."
        )
    found = options if positions is None else replace(options, context=min(options.context, positions))
    found.check(block, exact)
    data.calibration_ids(loaded.tokenizer, found.texts, count=found.sequences, length=found.context)
    return found


def parse_share(text: str) -> float:
    """A share from "1/8", "0.125" or "12.5%". Raises FhoptError."""
    try:
        number = text.strip()
        share = float(Fraction(number[:-1]) / 100 if number.endswith("%") else Fraction(number))
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share <= 1:
        raise FhoptError(f"{text!r} is no share; expected one such as 1/8, 0.125 or 12.5%, above 0 and at most 1.")
    return share


# --------------------------------------------------------------------------------------------------- sketches


class _Moments:
    """Sums over what one site's queries ask of each channel of its key latents, and over these, [J, R] each."""

    def __init__(self) -> None:
        self.energy: Tensor | None = None
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, latents: Latents, scale: float, softcap: float
    ) -> None:
        """See a call."""
        absorbed = ops.absorb(query, latents.key.decode).double()
        found = absorbed.unflatten(1, (latents.key.rows.shape[1], -1)).square().sum((0, 2, 3))
        self.energy = found if self.energy is None else self.energy + found

    def see(self, latents: Tensor) -> None:
        """Count latents [1,J,T,R]."""
        x = latents.double()
        self.count += x.shape[2]
        self.sums, self.squares = self.sums + x.sum((0, 2)), self.squares + x.square().sum((0, 2))

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Of the latents that were seen."""
        mean = self.sums / self.count
        variance = (self.squares - self.count * mean.square()) / max(1, self.count - 1)
        return mean, variance.clamp(min=1e-12).sqrt()


@torch.inference_mode()
def with_sketches(model: Any, plan: LatentPlan, ids: Tensor, size: int) -> LatentPlan:
    """The plan with sketches of at most `size` bytes of codes for all that decoders write, from token ids [N, T].

    Raises FhoptError when the plan is not for this model, or its attention cannot choose pages.
    """
    plan, seen = replace(plan, pages=None), dict[str, _Moments]()
    with switched(model, plan):
        for row in ids:
            cache = new_cache(model, plan)
            layers = [layer for layer in cache.layers if isinstance(layer, LatentLayer)]
            for layer in layers:
                layer.observer = seen.setdefault(layer.site.site.name, _Moments())
            for piece in row.split(PIECE):
                model(piece[None].to(model.device), **{cache_argument(model): cache}, use_cache=True)
            for layer in layers:
                seen[layer.site.site.name].see(layer.key_rows.latents(0, layer.sealed))
    if all(moments.energy is None for moments in seen.values()):
        raise FhoptError(
            f"no attention of {type(model).__name__} could be watched: it is written out in the model's code, where "
            "pages are not chosen. Use the plan without pages."
        )
    made = {name: _sketch(moments, size) for name, moments in seen.items()}
    return replace(plan, sites=tuple(replace(s, sketch=made.get(s.site.name)) for s in plan.sites))


def _sketch(moments: _Moments, size: int) -> SketchPlan | None:
    """By what a site's latents are like; channels by what an error would do to logits. None: there are too few."""
    if moments.energy is None:
        return None
    mean, deviation = moments.mean_and_deviation()
    wrong, order = (moments.energy * deviation.square()).sort(-1, descending=True)
    tiers = sketch_tiers(wrong.sum(0), size)
    if not tiers:
        return None
    kept = order[:, : sum(tier.width for tier in tiers)]
    return SketchPlan(kept.contiguous().cpu(), mean.float().cpu(), deviation.float().cpu(), tiers)


def sketch_tiers(wrong: Tensor, size: int) -> tuple[Tier, ...]:
    """Bits of channels by what each does to the square of a logit's error, falling, [R]: least error in `size` bytes.

    Every tier is whole words of four bytes, which is how rows are read. Empty where no tier fits.
    """
    steps = [TIER_QUANTUM if bits > 2 else 2 * TIER_QUANTUM for bits in SKETCH_BITS]
    ranges = [range(0, min(len(wrong), 8 * size // b) + 1, n) for b, n in zip(SKETCH_BITS, steps, strict=True)]
    best: tuple[float, tuple[Tier, ...]] = (math.inf, ())
    for widths in itertools.product(*ranges):
        given = list(zip(SKETCH_BITS, widths, strict=True))[::-1]
        if sum(widths) > len(wrong) or sum(b * w for b, w in given) > 8 * size or not any(widths):
            continue
        left = torch.tensor([pages.LOST[b] ** 2 for b, w in given for _ in range(w)], dtype=wrong.dtype)
        error = float((wrong[: len(left)].cpu() * left).sum() + wrong[len(left) :].sum())
        if error < best[0]:
            best = error, tuple(Tier(b, w, STEPS[b]) for b, w in given if w)
    return best[1]


# --------------------------------------------------------------------------------------------------- probes


@dataclass
class Curves:
    """What one site leaves out with each of LIFTS, as shares of all weight, summed over queries, sequences and units.

    left: with each of LIFTS; squares: its squares; read: the share of pages that were read. by_mass, used: the first
    and the last with each of MASSES. cost: nats per token and square of the weight left out; 1 where it was not
    measured. errors [FILLS, H]: squared, of what heads give. echo: the same of the second half of an `echo`.
    """

    left: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    read: Tensor = field(default_factory=lambda: torch.zeros(len(LIFTS), dtype=torch.float64))
    by_mass: Tensor = field(default_factory=lambda: torch.zeros(len(MASSES), dtype=torch.float64))
    used: Tensor = field(default_factory=lambda: torch.zeros(len(MASSES), dtype=torch.float64))
    count: int = 0
    cost: float = 1.0
    errors: Tensor | float = 0.0
    echo: Curves | None = None

    @property
    def fill(self) -> tuple[float, ...]:
        """Of each head, the one of FILLS with the least error."""
        return tuple(FILLS[i] for i in self.errors.argmin(0).tolist()) if isinstance(self.errors, Tensor) else ()

    def add(self, expected: Tensor, weights: Tensor, room: float) -> None:
        """Probes: expected and true weights [B,U,S,P] of pages, shares of all weight. room: share of pages at most."""
        count = expected.shape[-1]
        best, order = expected.double().sort(-1, descending=True)
        kept = torch.nn.functional.pad(weights.double().gather(-1, order).cumsum(-1), (1, 0))  # [..., P+1]
        most = page_ops.pages_read(count, room, page_ops.FEWEST)

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
        """Mean share of pages that is read with one of LIFTS, or ALL."""
        return 1.0 if at == ALL else float(self.read[at]) / self.count

    def left_out(self, at: int) -> float:
        """Mean weight that is left out with one of LIFTS, or ALL."""
        return 0.0 if at == ALL else float(self.left[at]) / self.count

    def loss(self, at: int) -> float:
        """What that costs, in nats per token: the mean of text and echo."""
        if at == ALL:
            return 0.0
        own = self.cost * float(self.squares[at]) / self.count
        return own if self.echo is None else (own + self.echo.loss(at)) / 2

    def lift_for(self, share: float) -> int:
        """Which of LIFTS reads a share of the pages that is nearest to this one."""
        return int((self.read / max(1, self.count) - share).abs().argmin())

    def mass_for(self, left_out: float) -> int:
        """Which of MASSES is the least that leaves out at most so much; the last leaves out nothing."""
        means = (self.by_mass / self.count).tolist()
        return next(i for i, mean in enumerate(means) if mean <= left_out or i == len(MASSES) - 1)


def _needed_by_lift(best: Tensor, most: int) -> Iterator[Tensor]:
    """How many pages each query reads, of expected weights in falling order [..., P], with each of LIFTS: [..., 1]."""
    count = best.shape[-1]
    fewest = torch.arange(count) < page_ops.FEWEST
    for lift in LIFTS:
        yield ((best * count >= lift) | fewest).sum(-1, keepdim=True).clamp(max=most)


def _needed_by_mass(best: Tensor, mass: float) -> Tensor:
    """The same with a mass: the others have at most the rest of the weight."""
    if mass == 1:
        return torch.full_like(best[..., :1], best.shape[-1], dtype=torch.int64)
    before = best.cumsum(-1) - best
    return (best.sum(-1, keepdim=True) - before > 1 - mass).sum(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class _Everything:
    """Attention of probes to all tokens: every query is taken to see all sealed tokens and all open ones before it.

    logits [B,H,S,T] of the sealed ones; near: (output [B,H,S,E], lse [B,H,S]) of the open ones.
    """

    logits: Tensor
    near: tuple[Tensor, Tensor]

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, latents: Latents, **numbers: float) -> _Everything:
        """query [B,H,S,D], open keys and values; numbers: scale and softcap."""
        far = far_logits(query, latents, **numbers)
        return _Everything(far, open_part(query, key, value, latents, **numbers))

    def page_weights(self, tokens: int) -> Tensor:
        """Share of each page in all weight: [B,H,S,P]."""
        sums = ops.page_logits(self.logits, tokens)
        total = torch.logaddexp(sums.logsumexp(-1), self.near[1])
        return (sums - total.unsqueeze(-1)).exp()


def fill_errors(
    everything: _Everything, absorbed: Tensor, latents: Latents, estimates: Tensor, index: PageIndex
) -> Tensor:
    """Squared errors of what each head gives with each of FILLS, where it reads the pages that `index` lets it choose.

    absorbed [B,H,S,R]: queries; estimates [B,H,S,P] of `index` -> [FILLS, H].
    """
    logits, near, key, value = everything.logits, everything.near, latents.key, latents.value
    heads, values = absorbed.shape[1], value.rebuild()
    expected = page_ops.expected_weights(estimates, index.units, near[1])
    chosen = pages.keep_best(expected, index, index.count)
    seen = pages.page_mask(chosen, index.tokens, heads, logits.shape[-1])
    odds = page_ops.odds_left_out(estimates, chosen)

    def part(x: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = ops._softmax(x)
        return ops.grouped_mix(weights, values.to(weights.dtype)), lse

    read, every = part(logits.masked_fill(~seen, -math.inf)), ops.merge([near, part(logits)])
    rows: Any = (key.rows, key.scale, value.rows, value.scale, None, None, index.tokens)
    tiers: Any = ops.tier_options(key.tiers, value.tiers)
    mean = mean_values(absorbed, *rows, **tiers).to(read[0].dtype)
    mean = mean.repeat_interleave(heads // mean.shape[1], 1)
    errors = []
    for fill in FILLS:
        parts = torch.full((heads,), fill, device=absorbed.device).log()
        found = ops.merge([near, page_ops.stand_in(*read, ops.expand(mean, value.decode), odds, parts)])
        errors.append((found - every).double().square().sum((0, 2, 3)))
    return torch.stack(errors)


class _Probe:
    """Watches the attention of one site. fills: also how well the mean of values stands in for pages left out."""

    def __init__(self, curves: Curves, options: PagingOptions, fills: bool = True) -> None:
        self.curves, self.options, self.fills = curves, options, fills

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, latents: Latents, scale: float, softcap: float
    ) -> None:
        """See the last QUERIES queries of a call."""
        index, query = latents.index, query[:, :, -QUERIES:]
        if index is None or index.count < LEAST_PAGES:
            return
        absorbed = ops.absorb(query, latents.key.decode)
        numbers: Any = dict(scale=scale, softcap=softcap)
        estimates = ops.page_logits(pages.token_logits(absorbed, index, None, None, **numbers), index.tokens)
        everything = _Everything.of(query, key, value, latents, **numbers)
        weights = everything.page_weights(index.tokens)
        expected = page_ops.expected_weights(estimates, index.units, everything.near[1])
        self.curves.add(expected, weights.unflatten(1, (index.units, -1)).mean(2), self.options.room)
        if self.fills:
            lift = LIFTS[self.curves.lift_for(self.options.share)]
            asked = replace(index, share=self.options.room, lift=lift)
            self.curves.errors += fill_errors(everything, absorbed, latents, estimates, asked)


@torch.inference_mode()
def measure(
    model: Any, plan: LatentPlan, ids: Tensor, options: PagingOptions, progress: Callable[[int], None] = lambda n: None
) -> dict[str, Curves]:
    """What each site of `plan` that has sketches leaves out, and what that costs, on token ids [N, T] and their echo.

    progress counts sequences and, in the first one and in the echo, sites. Raises FhoptError when the plan is not for
    this model.
    """
    names = [site.site.name for site in plan.sites if site.sketch is not None]
    found, echoes = {name: Curves() for name in names}, {name: Curves() for name in names}
    everywhere = tuple(0.5 if site.sketch is not None else 1.0 for site in plan.sites)
    plan = replace(plan, pages=PagePlan(options.tokens, everywhere, (1.0,) * len(everywhere), least=0))
    name, end = cache_argument(model), ids.shape[1] - LAST
    with switched(model, plan):
        for number, row in enumerate([*ids, echo(ids[0])]):
            repeats = number == len(ids)
            seen = echoes if repeats else found
            cache = new_cache(model, plan, each_query=False)
            probes = {x: _Probe(seen[x.site.site.name], options, fills=not repeats) for _, x in _choosing(cache)}
            for start in range(0, end, PIECE):
                stop = min(end, start + PIECE)
                looks = not repeats or stop - QUERIES >= len(row) // 2  # of an echo, at what only copying knows
                for layer, probe in probes.items():
                    layer.observer = probe if looks else None
                model(row[None, start:stop].to(model.device), **{name: cache}, use_cache=True)
            progress(1)
            if number == 0 or repeats:
                _measure_costs(model, cache, row[end:], found, seen, options, progress)
    return {name: replace(curves, echo=echoes[name] if echoes[name].count else None) for name, curves in found.items()}


def echo(ids: Tensor) -> Tensor:
    """Token ids [T] of which the second half repeats the first: some of those given, in an order without meaning,
    behind the first of all, which may be one that a model wants in front."""
    half = len(ids) // 2
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    said = ids[order[order != 0][:half]]
    return torch.cat([ids[:1], said[1:], said, ids[: len(ids) - 2 * half]])


def _choosing(cache: Any) -> list[tuple[int, LatentLayer]]:
    """Layers of a cache that have sketches, and where they are."""
    return [(i, x) for i, x in enumerate(cache.layers) if isinstance(x, LatentLayer) and x.sketches is not None]


def _measure_costs(
    model: Any, cache: Any, ids: Tensor, found: Mapping[str, Curves], seen: Mapping[str, Curves],
    options: PagingOptions, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """KL of the predictions on token ids [LAST] behind a cache, when one site after the other reads its share.

    found: of texts, by which sites choose; seen: of the sequence, which get the costs.
    """
    choosing = _choosing(cache)
    for _, layer in choosing:
        layer.observer, layer.share = None, 1.0
    expected = _predictions(model, copy.deepcopy(cache), ids)
    for at, layer in choosing:
        told, curves = found[layer.site.site.name], seen[layer.site.site.name]
        nearest = told.lift_for(options.share)
        trial = copy.deepcopy(cache)
        chooses = trial.layers[at]
        chooses.share, chooses.lift, chooses.each_query = options.room, LIFTS[nearest], True
        if options.limit == 1:
            chooses.fill = pages.log_fill(told.fill, layer.device)
        changed = _predictions(model, trial, ids)
        kl = float((expected.exp() * (expected - changed)).sum(-1).mean())
        if curves.count:
            curves.cost = max(kl, LEAST_KL) / max(float(curves.squares[nearest]) / curves.count, LEAST_LEFT)
        progress(1)


def _predictions(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [LAST, V] behind a cache, in steps of what a block seals, float64."""
    name, step = cache_argument(model), cache.plan.block
    cuts = range(0, len(ids), step)
    parts = [model(ids[None, i : i + step].to(model.device), **{name: cache}, use_cache=True).logits[0] for i in cuts]
    return torch.cat(parts).double().log_softmax(-1)


# --------------------------------------------------------------------------------------------------- budgets


def share_out(curves: Mapping[str, Curves], sites: Sequence[SitePlan], share: float) -> dict[str, int]:
    """Which of LIFTS, or ALL, each site gets, so that `share` of the bytes of all sealed tokens is read on average.

    Always the largest fall of cost per byte next, from half the share on: fewer pages would say little about longer
    contexts. Sites that were not measured read all their pages, and count. Raises FhoptError where the least that sites
    can read is more.
    """
    size = {site.site.name: site.token_bytes() for site in sites}
    now = {name: _first(found, share / 2) if found.count else ALL for name, found in curves.items()}
    now |= {name: ALL for name in size if name not in now}
    budget, used = share * sum(size.values()), sum(size[n] * _share(curves.get(n), now[n]) for n in size)
    if used > budget * (1 + 1e-9):
        raise FhoptError(
            f"pages {share:g}: sites read at least {used / sum(size.values()):.3g} of their bytes. Ask for more."
        )
    while gains := [
        gain for n in size if now[n] < ALL for gain in _gains(curves[n], now[n], size[n], budget - used, n)
    ]:
        _, name, at = max(gains)
        used += size[name] * (curves[name].share(at) - curves[name].share(now[name]))
        now[name] = at
    return now


def _share(curves: Curves | None, at: int) -> float:
    return 1.0 if curves is None else curves.share(at)


def _first(curves: Curves, share: float) -> int:
    """The least of LIFTS that reads at most that share; the largest, where each reads more."""
    return max([i for i in range(len(LIFTS)) if curves.share(i) <= share], default=0)


def _gains(curves: Curves, now: int, size: int, room: float, name: str) -> list[tuple[float, str, int]]:
    """(fall of cost per byte, name, which) for all lower LIFTS of a site, and ALL, that there is room for."""
    steps = [(n, size * (curves.share(n) - curves.share(now))) for n in range(now + 1, ALL + 1)]
    fits = [(n, more) for n, more in steps if 0 < more <= room * (1 + 1e-9)]
    return [((curves.loss(now) - curves.loss(n)) / more, name, n) for n, more in fits]


def with_pages(plan: LatentPlan, curves: Mapping[str, Curves], options: PagingOptions) -> LatentPlan:
    """The plan with pages by what was measured; provenance says what they leave out. Raises FhoptError."""
    given = share_out(curves, plan.sites, options.share)
    names = [site.site.name for site in plan.sites]
    masses = dict.fromkeys(names, 1.0)
    measured = {name: curves[name] for name in names if name in curves and curves[name].count}
    if options.mass is not None:
        masses |= {name: MASSES[found.mass_for(1 - options.mass)] for name, found in measured.items()}
    shares = tuple(1.0 if given[name] == ALL else options.room for name in names)
    lifts = tuple(0.0 if given[name] == ALL else LIFTS[given[name]] for name in names)
    fill = tuple(curves[s.site.name].fill if s.site.name in measured else (0.0,) * s.site.heads for s in plan.sites)
    kept = tuple(masses[n] for n in names)
    paged = PagePlan(
        options.tokens, shares, kept, options.least, options.limit, fill if options.limit == 1 else (), lifts
    )
    told = {
        "share": options.share,
        "mass": options.mass,
        "read": {name: found.share(given[name]) for name, found in measured.items()},
        "left_out": {name: found.left_out(given[name]) for name, found in measured.items()},
        "costs": {name: found.cost for name, found in measured.items()},
        "echo_costs": {name: found.echo.cost for name, found in measured.items() if found.echo is not None},
    }
    return replace(plan, pages=paged).with_provenance(pages=told)


def calibrate(loaded: LoadedModel, plan: LatentPlan, options: PagingOptions, progress: Progress = silent) -> LatentPlan:
    """`plan` with pages, calibrated on the first halves of the texts. Raises FhoptError."""
    options.check(plan.block, plan.sinks + plan.window)
    model = loaded.language_model()
    check_length(model, options.context)
    ids = data.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)
    done, total = 0, 2 + len(ids) + 2 * sum(site.site.kind == "self" for site in plan.sites)

    def count(parts: int) -> None:
        nonlocal done
        done += parts
        progress("pages", done, total)

    sketched = with_sketches(model, plan, ids, options.sketch)
    count(1)
    return with_pages(sketched, measure(model, sketched, ids, options, count), options)
