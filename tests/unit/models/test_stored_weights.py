"""Whether a plan belongs to a model that is not loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.models.stored_weights import check_stored
from fhopt.plan.fingerprint import fingerprint
from fhopt.plan.latent_plan import LatentPlan


@pytest.fixture
def plan(llama: FittedModel) -> LatentPlan:
    made = llama.plan(4)
    return made.with_provenance(
        fingerprint=fingerprint(dict(llama.model.named_parameters()), [p.site for p in made.sites])
    )


def altered(folder: Path) -> Path:
    """Flip the signs of the weights in the folder."""
    from safetensors.torch import load_file

    save_file(
        {name: -weight for name, weight in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    return folder


def test_the_weights_of_the_model_pass(plan: LatentPlan, llama: FittedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path)
    check_stored(plan, tmp_path)


def test_weights_in_several_files_and_another_dtype_pass(plan: LatentPlan, llama: FittedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_stored(plan, tmp_path)


def test_other_weights_are_refused(plan: LatentPlan, llama: FittedModel, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path)
    with pytest.raises(FhoptError, match="plan was not fitted to"):
        check_stored(plan, altered(tmp_path))


def test_weights_that_are_not_in_the_files_are_left_to_the_loader(
    plan: LatentPlan, llama: FittedModel, tmp_path: Path
) -> None:
    llama.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    check_stored(plan, altered(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    check_stored(plan, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    check_stored(plan, tmp_path)
