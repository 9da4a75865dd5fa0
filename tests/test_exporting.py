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
from small_models import Fitted, cached, found, tiny_gpt2, tiny_llama, token_ids
from test_cli import save_tiny_model
from test_latent_buffers import SLOTS, V, decoder
from torch import Tensor, nn

import fhopt
from fhopt import exporting, exporting_modules, fitting, passes, stepping
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
        found = [model(ids[:, i : i + 1], **cached(cache)).logits for i in range(ids.shape[1])]
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


def check_step(model: Any, plan: LatentPlan, kernels: bool) -> None:
    ids = token_ids(1, STEPS)
    step = stepping.Step(model, stepping.unrounded(plan), kernels)
    state = stepping.State(plan, step.tensors, step, stepping.Seal(step))
    assert difference(state, ids, by_the_model(model, plan, ids)) < ROUNDING
    assert (state.tokens, state.sealed) == (60, 48)


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("ratio", [1, 4, 8])
def test_a_step_on_explicit_state_has_the_logits_of_the_model(ratio: float, llama: Fitted) -> None:
    check_step(llama.model, llama.plan(ratio), kernels=False)


@pytest.mark.parametrize("ratio", [1, 4])
def test_so_has_a_step_that_calls_the_kernels(ratio: float, llama: Fitted) -> None:
    check_step(llama.model, llama.plan(ratio), kernels=True)


@pytest.mark.usefixtures("without_compiling")
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


def alone(folder: Path, ids: Tensor, path: Path, code: str = ALONE) -> Tensor:
    """Logits of all tokens by a fresh process that knows nothing of fhopt."""
    torch.save(ids, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(path)
    return found.detach()


@pytest.mark.slow
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


# --------------------------------------------------------------------------------------------------- any module


class Mixer(nn.Module):
    """One attention of a batch of vectors, and another output beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        q, k, v = (self.qkv(x) * scale).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"mixed": self.out(y.transpose(1, 2).flatten(2)), "mean": x.mean(1)}


def mixer() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(3)
    return Mixer().eval(), (torch.randn(2, 24, 32),), {"scale": 2.0}


def decoding() -> tuple[nn.Module, tuple[Any, ...]]:
    """A decoder with K/V buffers of its own, and the arguments of a step."""
    return decoder("index", "all", batch=1), (torch.tensor([[1]]), torch.tensor([5]), 0)


def as_loaded(made: tuple[Any, ...]) -> LoadedModel:
    return LoadedModel("module", made[0], inputs=(made[1], made[2] if len(made) > 2 else {}))


def plan_of(loaded: LoadedModel, tiers: tuple[Tier, ...] = ()) -> LatentPlan:
    with torch.no_grad():
        outcome = passes.find(loaded.capture().program)
    return with_tiers(fitting.exact_plan(outcome.sites.values(), sinks=2, recent=4, block=4), tiers)


CODES = (Tier(8, 8, 1 / 32), Tier(4, 8, 0.4))


def test_a_module_without_a_cache_becomes_a_program_with_its_outputs_in_order() -> None:
    loaded = as_loaded(mixer())
    module: Any = loaded.module
    made = exporting_modules.export_module(loaded, plan_of(loaded))
    assert [t.name for t in made.inputs] == ["x"] and not made.state and made.outputs == 2
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        wanted = module(x, scale=2.0)
    for got, name in zip(made.program.module()(x), ("mixed", "mean"), strict=True):
        assert float((got - wanted[name]).abs().max()) < ROUNDING


def test_a_compressed_module_computes_what_its_compiled_graph_does() -> None:
    loaded = as_loaded(mixer())
    plan = plan_of(loaded, (Tier(4, 8, 0.4),))
    program = exporting_modules.export_module(loaded, plan).program.module()
    captured = loaded.capture()
    passes.optimize(passes.find(captured.program), plan)
    wanted: Any = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())
    got = program(*loaded.inputs[0])
    assert float((got[0] - wanted[captured.result]).abs().max()) < ROUNDING
    exact = loaded.module(*loaded.inputs[0], scale=2.0)  # type: ignore[misc]
    assert float((got[0] - exact["mixed"]).abs().max()) > 1e-3  # it does round


STATEFUL = """
import json, sys, torch
folder, wanted = sys.argv[1], sys.argv[2]
ids = torch.load(wanted)
program, start = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("program", "start"))
if wanted.endswith("aot.pt"):
    torch.ops.load_library(f"{folder}/fhopt_kernels.so")
    program = torch._inductor.aoti_load_package(f"{folder}/program-aot.pt2")
state, found = start(), []
for at, token in enumerate(ids[0]):
    logits, *state = program(token.view(1, 1), torch.tensor([at]), *state)
    found.append(logits)
assert "fhopt" not in sys.modules
torch.save(torch.stack(found), wanted)
"""


def by_the_compiled_module(module: Any, plan: LatentPlan, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of each token, its buffers replaced by latents; without the minutes that inductor takes."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda m, inputs, **options: aot_eager(m, inputs))
    options: Any = {"plan": plan}
    compiled: Any = torch.compile(module, backend="flashhead", options=options)
    with torch.no_grad():
        return torch.stack([compiled(ids[:, i : i + 1], torch.tensor([i]), 0) for i in range(ids.shape[1])])


def by_the_program(made: exporting_modules.ExportedModule, ids: Tensor) -> Tensor:
    """Logits of each token, in this process."""
    assert made.start is not None
    program, state, found = made.program.module(), made.start.module()(), []
    for at in range(ids.shape[1]):
        given = [x.clone() for x in state]
        logits, *after = program(ids[:, at : at + 1], torch.tensor([at]), *state)
        assert all(map(torch.equal, state, given))  # what is given is not changed
        state = after
        found.append(logits)
    return torch.stack(found)


@torch.no_grad()
def by_the_module(module: Any, ids: Tensor) -> Tensor:
    return torch.stack([module(ids[:, i : i + 1], torch.tensor([i]), 0) for i in range(ids.shape[1])])


def test_buffers_of_a_module_become_state_and_stay_as_they_were() -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    module: Any = loaded.module
    plan, held = plan_of(loaded), [x.clone() for x in module.buffers()]
    made = exporting_modules.export_module(loaded, plan)
    assert all(map(torch.equal, held, module.buffers()))
    assert float((by_the_program(made, ids) - by_the_module(module, ids)).abs().max()) < ROUNDING


@pytest.mark.slow
def test_a_stateful_program_runs_in_a_process_without_fhopt(tmp_path: Path) -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    plan = plan_of(loaded, CODES)
    folder = exporting_modules.write_module(loaded, plan, tmp_path / "out", compiled=False)
    got, exact = alone(folder, ids, tmp_path / "plain.pt", STATEFUL), by_the_module(loaded.module, ids)
    assert float((got - by_the_program(exporting_modules.export_module(loaded, plan), ids)).abs().max()) < ROUNDING
    assert 1e-4 < float((got - exact).abs().max() / exact.abs().max()) < 0.2  # rounded to 8 and 4 bits
    told = json.loads((folder / "program.json").read_text())
    assert [t["name"] for t in told["inputs"]] == ["ids", "at"] and told["outputs"] == 1
    rows = [t["shape"] for t in told["state"] if t["dtype"] == "uint8"]
    assert rows == [[1, 2, SLOTS - 2 + 1, 12]] * 2  # 8 channels of 8 bits and 8 of 4; a spare row takes what has none
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "plan", "program.json", "program.pt2", "start.pt2"]


@pytest.mark.slow
def test_a_compiled_stateful_program_calls_the_kernels_in_a_process_without_fhopt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    plan = plan_of(loaded, CODES)
    folder = exporting_modules.write_module(loaded, plan, tmp_path / "out")
    got = alone(folder, ids, tmp_path / "aot.pt", STATEFUL)
    coded = (got - by_the_module(loaded.module, ids)).abs()
    difference = (got - by_the_compiled_module(loaded.module, plan, ids, monkeypatch)).abs()
    assert float(difference.median()) < 1e-4  # but of a number between two codes of 4 bits, rounding decides
    assert float(difference.max()) < float(coded.max()) / 4


def test_the_command_writes_the_program_of_a_hand_written_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    plan_of(as_loaded(mixer())).save(tmp_path / "plan")
    options = ["rewrite", "test_exporting:mixer", "--plan", str(tmp_path / "plan"), "--format", "pt2", "--no-aot"]
    for _ in range(2):  # an older one is replaced
        done = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "plan", "program.json", "program.pt2"}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_modules_that_cannot_be_exported_and_plans_of_others_are_refused(llama: Fitted) -> None:
    loaded = as_loaded(mixer())
    plan = plan_of(loaded)
    with pytest.raises(FhoptError, match="cannot be exported"):
        exporting_modules.export_module(LoadedModel("branching", Branching(), inputs=((torch.ones(2),), {})), plan)
    with pytest.raises(FhoptError, match=r"model.layers.0.self_attn stays as it is in module: .*"):
        exporting_modules.export_module(loaded, llama.plan(1).with_provenance(fingerprint=None))
