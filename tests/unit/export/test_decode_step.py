"""A decode step on explicit state, against the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exported_steps import by_the_model, difference
from hand_plans import shared_plan
from small_models import FittedModel, found, tiny_llama, token_ids

from fhopt.errors import FhoptError
from fhopt.export import decode_step, step_attention, step_state
from fhopt.plan.latent_plan import LatentPlan

ROUNDING = 5e-5  # logits of about 4 in float32: attention sums in another order, or a value rounds differently
STEPS = 60


def check_step(model: Any, plan: LatentPlan, kernels: bool) -> None:
    ids = token_ids(1, STEPS)
    step = decode_step.ExportedStep(model, decode_step.unrounded(plan), kernels)
    state = step_state.StepState(plan, step.tensors, step, decode_step.Seal(step))
    assert difference(state, ids, by_the_model(model, plan, ids)) < ROUNDING
    assert (state.tokens, state.quantized) == (60, 48)


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("ratio", [1, 4, 8])
def test_a_step_on_explicit_state_has_the_logits_of_the_model(ratio: float, llama: FittedModel) -> None:
    check_step(llama.model, llama.plan(ratio), kernels=False)


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_step_that_calls_the_kernels_has_them_too(ratio: float, llama: FittedModel) -> None:
    check_step(llama.model, llama.plan(ratio), kernels=True)


def test_one_latent_for_keys_and_values_and_another_family(gpt2: FittedModel) -> None:
    plan, ids = shared_plan(found(gpt2.model, 96)[1], width=64), token_ids(1, 40)
    step = decode_step.ExportedStep(gpt2.model, plan)
    assert [t.name.rpartition(".")[2] for t in step.tensors[:3]] == ["open_key", "open_value", "key_rows"]
    state = step_state.StepState(plan, step.tensors, step, decode_step.Seal(step))
    assert difference(state, ids, by_the_model(gpt2.model, plan, ids)) < ROUNDING


def test_the_state_has_the_bytes_per_token_of_the_plan(llama: FittedModel) -> None:
    plan = llama.plan(4)
    tensors = step_attention.state_tensors(plan, torch.float32)
    assert sum(t.token_bytes for t in tensors) == sum(s.token_bytes(4) for s in plan.sites)


def test_plans_and_models_without_such_a_step_are_refused(llama: FittedModel) -> None:
    plan = llama.plan(4)
    with pytest.raises(FhoptError, match="position_ids"):
        decode_step.ExportedStep(torch.nn.Linear(1, 1), plan)
    with pytest.raises(FhoptError, match="not fitted to"):
        decode_step.ExportedStep(tiny_llama(), plan.with_provenance(fingerprint="0"))
    with pytest.raises(FhoptError, match="one site per layer"):
        decode_step.ExportedStep(llama.model, LatentPlan(plan.sites[:1], 4, 8, 8))
