"""`fhopt.load`: load a rewritten folder with its plan applied."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fhopt.hf.apply import apply
from fhopt.models import rewritten_folder
from fhopt.models.rewritten_model import load_exact


def load(folder: str | os.PathLike[str], **options: Any) -> torch.nn.Module:
    """Load the model of a folder written by `fhopt rewrite`, with its plan applied.

    options: as of transformers' `from_pretrained` (dtype, device_map, ...). All bytes are verified first; no code in
    the folder is executed. Raises FhoptError if the folder is damaged or modified, or does not match its plan.
    """
    rewritten = rewritten_folder.read_folder(Path(folder))
    return apply(load_exact(rewritten, **options), rewritten.plan)
