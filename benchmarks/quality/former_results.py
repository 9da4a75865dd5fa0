"""Results of other methods from an earlier run, reported next to newly measured plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.baselines import FAMILIES
from benchmarks.quality.comparison import INCREASE
from benchmarks.quality.measurement import COUNTED_AT, OURS, Implementation, QualityResult
from benchmarks.recording import kept_rows
from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import Comparison, Interval

ALIKE = 1e-3  # relative tolerance for the full-precision perplexity of the same texts and model

_Figures = dict[tuple[str, str], dict[str, dict[str, float]]]  # by method and size, text, metric


def check_kept(name: str, exact: Mapping[str, float]) -> None:
    """Raise FhoptError if `results/<name>.json` is for other texts, or another model.

    exact: perplexity with the full-precision cache, by text name.
    """
    for (impl, _), texts in _figures(name).items():
        for text, now in exact.items():
            if text not in texts:
                raise FhoptError(f"results/{name}.json has no {text} of {impl}; expected the texts of that run.")
            then = _exact(texts[text])
            if abs(then / now - 1) > ALIKE:
                raise FhoptError(
                    f"the exact perplexity of {text} is {now:.4f}, and {then:.4f} in results/{name}.json; expected the "
                    "same model, texts and --context. Measure all anew: without --kept."
                )


def kept_results(name: str, measured: Sequence[QualityResult]) -> list[QualityResult]:
    """Return the results of other methods in `results/<name>.json` on the texts of `measured`. Raises FhoptError."""
    texts = measured[0].by_text
    check_kept(name, {text.name: now.exact for text, now in texts.items()})
    results = []
    for (impl, size), figures in _figures(name).items():
        held = int(COUNTED_AT * next(iter(figures.values()))["bytes_per_token"])
        result: Any = QualityResult(Implementation(impl, family_of(impl), held, float(size.removesuffix("x"))))
        result.by_text = {text: _comparison(figures[text.name], now) for text, now in texts.items()}
        result.mean = _mean([c for text, c in result.by_text.items() if text.is_unseen])
        results.append(result)
    return results


def _figures(name: str) -> _Figures:
    """Load the file's results of methods other than plans."""
    figures: _Figures = {}
    for row in kept_rows(name, lambda case: False):
        text, _, size = row.case.rpartition("@")
        if row.impl != OURS:
            figures.setdefault((row.impl, size), {}).setdefault(text, {})[row.metric] = row.value
    if not figures:
        raise FhoptError(f"results/{name}.json has no other method; expected those of a run without --kept.")
    return figures


def _exact(row: Mapping[str, float]) -> float:
    return row["perplexity"] / (1 + row[INCREASE] / 100)


def family_of(impl: str) -> str:
    """Return the family of a method, a prefix of its name."""
    families = (family for family in FAMILIES if impl == family or impl.startswith(f"{family}-"))
    return max(families, key=len, default=impl)


def _comparison(row: Mapping[str, float], now: Comparison) -> Comparison:
    ends = row.get(f"{INCREASE}_low"), row.get(f"{INCREASE}_high")
    interval: Interval | None = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
    return Comparison(_exact(row), row["perplexity"], row[INCREASE], interval, row["kl"], None, now.tokens)


def _mean(parts: Sequence[Comparison]) -> Comparison:
    """Return the mean over all tokens of some texts, without intervals, which require per-token data."""
    count = sum(part.tokens for part in parts)

    def mean(values: Sequence[float]) -> float:
        return sum(value * part.tokens for value, part in zip(values, parts, strict=True)) / count

    exact = math.exp(mean([math.log(part.exact) for part in parts]))
    plan = math.exp(mean([math.log(part.plan) for part in parts]))
    return Comparison(exact, plan, 100 * (plan / exact - 1), None, mean([p.kl for p in parts]), None, count)
