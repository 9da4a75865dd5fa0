"""Decode steps as .pt2 programs, run without fhopt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_steps import alone, by_the_model, difference
from small_models import FittedModel, found, tiny_gpt2, token_ids

from fhopt.export import pt2_step, step_state
from fhopt.fitting import fit_plan
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan

ROUNDING = 5e-5  # logits of about 4 in float32: attention sums in another order, or a value rounds differently
STEPS = 60


@pytest.mark.slow
def test_exported_programs_run_in_a_process_without_fhopt(llama: FittedModel, lettered: Any, tmp_path: Path) -> None:
    plan, ids = llama.plan(4), token_ids(1, STEPS)
    folder = pt2_step.write_programs(
        LoadedModel("small", llama.model, lettered), plan, tmp_path / "out", compiled=False
    )
    got = alone(folder, ids, tmp_path / "plain.pt")
    assert float((got - torch.stack(by_the_model(llama.model, plan, ids))).abs().max()) < ROUNDING
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "plan", "seal.pt2", "step.json", "step.pt2"]
    assert LatentPlan.load(folder / "plan").digest() == pt2_step.read_step_description(folder)["plan"]


@pytest.mark.slow
def test_compiled_programs_call_the_kernels_in_a_process_without_fhopt(
    llama: FittedModel, lettered: Any, tmp_path: Path
) -> None:
    plan, ids = llama.plan(4), token_ids(1, STEPS)
    loaded = LoadedModel("small", llama.model, lettered)
    folder = pt2_step.write_programs(loaded, plan, tmp_path / "out")
    got = alone(folder, ids, tmp_path / "aot.pt")
    assert float((got - torch.stack(by_the_model(llama.model, plan, ids))).abs().max()) < ROUNDING
    pt2_step.write_programs(loaded, plan, folder, compiled=False)  # replaces the folder
    assert not (folder / "fhopt_kernels.so").exists()


def test_a_gpt2_is_exported_too(tmp_path: Path) -> None:
    model = tiny_gpt2()
    plan = fit_plan.exact_plan(found(model)[1].sites.values(), recent=8, block=8)
    exported = pt2_step.export_pt2(model, plan)
    state = step_state.StepState(plan, exported.state, exported.step.module(), exported.seal.module())
    ids = token_ids(1, 40)
    assert difference(state, ids, by_the_model(model, plan, ids)) < ROUNDING
