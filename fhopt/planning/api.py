"""Calibrating a model and fitting a plan from Python: `fhopt.fit`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fhopt.calibration import options as calibration_options
from fhopt.calibration import run
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan


def fit(
    model: torch.nn.Module,
    tokenizer: Any = None,
    *,
    text: str | tuple[str, ...] = calibration_options.DEFAULT_TEXTS,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    ratio: float = 4.0,
    **options: Any,
) -> LatentPlan:
    """Calibrate a model and fit a plan for it.

    A causal language model with its tokenizer is calibrated on `text`: a file, a folder or a built-in name (see
    `fhopt.texts.tokens`), or several. Any other module is calibrated on `batches`: dicts of keyword arguments, all of
    the same shapes; its output counts as logits where the model calls it so. options: the other fields of
    `fhopt.calibration.options.FitOptions`, such as `device="here"` for a plan that is fast on this CPU. Raises
    FhoptError for options that cannot work and models without attention.
    """
    texts = (text,) if isinstance(text, str) else tuple(text)
    chosen = calibration_options.FitOptions(texts=texts, ratio=ratio, **options)
    if batches is not None:
        return run.plan_for(run.measure_module(model, batches, chosen), chosen)
    if tokenizer is None:
        raise FhoptError(
            "found neither a tokenizer nor batches; expected the tokenizer of a language model, or `batches=`, keyword "
            "arguments for any other module."
        )
    return run.fit(LoadedModel(type(model).__name__, model, tokenizer), chosen)[0]
