"""A model with its weights on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

AWAY = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu"}
PLACES = AWAY | {"lm_head": "disk"}


def offloaded(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load the model in `folder`, with blocks and head on disk until they run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=PLACES)
    return model.requires_grad_(False)
