"""`fhopt eval` on the command line."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import characters
from click.testing import CliRunner
from rich.console import Console
from small_models import FittedModel, tiny_llama

from fhopt.cli.app import main
from fhopt.evaluation.tasks import TASKS
from fhopt.export import rewrite_folder
from fhopt.inspection.measured_tables import evaluation_tables
from fhopt.models.loader import load_model
from fhopt.models.rewritten_folder import read_folder
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import quality_card


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return characters()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    tiny_llama().save_pretrained(path)
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


WRONG: dict[str, tuple[list[str], str]] = {
    "an unknown task": (
        ["--tasks", "copy,poetry"],
        "task 'poetry' is unknown; expected a comma-separated list of perplexity, passkey",
    ),
    "a task of RULER without room": (["--tasks", "ruler", "--lengths", "200"], "no room for the task niah_single"),
    "lengths that are words": (
        ["--lengths", "long"],
        "--lengths 'long' is invalid; expected comma-separated token counts",
    ),
    "a length of 0": (["--lengths", "0"], "expected comma-separated token counts"),
    "a context without room": (["--tasks", "digits", "--lengths", "200"], "Use longer --lengths"),
    "a task beyond the model": (["--tasks", "copy", "--lengths", "700"], "expected at most 512, the model's limit"),
    "perplexity beyond the model": (["--context", "900"], "expected at most 512, the model's limit"),
    "a plan that is not there": (["--plan", "nowhere"], "is not a plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_with_a_fix(case: str, folder: Path) -> None:
    arguments, message = WRONG[case]
    result = call(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_measures_perplexity_and_tasks(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    llama.plan(4).save(tmp_path / "plan")
    options = ["--plan", tmp_path / "plan", "--data", "license", "--context", 200, "--sequences", 2]
    options += ["--tasks", "all", "--items", 1, "--lengths", "400,450"]
    result = call(folder, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"model", "ratio", "whole_ratio", "perplexity", "tasks"} and found["ratio"] > 1
    row = found["perplexity"]["license"]
    assert set(row) == {"exact", "plan", "increase_percent", "increase_percent_ci", "kl", "kl_ci", "tokens"}
    assert row["tokens"] == 398 and row["kl"] > 0 and row["kl_ci"][0] <= row["kl"] <= row["kl_ci"][1]
    assert row["increase_percent"] == pytest.approx(100 * (row["plan"] / row["exact"] - 1))
    assert set(found["tasks"]) == set(TASKS) and len(found["tasks"]["passkey"]["cells"]) == 10
    assert [c["length"] for c in found["tasks"]["copy"]["cells"]] == [400, 450]
    assert {"hits", "items", "rate", "rate_ci", "log_prob"} == set(found["tasks"]["copy"]["plan"])
    assert {"mcnemar", "rate_change_ci"} <= found["tasks"]["copy"].keys() & found["tasks"]["copy"]["cells"][0].keys()
    table = call(folder, *options)
    assert table.exit_code == 0 and "Perplexity" in table.stdout and "arithmetic" in table.stdout


def test_measurements_are_stored_in_the_plan_and_shown(folder: Path, llama: FittedModel, tmp_path: Path) -> None:
    llama.plan(4).save(tmp_path / "plan")
    options = ["--plan", tmp_path / "plan", "--data", "license", "--context", 150, "--json"]
    options += ["--tasks", "perplexity,copy", "--items", 1, "--lengths", 400]
    found = json.loads(call(folder, *options, "--record").stdout)
    plan = LatentPlan.load(tmp_path / "plan")
    (text,), (task,) = quality_card(plan).texts, quality_card(plan).tasks
    assert text.name == "license" and text.kl == found["perplexity"]["license"]["kl"] > 0
    assert (task.name, task.items) == ("copy", 1) and plan.digest() == llama.plan(4).digest()
    table = CliRunner().invoke(main, ["inspect", str(folder), "--plan", str(tmp_path / "plan")])
    assert table.exit_code == 0 and "Quality card" in table.stdout and "license" in table.stdout, table.output


def test_a_rewritten_folder_opens_after_its_plan_has_recorded_and_accepts_no_other(
    folder: Path, llama: FittedModel, tmp_path: Path
) -> None:
    rewritten = tmp_path / "rewritten"
    rewrite_folder.rewrite_folder(load_model(str(folder)), llama.plan(4), rewritten, folder)
    result = call(rewritten, "--plan", rewritten / "plan", "--data", "license", "--context", 150, "--record")
    assert result.exit_code == 0, result.output
    assert [text.name for text in quality_card(read_folder(rewritten).plan).texts] == ["license"]
    for command in (["fit", "demo"], ["heal", "demo", "--plan", str(rewritten / "plan")]):
        refused = CliRunner().invoke(main, [*command, "-o", str(rewritten / "plan")])
        assert refused.exit_code == 2 and "is the plan of the rewritten folder" in refused.stderr, refused.output
    read_folder(rewritten)


def test_nothing_is_recorded_without_a_plan(folder: Path) -> None:
    result = call(folder, "--record")
    assert result.exit_code == 2 and "--record requires a plan" in result.stderr


def test_needles_all_over_a_context_have_no_depth() -> None:
    found = {"exact": dict(hits=0, items=1, rate=0.0, rate_ci=(0.0, 0.8), log_prob=-3.0), "plan": None}
    whole = found | {"log_prob_change": None, "log_prob_change_ci": None}
    tasks = {"variable_tracking": whole | {"cells": [{"length": 490, "depth": None, **whole}]}}
    console = Console(width=120, record=True, file=StringIO())
    console.print(evaluation_tables({"model": "m", "ratio": None, "perplexity": {}, "tasks": tasks}))
    assert "spread" in console.export_text()


def test_without_a_plan_only_the_exact_model_is_measured(folder: Path) -> None:
    options = ["--data", "license", "--context", 150, "--tasks", "perplexity,copy", "--items", 1, "--lengths", 400]
    result = call(folder, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ratio"] is None and set(found["perplexity"]["license"]) == {"exact", "tokens"}
    assert found["tasks"]["copy"]["plan"] is None and found["tasks"]["copy"]["exact"]["items"] == 1
    table = call(folder, *options)
    assert table.exit_code == 0 and "exact" in table.stdout
