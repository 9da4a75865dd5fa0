"""What a plan is expected to lose, from its provenance, and warnings where that rests on little.

`expected_loss` of the provenance has what plans were measured to lose on held-out text, carried over to this one, with
an interval for texts of other kinds (fhopt/fitting/loss_interval.py). A plan without it, of an older version or of a
module that was calibrated on batches, has `predicted_nats` alone: the sum of the costs by which bits were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fhopt.plan.latent_plan import LatentPlan

EXPECTED = "expected_loss"  # of the provenance
# For each number of a token's keys, of all heads that one latent mixes. With 13, plans of 8x lost 30 % more than with
# 64, those of 4x 6 % (SmolLM2-135M-Instruct, benchmarks/results/calibration_curve.json).
MIN_TOKENS = 8


@dataclass(frozen=True)
class ExpectedLoss:
    """Loss, nats per token, with the interval of texts of other kinds than calibrated; None: it was not checked."""

    nats: float
    interval: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """Return the loss as text."""
        if self.interval is None:
            return f"{self.nats:.3g} nats per token (not checked on held-out text)"
        low, high = self.interval
        return f"{self.nats:.2g} nats per token ({low:.2g} to {high:.2g} on texts of other kinds)"


def expected_loss(plan: LatentPlan) -> ExpectedLoss | None:
    """Return what the plan is expected to lose, None where nothing is known."""
    known, predicted = plan.provenance.get(EXPECTED), plan.provenance.get("predicted_nats")
    if isinstance(known, Mapping):
        return ExpectedLoss(known["nats"], (known["least"], known["most"]))
    return None if predicted is None else ExpectedLoss(predicted)


def calibration_warning(plan: LatentPlan) -> str | None:
    """Return a sentence where a plan was fitted to few tokens for its model, None otherwise."""
    sequences, context = plan.provenance.get("sequences"), plan.provenance.get("context")
    if not sequences or not context or all(site.is_exact for site in plan.sites):
        return None
    width = max(site.key.encode.shape[2] for site in plan.sites)
    tokens, least = sequences * context, MIN_TOKENS * width
    if tokens >= least:
        return None
    return (
        f"The bases were fitted to {tokens:,} tokens; expected at least {least:,} for latents of {width:,} numbers, or "
        f"texts of other kinds lose more. Calibrate with --sequences {-(-least // context)}."
    )
