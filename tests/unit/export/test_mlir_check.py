"""MLIR of decode steps: what it proves, what it catches, and what IREE makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from exported_steps import by_the_model
from small_models import VOCABULARY, Fitted, token_ids
from torch import Tensor

from fhopt.cli.app import main
from fhopt.errors import FhoptError
from fhopt.export import mlir, rewrite_folder, step_attention
from fhopt.export.step_attention import SiteAttention
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.latent_plan import LatentPlan

pytest.importorskip("torch_mlir.ir", reason="the extra mlir is not installed")

verifying: Any = pytest.importorskip("fhopt.verifying")


def text_of(model: Any, plan: LatentPlan) -> str:
    step = mlir.lower(model, plan).step
    text: str = step.operation.get_asm(enable_debug_info=True)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 4])
def test_a_step_is_proved_to_read_latents_alone(ratio: float, llama: Fitted) -> None:
    plan = llama.plan(ratio)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    assert not found.faults
    assert found.bytes_per_token == sum(s.token_bytes(4) for s in plan.sites)
    assert found.macs_per_token == sum(4 * (s.key.width + s.value.width) for s in plan.sites)  # 4 heads


def test_multiplications_are_counted_exactly(llama: Fitted) -> None:
    """The part that does not grow: projections, the head, absorption, expansion, and open tokens."""
    plan = llama.plan(4)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    projections = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * VOCABULARY
    moving = sum(4 * 16 * (s.key.width + s.value.width) for s in plan.sites)
    opened = 2 * 2 * 4 * 16 * (plan.window.first_length + 1)
    rotary = 8  # frequencies times the position
    constant = int(verifying.sympy.sympify(found.macs).subs("T", 0))
    assert constant in (projections + moving + opened, projections + moving + opened + rotary)


def decompressing(self: SiteAttention, query: Tensor, rows: Any, count: Tensor) -> Tensor:
    """What must be caught: keys rebuilt at full length."""
    latent = torch.cat([v for _, v, _ in step_attention._tiers(rows)], -1) * rows.scale.float().unsqueeze(-1)
    n = rows.decode.shape[0] // latent.shape[1]
    parts = [torch.matmul(latent[:, g // n], rows.decode[g].T) for g in range(rows.decode.shape[0])]
    keys = torch.stack(parts, 1)  # [B, G, T, D]
    return step_attention._grouped(query, keys.transpose(-1, -2))


def test_a_planted_decompressing_graph_is_caught_with_its_source_line(
    llama: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = llama.plan(4)
    monkeypatch.setattr(SiteAttention, "_sealed_logits", decompressing)
    found = verifying.verify_text(text_of(llama.model, plan), plan)
    assert any("a contraction makes" in fault and "stepping.py:" in fault for fault in found.faults)
    assert any("multiplications" in fault for fault in found.faults)


def test_a_state_of_other_bytes_than_the_plans_is_caught(llama: Fitted) -> None:
    found = verifying.verify_text(text_of(llama.model, llama.plan(4)), llama.plan(2))
    assert any("the plan says" in fault for fault in found.faults)


def test_what_is_no_linalg_is_refused(llama: Fitted) -> None:
    plan = llama.plan(4)
    with pytest.raises(FhoptError, match="no MLIR"):
        verifying.verify_text("module {", plan)
    with pytest.raises(FhoptError, match="operations of torch"):
        verifying.verify_text(str(mlir.lower(llama.model, plan, "torch").step), plan)
    with pytest.raises(FhoptError, match="no contraction"):
        verifying.verify_text("module { func.func @step(%x: tensor<?xf32>) { return } }", plan)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def folder(llama: Fitted, lettered: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folders") / "llama"
    rewrite_folder.rewrite(LoadedModel("llama", llama.model, lettered), llama.plan(4), out)
    return out


@pytest.mark.slow
def test_a_rewritten_folder_is_verified_and_exported_as_mlir(folder: Path, llama: Fitted, tmp_path: Path) -> None:
    verified = call("verify", str(folder), "--json")
    assert verified.exit_code == 0, verified.output
    for number, options in enumerate(([], ["--bytecode"])):
        out = str(tmp_path / str(number))
        done = call("export", str(folder), "--target", "mlir", *options, "-o", out, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(call("verify", out, "--json").stdout) == json.loads(verified.stdout)
    assert json.loads(done.stdout)["files"].keys() == {"seal.mlirbc", "step.mlirbc", "step.json", "weights.safetensors"}


def test_targets_that_there_are_not_are_refused(folder: Path) -> None:
    for options, said in (
        (["--target", "tpu"], "is no target"),
        (["--target", "mlir", "--arch", "sm_90"], "of a device"),
        (["--target", "iree-cpu", "--dialect", "torch"], "given linalg"),
    ):
        refused = call("export", str(folder), *options)
        assert refused.exit_code == 2 and said in refused.stderr


@pytest.mark.slow
def test_an_iree_module_has_the_logits_of_the_model(folder: Path, llama: Fitted, tmp_path: Path) -> None:
    pytest.importorskip("iree.compiler")
    pytest.importorskip("iree.runtime")
    out, ids = tmp_path / "out", token_ids(1, 48)
    done = call("export", str(folder), "--target", "iree-cpu", "-o", str(out))
    assert done.exit_code == 0, done.output
    state = mlir.open_module(out)
    expected = by_the_model(llama.model, llama.plan(4), ids)
    errors = [float((state.step(ids[:, i : i + 1]) - expected[i]).abs().max()) for i in range(48)]
    assert max(errors) < 1e-4 and state.sealed > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "arch", "holds"), [("iree-cpu", "aarch64:cortex-a76", b"aarch64"), ("iree-vulkan", "", b"vulkan-spirv")]
)
def test_a_module_for_another_machine_is_compiled_here(
    target: str, arch: str, holds: bytes, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("iree.compiler")
    out = tmp_path / "out"
    options = ["--arch", arch] if arch else []
    done = call("export", str(folder), "--target", target, *options, "-o", str(out))
    assert done.exit_code == 0, done.output
    assert len((out / "step.vmfb").read_bytes()) > 10_000 and json.loads((out / "step.json").read_text())
