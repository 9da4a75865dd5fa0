"""Encoder-decoders of the zoo with plans."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hand_plans import shared_plan
from model_zoo import huggingface as zoo
from torch import Tensor

from fhopt.calibration.data import of_batches
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import calibrate, plan_from_calibration
from fhopt.fitting import fit_plan
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan

SOURCE = 30


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    row = next(m for m in zoo.ENCODER_DECODERS if m.name == name)
    longer = {"max_position_embeddings": 256} if name == "bart" else {}
    return zoo._make(replace(row, options={**row.options, **longer}), "sdpa")


@cache
def plan_of(name: str, layout: str) -> LatentPlan:
    """A lossless plan: keys and values unchanged, or one latent for both, which are linear in one input."""
    torch.manual_seed(1)
    inputs = {"input_ids": ids(1, 250), "decoder_input_ids": ids(1, 240), "use_cache": False}  # most of the vocabulary
    outcome = pipeline.find_attentions(capture(model_of(name), (), inputs).program)
    if layout == "identity":
        return fit_plan.exact_plan(outcome.sites.values(), recent=4, block=4)
    return shared_plan(outcome, width=64, recent=4, block=4)


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, zoo.VOCABULARY, (batch, tokens))


def fitted(name: str, ratio: float) -> LatentPlan:
    options = FitOptions(ratio=ratio, sequences=6, rate_sequences=4, sinks=4, recent=8, block=8, tokens=2048)
    batches: list[dict[str, Any]] = [
        {"input_ids": ids(2, 64), "decoder_input_ids": ids(2, 64), "use_cache": False} for _ in range(10)
    ]
    return plan_from_calibration(calibrate(of_batches(model_of(name), batches), options), options)
