"""From losses that were measured on held-out text to the interval of what a plan is expected to lose.

The sum of the costs by which bits are chosen is a lower estimate: it is of second order, of each channel by itself, on
the text that chose the bits, and has neither the rounding of the residual window nor that of the model's own arithmetic
in 16 bits. So plans of two sizes are measured on a held-out sequence of each calibration text, and between the two

    loss = a + b * sum of costs          a: of rounding, the same for every size; b: of all that the sum leaves out

The lines of the texts give the expected loss, their geometric mean. The interval is for a text of any kind, and kinds
differ by more than those that calibrate a plan: see KIND_SPREAD.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CHECKS = "loss_checks"  # of the provenance of a calibration and of its plans
KIND_SPREAD = 0.56  # standard deviation of log(loss on a text of another kind / mean of kinds that calibrated), of 105
# measurements: three models, plans of 4x to 12x, 9 to 15 texts. 100 of them lie within the interval, the others (long
# columns of numbers) below it. benchmarks/results/quality-*.json
DEVIATIONS = 1.96  # 95 % of a normal distribution
LEAST = 1e-12  # nats: any less is rounding


@dataclass(frozen=True)
class LossCheck:
    """What plans of rising sizes lose on a held-out text. predicted: sums of costs; measured: KL. Nats per token."""

    text: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    def at(self, predicted: float) -> float:
        """Return the loss, nats per token, of a plan whose costs sum to `predicted`."""
        points = sorted(zip(self.predicted, self.measured, strict=True))
        (x, y), rest = points[0], points[1:]
        if not rest:
            return y * max(1.0, predicted / max(x, LEAST))
        slope = max(0.0, (rest[-1][1] - y) / max(rest[-1][0] - x, LEAST))
        if predicted >= x:
            return y + slope * (predicted - x)
        return max(y - slope * (x - predicted), y * predicted / max(x, LEAST))

    def as_json(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"text": self.text, "predicted_nats": list(self.predicted), "nats": list(self.measured)}

    @staticmethod
    def from_json(values: Any) -> LossCheck:
        """Return the check of `as_json`."""
        return LossCheck(values["text"], tuple(values["predicted_nats"]), tuple(values["nats"]))


def loss_interval(checks: Sequence[LossCheck], predicted: float) -> tuple[float, float, float]:
    """Return (expected loss, least, most), nats per token, of a plan whose costs sum to `predicted`.

    The interval holds 95 % of texts of other kinds than calibrated.
    """
    logs = [math.log(max(check.at(predicted), LEAST)) for check in checks]
    center = statistics.fmean(logs)
    own = statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs)) if len(logs) > 1 else 0.0
    width = DEVIATIONS * max(own, KIND_SPREAD)
    return math.exp(center), math.exp(center - width), math.exp(center + width)


def checks_of(values: Iterable[Any]) -> tuple[LossCheck, ...]:
    """Return the checks that a calibration kept in its provenance."""
    return tuple(map(LossCheck.from_json, values))
