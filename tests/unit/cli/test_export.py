"""`fhopt rewrite` and what it exports, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_models import save_tiny_model
from exported_steps import as_loaded, mixer, plan_of
from mla_export import sites_of, with_tiers
from small_models import Fitted, found, tiny_llama

from fhopt.cli.app import main
from fhopt.export import rewrite_folder
from fhopt.fitting import fit_plan
from fhopt.models.loaded_model import LoadedModel


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments), "--json"])


def test_the_command_cuts_and_writes_what_opens_and_says_how_to_serve_it(
    llama: Fitted, lettered: Any, tmp_path: Path
) -> None:
    plan = fit_plan.fit(llama.statistics, ratio=1, layout="freq")
    rewrite_folder.rewrite(LoadedModel("small", llama.model, lettered), plan, tmp_path / "model")
    uncut = run(tmp_path / "model", "--target", "vllm")
    assert uncut.exit_code == 2 and "--kv-lora-rank" in uncut.stderr
    done = run(tmp_path / "model", "--target", "sglang", "--kv-lora-rank", 24, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["checkpoint"]["sizes"]["latent"] == 24 and printed["kv_cache_dtype"] == "auto"
    assert f"--model-path {tmp_path / 'out'}" in printed["command"]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "export.json", "README.md"} <= names
    assert "plan" not in names and "fhopt.json" not in names
    again = run(tmp_path / "model", "--target", "sglang", "--kv-lora-rank", 15, "-o", tmp_path / "out")
    assert json.loads(again.stdout)["checkpoint"]["sizes"]["latent"] == 16


@pytest.mark.parametrize(("bits", "dtype"), [(8, "fp8_e4m3"), (16, None)])
def test_where_only_bits_change_the_command_says_which_cache_to_serve_the_original_with(
    bits: int, dtype: str | None, lettered: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    plan = with_tiers(fit_plan.exact_plan(sites_of(model)), bits)
    rewrite_folder.rewrite(LoadedModel("small", model, lettered), plan, tmp_path / "model")
    done = run(tmp_path / "model", "--target", "sglang", "-o", tmp_path / "out")
    if dtype is None:  # 16 bits are no other cache, and two kv heads no latent attention
        assert done.exit_code == 2 and "keeps 2 complex numbers" in done.stderr
        return
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["checkpoint"] is None and printed["kv_cache_dtype"] == dtype and "ORIGINAL" in printed["command"]
    assert not (tmp_path / "out").exists()


def test_options_of_other_targets_are_refused(tmp_path: Path) -> None:
    assert "not a rewritten model" in run(tmp_path, "--target", "vllm").stderr
    (tmp_path / "fhopt.json").write_text("{}")  # options are looked at before what it says
    assert "are for MLIR" in run(tmp_path, "--target", "vllm", "--bytecode").stderr
    assert "vllm and sglang" in run(tmp_path, "--target", "mlir", "--kv-lora-rank", 8).stderr
    assert "iree-metal, vllm, sglang" in run(tmp_path, "--target", "nothing").stderr


# --------------------------------------------------------------------------------------------------- programs


def test_the_command_writes_programs_and_leaves_other_folders_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    plan = fit_plan.exact_plan(found(tiny_llama())[1].sites.values())
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


# --------------------------------------------------------------------------------------------------- any module


def test_the_command_writes_the_program_of_a_hand_written_module(tmp_path: Path) -> None:
    plan_of(as_loaded(mixer())).save(tmp_path / "plan")
    options = ["rewrite", "exported_steps:mixer", "--plan", str(tmp_path / "plan"), "--format", "pt2", "--no-aot"]
    for _ in range(2):  # an older one is replaced
        done = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "plan", "program.json", "program.pt2"}
