"""A multi-layer model with a plan, whose decode steps run as layer programs."""

from __future__ import annotations

from typing import Any

from latent_caches import coded, plans
from small_models import tiny_llama
from torch import Tensor

import fhopt

LAYERS = 4


def four_layers() -> Any:
    return tiny_llama(num_hidden_layers=LAYERS)


def model_of(programs: bool = True) -> Any:
    model, plan = four_layers(), coded(plans(four_layers, 8))
    return fhopt.prepare(fhopt.apply(model, plan, decode_program=programs))


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-3
