"""Sums over batches, saved when a calibration is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupted_calibration import OPTIONS, measure, sequences
from interruptions import DAMAGES, Interrupted, stop_at
from small_models import FittedModel
from torch import Tensor

from fhopt.calibration import checkpoint, run
from fhopt.calibration import options as calibration_options
from fhopt.calibration.data import CalibrationData
from fhopt.errors import FhoptError


def sums(calibration: run.Calibration) -> dict[str, Tensor]:
    return checkpoint.named_moments(calibration.statistics) | checkpoint.named_costs(calibration.costs)


def interrupted(llama: FittedModel, folder: Path, stage: str = "moments") -> calibration_options.FitOptions:
    """Return options of a calibration interrupted with 4 batches of `stage` in its checkpoint."""
    options = replace(OPTIONS, checkpoint=folder / "state")
    with pytest.raises(Interrupted):
        measure(llama.captured, options, stop_at(stage, 5))
    return options


@pytest.mark.parametrize("stage", ["moments", "rates"])
def test_an_interrupted_calibration_resumes_and_gives_the_same_sums(
    llama: FittedModel, tmp_path: Path, stage: str
) -> None:
    options = interrupted(llama, tmp_path, stage)
    assert (tmp_path / f"state.{stage}").exists()
    seen: list[tuple[str, int]] = []
    again = measure(llama.captured, options, lambda now, done, total: seen.append((now, done)))
    moments, rates = ((4, 5, 6), range(6)) if stage == "moments" else ((6,), (4, 5))  # finished batches come first
    assert seen == [*(("moments", i) for i in moments), *(("rates", i) for i in rates)]
    whole = sums(measure(llama.captured))
    for name, total in sums(again).items():
        assert torch.equal(total, whole[name]), name


def test_checkpoints_are_removed_when_the_calibration_is_done(llama: FittedModel, tmp_path: Path) -> None:
    measure(llama.captured, interrupted(llama, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_first_batch_is_saved_at_once(llama: FittedModel, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint=tmp_path / "state")
    with pytest.raises(Interrupted):
        measure(llama.captured, options, stop_at("moments", 2))
    seen: list[int] = []
    measure(llama.captured, options, lambda now, done, total: seen.append(done))
    assert seen[0] == 1


def test_nothing_is_written_without_a_checkpoint_folder(
    llama: FittedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measure(llama.captured)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_options_is_refused(llama: FittedModel, tmp_path: Path) -> None:
    options = interrupted(llama, tmp_path)
    for other in (replace(options, seed=1), replace(options, sequences=7), replace(options, texts=("others",))):
        with pytest.raises(FhoptError, match=r"state\.moments belongs to another calibration"):
            measure(llama.captured, other)
    with pytest.raises(FhoptError, match="another calibration"):
        run.calibrate(CalibrationData(llama.captured, sequences(), {}, "another model"), options)
    with pytest.raises(FhoptError, match="another calibration"):  # the same options, other text
        run.calibrate(CalibrationData(llama.captured, sequences(), {}, "tiny", "other"), options)


def test_a_checkpoint_can_be_used_for_another_plan_size(llama: FittedModel, tmp_path: Path) -> None:
    options = replace(interrupted(llama, tmp_path), ratio=2.0, bits=(4, 8), block=16, window_bits=16)
    assert measure(llama.captured, options).costs


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(llama: FittedModel, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    options = interrupted(llama, tmp_path)
    damage(tmp_path / "state.moments")
    with pytest.raises(FhoptError, match=r"state\.moments is damaged .* Remove it"):
        measure(llama.captured, options)


def test_an_unwritable_checkpoint_folder_is_named(llama: FittedModel, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint=tmp_path / "absent" / "state")
    with pytest.raises(FhoptError, match=r"cannot write .*state\.moments"):
        measure(llama.captured, options)
