"""The quality card of a plan: what it was calibrated on, and what it was measured to lose where.

`fhopt eval --record` writes what it measured into the plan's provenance, under `quality`; `fhopt inspect`, the report
and the model card show it. A text or task that is measured again replaces what stood there. The digest of a plan is of
what changes numbers, so that a card does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fhopt.plan.latent_plan import LatentPlan

QUALITY = "quality"  # of the provenance


@dataclass(frozen=True)
class MeasuredText:
    """What perplexity a text had with the exact cache and with the plan's. KL in nats per token; `_ci`: 95 %."""

    name: str
    tokens: int
    exact: float
    plan: float
    increase_percent: float
    increase_percent_ci: tuple[float, float] | None
    kl: float


@dataclass(frozen=True)
class MeasuredTask:
    """Shares of right answers, in percent, with the exact cache and with the plan's."""

    name: str
    items: int
    exact: float
    plan: float


@dataclass(frozen=True)
class QualityCard:
    """All that is known of a plan's loss. calibrated_on: texts, and how many tokens of them."""

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
    """Return the plan with what `fhopt eval` measured on its card: figures by text and by task, JSON values."""
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


def card(plan: LatentPlan) -> QualityCard:
    """Return the card of a plan, empty where nothing was recorded."""
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
