"""The Python door to the main job."""

from __future__ import annotations

from typing import Any

import torch

from fhopt import pipeline
from fhopt.models import LoadedModel
from fhopt.spec import LatentPlan


def fit(
    model: torch.nn.Module, tokenizer: Any, *, text: str = "topics", ratio: float = 4.0, **options: Any
) -> LatentPlan:
    """Calibrate a causal language model on `text` and fit a plan for it.

    text: a text file, a folder, or one of "topics", "source", "license". options: the other fields of
    `fhopt.pipeline.FitOptions`. Raises FhoptError for options that cannot work and models without attention.
    """
    loaded = LoadedModel(type(model).__name__, model, tokenizer)
    return pipeline.fit(loaded, pipeline.FitOptions(text=text, ratio=ratio, **options))[0]
