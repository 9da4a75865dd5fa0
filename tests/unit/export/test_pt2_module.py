"""Modules as .pt2 programs, with their buffers as state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from buffered_decoder import SLOTS, V, decoder
from exported_steps import alone, as_loaded, mixer, plan_of
from small_models import FittedModel
from torch import Tensor, nn

from fhopt.errors import FhoptError
from fhopt.export import pt2_module
from fhopt.models.loaded_model import LoadedModel
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup

ROUNDING = 5e-5  # logits of about 4 in float32: attention sums in another order, or a value rounds differently


def decoding() -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a decoder with its own K/V buffers, and the arguments of a step."""
    return decoder("index", "all", batch=1), (torch.tensor([[1]]), torch.tensor([5]), 0)


CODES = (BitGroup(8, 8, 1 / 32), BitGroup(4, 8, 0.4))


def test_a_module_without_a_cache_becomes_a_program_with_its_outputs_in_order() -> None:
    loaded = as_loaded(mixer())
    module: Any = loaded.module
    made = pt2_module.export_module(loaded, plan_of(loaded))
    assert [t.name for t in made.inputs] == ["x"] and not made.state and made.outputs == 2
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        wanted = module(x, scale=2.0)
    for got, name in zip(made.program.module()(x), ("mixed", "mean"), strict=True):
        assert float((got - wanted[name]).abs().max()) < ROUNDING


def test_a_compressed_module_agrees_with_its_compiled_graph() -> None:
    loaded = as_loaded(mixer())
    plan = plan_of(loaded, (BitGroup(4, 8, 0.4),))
    program = pt2_module.export_module(loaded, plan).program.module()
    captured = loaded.capture()
    pipeline.optimize(pipeline.find_attentions(captured.program), plan)
    wanted: Any = torch.fx.Interpreter(captured.program.module).run(*captured.program.values.values())
    got = program(*loaded.inputs[0])
    assert float((got[0] - wanted[captured.result]).abs().max()) < ROUNDING
    exact = loaded.module(*loaded.inputs[0], scale=2.0)  # type: ignore[misc]
    assert float((got[0] - exact["mixed"]).abs().max()) > 1e-3  # it is quantized


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
    """Return each token's logits with buffers replaced by latents, without inductor, which takes minutes."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda m, inputs, **options: aot_eager(m, inputs))
    options: Any = {"plan": plan}
    compiled: Any = torch.compile(module, backend="flashhead", options=options)
    with torch.no_grad():
        return torch.stack([compiled(ids[:, i : i + 1], torch.tensor([i]), 0) for i in range(ids.shape[1])])


def by_the_program(made: pt2_module.ExportedModule, ids: Tensor) -> Tensor:
    """Return each token's logits, in this process."""
    assert made.start is not None
    program, state, found = made.program.module(), made.start.module()(), []
    for at in range(ids.shape[1]):
        given = [x.clone() for x in state]
        logits, *after = program(ids[:, at : at + 1], torch.tensor([at]), *state)
        assert all(map(torch.equal, state, given))  # inputs are not changed
        state = after
        found.append(logits)
    return torch.stack(found)


@torch.no_grad()
def by_the_module(module: Any, ids: Tensor) -> Tensor:
    return torch.stack([module(ids[:, i : i + 1], torch.tensor([i]), 0) for i in range(ids.shape[1])])


def test_buffers_of_a_module_become_state_and_stay_unchanged() -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    module: Any = loaded.module
    plan, held = plan_of(loaded), [x.clone() for x in module.buffers()]
    made = pt2_module.export_module(loaded, plan)
    assert all(map(torch.equal, held, module.buffers()))
    assert float((by_the_program(made, ids) - by_the_module(module, ids)).abs().max()) < ROUNDING


@pytest.mark.slow
def test_a_stateful_program_runs_in_a_process_without_fhopt(tmp_path: Path) -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    plan = plan_of(loaded, CODES)
    folder = pt2_module.write_module(loaded, plan, tmp_path / "out", compiled=False)
    got, exact = alone(folder, ids, tmp_path / "plain.pt", STATEFUL), by_the_module(loaded.module, ids)
    assert float((got - by_the_program(pt2_module.export_module(loaded, plan), ids)).abs().max()) < ROUNDING
    assert 1e-4 < float((got - exact).abs().max() / exact.abs().max()) < 0.2  # quantized to 8 and 4 bits
    content = json.loads((folder / "program.json").read_text())
    assert [t["name"] for t in content["inputs"]] == ["ids", "at"] and content["outputs"] == 1
    rows = [t["shape"] for t in content["state"] if t["dtype"] == "uint8"]
    assert rows == [[1, 2, SLOTS - 2 + 1, 12]] * 2  # 8 channels of 8 bits, 8 of 4; a spare row for unplaced tokens
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "plan", "program.json", "program.pt2", "start.pt2"]


@pytest.mark.slow
def test_a_compiled_stateful_program_calls_the_kernels_in_a_process_without_fhopt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, ids = as_loaded(decoding()), torch.randint(0, V, (1, 40))
    plan = plan_of(loaded, CODES)
    folder = pt2_module.write_module(loaded, plan, tmp_path / "out")
    got = alone(folder, ids, tmp_path / "aot.pt", STATEFUL)
    quantized = (got - by_the_module(loaded.module, ids)).abs()
    difference = (got - by_the_compiled_module(loaded.module, plan, ids, monkeypatch)).abs()
    assert float(difference.median()) < 1e-4  # except for values between two 4-bit codes, which rounding decides
    assert float(difference.max()) < float(quantized.max()) / 4


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_modules_that_cannot_be_exported_and_plans_of_others_are_refused(llama: FittedModel) -> None:
    loaded = as_loaded(mixer())
    plan = plan_of(loaded)
    with pytest.raises(FhoptError, match="cannot be exported"):
        pt2_module.export_module(LoadedModel("branching", Branching(), inputs=((torch.ones(2),), {})), plan)
    with pytest.raises(FhoptError, match=r"model.layers.0.self_attn was not compressed in module: .*"):
        pt2_module.export_module(loaded, llama.plan(1).with_provenance(fingerprint=None))
