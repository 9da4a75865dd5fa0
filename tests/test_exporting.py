"""Decode steps with latents as state: in torch, as exported programs, and compiled, with the numbers of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hand_plans import shared_plan
from small_models import Fitted, found, tiny_gpt2, tiny_llama, token_ids
from test_cli import save_tiny_model
from torch import Tensor

import fhopt
from fhopt import exporting, fitting, stepping
from fhopt.applying import latent_cache
from fhopt.cli import main
from fhopt.errors import FhoptError
from fhopt.exporting_kernels import render
from fhopt.models import LoadedModel
from fhopt.spec import LatentPlan, SidePlan, SitePlan, Tier

ROUNDING = 5e-5  # logits of about 4 in float32: attention is summed in another order, a number rounded differently
STEPS = 60


def by_the_model(model: Any, plan: LatentPlan, ids: Tensor) -> list[Tensor]:
    """Logits of each token, with a latent cache."""
    fhopt.apply(model, stepping.unrounded(plan))
    cache = latent_cache(model)
    with torch.no_grad():
        found = [model(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1])]
    fhopt.unapply(model)
    return found


def difference(state: stepping.State, ids: Tensor, expected: list[Tensor]) -> float:
    steps = (state.step(ids[:, i : i + 1]) for i in range(ids.shape[1]))
    return max(float((step - wanted).abs().max()) for step, wanted in zip(steps, expected, strict=True))


def with_tiers(plan: LatentPlan, tiers: tuple[Tier, ...]) -> LatentPlan:
    """The same bases with other tiers of the same width."""

    def side(one: SidePlan) -> SidePlan:
        return SidePlan(one.encode, one.decode, tiers)

    sites = tuple(SitePlan(s.site, s.layout, side(s.key), side(s.value)) for s in plan.sites)
    return LatentPlan(sites, plan.sinks, plan.recent, plan.block)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "C++"])
@pytest.mark.parametrize("ratio", [1, 4, 8])
def test_a_step_on_explicit_state_has_the_logits_of_the_model(ratio: float, kernels: bool, llama: Fitted) -> None:
    plan, ids = llama.plan(ratio), token_ids(1, STEPS)
    step = stepping.Step(llama.model, stepping.unrounded(plan), kernels)
    state = stepping.State(plan, step.tensors, step, stepping.Seal(step))
    assert difference(state, ids, by_the_model(llama.model, plan, ids)) < ROUNDING
    assert (state.tokens, state.sealed) == (60, 48)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8, 16])
def test_every_number_of_bits_is_read_right(bits: int, llama: Fitted) -> None:
    plan = fitting.exact_plan(llama.outcome.sites.values(), recent=8, block=8)
    plan = with_tiers(plan, (Tier(bits, 8, 4 / 2**bits), Tier(8, 8, 1 / 64)))
    ids = token_ids(1, 40)
    step = stepping.Step(llama.model, plan)
    state = stepping.State(plan, step.tensors, step, stepping.Seal(step))
    assert difference(state, ids, by_the_model(llama.model, plan, ids)) < ROUNDING


def test_halves_are_read_from_bytes_exactly() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    assert torch.equal(stepping._halves(numbers.clone().view(torch.uint8)), numbers.float())


def test_one_latent_for_keys_and_values_and_another_family(gpt2: Fitted) -> None:
    plan, ids = shared_plan(found(gpt2.model, 96)[1], width=64), token_ids(1, 40)
    step = stepping.Step(gpt2.model, plan)
    assert [t.name.rpartition(".")[2] for t in step.tensors[:3]] == ["open_key", "open_value", "key_rows"]
    state = stepping.State(plan, step.tensors, step, stepping.Seal(step))
    assert difference(state, ids, by_the_model(gpt2.model, plan, ids)) < ROUNDING


def test_the_state_holds_as_many_bytes_per_token_as_the_plan_says(llama: Fitted) -> None:
    plan = llama.plan(4)
    tensors = stepping.state_tensors(plan, torch.float32)
    assert sum(t.token_bytes for t in tensors) == sum(s.token_bytes(4) for s in plan.sites)


def test_what_has_no_such_step_is_refused(llama: Fitted) -> None:
    plan = llama.plan(4)
    with pytest.raises(FhoptError, match="position_ids"):
        stepping.Step(torch.nn.Linear(1, 1), plan)
    with pytest.raises(FhoptError, match="another model"):
        stepping.Step(tiny_llama(), plan.with_provenance(fingerprint="0"))
    with pytest.raises(FhoptError, match="one for each layer"):
        stepping.Step(llama.model, LatentPlan(plan.sites[:1], 4, 8, 8))


# --------------------------------------------------------------------------------------------------- programs

ALONE = """
import json, sys, torch
folder, wanted = sys.argv[1], sys.argv[2]
ids = torch.load(wanted)
about = json.load(open(f"{folder}/step.json"))
step, seal = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("step", "seal"))
if wanted.endswith("aot.pt"):
    torch.ops.load_library(f"{folder}/fhopt_kernels.so")
    step = torch._inductor.aoti_load_package(f"{folder}/step-aot.pt2")
sinks, block, limit = about["sinks"], about["block"], about["sinks"] + about["recent"] + about["block"]
state = [torch.zeros([2 * block if n is None else n for n in t["shape"]], dtype=getattr(torch, t["dtype"]))
         for t in about["state"]]
opened = [i for i, t in enumerate(about["state"]) if None not in t["shape"]]
grown = [i for i in range(len(state)) if i not in opened]
held, sealed, found = 0, 0, []
for token in ids[0]:
    logits, *new = step(token.view(1, 1), torch.tensor([held, sealed]), *state)
    found.append(logits)
    for i, x in zip(opened, new):
        state[i][:, :, held] = x[:, :, 0]
    held += 1
    if held == limit:
        rows = seal(*[state[i][:, :, sinks : sinks + block].contiguous() for i in opened])
        for i, x in zip(grown, rows):
            state[i] = torch.cat([state[i][:, :, :sealed], x, torch.zeros_like(x)], 2)
        for i in opened:
            state[i][:, :, sinks : -block] = state[i][:, :, sinks + block :].clone()
        held, sealed = held - block, sealed + block
assert "fhopt" not in sys.modules and "transformers" not in sys.modules
torch.save(torch.stack(found), wanted)
"""


def alone(folder: Path, ids: Tensor, path: Path) -> Tensor:
    """Logits of all tokens by a fresh process that knows nothing of fhopt."""
    torch.save(ids, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, str(folder), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(path)
    return found.detach()


def test_exported_programs_run_in_a_process_without_fhopt(llama: Fitted, lettered: Any, tmp_path: Path) -> None:
    plan, ids = llama.plan(4), token_ids(1, STEPS)
    folder = exporting.write_programs(
        LoadedModel("small", llama.model, lettered), plan, tmp_path / "out", compiled=False
    )
    got = alone(folder, ids, tmp_path / "plain.pt")
    assert float((got - torch.stack(by_the_model(llama.model, plan, ids))).abs().max()) < ROUNDING
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "plan", "seal.pt2", "step.json", "step.pt2"]
    assert LatentPlan.load(folder / "plan").digest() == exporting.read_description(folder)["plan"]


@pytest.mark.slow
def test_compiled_programs_call_the_kernels_in_a_process_without_fhopt(
    llama: Fitted, lettered: Any, tmp_path: Path
) -> None:
    plan, ids = llama.plan(4), token_ids(1, STEPS)
    loaded = LoadedModel("small", llama.model, lettered)
    folder = exporting.write_programs(loaded, plan, tmp_path / "out")
    got = alone(folder, ids, tmp_path / "aot.pt")
    assert float((got - torch.stack(by_the_model(llama.model, plan, ids))).abs().max()) < ROUNDING
    exporting.write_programs(loaded, plan, folder, compiled=False)  # replaces it
    assert not (folder / "fhopt_kernels.so").exists()


def test_the_text_of_the_library_is_always_the_same_and_serves_every_kernel(llama: Fitted) -> None:
    specs = [stepping.kernel_spec(site) for site in llama.plan(4).sites]
    files = render(specs)
    assert files == render(specs) and set(files) == {"op.cpp", *(f"{s.name}.cpp" for s in specs)}
    assert all(f'fhopt_serve("{s.name}"' in files["op.cpp"] for s in specs)


def test_the_command_writes_programs_and_leaves_other_folders_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    plan = fitting.exact_plan(found(tiny_llama())[1].sites.values())
    plan.save(tmp_path / "plan")
    options = [
        "rewrite",
        str(tmp_path / "model"),
        "--plan",
        str(tmp_path / "plan"),
        "--format",
        "pt2",
        "--no-aot",
        "--json",
    ]
    refused = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "model")])
    assert refused.exit_code == 2 and "holds other things" in refused.stderr
    done = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"path": str(tmp_path / "out")}
    assert (tmp_path / "out" / "step.pt2").is_file()


def test_a_gpt2_is_exported_too(tmp_path: Path) -> None:
    model = tiny_gpt2()
    plan = fitting.exact_plan(found(model)[1].sites.values(), recent=8, block=8)
    exported = exporting.export_step(model, plan)
    state = stepping.State(plan, exported.state, exported.step.module(), exported.seal.module())
    ids = token_ids(1, 40)
    assert difference(state, ids, by_the_model(model, plan, ids)) < ROUNDING
