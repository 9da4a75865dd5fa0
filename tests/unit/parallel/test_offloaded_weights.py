"""Weights loaded from disk on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offloaded_models import offloaded
from small_models import FittedModel, tiny_llama

import fhopt
from fhopt.errors import FhoptError
from fhopt.parallel.offloaded_weights import Weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny_llama().double().save_pretrained(path)
    return path


def test_weights_are_loaded_one_at_a_time_and_released(folder: Path) -> None:
    model = offloaded(folder)
    weights, names = Weights(model), [name for name, _ in tiny_llama().named_parameters()]
    assert sorted(names) == list(weights) and not weights.absent
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name], tiny_llama().double().get_parameter(name))
    assert weights[name] is not weights[name] and model.get_parameter(name).is_meta


def test_a_model_without_values_is_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match=r"lm_head\.weight of LlamaForCausalLM is on the meta device"):
        fhopt.apply(tiny_llama().to("meta"), llama.plan(4))
