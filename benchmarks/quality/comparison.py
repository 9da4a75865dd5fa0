"""Comparison of plans with other methods of similar size, and the rows of the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality.measurement import OURS, Implementation, QualityResult, QualityText
from benchmarks.recording import Row
from fhopt.evaluation.statistics import Comparison

INCREASE = "perplexity_increase_percent"
COMPARABLE = 1.65  # a method with more than this many times the plan's bytes is listed, but is not a baseline


@dataclass(frozen=True)
class Contest:
    """A plan, and the smallest size of a family that is not smaller than the plan."""

    plan: QualityResult
    baseline: QualityResult

    @property
    def bytes_ratio(self) -> float:
        """Return the bytes of the other method relative to the plan's."""
        return self.baseline.impl.bytes_held / self.plan.impl.bytes_held

    @property
    def is_won(self) -> bool:
        """Whether the plan is better by both metrics, over all held-out texts."""
        mine, other = self.plan.mean, self.baseline.mean
        return mine.kl < other.kl and mine.increase_percent < other.increase_percent


def contests(results: Sequence[QualityResult]) -> list[Contest]:
    """Pair each plan with each family, those of similar size first."""
    pairs = []
    for plan in results:
        if plan.impl.family != OURS:
            continue
        nearest: dict[str, QualityResult] = {}
        for baseline in results:
            family = baseline.impl.family
            if family == OURS or not baseline.impl.is_larger(plan.impl):
                continue
            if family not in nearest or nearest[family].impl.is_larger(baseline.impl):
                nearest[family] = baseline
        pairs += [Contest(plan, baseline) for baseline in sorted(nearest.values(), key=lambda r: r.impl.bytes_held)]
    return pairs


def baselines(results: Sequence[QualityResult]) -> dict[str, QualityResult]:
    """Return, by size of a plan, the best other method by KL among those of comparable size."""
    best: dict[str, QualityResult] = {}
    for contest in contests(results):
        key = size_name(contest.plan.impl)
        if contest.bytes_ratio <= COMPARABLE and (key not in best or contest.baseline.mean.kl < best[key].mean.kl):
            best[key] = contest.baseline
    return best


def size_name(impl: Implementation) -> str:
    """Format the size of an implementation: `4x`, `3.09x`."""
    return f"{impl.ratio:.3g}x"


def rows(results: Sequence[QualityResult]) -> list[Row]:
    """Return results of each implementation on each text; a plan's baseline is from `baselines`, same text."""
    best, out = baselines(results), []
    for result in results:
        baseline = best.get(size_name(result.impl)) if result.impl.family == OURS else None
        for number, (text, comparison) in enumerate(result.by_text.items()):
            out += _text_rows(result.impl, text, comparison, baseline.by_text[text] if baseline is not None else None)
            if not number:  # independent of the text
                case = f"{text.name}@{size_name(result.impl)}"
                out.append(Row(case, result.impl.name, "bytes_per_token", result.impl.token_bytes, "B"))
    return out


def _text_rows(
    impl: Implementation, text: QualityText, comparison: Comparison, baseline: Comparison | None
) -> list[Row]:
    case = f"{text.name}@{size_name(impl)}"
    low, high = comparison.increase_percent_ci or (math.nan, math.nan)

    def row(metric: str, value: float, unit: str, baseline: float | None = None) -> Row:
        return Row(case, impl.name, metric, value, unit, baseline, gain(baseline, value))

    return [
        row(INCREASE, comparison.increase_percent, "%", None if baseline is None else baseline.increase_percent),
        row(f"{INCREASE}_low", low, "%"),
        row(f"{INCREASE}_high", high, "%"),
        row("kl", comparison.kl, "nats/token", None if baseline is None else baseline.kl),
        row("perplexity", comparison.plan, ""),
    ]


def gain(baseline: float | None, value: float) -> float | None:
    """Return baseline / value; None if their ratio is meaningless."""
    return baseline / value if baseline is not None and min(baseline, value) > 0 else None
