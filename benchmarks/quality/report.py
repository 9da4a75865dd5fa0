"""Tables and plot of benchmarks/quality/perplexity.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.quality.comparison import Contest, contests, size_name
from benchmarks.quality.measurement import COUNTED_AT, OURS, QualityResult
from fhopt.evaluation.statistics import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # type: ignore[import-not-found, unused-ignore]
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


def draw(figure: Figure, results: Sequence[QualityResult], model: str) -> None:
    """Plot both quality metrics against bytes, a line per family; model: its name."""
    left, right = figure.subplots(1, 2, sharex=True)
    _lines(left, results, lambda comparison: comparison.kl)
    _lines(right, results, lambda comparison: comparison.increase_percent)
    left.set(yscale="log", ylabel="KL(exact || cache), nats per token")
    right.set_yscale("symlog", linthresh=0.1)  # noise can make an increase negative
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
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=7)
    figure.suptitle(f"{model}: loss of smaller KV caches, mean of texts unlike the calibration text")


def _lines(axes: Axes, results: Sequence[QualityResult], loss: Callable[[Comparison], float]) -> None:
    """Plot the points of each family, joined in order of size; fhopt's line is heavier.

    There are ten colors: an eleventh family reuses the first one, with dashes and squares.
    """
    for number, family in enumerate(dict.fromkeys(result.impl.family for result in results)):
        members = sorted((r for r in results if r.impl.family == family), key=lambda r: r.impl.ratio)
        line, marker = (("-", "o"), ("--", "s"))[number // 10 % 2]
        style: dict[str, Any] = dict(color=f"C{number % 10}", linestyle=line, marker=marker, linewidth=1.2)
        if family == OURS:
            style |= dict(linewidth=2.5, zorder=3, color="black")
        axes.plot([r.impl.ratio for r in members], [loss(r.mean) for r in members], label=family, **style)
