"""Tables and plot of benchmarks/quality/perplexity.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from benchmarks.palette import FHOPT, OTHER, OTHERS, describe, plain
from benchmarks.quality.comparison import Contest, contests, size_name
from benchmarks.quality.former_results import family_of
from benchmarks.quality.measurement import COUNTED_AT, OURS, QualityResult
from benchmarks.recording import ResultsFile
from fhopt.calibration.options import DEFAULT_TEXTS
from fhopt.evaluation.statistics import Comparison, Interval, bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]


def summary(results: Sequence[QualityResult]) -> Table:
    """Format a line per implementation."""
    unseen = sum(text.is_unseen for text in results[0].by_text)
    table = Table(title=f"Loss against bytes, {unseen} unseen texts", title_justify="left")
    for heading, justify in zip(SUMMARY, ("left", *("right",) * 6), strict=True):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for result in results:
        table.add_row(*_summary_cells(result))
    return table


SUMMARY = ("cache", "size", "bytes a token", "perplexity, mean", "95 % interval", "worst text", "KL, mean")


def _summary_cells(result: QualityResult) -> tuple[str, ...]:
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


def contest_table(results: Sequence[QualityResult]) -> Table:
    """Format the comparison of plans with other methods."""
    table = Table(title="Plans against caches that are not smaller", title_justify="left")
    for heading in CONTESTS:
        table.add_column(heading)
    for contest in contests(results):
        table.add_row(*_contest_cells(contest))
    return table


def _contest_cells(contest: Contest) -> tuple[str, ...]:
    plan, baseline = contest.plan, contest.baseline
    return (
        size_name(plan.impl),
        f"{baseline.impl.name} ({size_name(baseline.impl)})",
        f"{contest.bytes_ratio:.2f}x",
        _percent(plan.mean.increase_percent),
        _percent(baseline.mean.increase_percent),
        f"{baseline.mean.kl / plan.mean.kl:.1f}x",
        "yes" if contest.is_won else "no",
    )


def _percent(value: float) -> str:
    return f"{value:+.2f} %" if abs(value) < 100 else f"{value:+.0f} %"


def _interval(comparison: Comparison) -> str:
    if comparison.increase_percent_ci is None:
        return "-"
    low, high = comparison.increase_percent_ci
    return f"{_percent(low)[:-2]} to {_percent(high)[:-2]}"


@dataclass(frozen=True)
class QualityLine:
    """The points of one family of caches: compression ratios, mean KL over held-out domains, and its 95% interval."""

    family: str
    ratios: tuple[float, ...]
    kl: tuple[float, ...]
    intervals: tuple[Interval, ...]

    def gap(self, other: QualityLine) -> float:
        """Return the mean of log(KL) minus that of `other` at the same or nearest ratio; infinite if none is near."""
        first, last = other.ratios[0] / COMPARABLE_RATIO, other.ratios[-1] * COMPARABLE_RATIO
        near = [(ratio, kl) for ratio, kl in zip(self.ratios, self.kl, strict=True) if first <= ratio <= last]
        if not near:
            return math.inf
        at = np.interp(np.log([ratio for ratio, _ in near]), np.log(other.ratios), np.log(other.kl))
        return float(np.mean(np.log([kl for _, kl in near]) - at))


def quality_lines(results: ResultsFile) -> list[QualityLine]:
    """Return a line for each family: fhopt first, then the others from the lowest KL to the highest."""
    seen = SEEN_BY_DEMO if results.name == "quality" else DEFAULT_TEXTS
    found: dict[str, dict[float, list[float]]] = {}
    for row in results.of("kl"):
        text, _, size = row.case.rpartition("@")
        if text not in seen:
            found.setdefault(family_of(row.impl), {}).setdefault(float(size[:-1]), []).append(max(row.value, MIN_KL))
    lines = []
    for family, sizes in found.items():
        points = [(ratio, values) for ratio, values in sorted(sizes.items()) if ratio >= MIN_RATIO]
        if points:
            means = tuple(sum(values) / len(values) for _, values in points)
            ends = (bootstrap_interval(values, [1] * len(values)) for _, values in points)
            intervals = tuple(end or (mean, mean) for end, mean in zip(ends, means, strict=True))
            lines.append(QualityLine(family, tuple(ratio for ratio, _ in points), means, intervals))
    ours = next(line for line in lines if line.family == OURS)
    return sorted(lines, key=lambda line: (line is not ours, line.gap(ours)))


MIN_RATIO, MIN_KL = 1.8, 1e-6
COMPARABLE_RATIO = 1.25  # between sizes that are compared
LABELED = 6  # other methods with a color and a label, those with the lowest KL


def draw(figure: Figure, results: ResultsFile) -> None:
    """Plot KL against compression, a line per family; fhopt and the best others are labeled at their ends."""
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    ours, *others = lines = quality_lines(results)
    colors = dict(zip((line.family for line in others[:LABELED]), OTHERS, strict=False))
    for line in reversed(lines):
        color = FHOPT if line is ours else colors.get(line.family, OTHER)
        low, high = ([abs(end[side] - kl) for end, kl in zip(line.intervals, line.kl, strict=True)] for side in (0, 1))
        width = 2.6 if line is ours else 1.3 if line.family in colors else 0.7
        bars = (low, high) if line is ours or line.family in colors else None
        axes.errorbar(
            line.ratios, line.kl, bars, color=color, linewidth=width, elinewidth=0.6, marker="o", markersize=3
        )
    axes.set(xscale="log", yscale="log", ylabel="KL divergence from the full-precision cache, nats/token")
    axes.set_xlabel(f"compression of the KV cache relative to 16 bits, at {COUNTED_AT:,} tokens")
    ticks = [tick for tick in (2, 3, 4, 5, 6, 8, 10, 12, 16) if tick <= max(max(line.ratios) for line in lines)]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    plain(axes)
    _label_ends(axes, [(line, FHOPT if line is ours else colors[line.family]) for line in lines[: 1 + LABELED]])
    gain = math.exp(others[0].gap(ours)) if others else 0.0
    model = results.name.removeprefix("quality").removeprefix("-") or "SmolLM2-135M-Instruct"
    grays = ", ".join(METHODS.get(line.family, line.family) for line in others[LABELED:])
    about = f"{model}; mean over held-out text domains with its 95% bootstrap interval" + (
        f"; gray: {grays}" if grays else ""
    )
    finding = f"At about the same size, fhopt's KL divergence is {gain:.1f}x lower than the next best method's"
    describe(
        figure,
        finding if gain > 1 else "KL divergence of compressed KV caches by size",
        about,
        results,
    )


def _label_ends(axes: Any, lines: Sequence[tuple[QualityLine, str]]) -> None:
    """Write the name of each line next to its last point; a label moves up if it would touch one below it."""
    low, high = (math.log10(end) for end in axes.get_ylim())
    height, placed = (high - low) / 20, list[tuple[float, float]]()
    for line, color in sorted(lines, key=lambda pair: pair[0].kl[-1]):
        right, at = line.ratios[-1], math.log10(line.kl[-1])
        near = [up for x, up in placed if max(x, right) < 1.5 * min(x, right) and abs(at - up) < height]
        at = max(near) + height if near else at
        placed.append((right, at))
        weight = "bold" if line.family == OURS else None
        name = METHODS.get(line.family, line.family)
        axes.text(right * 1.03, 10**at, name, color=color, fontsize=9, va="center", fontweight=weight)
    axes.set_xlim(right=1.25 * max(line.ratios[-1] for line, _ in lines))


SEEN_BY_DEMO = ("topics",)  # text that calibrates in perplexity.py without --model
METHODS = {
    "kivi": "KIVI",
    "turboquant": "TurboQuant",
    "quarot": "QuaRot",
    "kvtc": "KVTC",
    "oscar": "OSCAR",
    "aatc": "AATC",
    "q4_0-hadamard": "llama.cpp q4_0, rotated",
    "rtn": "round to nearest",
    "quanto": "QuantizedCache, quanto",
    "hqq": "QuantizedCache, HQQ",
    "low-rank": "low rank per head",
    "snapkv": "SnapKV",
    "expected-attention": "Expected Attention",
}  # names of families in the plot; others by their own name
