"""Damaged files of plans are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan


def _damage(folder: Path, how: str) -> None:
    if how == "no folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    elif how == "cut short":
        blob = (folder / "plan.safetensors").read_bytes()
        (folder / "plan.safetensors").write_bytes(blob[: len(blob) // 2])
    elif how == "a changed number":
        altered = bytearray((folder / "plan.safetensors").read_bytes())
        altered[-2] ^= 1
        (folder / "plan.safetensors").write_bytes(bytes(altered))
    else:
        description = json.loads((folder / "plan.json").read_text())
        description["version" if how == "a newer version" else "sinks"] = 99
        (folder / "plan.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [("no folder", "is not a plan"), ("cut short", "damaged"), ("a changed number", "altered"),
     ("a changed option", "altered"), ("a newer version", "plan version 99")],
)  # fmt: skip
def test_a_damaged_plan_is_refused_with_the_reason(llama: FittedModel, tmp_path: Path, how: str, message: str) -> None:
    folder = llama.plan(4).save(tmp_path / "plan")
    _damage(folder, how)
    with pytest.raises(FhoptError, match=message):
        LatentPlan.load(folder)
