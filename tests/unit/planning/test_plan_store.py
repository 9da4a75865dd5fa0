"""The plan store."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from command_models import save_tiny_model
from small_models import FittedModel
from stored_plans import plan

from fhopt.calibration.options import FitOptions
from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.plan.latent_plan import LatentPlan
from fhopt.planning import pipeline, plan_store
from fhopt.system import cache_folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def test_a_plan_is_stored_and_found_by_a_prefix_of_its_name_or_digest() -> None:
    first, second = (plan_store.add(plan(n)) for n in (1, 2))
    assert [e.name for e in plan_store.stored_plans()] == sorted([first.name, second.name])
    assert plan_store.find_plan(first.name[:-2]) == first and plan_store.find_plan(second.digest[:12]) == second
    assert LatentPlan.load(first.path).digest() == plan(1).digest()
    assert first.name.startswith("a-model-") and plan_store.add(plan(1)) == first
    for wrong in ("a-model", "nothing", ""):
        with pytest.raises(FhoptError, match="does not name one plan"):
            plan_store.find_plan(wrong)


def test_a_damaged_plan_is_reported_and_replaced_when_it_is_added_again() -> None:
    kept = plan_store.add(plan())
    content = (kept.path / "plan.safetensors").read_bytes()
    (kept.path / "plan.safetensors").write_bytes(content[:-1] + b"x")
    assert "altered" in plan_store.verify_plan(kept).fault
    assert not plan_store.verify_plan(plan_store.add(plan())).fault


def test_plans_of_another_model_are_reported(llama: FittedModel, gpt2: FittedModel) -> None:
    from fhopt.plan.fingerprint import fingerprint

    fitted = llama.plan(4)
    print_ = fingerprint(dict(llama.model.named_parameters()), [s.site for s in fitted.sites])
    kept = plan_store.add(fitted.with_provenance(fingerprint=print_))
    assert not plan_store.verify_plan(kept, LoadedModel("llama", llama.model)).fault
    assert "not fitted to gpt2" in plan_store.verify_plan(kept, LoadedModel("gpt2", gpt2.model)).fault


def test_pruning_removes_the_damaged_the_old_and_leftovers(own_folder: Path) -> None:
    kept = [plan_store.add(plan(n, fingerprint="x" if n < 3 else "y")) for n in range(4)]
    for age, entry in enumerate(reversed(kept)):
        os.utime(entry.path / "plan.json", (time.time() - age, time.time() - age))
    broken = plan_store.add(plan(9))
    (broken.path / "plan.json").write_text("{")
    old, new = own_folder / ".old.calibration", own_folder / ".new.calibration"
    for file in (old, new):
        file.write_bytes(b"1234")
    os.utime(old, (0, 0))
    planned = plan_store.prune_plans(keep=1, dry=True)
    assert len(plan_store.stored_plans()) == 5 and old.exists()
    assert plan_store.prune_plans(keep=1) == planned and planned.nbytes > 4
    assert set(planned.names) == {broken.name, old.name, kept[0].name, kept[1].name}
    assert {e.name for e in plan_store.stored_plans()} == {kept[2].name, kept[3].name} and new.exists()


def test_pruning_never_removes_other_files(own_folder: Path, tmp_path: Path) -> None:
    other = own_folder / "letters"
    other.mkdir(parents=True)
    (other / "dear.txt").write_text("dear")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (own_folder / "link").symlink_to(elsewhere)
    assert plan_store.prune_plans().names == () and (other / "dear.txt").exists() and elsewhere.exists()


def test_several_sizes_come_from_one_calibration_and_are_fitted_once(
    tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "model")
    calibrations: list[float] = []
    calibrate = pipeline.calibrate_source

    def counted(*arguments: Any) -> Any:
        calibrations.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(pipeline, "calibrate_source", counted)
    loaded, options = (
        load_model(str(tmp_path / "model")),
        FitOptions(sequences=6, rate_sequences=2, context=256, recent=64),
    )
    two = plan_store.fit_ratios(loaded, options, (2, 4))
    assert [round(e.ratio) for e in two] == [2, 4] and len(calibrations) == 1
    assert plan_store.fit_ratios(loaded, options, (4, 2)) == two[::-1] and len(calibrations) == 1
    assert plan_store.fit_ratios(loaded, options, (4, 3))[0] == two[1] and len(calibrations) == 2
    monkeypatch.setattr(plan_store, "__version__", "another")  # another request with an equal plan
    names = [entry.name for entry in two]
    for _ in range(2):
        assert [e.name for e in plan_store.fit_ratios(loaded, options, (2, 4))] == names and len(calibrations) == 3
    monkeypatch.undo()
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(own_folder.parent))
    monkeypatch.setattr(pipeline, "calibrate_source", counted)
    assert [e.name for e in plan_store.fit_ratios(loaded, options, (2, 4))] == names and len(calibrations) == 3
    assert not list(own_folder.glob(".*"))


def test_an_interrupted_fit_resumes(tmp_path: Path, own_folder: Path) -> None:
    save_tiny_model(tmp_path / "model")
    loaded, options = (
        load_model(str(tmp_path / "model")),
        FitOptions(sequences=6, rate_sequences=2, context=256, recent=64),
    )
    seen: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if (stage, done) == ("moments", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_store.fit_ratios(loaded, options, (4,), stop)
    assert list(own_folder.glob(".*.calibration.moments")) and not plan_store.stored_plans()
    resumed: list[tuple[str, int]] = []
    again = plan_store.fit_ratios(loaded, options, (4,), lambda stage, done, total: resumed.append((stage, done)))
    assert resumed[0] == ("moments", 4)  # contents of the checkpoint
    assert not list(own_folder.glob(".*"))
    whole = pipeline.fit_to_text(loaded, options).plan
    assert again[0].digest == whole.digest()


def test_plans_are_stored_next_to_the_kernels_in_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path))
    assert plan_store.plans_folder() == tmp_path / "plans" and cache_folder() == tmp_path
    monkeypatch.delenv("FHOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert plan_store.plans_folder() == cache_folder() / "plans" == Path("/somewhere/fhopt/plans")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plan_store.plans_folder() == Path.home() / ".cache" / "fhopt" / "plans"
