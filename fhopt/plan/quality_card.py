"""The quality card of a plan: its calibration set, and its measured quality.

`fhopt eval --record` writes measurements to the plan's provenance, under `quality`; `fhopt inspect`, the report and the
model card show them. A repeated measurement of a text or task replaces the earlier one. A card does not change the
plan's digest, which covers only what affects results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fhopt.plan.latent_plan import LatentPlan

QUALITY = "quality"  # provenance key


@dataclass(frozen=True)
class MeasuredText:
    """Perplexity of a text with the full-precision cache and with the plan's. KL in nats per token; `_ci`: 95 %."""

    name: str
    tokens: int
    exact: float
    plan: float
    increase_percent: float
    increase_percent_ci: tuple[float, float] | None
    kl: float


@dataclass(frozen=True)
class MeasuredTask:
    """Accuracy in percent, with the full-precision cache and with the plan's."""

    name: str
    items: int
    exact: float
    plan: float


@dataclass(frozen=True)
class QualityCard:
    """All quality measurements of a plan. calibrated_on: calibration texts; tokens: their number of tokens."""

    calibrated_on: tuple[str, ...]
    tokens: int
    texts: tuple[MeasuredText, ...]
    tasks: tuple[MeasuredTask, ...]

    @property
    def worst(self) -> MeasuredText | None:
        """The text with the largest KL."""
        return max(self.texts, key=lambda text: text.kl, default=None)


def with_measured(
    plan: LatentPlan, perplexity: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]
) -> LatentPlan:
    """Return the plan with measurements of `fhopt eval` added to its card, by text and by task, as JSON values."""
    known = plan.provenance.get(QUALITY) or {}
    texts = {
        name: {k: row[k] for k in ("tokens", "exact", "plan", "increase_percent", "increase_percent_ci", "kl")}
        for name, row in perplexity.items()
        if "plan" in row
    }
    answers = {
        name: {"items": row["exact"]["items"], "exact": 100 * row["exact"]["rate"], "plan": 100 * row["plan"]["rate"]}
        for name, row in tasks.items()
        if row.get("plan")
    }
    quality = {"texts": known.get("texts", {}) | texts, "tasks": known.get("tasks", {}) | answers}
    return plan.with_provenance(**{QUALITY: quality})


def quality_card(plan: LatentPlan) -> QualityCard:
    """Return the card of a plan; empty if nothing was recorded."""
    known = plan.provenance.get(QUALITY)
    known = known if isinstance(known, Mapping) else {}
    return QualityCard(
        tuple(map(str, plan.provenance.get("texts") or ())),
        int(plan.provenance.get("tokens") or 0),
        tuple(MeasuredText(name=name, **_text(row)) for name, row in known.get("texts", {}).items()),
        tuple(MeasuredTask(name=name, **row) for name, row in known.get("tasks", {}).items()),
    )


def _text(row: Mapping[str, Any]) -> dict[str, Any]:
    interval = row["increase_percent_ci"]
    return {**row, "increase_percent_ci": None if interval is None else (float(interval[0]), float(interval[1]))}
