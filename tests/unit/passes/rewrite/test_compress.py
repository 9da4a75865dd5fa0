"""Keys and values from one latent become both operands of one node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_models import captured_sites, tiny_bert, with_biases
from hand_plans import CODED, shared_plan
from small_models import run, tiny_gpt2

from fhopt.ops import latent_attention
from fhopt.passes import pipeline


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("tiers", [(), CODED * 4], ids=["uncoded", "coded"])
def test_one_latent_becomes_both_operands_of_one_node(make: Any, tiers: Any) -> None:
    model = with_biases(make())
    captured, outcome = captured_sites(model)
    plan = shared_plan(outcome, 64, tiers)
    with torch.no_grad():
        expected = run(captured)
        pipeline.optimize(outcome, plan)
        result = run(captured)
    assert set(outcome.compressed.values()) == {"input"} and len(outcome.compressed) == 2
    op = torch.ops.fhopt.latent_attention.default if tiers else latent_attention.latent_attention_reference  # lowered
    far = [n.args for n in outcome.program.graph.nodes if n.target is op and n.args[1] is n.args[3]]
    assert len(far) == 2 and all(a[2] is a[4] and (a[2] is not None) == bool(tiers) for a in far)
    error = float((result - expected).norm() / expected.norm())
    assert error < 1e-5 if not tiers else 1e-5 < error < 0.3  # half of the channels have 4 bits
