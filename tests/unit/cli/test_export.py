"""`fhopt rewrite` and what it exports, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from command_models import save_tiny_model
from exported_steps import as_loaded, mixer, plan_of
from small_models import found, tiny_llama

from fhopt.cli.app import main
from fhopt.fitting import fit_plan


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments), "--json"])


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    assert "not a rewritten folder" in run(tmp_path, "--target", "mlir").stderr
    (tmp_path / "fhopt.json").write_text("{}")  # options are checked before its contents
    assert "expected one of mlir, iree-cpu" in run(tmp_path, "--target", "nothing").stderr


# --------------------------------------------------------------------------------------------------- programs


def test_the_command_writes_programs_and_does_not_change_other_folders(tmp_path: Path) -> None:
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
    assert refused.exit_code == 2 and "is not an export" in refused.stderr
    done = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"path": str(tmp_path / "out")}
    assert (tmp_path / "out" / "step.pt2").is_file()


# --------------------------------------------------------------------------------------------------- any module


def test_the_command_writes_the_program_of_a_hand_written_module(tmp_path: Path) -> None:
    plan_of(as_loaded(mixer())).save(tmp_path / "plan")
    options = ["rewrite", "exported_steps:mixer", "--plan", str(tmp_path / "plan"), "--format", "pt2", "--no-aot"]
    for force in ([], ["--force"]):
        done = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out"), *force])
        assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(main, [*options, "-o", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "out exists; expected a new folder. Choose another name, or" in refused.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "plan", "program.json", "program.pt2"}
