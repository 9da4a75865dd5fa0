"""Checks of decode steps in MLIR: proofs, detected faults, and compilation by IREE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import VOCABULARY, FittedModel
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.export import mlir, step_attention
from fhopt.export.step_attention import SiteAttention
from fhopt.plan.latent_plan import LatentPlan

pytest.importorskip("torch_mlir.ir", reason="the extra mlir is not installed")

verifying: Any = pytest.importorskip("fhopt.export.mlir_check")


def text_of(model: Any, plan: LatentPlan) -> str:
    step = mlir.lower_step(model, plan).step
    text: str = step.operation.get_asm(enable_debug_info=True)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 4])
def test_a_step_is_proved_to_load_only_latents(ratio: float, llama: FittedModel) -> None:
    plan = llama.plan(ratio)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    assert not found.faults
    assert found.bytes_per_token == sum(s.token_bytes(4) for s in plan.sites)
    assert found.macs_per_token == sum(4 * (s.key.width + s.value.width) for s in plan.sites)  # 4 heads


def test_multiplications_are_counted_exactly(llama: FittedModel) -> None:
    """The part independent of the context: projections, head, absorption, expansion, and full-precision tokens."""
    plan = llama.plan(4)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    projections = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * VOCABULARY
    moving = sum(4 * 16 * (s.key.width + s.value.width) for s in plan.sites)
    opened = 2 * 2 * 4 * 16 * (plan.window.first_length + 1)
    rotary = 8  # frequencies times the position
    constant = int(verifying.sympy.sympify(found.macs).subs("T", 0))
    assert constant in (projections + moving + opened, projections + moving + opened + rotary)


def decompressing(self: SiteAttention, query: Tensor, rows: Any, count: Tensor) -> Tensor:
    """A graph to detect: it reconstructs keys at full length."""
    latent = torch.cat([v for _, v, _ in step_attention._bit_groups(rows)], -1) * rows.scale.float().unsqueeze(-1)
    n = rows.decode.shape[0] // latent.shape[1]
    parts = [torch.matmul(latent[:, g // n], rows.decode[g].T) for g in range(rows.decode.shape[0])]
    keys = torch.stack(parts, 1)  # [B, G, T, D]
    return step_attention._grouped(query, keys.transpose(-1, -2))


def test_a_planted_decompressing_graph_is_caught_with_its_source_line(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = llama.plan(4)
    monkeypatch.setattr(SiteAttention, "_latent_logits", decompressing)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    assert any("a contraction produces" in fault and "stepping.py:" in fault for fault in found.faults)
    assert any("multiplications" in fault for fault in found.faults)


def test_a_state_whose_bytes_differ_from_the_plan_is_caught(llama: FittedModel) -> None:
    found = verifying.verify_text(text_of(llama.model, llama.plan(4)), llama.plan(2))
    assert any("as in the plan" in fault for fault in found.faults)


def test_other_dialects_than_linalg_are_refused(llama: FittedModel) -> None:
    plan = llama.plan(4)
    with pytest.raises(FhoptError, match="no MLIR"):
        verifying.verify_text("module {", plan)
    with pytest.raises(FhoptError, match="torch operations"):
        verifying.verify_text(str(mlir.lower_step(llama.model, plan, "torch").step), plan)
    with pytest.raises(FhoptError, match="no contraction"):
        verifying.verify_text("module { func.func @step(%x: tensor<?xf32>) { return } }", plan)
