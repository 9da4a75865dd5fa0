"""A calibration of the small Llama that a test can interrupt."""

from __future__ import annotations

import torch
from small_models import TOKENS, numbered
from torch import Tensor

from fhopt import progress as fhopt_progress
from fhopt.calibration import options as calibration_options
from fhopt.calibration import run
from fhopt.calibration.data import CalibrationData
from fhopt.models.capture import Captured

OPTIONS = calibration_options.FitOptions(sequences=6, rate_sequences=5, context=96, recent=8, block=8, tokens=TOKENS)


def sequences(count: int = 11) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    return [batch for _, batch in numbered(count)]


def measure(
    captured: Captured, options: calibration_options.FitOptions = OPTIONS,
    progress: fhopt_progress.Progress = fhopt_progress.silent, count: int = 11,
) -> run.Calibration:  # fmt: skip
    return run.calibrate(CalibrationData(captured, sequences(count), {}, "tiny"), options, progress)
