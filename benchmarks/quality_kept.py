"""Results of other methods as a former run measured them, to stand beside plans that are measured anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from quality_measurement import COUNTED_AT, OURS, Implementation, Result
from quality_rivals import FAMILIES
from recording import kept_rows

from fhopt.errors import FhoptError
from fhopt.evaluation.statistics import Comparison, Interval

ALIKE = 1e-3  # relative: so near is the exact perplexity of the same texts and the same model


def kept_results(name: str, measured: Sequence[Result]) -> list[Result]:
    """Return what `results/<name>.json` has of other methods on the texts of `measured`.

    Raises FhoptError where the file has none, or is of other texts or another model.
    """
    parts: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in kept_rows(name, lambda case: False):
        text, _, size = row.case.rpartition("@")
        if row.impl != OURS:
            parts.setdefault((row.impl, size), {}).setdefault(text, {})[row.metric] = row.value
    if not parts:
        raise FhoptError(f"results/{name}.json has no other method; expected those of a run without --kept.")
    return [_kept(*at, texts, measured[0], name) for at, texts in parts.items()]


def _kept(impl: str, size: str, texts: dict[str, dict[str, float]], measured: Result, name: str) -> Result:
    missing = [text.name for text in measured.by_text if text.name not in texts]
    if missing:
        raise FhoptError(f"results/{name}.json has no {missing[0]} of {impl}; expected the texts of that run.")
    held = int(COUNTED_AT * next(iter(texts.values()))["bytes_per_token"])
    result: Any = Result(Implementation(impl, _family(impl), held, float(size.removesuffix("x"))))
    result.by_text = {text: _comparison(texts[text.name], now) for text, now in measured.by_text.items()}
    for text, now in measured.by_text.items():
        then = result.by_text[text].exact
        if abs(then / now.exact - 1) > ALIKE:
            raise FhoptError(
                f"the exact perplexity of {text.name} is {now.exact:.4f}, and {then:.4f} in results/{name}.json; "
                "expected the same model and texts. Measure all anew: without --kept."
            )
    result.mean = _mean([c for text, c in result.by_text.items() if text.is_unseen])
    return result


def _family(impl: str) -> str:
    """Return the family of a method, whose name its own begins with."""
    families = (family for family in FAMILIES if impl == family or impl.startswith(f"{family}-"))
    return max(families, key=len, default=impl)


def _comparison(row: dict[str, float], now: Comparison) -> Comparison:
    metric = "perplexity_increase_percent"
    ends = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval: Interval | None = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
    exact = row["perplexity"] / (1 + row[metric] / 100)
    return Comparison(exact, row["perplexity"], row[metric], interval, row["kl"], None, now.tokens)


def _mean(parts: Sequence[Comparison]) -> Comparison:
    """Return the mean over all tokens of some texts; without intervals, which tokens alone give."""
    count = sum(part.tokens for part in parts)

    def mean(values: Sequence[float]) -> float:
        return sum(value * part.tokens for value, part in zip(values, parts, strict=True)) / count

    exact = math.exp(mean([math.log(part.exact) for part in parts]))
    plan = math.exp(mean([math.log(part.plan) for part in parts]))
    return Comparison(exact, plan, 100 * (plan / exact - 1), None, mean([p.kl for p in parts]), None, count)
