"""`fhopt.fit`: the options of the command, from Python."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from command_models import call, save_tiny_model

import fhopt
from fhopt.calibration.options import FitOptions
from fhopt.cli.fit import fit_command as command
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.refine import loss_target
from fhopt.refine.options import RATIOS

SMALL: dict[str, Any] = dict(sequences=6, rate_sequences=2, context=256, recent=64)
FLAGS = ["--sequences", "6", "--rate-sequences", "2", "--context", "256", "--recent", "64"]
OF_THE_COMMAND = {"model", "explain", "kept", "out", "device_map", "dtype", "as_json"}  # loading, output
RENAMED = {"texts": "text", "gate_texts": "gate_text", "statistics_file": "statistics", "ratios": "ratio"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "model"
    save_tiny_model(path)
    return path


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


def test_it_accepts_the_options_of_the_command_with_the_same_defaults() -> None:
    named = inspect.signature(fhopt.fit).parameters
    for option in command.params:
        if not isinstance(option, click.Option) or option.name in OF_THE_COMMAND:
            continue
        name = RENAMED.get(str(option.name), str(option.name))
        field = FitOptions.__dataclass_fields__.get(str(option.name))
        assert name in named or field is not None, f"fhopt.fit has no {name}"
        if field is not None and name != "text":
            default = option.default
            assert not isinstance(default, (int, float, str)) or str(default) == str(field.default), name


def test_plan_and_warning_equal_those_of_the_command(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhopt.plan.expected_loss.MIN_TOKENS", 1000)  # so that a tiny model has too few
    printed = call("fit", str(folder), *FLAGS, "--dtype", "float32", "-o", str(tmp_path / "plan")).output
    with pytest.warns(UserWarning, match="bases were fitted to") as caught:
        plan = fhopt.fit(loaded.module, loaded.tokenizer, **SMALL)
    assert plan.digest() == fhopt.LatentPlan.load(tmp_path / "plan").digest()
    assert str(caught[0].message)[:60] in printed and caught[0].filename == __file__


def test_statistics_give_plans_without_a_model(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    assert not call("calibrate", str(folder), *FLAGS, "--dtype", "float32", "-o", str(tmp_path / "s.stats")).exit_code
    plans = [
        fhopt.fit(None, statistics=tmp_path / "s.stats", ratio=8),
        fhopt.fit(loaded.module, loaded.tokenizer, ratio=8, **SMALL),
    ]
    assert plans[0].digest() == plans[1].digest()
    with pytest.raises(FhoptError, match="--sinks and --statistics are mutually exclusive"):
        fhopt.fit(None, statistics=tmp_path / "s.stats", sinks=4)


def test_a_maximum_loss_and_pages_are_accepted(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = loss_target.smallest_plan

    def quicker(model: Any, calibration: Any, options: Any, gate: Any, ids: Any, progress: Any) -> Any:
        assert (gate.max_loss, gate.texts, gate.ratios) == (0.9, ("topics",), RATIOS)
        return measure(model, calibration, options, replace(gate, ratios=(2.0,)), ids[:1, :256], progress)

    monkeypatch.setattr(loss_target, "smallest_plan", quicker)
    plan = fhopt.fit(loaded.module, loaded.tokenizer, max_loss=0.9, gate_text="topics", **SMALL)
    assert plan.provenance["gate"]["texts"] == ["topics"]
    with pytest.raises(FhoptError, match="positions"):  # the tiny model has too few to calibrate pages
        fhopt.fit(loaded.module, loaded.tokenizer, pages="1/8", **SMALL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(), "neither a tokenizer nor batches"),
        (dict(batches=[], max_loss=0.1), "require text"),
        (dict(batches=[]), "there are no batches"),
        (dict(batches=[], ratioo=4), "'ratioo' is not an option of a fit; expected 'ratio'"),
    ],
)
def test_missing_arguments_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        fhopt.fit(torch.nn.Linear(2, 2), **values)
