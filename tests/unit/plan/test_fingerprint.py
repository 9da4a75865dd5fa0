"""Fingerprints tie a plan to its model."""

from __future__ import annotations

import pytest
import torch
from small_models import FittedModel, tiny_llama

from fhopt.errors import FhoptError
from fhopt.plan import fingerprint


def test_a_plan_recognizes_its_model_in_any_dtype_and_refuses_another(llama: FittedModel) -> None:
    sites = [s.site for s in llama.plan(4).sites]
    own = dict(llama.model.named_parameters())
    plan = llama.plan(4).with_provenance(fingerprint=fingerprint.fingerprint(own, sites))
    fingerprint.check_fingerprint(plan, {n: p.to(torch.bfloat16) for n, p in own.items()}, "the same in bfloat16")
    torch.manual_seed(5)
    other = tiny_llama()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(FhoptError, match=r"not fitted to another, but to tiny \(fingerprint"):
        fingerprint.check_fingerprint(plan.with_provenance(model="tiny"), dict(other.named_parameters()), "another")


def test_a_model_with_an_adapter_is_told_to_fit_its_own_plan(llama: FittedModel) -> None:
    from peft import LoraConfig, get_peft_model

    plan = llama.plan(4).with_provenance(fingerprint="0")
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(FhoptError, match="Fit a plan for the model with its PEFT adapter"):
        fingerprint.check_fingerprint(plan, dict(adapted.named_parameters()), "adapted")
