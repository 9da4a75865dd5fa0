"""Search for the smallest plan within a loss target: `fit --max-loss 1%` measures sizes on held-out tokens.

A plan passes if the upper end of the 95% interval of its perplexity increase is at most the limit, with the real KV
cache, on tokens outside the calibration set. Sizes form a geometric grid. Loss grows with the ratio, except where
trellis codes begin (fhopt/fitting/codes.py), and unevenly if KL is traded for time (fhopt/fitting/fast_choice.py). A
bisection therefore finds the largest ratio that passes, or one near it, in few measurements. The measurements are
stored in the plan's provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import Calibration, plan_from_calibration
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.evaluation.statistics import Comparison
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan
from fhopt.progress import Progress, silent
from fhopt.refine.options import Gate
from fhopt.texts import tokens


def smallest_plan(
    loaded: LoadedModel,
    calibration: Calibration,
    options: FitOptions,
    gate: Gate,
    ids: Tensor,
    progress: Progress = silent,
) -> tuple[LatentPlan, dict[float, Comparison]]:
    """Find the plan with the largest ratio of the gate that passes on ids [N, T] from `held_out`.

    Returns (plan, measurements by ratio). Raises FhoptError if none passes.
    """
    gate.check()
    network = loaded.language_model()
    trials: dict[float, Comparison] = {}
    rounds = (len(gate.ratios) - 1).bit_length() + 1

    def passes(ratio: float) -> bool:
        try:
            plan = plan_from_calibration(calibration, replace(options, ratio=ratio))
        except FhoptError:  # so small that sinks and window exceed it
            if not trials:
                raise
            return False
        trials[ratio] = token_costs(network, ids, plan).compare()
        progress("gate", len(trials), rounds)
        low_high = trials[ratio].increase_percent_ci
        return low_high is not None and low_high[1] <= 100 * gate.max_loss

    best = _largest(gate.ratios, passes)
    if best is None:
        mildest = min(trials)
        raise FhoptError(
            f"no plan passes {gate.max_loss:.2%}: at {mildest:.3g}x perplexity changes by "
            f"{trials[mildest].increase_percent:+.2f}% ({_range(trials[mildest])}) on {ids.numel()} held-out "
            "tokens. Raise --max-loss, or calibrate on more text."
        )
    plan = plan_from_calibration(calibration, replace(options, ratio=best))
    progress("gate", rounds, rounds)
    passed: dict[str, Any] = asdict(trials[best]) | {
        "max_loss": gate.max_loss,
        "texts": list(gate.texts or options.texts),
    }
    return plan.with_provenance(gate=passed), trials


def held_out(loaded: LoadedModel, options: FitOptions, gate: Gate) -> Tensor:
    """Load token ids [N, T] from the second halves of the texts, round-robin, at most as long as the model's positions.

    Raises FhoptError if the texts are too short.
    """
    config: Any = loaded.language_model().config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or gate.context
    length = min(gate.context, positions)
    return tokens.held_out_ids(loaded.tokenizer, gate.texts or options.texts, count=gate.sequences, length=length)


def _range(comparison: Comparison) -> str:
    low, high = comparison.increase_percent_ci or (float("nan"), float("nan"))
    return f"95% CI {low:+.2f} to {high:+.2f}"


def _largest(values: tuple[float, ...], passes: Callable[[float], bool]) -> float | None:
    """Find the largest of the ascending `values` that passes, by bisection; None if the smallest does not."""
    if not passes(values[0]):
        return None
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(values[middle]) else (low, middle)
    return values[low]
