"""`fhopt calibrate`, and `fhopt fit --statistics`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_models import call, save_tiny_model
from needs import sampled

from fhopt.calibration.statistics_file import load_statistics
from fhopt.fitting.fast_choice import bound_of
from fhopt.fitting.loss_interval import CHECKS
from fhopt.hardware import this_cpu
from fhopt.plan.latent_plan import LatentPlan

SAMPLE = ("--sequences", "6", "--rate-sequences", "2", "--context", "256", "--recent", "64", "--tokens", "4096")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its statistics."""
    here: Path = tmp_path_factory.mktemp("calibrated")
    save_tiny_model(here / "model")
    result = call("calibrate", str(here / "model"), *SAMPLE, "-o", str(here / "stats"), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["sites"] == 2 and told["tokens"] == 8 * 256 and told["bytes"] == (here / "stats").stat().st_size
    assert told["seconds"] > 0 and told["peak_megabytes"] > 50
    assert sorted(os.listdir(here)) == ["model", "stats"]
    return here


def fit(folder: Path, *arguments: str) -> dict[str, Any]:
    result = call("fit", "--statistics", str(folder / "stats"), *arguments, "-o", str(folder / "plan"), "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


@pytest.mark.parametrize("ratio", [3.0, 4.0])
def test_a_plan_is_fitted_without_the_model(folder: Path, ratio: float) -> None:
    assert fit(folder, "--ratio", str(ratio))["ratio"] > 0
    plan = LatentPlan.load(folder / "plan")
    assert plan.ratio(4096) >= ratio and plan.sinks == 16 and plan.mean_tokens == 256
    assert plan.provenance["calibration"]["dtype"] == "float32"


def test_trellis_codes_are_fitted_to_the_same_statistics(folder: Path) -> None:
    told = {code: fit(folder, "--ratio", "6", "--code", code) for code in ("uniform", "trellis")}
    assert LatentPlan.load(folder / "plan").has_trellis
    assert [each["trellis"] for each in told.values()] == [False, True]
    assert told["trellis"]["predicted_nats"] < 0.9 * told["uniform"]["predicted_nats"]
    assert fit(folder, "--ratio", "4", "--device", "cpu")["trellis"] is False
    small, least = fit(folder, "--ratio", "6", "--device", "cpu"), told["trellis"]["predicted_nats"]
    assert small["trellis"] and small["time"]["predicted_nats_without"] <= least  # each head may have its own latent
    assert least < small["predicted_nats"] <= bound_of(small["time"]["predicted_nats_without"])
    assert told["trellis"]["time"] is None and small["time"]["share"] < 1
    shown = call("inspect", str(folder / "model"), "--plan", str(folder / "plan"))
    assert shown.exit_code == 0 and "trellis codes" in shown.output


def test_the_expected_loss_is_an_interval_wherever_it_is_printed(folder: Path) -> None:
    """Calibration measured KL on the second halves of its texts, and it was small for this model or not."""
    told = fit(folder)
    known = told["expected_loss"]
    assert known["least"] < known["nats"] < known["most"] and told["warning"] is None
    result = call("fit", "--statistics", str(folder / "stats"), "-o", str(folder / "plan"))
    assert f"expected loss: {known['nats']:.2g} nats/token (" in result.output
    shown = call("inspect", str(folder / "model"), "--plan", str(folder / "plan"), "--json")
    plan = json.loads(shown.stdout)["plan"]
    assert plan["expected_interval"] == [known["least"], known["most"]]
    assert plan["expected_words"].endswith("on text from other domains)")


def test_a_plan_equals_that_of_fit(folder: Path) -> None:
    kept = folder / "kept"
    result = call(
        "fit", str(folder / "model"), *SAMPLE, "-o", str(folder / "alone"), "--keep-statistics", str(kept)
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Exported programs and torch.compile graphs need --mean-tokens 0." in result.stderr
    again = call("fit", "--statistics", str(kept), "-o", str(folder / "again"), "--json")
    assert json.loads(again.stdout)["digest"] == LatentPlan.load(folder / "alone").digest()
    fit(folder)
    alone, plan = (LatentPlan.load(folder / name) for name in ("alone", "plan"))
    for name in ("fingerprint", "weights", "text_sha256", "model", "predicted_nats"):
        assert alone.provenance[name] == plan.provenance[name], name
    assert [(s.layout, s.key.tiers, s.value.tiers) for s in alone.sites] == [
        (s.layout, s.key.tiers, s.value.tiers) for s in plan.sites
    ]


def test_sizes_layouts_devices_and_losses_come_from_the_same_file(folder: Path) -> None:
    fit(folder, "--layout", "head", "--ratio", "3")
    assert {s.layout for s in LatentPlan.load(folder / "plan").sites} == {"head"}
    fit(folder, "--device", "h100", "--ratio", "1.5")
    assert LatentPlan.load(folder / "plan").provenance["ratio"] == 1.5
    exact = sum(2 * s.site.exact_numbers_per_token for s in LatentPlan.load(folder / "plan").sites)
    fit(folder, "--bytes-per-token", str(exact / 2.5))
    assert LatentPlan.load(folder / "plan").provenance["ratio"] == pytest.approx(2.5)
    told = fit(folder, str(folder / "model"), "--max-loss", "50%", "--gate-data", "license")
    assert told["trials"] and LatentPlan.load(folder / "plan").provenance["gate"]["max_loss"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sinks", "4"), "--sinks and --statistics are mutually exclusive"),
        (("--data", "source"), "--data and --statistics are mutually exclusive"),
        (("--layout", "freq"), "no bases of the layout freq"),
        (("--ratio", "900"), "expected at least"),
    ],
)
def test_options_set_by_the_statistics_cannot_be_changed(
    folder: Path, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = call("fit", "--statistics", str(folder / "stats"), *arguments, "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "plan").exists()


def test_statistics_of_another_model_are_refused_if_a_model_is_run(folder: Path) -> None:
    target = ("--max-loss", "50%", "-o", str(folder / "plan"))
    result = call("fit", "demo", "--statistics", str(folder / "stats"), *target)
    assert result.exit_code == 2 and "statistics are of another model" in result.stderr, result.output


def test_neither_a_model_nor_statistics_is_refused(tmp_path: Path) -> None:
    result = call("fit", "-o", str(tmp_path / "plan"))
    assert result.exit_code == 2 and "MODEL is missing" in result.stderr, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--layout", "mla"), "is unknown"), (("--sequences", "1", "--context", "200"), "more or longer sequences")],
)
def test_a_calibration_that_cannot_work_is_refused_at_once(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = call("calibrate", "demo", *arguments, "-o", str(tmp_path / "stats"))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert os.listdir(tmp_path) == []


def test_files_of_other_things_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for name, message in (("notes", "is not a statistics file"), (".", "is a folder")):
        result = call("calibrate", "demo", "-o", str(tmp_path / name))
        assert result.exit_code == 2 and message in result.stderr, result.output
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("stored", "has_them", "options", "dtype"),
    sampled(
        [
            ("bfloat16", True, (), "bfloat16"),
            ("bfloat16", True, ("--dtype", "float32"), "float32"),
            ("bfloat16", False, (), "float32"),
            ("float16", True, (), "float32"),
            ("float32", True, (), "float32"),
        ],
        2,
    ),
)
def test_a_model_is_calibrated_in_the_dtype_that_is_faster_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, has_them: bool,
    options: tuple[str, ...], dtype: str,
) -> None:  # fmt: skip
    """KL on held-out text is measured in float32 in any case, so it is as small as that of the float32 plan."""
    monkeypatch.setattr(this_cpu, "multiplies_bfloat16", lambda: has_them)
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    result = call("calibrate", str(tmp_path / "model"), *SAMPLE, *options, "-o", str(tmp_path / "stats"))
    assert result.exit_code == 0, result.output
    calibration, of_float32 = load_statistics(tmp_path / "stats"), load_statistics(folder / "stats")
    assert calibration.provenance["calibration"]["dtype"] == dtype
    for one, other in zip(*(c.provenance[CHECKS] for c in (calibration, of_float32)), strict=True):
        assert one["nats"] == pytest.approx(other["nats"], rel=0.5)
