"""Prediction interval of a plan's KL, from the KL measured on held-out text.

Bits are chosen by a sum of costs that underestimates the KL: it is a second-order estimate of each channel separately,
on the text that chose the bits, without the rounding of the recent window or of the model's own 16-bit arithmetic.
Plans of two sizes are therefore measured on a held-out sequence of each calibration text, and between the two

    KL = a + b * sum of costs          a: rounding, the same for every size; b: all that the sum leaves out

The expected KL is the geometric mean over the texts. The interval is for a text of any domain, and domains differ by
more than the calibration texts do: see KIND_SPREAD.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CHECKS = "loss_checks"  # provenance key of a calibration and of its plans
# Standard deviation of log(KL on a held-out domain / mean of the calibration domains), 105 measurements: three models,
# 4x to 12x plans, 9 to 15 texts. 100 of them lie within the interval, the others (long columns of numbers) below it.
# Source: benchmarks/results/quality-*.json.
KIND_SPREAD = 0.56
DEVIATIONS = 1.96  # 95% of a normal distribution
MIN_NATS = 1e-12  # nats; less is rounding error


@dataclass(frozen=True)
class LossCheck:
    """Measured KL of plans on one held-out text, and the sums of costs that predict it, in nats/token."""

    text: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    def at(self, predicted: float) -> float:
        """Return the KL in nats/token of a plan whose costs sum to `predicted`."""
        points = sorted(zip(self.predicted, self.measured, strict=True))
        (x, y), rest = points[0], points[1:]
        if not rest:
            return y * max(1.0, predicted / max(x, MIN_NATS))
        slope = max(0.0, (rest[-1][1] - y) / max(rest[-1][0] - x, MIN_NATS))
        if predicted >= x:
            return y + slope * (predicted - x)
        return max(y - slope * (x - predicted), y * predicted / max(x, MIN_NATS))

    def as_json(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"text": self.text, "predicted_nats": list(self.predicted), "nats": list(self.measured)}

    @staticmethod
    def from_json(values: Any) -> LossCheck:
        """Rebuild the check from the values of `as_json`."""
        return LossCheck(values["text"], tuple(values["predicted_nats"]), tuple(values["nats"]))


def loss_interval(checks: Sequence[LossCheck], predicted: float) -> tuple[float, float, float]:
    """Return (expected KL, least, most) in nats/token for a plan whose costs sum to `predicted`.

    The interval holds 95% of texts from other domains than those calibrated on.
    """
    logs = [math.log(max(check.at(predicted), MIN_NATS)) for check in checks]
    center = statistics.fmean(logs)
    own = statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs)) if len(logs) > 1 else 0.0
    width = DEVIATIONS * max(own, KIND_SPREAD)
    return math.exp(center), math.exp(center - width), math.exp(center + width)


def checks_of(values: Iterable[Any]) -> tuple[LossCheck, ...]:
    """Return the checks in a calibration's provenance."""
    return tuple(map(LossCheck.from_json, values))
