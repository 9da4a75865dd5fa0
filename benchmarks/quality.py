"""Measure loss against bytes: plans and other small KV caches, on the same tokens with the same exact tokens.

    python benchmarks/quality.py                     benchmarks/results/quality.json, quality.png, docs/quality.md
    python benchmarks/quality.py --quick             one short text, one ratio, two methods (also QUICK=1); no page
    python benchmarks/quality.py --plans FOLDER      saved plans FOLDER/8x, ... in place of calibration

Loss is measured against the exact cache: the increase of perplexity, and KL(exact || other) of the next token. The
exact model reads each text once; its log-probabilities are stored; every other cache reads it in the same calls.
Bytes are counted at 8,192 tokens, everything included: quantized values, scales, zero points, attention sinks, residual
window (competitors.py has the formulas). Plans and low-rank bases come from the same calibration tokens; the mean is
over texts of other kinds, and the other half of the calibration text is reported separately.

Other methods have fixed sizes. A plan is compared with each method's smallest size that is at least as large.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from competitors import (
    PACKAGES,
    Competitor,
    Kivi,
    RoundToNearest,
    Schedule,
    Sealing,
    Shape,
    Transformers,
    head_moments,
    low_rank,
    rank_for,
)
from recording import ROOT, Row, commit, is_quick, machine, record, screen, versions
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor

from fhopt.calibration import options as calibration_options
from fhopt.calibration import run
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, paired, read_steps, switched
from fhopt.evaluation.statistics import Comparison, TokenCosts
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.plan.latent_plan import LatentPlan
from fhopt.texts import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

PAGE = ROOT / "docs" / "quality.md"
COMMAND = "make bench-quality"
OURS = "fhopt"
TEXTS = ("source", "license", "docstrings", "scripture")
RATIOS = (3.2, 4.0, 5.3, 8.0, 12.0)
CONTEXT = 2048
LEAST_TOKENS = 512  # of a text: with fewer, most of what is read is still exact
COUNTED_AT = 8192
COMPARABLE = 1.65  # a method with more bytes than this many times the plan's is listed, but is no baseline
QUICK_CONTEXT, QUICK_RATIO = 512, 8.0


@dataclass(frozen=True)
class Implementation:
    """A cache to measure: of a plan or of another method. bytes_held: of one sequence of COUNTED_AT tokens."""

    name: str
    family: str
    bytes_held: int
    ratio: float
    plan: LatentPlan | None = None
    rival: Competitor | None = None

    def new_cache(self, model: Any) -> Any:
        """An empty cache."""
        return new_cache(model, self.plan) if self.rival is None else self.rival.new_cache(model)

    @property
    def token_bytes(self) -> float:
        """Bytes per token, with a share of everything that is held."""
        return self.bytes_held / COUNTED_AT

    def is_larger(self, other: Implementation) -> bool:
        """Whether it holds at least as much as `other`."""
        return self.bytes_held >= other.bytes_held


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids [T]; `is_unseen` when its kind is not that of the calibration text."""

    name: str
    ids: Tensor
    is_unseen: bool


class Result:
    """The costs of one implementation on each text."""

    def __init__(self, impl: Implementation) -> None:
        self.impl = impl
        self.costs: dict[Text, TokenCosts] = {}

    @cached_property
    def by_text(self) -> dict[Text, Comparison]:
        """Text by text; to be read when all are measured."""
        return {text: costs.compare() for text, costs in self.costs.items()}

    @cached_property
    def mean(self) -> Comparison:
        """Over the tokens of all unseen texts."""
        parts = [costs for text, costs in self.costs.items() if text.is_unseen]
        return TokenCosts(
            torch.cat([c.exact for c in parts], 1),
            torch.cat([c.plan for c in parts], 1),
            torch.cat([c.kl for c in parts], 1),
        ).compare()

    @property
    def worst(self) -> tuple[Text, Comparison]:
        """The unseen text with the largest increase of perplexity."""
        return max(((t, c) for t, c in self.by_text.items() if t.is_unseen), key=lambda pair: pair[1].increase_percent)


# --------------------------------------------------------------------------------------------------- the command


@click.command()
@click.option("--ratio", "ratios", type=float, multiple=True, help="Sizes of plans; 3.2, 4, 5.3, 8, 12 when not given.")
@click.option("--texts", multiple=True, metavar="TEXT", help="A further text: a file, a folder, or a built-in name.")
@click.option("--plans", type=click.Path(path_type=Path), metavar="FOLDER", help="Saved plans: FOLDER/8x and so on.")
@click.option("--context", default=CONTEXT, show_default=True, help="Tokens of each text.")
@click.option("--quick", is_flag=True, help="A small version, of under a minute.")
def main(ratios: tuple[float, ...], texts: tuple[str, ...], plans: Path | None, context: int, quick: bool) -> None:
    """Measure plans and other methods on SmolLM2-135M-Instruct, and write the figures."""
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )  # ninja: quanto
    quick = quick or is_quick()
    options = calibration_options.FitOptions()
    if quick:
        options = dataclasses.replace(options, sequences=5, rate_sequences=2, context=256)
        context = min(context, QUICK_CONTEXT)
    try:
        loaded = load_model("demo")
        chosen = tuple(sorted(ratios)) or ((QUICK_RATIO,) if quick else RATIOS)
        read = read_texts(loaded, (TEXTS[:1] if quick else TEXTS) + texts, options.texts, context, with_seen=not quick)
        fitted = load_plans(plans, chosen) if plans is not None else fit_plans(loaded, chosen, options)
        impls = ours(fitted) + rivals(loaded, fitted, options, quick)
        results = measure(loaded.language_model(), impls, read, next(iter(fitted.values())))
    except FhoptError as error:
        raise click.ClickException(str(error)) from error
    record("quality", rows(results), lambda figure: draw(figure, results), summary(results))
    screen().print(contest_table(results))
    if not quick:
        write_page(PAGE, results)
        print(f"quality: {PAGE.relative_to(ROOT)}")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, as a function of (done, total)."""
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def read_texts(
    loaded: LoadedModel, names: Sequence[str], calibration: Sequence[str], context: int, with_seen: bool
) -> list[Text]:
    """The held-out half of each text, all of it where the half is short; at most `context` tokens.

    A built-in text that is not installed, or one that is too short, is left out with a message.
    """
    texts = []
    for name in dict.fromkeys([*names, *(calibration if with_seen else [])]):
        is_unseen = name not in calibration
        try:
            ids = _tokens(loaded, name, context, whole=is_unseen)
        except FhoptError as error:
            if name not in TEXTS:
                raise
            screen().print(f"{name} is left out: {error}", markup=False)
            continue
        texts.append(Text(Path(name).name, ids, is_unseen))
    if not any(text.is_unseen for text in texts):
        raise FhoptError(f"no text is left but {', '.join(calibration)}, which calibrates. Give another with --texts.")
    return texts


def _tokens(loaded: LoadedModel, name: str, context: int, whole: bool) -> Tensor:
    """Up to `context` token ids [T] of the text called `name`."""
    text = tokens.read_text(name)
    ids = _tokenized(loaded, tokens.halves(text)[1], context)
    if len(ids) < context and whole:
        ids = _tokenized(loaded, text, context)
    if len(ids) < min(LEAST_TOKENS, context):
        raise FhoptError(f"{name} has {len(ids)} tokens; expected at least {LEAST_TOKENS}. Give a longer text.")
    return ids


def _tokenized(loaded: LoadedModel, text: str, context: int) -> Tensor:
    start = text[: tokens.CHARACTERS_PER_TOKEN * context]
    return torch.as_tensor(loaded.tokenizer(start, return_tensors="pt", verbose=False).input_ids[0][:context])


# --------------------------------------------------------------------------------------------------- what is measured


def load_plans(folder: Path, ratios: Iterable[float]) -> dict[float, LatentPlan]:
    """The plans `folder`/8x and so on. Raises FhoptError when one is absent."""
    return {ratio: LatentPlan.load(folder / f"{ratio:g}x") for ratio in ratios}


def fit_plans(
    loaded: LoadedModel, ratios: Iterable[float], options: calibration_options.FitOptions
) -> dict[float, LatentPlan]:
    """A plan for each ratio, from statistics that are collected once."""
    with progress_bar("calibrate") as bar:
        measured = run.measure(loaded, options, lambda stage, done, total: bar(done, total))
    return {
        ratio: run.plan_for(measured, dataclasses.replace(options, ratio=ratio))
        for ratio in track(ratios, "fit", transient=True)
    }


def ours(plans: dict[float, LatentPlan]) -> list[Implementation]:
    """The plans, as implementations. Raises FhoptError when they do not keep the same tokens exact."""
    if len({(p.sinks, p.recent, p.block) for p in plans.values()}) > 1:
        raise FhoptError("the plans differ in sinks, recent or block; expected the same exact tokens in all of them.")
    return [
        Implementation(OURS, OURS, plan.cache_bytes(COUNTED_AT), plan.ratio(COUNTED_AT), plan=plan)
        for plan in plans.values()
    ]


def rivals(
    loaded: LoadedModel, plans: dict[float, LatentPlan], options: calibration_options.FitOptions, quick: bool
) -> list[Implementation]:
    """Return the other methods, with the exact tokens of the plans; without those whose package is missing."""
    plan = next(iter(plans.values()))
    schedule = Schedule(plan.sinks, plan.recent, plan.block)
    shape = Shape.of(loaded.language_model())
    found: list[Competitor] = [Sealing(Kivi(bits), schedule) for bits in ((2,) if quick else (4, 3, 2))]
    if not quick:
        found += [Sealing(RoundToNearest(bits), schedule) for bits in (8, 4)]
        for backend in PACKAGES:
            found += _installed([Transformers(backend, bits, schedule.first_step) for bits in (4, 2)])
    ranks = {rank_for(ratio, shape, schedule, COUNTED_AT) for ratio in plans}
    moments = _moments(loaded, options, plan.sinks)
    found += [Sealing(low_rank(moments, rank), schedule) for rank in sorted(ranks, reverse=True)]
    exact = COUNTED_AT * shape.exact_token_bytes
    sizes = [rival.cache_bytes(shape, COUNTED_AT) for rival in found]
    return [Implementation(r.name, r.family, size, exact / size, rival=r) for r, size in zip(found, sizes, strict=True)]


def _installed(found: Iterable[Transformers]) -> list[Transformers]:
    there = []
    for rival in found:
        if rival.missing is None:
            there.append(rival)
        else:
            screen().print(rival.missing, markup=False)
    return there


def _moments(loaded: LoadedModel, options: calibration_options.FitOptions, sinks: int) -> list[tuple[Tensor, Tensor]]:
    """Second moments of each head on the tokens that calibrate the plans."""
    ids = tokens.calibration_ids(loaded.tokenizer, options.texts, count=options.sequences, length=options.context)
    with progress_bar("second moments") as bar:
        return head_moments(loaded.language_model(), ids, sinks, lambda done: bar(done, len(ids)))


def measure(model: Any, impls: Sequence[Implementation], texts: Sequence[Text], steps: LatentPlan) -> list[Result]:
    """Every implementation on every text, in the steps of the plan `steps`."""
    results = [Result(impl) for impl in impls]
    with progress_bar("texts and caches") as bar:
        for index, text in enumerate(texts):
            log_p = exact_log_probabilities(model, text.ids, steps)
            for done, result in enumerate(results, 1):
                result.costs[text] = costs(model, text.ids, result.impl, log_p, steps)
                bar(index * len(results) + done, len(texts) * len(results))
    return results


@torch.inference_mode()
def exact_log_probabilities(model: Any, ids: Tensor, steps: LatentPlan) -> Tensor:
    """log p of every next token [T-1, V] with the exact cache, float32."""
    with switched(model, None):
        read = read_steps(model, ids[None, :-1], [new_cache(model, None)], steps)
        return torch.cat([logits[0].double().log_softmax(-1).float() for _, (logits,) in read])


@torch.inference_mode()
def costs(model: Any, ids: Tensor, impl: Implementation, log_p: Tensor, steps: LatentPlan) -> TokenCosts:
    """Return the cost of each token of ids [T] with the cache of `impl`, and the exact one."""
    with switched(model, impl.plan):
        parts = [
            paired(log_p[start : start + logits.shape[1]], logits[0], ids[start + 1 :])
            for start, (logits,) in read_steps(model, ids[None, :-1], [impl.new_cache(model)], steps)
        ]
    return TokenCosts(*torch.cat(parts, -1)[:, None])


# --------------------------------------------------------------------------------------------------- who beats whom


@dataclass(frozen=True)
class Contest:
    """A plan, and the smallest size of a family that is not smaller than the plan."""

    plan: Result
    rival: Result

    @property
    def bytes_ratio(self) -> float:
        """Return the bytes of the other method relative to the plan's."""
        return self.rival.impl.bytes_held / self.plan.impl.bytes_held

    @property
    def is_won(self) -> bool:
        """Whether the plan costs less by both measures, over all unseen texts."""
        mine, other = self.plan.mean, self.rival.mean
        return mine.kl < other.kl and mine.increase_percent < other.increase_percent


def contests(results: Sequence[Result]) -> list[Contest]:
    """Each plan against each family, those of like size first."""
    found = []
    for plan in results:
        if plan.impl.family != OURS:
            continue
        nearest: dict[str, Result] = {}
        for rival in results:
            family = rival.impl.family
            if family == OURS or not rival.impl.is_larger(plan.impl):
                continue
            if family not in nearest or nearest[family].impl.is_larger(rival.impl):
                nearest[family] = rival
        found += [Contest(plan, rival) for rival in sorted(nearest.values(), key=lambda r: r.impl.bytes_held)]
    return found


def baselines(results: Sequence[Result]) -> dict[str, Result]:
    """For each plan, by its size: of the other methods of comparable size in its contests, the best by KL."""
    best: dict[str, Result] = {}
    for contest in contests(results):
        key = size_name(contest.plan.impl)
        if contest.bytes_ratio <= COMPARABLE and (key not in best or contest.rival.mean.kl < best[key].mean.kl):
            best[key] = contest.rival
    return best


def size_name(impl: Implementation) -> str:
    """`4x`, `3.09x`."""
    return f"{impl.ratio:.3g}x"


def rows(results: Sequence[Result]) -> list[Row]:
    """The figures of each implementation on each text; the baseline of a plan is that of `baselines`, same text."""
    best, out = baselines(results), []
    for result in results:
        rival = best.get(size_name(result.impl)) if result.impl.family == OURS else None
        for text, found in result.by_text.items():
            out += _text_rows(result.impl, text, found, rival.by_text[text] if rival is not None else None)
    return out


def _text_rows(impl: Implementation, text: Text, found: Comparison, rival: Comparison | None) -> list[Row]:
    case, metric = f"{text.name}@{size_name(impl)}", "perplexity_increase_percent"
    low, high = found.increase_percent_ci or (math.nan, math.nan)

    def row(metric: str, value: float, unit: str, baseline: float | None = None) -> Row:
        return Row(case, impl.name, metric, value, unit, baseline, gain(baseline, value))

    return [
        row(metric, found.increase_percent, "%", None if rival is None else rival.increase_percent),
        row(f"{metric}_low", low, "%"),
        row(f"{metric}_high", high, "%"),
        row("kl", found.kl, "nats/token", None if rival is None else rival.kl),
        row("perplexity", found.plan, ""),
        row("bytes_per_token", impl.token_bytes, "B"),
    ]


def gain(baseline: float | None, value: float) -> float | None:
    """baseline / value; None where a ratio of the two says nothing."""
    return baseline / value if baseline is not None and min(baseline, value) > 0 else None


# --------------------------------------------------------------------------------------------------- screen, picture


def summary(results: Sequence[Result]) -> Table:
    """One line for each implementation."""
    unseen = sum(text.is_unseen for text in results[0].by_text)
    table = Table(title=f"Loss against bytes, {unseen} unseen texts", title_justify="left")
    for heading, justify in zip(SUMMARY, ("left", *("right",) * 6), strict=True):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for result in results:
        table.add_row(*_summary_cells(result))
    return table


SUMMARY = ("cache", "size", "bytes a token", "perplexity, mean", "95 % interval", "worst text", "KL, mean")


def _summary_cells(result: Result) -> tuple[str, ...]:
    text, worst = result.worst
    mean = result.mean
    return (
        result.impl.name,
        size_name(result.impl),
        f"{result.impl.token_bytes:,.0f}",
        _percent(mean.increase_percent),
        _interval(mean),
        f"{_percent(worst.increase_percent)} ({text.name})",
        f"{mean.kl:.2e}",
    )


CONTESTS = ("plan", "against", "its bytes", "perplexity", "its perplexity", "its KL", "plan is better")


def contest_table(results: Sequence[Result]) -> Table:
    """Format the comparison of plans with other methods."""
    table = Table(title="Plans against caches that are not smaller", title_justify="left")
    for heading in CONTESTS:
        table.add_column(heading)
    for contest in contests(results):
        table.add_row(*_contest_cells(contest))
    return table


def _contest_cells(contest: Contest) -> tuple[str, ...]:
    plan, rival = contest.plan, contest.rival
    return (
        size_name(plan.impl),
        f"{rival.impl.name} ({size_name(rival.impl)})",
        f"{contest.bytes_ratio:.2f}x",
        _percent(plan.mean.increase_percent),
        _percent(rival.mean.increase_percent),
        f"{rival.mean.kl / plan.mean.kl:.1f}x",
        "yes" if contest.is_won else "no",
    )


def _percent(value: float) -> str:
    return f"{value:+.2f} %" if abs(value) < 100 else f"{value:+.0f} %"


def _interval(found: Comparison) -> str:
    if found.increase_percent_ci is None:
        return "-"
    low, high = found.increase_percent_ci
    return f"{_percent(low)[:-2]} to {_percent(high)[:-2]}"


def draw(figure: Figure, results: Sequence[Result]) -> None:
    """Both measures of loss over bytes, a line for each family."""
    left, right = figure.subplots(1, 2, sharex=True)
    _lines(left, results, lambda found: found.kl)
    _lines(right, results, lambda found: found.increase_percent)
    left.set(yscale="log", ylabel="KL(exact || cache), nats per token")
    right.set_yscale("symlog", linthresh=0.1)  # an increase may be below zero by chance
    right.set_ylabel("increase of perplexity, % (linear below 0.1)")
    right.set_ylim(bottom=min(-0.1, 1.5 * min(result.mean.increase_percent for result in results)))
    right.axhline(0, color="black", linewidth=0.5)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel(f"times smaller than a 16-bit cache, at {COUNTED_AT:,} tokens")
        ticks = [2, 3, 4, 5, 6, 8, 10, 12]
        axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle("SmolLM2-135M-Instruct: loss of smaller KV caches, mean of texts unlike the calibration text")


def _lines(axes: Axes, results: Sequence[Result], loss: Callable[[Comparison], float]) -> None:
    """Points of a family are joined in order of size; ours is drawn heavier."""
    for family in dict.fromkeys(result.impl.family for result in results):
        members = sorted((r for r in results if r.impl.family == family), key=lambda r: r.impl.ratio)
        style: dict[str, Any] = dict(linewidth=2.5, zorder=3, color="black") if family == OURS else dict(linewidth=1.2)
        axes.plot([r.impl.ratio for r in members], [loss(r.mean) for r in members], marker="o", label=family, **style)


# --------------------------------------------------------------------------------------------------- the page


def write_page(path: Path, results: Sequence[Result]) -> None:
    """The Markdown page: implementations, contests, texts."""
    lines = [
        "# Quality: the loss of smaller KV caches",
        "",
        *_made_by(),
        "",
        *_method(results),
        "",
        "![loss against bytes](../benchmarks/results/quality.png)",
        "",
        "## By implementation",
        "",
        *_markdown(SUMMARY, [_summary_cells(result) for result in results]),
        "",
        "## Plans against caches that are not smaller",
        "",
        "Each plan is compared with each method's smallest size that is at least as large. `its bytes` and `its KL` "
        "are relative to the plan's; a plan is better when it is better in both measures. In `quality.json`, a plan's "
        f"baseline is the best of these that holds at most {COMPARABLE:g} times its bytes.",
        "",
        *_markdown(CONTESTS, [_contest_cells(contest) for contest in contests(results)]),
        "",
        "## By text",
        "",
        *_by_text(results),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.part")
    staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
    staging.replace(path)


def _made_by() -> list[str]:
    used, on = versions(), machine()
    known, _, state = commit().partition("-")
    measured = f"{known[:12]} ({state})" if state else known[:12]
    packages = [f"{p} {metadata.version(p)}" for p in PACKAGES.values() if _is_installed(p)]
    named = ", ".join([f"torch {used['torch']}", f"transformers {used.get('transformers', '-')}", *packages])
    return [
        f"Made by `{COMMAND}` with {named}, on {on['cpu'] or on['architecture']} ({on['threads']} threads), commit "
        f"{measured}. Do not edit: run the command again.",
    ]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _method(results: Sequence[Result]) -> list[str]:
    texts = list(results[0].by_text)
    unseen = ", ".join(f"{t.name} ({len(t.ids):,} tokens)" for t in texts if t.is_unseen)
    seen = ", ".join(t.name for t in texts if not t.is_unseen)
    return [
        f"SmolLM2-135M-Instruct in float32; each token attends to what it would attend to in decoding. Unseen texts: "
        f"{unseen}; the mean is over their tokens. Calibrated on the first half of "
        f"{seen or 'another text'}, whose second half is in the last table only. Bytes are counted at "
        f"{COUNTED_AT:,} tokens, everything included; 1x is a 16-bit cache. The plans, kivi, rtn and low-rank have the "
        "same attention sinks and residual window; quanto and hqq are "
        "`transformers.QuantizedCache` with its own residual window. Formulas: the docstring of "
        "`benchmarks/competitors.py`. Intervals: a bootstrap over blocks of 64 tokens."
    ]


def _by_text(results: Sequence[Result]) -> list[str]:
    """Format the increase of perplexity, with the exact perplexity in the first row."""
    texts = list(results[0].by_text)
    exact = [f"{results[0].by_text[text].exact:.3f}" for text in texts]
    heading = ("cache", "size", *(text.name + ("" if text.is_unseen else " (kind of calibration)") for text in texts))
    body = [
        (result.impl.name, size_name(result.impl), *(_percent(result.by_text[t].increase_percent) for t in texts))
        for result in results
    ]
    return _markdown(heading, [("exact perplexity", "1x", *exact), *body])


def _markdown(heading: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    main()
