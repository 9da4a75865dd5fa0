"""Weights of multi-head latent attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mla_export import difference, exported, sites_of
from small_models import tiny_llama

from fhopt.export import mla_weights
from fhopt.fitting import fit_plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_the_norm_of_the_latent_changes_no_number(dtype: torch.dtype, size: float) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

    norm = DeepseekV2RMSNorm(64).to(dtype)
    norm.weight.data.fill_(mla_weights.WEIGHT)
    latent = (torch.randn(100, 64) * size).to(dtype)
    with torch.no_grad():
        got = norm(latent * mla_weights.SHRINK).double() * mla_weights.GAIN
    assert float((got / latent.double() - 1).abs().max()) < 4 * torch.finfo(dtype).eps


def test_bfloat16_weights_are_stored_and_the_logits_are_near(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=1)
    plan = fit_plan.exact_plan(sites_of(model))
    made = exported(model, plan, tmp_path / "out", dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16 and difference(made.float(), model) < 0.05
