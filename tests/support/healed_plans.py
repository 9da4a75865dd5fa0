"""A small model and its plan to heal."""

from __future__ import annotations

from typing import Any

import torch
from small_models import VOCABULARY

from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.site_plan import BitGroup

CONTEXT, COUNT = 64, 12
CODED = (BitGroup(4, 8, 0.3352), BitGroup(2, 8, 0.9957))


class Letters:
    """A tokenizer without a vocabulary file."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[1 + ord(c) % (VOCABULARY - 1) for c in text]])
        return type("Encoding", (), {"input_ids": ids})


def loaded(model: Any) -> LoadedModel:
    return LoadedModel("tiny", model.requires_grad_(False), Letters())
