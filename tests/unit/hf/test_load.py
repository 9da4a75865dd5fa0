"""Rewritten folders as transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_folders import ROUNDING, difference, generated, written
from small_models import FittedModel, tiny_llama, token_ids

import fhopt
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel


@pytest.fixture(scope="session")
def folder(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten tiny Llama in three shards."""
    out = tmp_path_factory.mktemp("folders") / "llama"
    written(out, llama.model, llama.plan(4), shard_size="200KB")
    return out


def test_the_plan_changes_logits_so_that_the_routes_can_be_distinguished(folder: Path, llama: FittedModel) -> None:
    ids = token_ids(2, 60)
    exact, latent = generated(llama.model, ids), generated(fhopt.load(folder), ids)
    assert difference(latent[1], exact[1]) > 10 * ROUNDING


def test_another_dtype_can_be_requested(folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model: Any = fhopt.load(folder, dtype=dtype)
        assert model.dtype == dtype and generated(model, token_ids(1, 40))[0].shape == (1, 52)


def test_a_loaded_model_can_be_unapplied_saved_and_is_then_the_original(
    folder: Path, llama: FittedModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    original = llama.model.state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert original.keys() == again.keys() and all(torch.equal(original[k], again[k]) for k in original)


def test_the_demo_model_loads_offline_with_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel("demo", tiny_llama(), tokenizer=object())
    monkeypatch.setattr("fhopt.hf.load.load_model", lambda name, dtype: loaded if name == "demo" else None)
    model = fhopt.load("demo")
    assert model is loaded.module and model.tokenizer is loaded.tokenizer
    with pytest.raises(FhoptError, match="'dtyp' is not an option of the demo's model; expected 'dtype'"):
        fhopt.load("demo", dtyp=torch.float16)


def test_a_name_that_is_no_folder_is_refused_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(FhoptError, match="'HuggingFaceTB/nothing' is not a folder on this machine"):
        fhopt.load("HuggingFaceTB/nothing")
