"""Statistics files: plans from a file are those of the calibration that wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupted_calibration import OPTIONS, sequences
from safetensors.torch import load_file, save_file
from small_models import FittedModel

from fhopt.calibration import run, statistics_file
from fhopt.calibration.data import CalibrationData
from fhopt.calibration.statistics_file import load_statistics, save_statistics
from fhopt.errors import FhoptError

LAYOUTS = ("input", "band", "identity", "head")


@pytest.fixture(scope="module")
def measured(llama: FittedModel) -> run.Calibration:
    weights = dict(llama.model.named_parameters())
    return run.calibrate(CalibrationData(llama.captured, sequences(), weights, "tiny"), OPTIONS, layouts=LAYOUTS)


@pytest.fixture(scope="module")
def file(measured: run.Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "tiny.stats"
    save_statistics(measured, path)
    return path


@pytest.mark.parametrize("layout", ["auto", "head", "identity"])
@pytest.mark.parametrize(("ratio", "device"), [(1.0, None), (4.0, None), (8.0, None), (1.5, "h100")])
def test_plans_are_those_of_the_calibration(
    measured: run.Calibration, file: Path, ratio: float, layout: str, device: str | None
) -> None:
    options = replace(OPTIONS, ratio=ratio, layout=layout, device=device)
    read, made = (run.plan_from_calibration(calibration, options) for calibration in (load_statistics(file), measured))
    assert read.provenance == made.provenance
    assert read.mean_tokens == made.mean_tokens == (OPTIONS.mean_tokens if ratio > 1 else 0)
    for a, b in zip(read.sites, made.sites, strict=True):
        assert a.site == b.site and a.layout == b.layout
        for one, other in ((a.key, b.key), (a.value, b.value)):
            assert one.tiers == other.tiers
            assert torch.equal(one.encode, other.encode) and torch.equal(one.decode, other.decode)


def test_sites_of_a_plan_keep_the_order_of_the_model(measured: run.Calibration, tmp_path: Path) -> None:
    reversed_names = list(measured.statistics)[::-1]  # layer 10 follows layer 9, but not by name
    other = replace(measured, statistics={name: measured.statistics[name] for name in reversed_names})
    save_statistics(other, tmp_path / "other.stats")
    plan = run.plan_from_calibration(load_statistics(tmp_path / "other.stats"), replace(OPTIONS, ratio=4.0))
    assert [one.site.name for one in plan.sites] == reversed_names


def test_a_file_from_before_segments_has_statistics_of_unsegmented_keys(
    measured: run.Calibration, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_statistics(file).options.segment == 512
    monkeypatch.setattr(statistics_file, "UNKEPT", (*statistics_file.UNKEPT, "segment"))
    save_statistics(measured, tmp_path / "old.stats")
    old = load_statistics(tmp_path / "old.stats")
    assert old.options.segment == 0 and not any(s.segment for s in old.statistics.values())
    assert run.plan_from_calibration(old, replace(OPTIONS, ratio=4.0)).segment == 0


def test_one_calibration_gives_the_same_plans_as_separate_ones(llama: FittedModel, file: Path) -> None:
    weights = dict(llama.model.named_parameters())
    for layout, device, ratio in (("auto", None, 4.0), ("auto", "h100", 2.0), ("head", None, 4.0)):
        options = replace(OPTIONS, ratio=ratio, layout=layout, device=device, segment=512)
        alone = run.plan_from_calibration(
            run.calibrate(CalibrationData(llama.captured, sequences(), weights, "tiny"), options), options
        )
        assert run.plan_from_calibration(load_statistics(file), options).digest() == alone.digest()


def test_a_layout_that_was_not_measured_is_refused(file: Path) -> None:
    with pytest.raises(FhoptError, match="no bases of the layout freq; expected one of band, head, identity"):
        run.plan_from_calibration(load_statistics(file), replace(OPTIONS, layout="freq"))
    with pytest.raises(FhoptError, match="its keys rotate"):
        run.plan_from_calibration(load_statistics(file), replace(OPTIONS, layout="input"))


def test_other_files_are_refused_as_statistics(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match=r"cannot read .*fhopt calibrate MODEL -o FILE"):
        load_statistics(tmp_path / "absent")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no safetensors at all")
    with pytest.raises(FhoptError, match="is damaged"):
        load_statistics(garbage)
    other = tmp_path / "other"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(FhoptError, match="has no statistics"):
        load_statistics(other)
    changed, content = tmp_path / "changed", bytearray(file.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    with pytest.raises(FhoptError, match=r"is damaged.*digest does not match"):
        load_statistics(changed)
    assert load_file(file)


def test_a_file_that_cannot_be_written_leaves_nothing(measured: run.Calibration, tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match="cannot write"):
        save_statistics(measured, tmp_path / "absent" / "tiny.stats")
    assert not list(tmp_path.iterdir())
