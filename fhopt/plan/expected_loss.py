"""The expected quality loss of a plan, from its provenance, and warnings if the evidence is weak.

`expected_loss` of the provenance is the loss measured for plans on held-out text, transferred to this plan, with an
interval for other domains (fhopt/fitting/loss_interval.py). Older plans, and plans of modules calibrated on batches,
only have `predicted_nats`: the sum of the costs by which bits were allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fhopt.plan.latent_plan import LatentPlan

EXPECTED = "expected_loss"  # provenance key
# Per element of the keys that one latent mixes. With 13, the loss of 8x plans is 30 % higher than with 64, that of 4x
# plans 6 % (SmolLM2-135M-Instruct, benchmarks/results/calibration_curve.json).
MIN_TOKENS = 8


@dataclass(frozen=True)
class ExpectedLoss:
    """Loss in nats per token, with the interval for domains not used for calibration; None: not checked."""

    nats: float
    interval: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """The loss as text."""
        if self.interval is None:
            return f"{self.nats:.3g} nats/token (not checked on held-out text)"
        low, high = self.interval
        return f"{self.nats:.2g} nats/token ({low:.2g} to {high:.2g} on text from other domains)"


def expected_loss(plan: LatentPlan) -> ExpectedLoss | None:
    """Return the expected loss of a plan; None if unknown."""
    known, predicted = plan.provenance.get(EXPECTED), plan.provenance.get("predicted_nats")
    if isinstance(known, Mapping):
        return ExpectedLoss(known["nats"], (known["least"], known["most"]))
    return None if predicted is None else ExpectedLoss(predicted)


def calibration_warning(plan: LatentPlan) -> str | None:
    """Return a warning if a plan was fitted to too few tokens for its model, else None."""
    sequences, context = plan.provenance.get("sequences"), plan.provenance.get("context")
    if not sequences or not context or all(site.is_exact for site in plan.sites):
        return None
    width = max(site.key.encode.shape[2] for site in plan.sites)
    tokens, least = sequences * context, MIN_TOKENS * width
    if tokens >= least:
        return None
    return (
        f"The bases were fitted to {tokens:,} tokens; expected at least {least:,} for latents of {width:,} "
        "channels. With fewer, quality falls on text from other domains. Calibrate with --sequences "
        f"{-(-least // context)}."
    )
