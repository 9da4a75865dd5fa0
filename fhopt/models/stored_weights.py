"""Check of a plan against weights in a folder's safetensors files, without loading the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fhopt.models.rewritten_folder import METHOD, is_rewritten, read_json
from fhopt.plan.fingerprint import check_fingerprint
from fhopt.plan.latent_plan import LatentPlan


def check_stored(plan: LatentPlan, folder: Path) -> None:
    """Raise FhoptError if the weights in `folder` show that the plan was fitted to another model.

    Loads only the weights that the plan names. Inconclusive for quantized weights, or if names differ from those of the
    loaded model: `check_model` decides once it is loaded.
    """
    names = {n for site in plan.sites for role in site.site.projections.values() for n in role}
    if not names or _is_quantized(folder):
        return
    with contextlib.suppress(OSError, SafetensorError):  # the loader reports unreadable files
        found = _weights(folder, names)
        if found.keys() == names:
            check_fingerprint(plan, found, folder.name)


def _is_quantized(folder: Path) -> bool:
    method = read_json(folder, "config.json").get("quantization_config")
    is_ours = is_rewritten(folder) and isinstance(method, dict) and method.get("quant_method") == METHOD
    return bool(method) and not is_ours


def _weights(folder: Path, names: set[str]) -> Mapping[str, Tensor]:
    """Load the weights of these names that are in the folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in names & set(opened.keys())}
    return found
