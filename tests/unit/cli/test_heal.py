"""`fhopt heal` on the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_models import call, save_tiny_model
from healed_plans import CONTEXT, COUNT, loaded
from small_models import FittedModel, tiny_llama

from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.plan import fingerprint
from fhopt.plan.latent_plan import LatentPlan

pytestmark = pytest.mark.usefixtures("without_compiling")


@pytest.fixture
def plan(llama: FittedModel) -> LatentPlan:
    return llama.plan(8.0)


@pytest.fixture
def model() -> LoadedModel:
    return loaded(tiny_llama())


@pytest.fixture
def folder(plan: LatentPlan, tmp_path: Path) -> Path:
    """A folder with `model` and `plan`."""
    save_tiny_model(tmp_path / "model")
    weights = dict(load_model(str(tmp_path / "model")).language_model().named_parameters())
    print_ = fingerprint.fingerprint(weights, [s.site for s in plan.sites])
    plan.with_provenance(fingerprint=print_).save(tmp_path / "plan")
    return tmp_path


SAMPLE = ("--data", "license", "--tokens", str(2 * COUNT * CONTEXT), "--context", str(CONTEXT), "--held-out", "4")


@pytest.mark.slow
def test_the_command_writes_a_better_plan(folder: Path) -> None:
    arguments = ["heal", str(folder / "model"), "--plan", str(folder / "plan"), *SAMPLE, "-o", str(folder / "healed")]
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    printed, healed = json.loads(result.stdout), LatentPlan.load(folder / "healed")
    assert printed["digest"] == healed.digest() and printed["plan_path"] == str(folder / "healed")
    assert printed["healing"] == healed.provenance["healing"]
    assert printed["healing"]["after"]["kl"] < printed["healing"]["before"]["kl"]
    assert sorted(os.listdir(folder)) == ["healed", "model", "plan"]  # the checkpoint is removed
    result = call(*arguments, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "nats/token" in result.stdout, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "64"), "expected at least 4"),
        (("--ridge", "0"), "ridge 0 is invalid"),
        (("--context", "12"), "expected more than 12"),
        (("--data", "absent.txt"), "cannot read absent.txt"),
        (("--plan", "absent"), "is not a plan"),
        (("-o", "{tmp}/model"), "is not a plan"),
        (("-o", "{tmp}/plan/plan.json/below"), "Choose another folder"),
        (("--checkpoint", "{tmp}/plan/plan.json/state"), "Choose another folder"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    given = ["--plan", str(folder / "plan"), *SAMPLE, "-o", str(folder / "healed")]
    result = call("heal", str(folder / "model"), *given, *(o.format(tmp=folder) for o in options))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert {"model", "plan"} == set(os.listdir(folder))
