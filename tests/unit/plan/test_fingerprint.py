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
    with pytest.raises(FhoptError, match="not fitted to"):
        fingerprint.check_fingerprint(plan, dict(other.named_parameters()), "another")
