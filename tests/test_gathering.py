"""Sums over batches: kept when a calibration is interrupted, shared between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import TOKENS, Fitted, found, numbered, tiny_llama
from torch import Tensor

from fhopt import fitting, gathering, pipeline
from fhopt.capture import Captured
from fhopt.errors import FhoptError
from fhopt.spec import LatentPlan

OPTIONS = pipeline.FitOptions(sequences=6, rate_sequences=5, context=96, recent=8, block=8, tokens=TOKENS)


class Interrupted(Exception):
    """What a user's Ctrl-C is to these tests."""


def sequences(count: int = 11) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    return [batch for _, batch in numbered(count)]


def measure(
    captured: Captured, options: pipeline.FitOptions = OPTIONS, progress: pipeline.Progress = pipeline.silent,
    count: int = 11,
) -> pipeline.Measured:  # fmt: skip
    return pipeline.measure_batches(captured, sequences(count), options, {}, "tiny", progress)


def sums(measured: pipeline.Measured) -> dict[str, Tensor]:
    levels = (0, *fitting.STEPS)
    return gathering.moments(measured.statistics) | gathering.rates(measured.found, levels)


def stop_at(stage: str, number: int) -> pipeline.Progress:
    """Progress that is interrupted behind batch `number` of a stage."""

    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, number):
            raise Interrupted

    return progress


def interrupted(llama: Fitted, folder: Path, stage: str = "moments") -> pipeline.FitOptions:
    """Options of a calibration that was interrupted with 4 batches of `stage` in its checkpoint."""
    options = replace(OPTIONS, checkpoint=folder / "state")
    with pytest.raises(Interrupted):
        measure(llama.captured, options, stop_at(stage, 5))
    return options


# ---- checkpoints


@pytest.mark.parametrize("stage", ["moments", "rates"])
def test_an_interrupted_calibration_goes_on_and_gives_the_same_sums(llama: Fitted, tmp_path: Path, stage: str) -> None:
    options = interrupted(llama, tmp_path, stage)
    assert (tmp_path / f"state.{stage}").exists()
    told: list[tuple[str, int]] = []
    again = measure(llama.captured, options, lambda now, done, total: told.append((now, done)))
    rest = [("moments", 5), ("moments", 6)] if stage == "moments" else []
    assert told == [*rest, *(("rates", i) for i in ((1, 2, 3, 4, 5) if stage == "moments" else (5,)))]
    whole = sums(measure(llama.captured))
    for name, total in sums(again).items():
        assert torch.equal(total, whole[name]), name


def test_checkpoints_are_removed_when_the_calibration_is_done(llama: Fitted, tmp_path: Path) -> None:
    measure(llama.captured, interrupted(llama, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_a_place_for_checkpoints(
    llama: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measure(llama.captured)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_options_is_refused(llama: Fitted, tmp_path: Path) -> None:
    options = interrupted(llama, tmp_path)
    for other in (replace(options, seed=1), replace(options, sequences=7), replace(options, texts=("others",))):
        with pytest.raises(FhoptError, match=r"state\.moments is of another calibration"):
            measure(llama.captured, other)
    with pytest.raises(FhoptError, match="another calibration"):
        pipeline.measure_batches(llama.captured, sequences(), options, {}, "another model")
    with pytest.raises(FhoptError, match="another calibration"):  # the same options, other text
        pipeline.measure_batches(llama.captured, sequences(), options, {}, "tiny", data_digest="other")


def test_a_checkpoint_serves_another_size_of_plan(llama: Fitted, tmp_path: Path) -> None:
    options = replace(interrupted(llama, tmp_path), ratio=2.0, bits=(4, 8), block=16, window_bits=16)
    assert measure(llama.captured, options).found


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_key(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def _of_fewer_sums(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({"x": torch.zeros(1)}, file, about)


@pytest.mark.parametrize("damage", [_cut_short, _without_a_key, _of_fewer_sums])
def test_a_damaged_checkpoint_is_refused(llama: Fitted, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    options = interrupted(llama, tmp_path)
    damage(tmp_path / "state.moments")
    with pytest.raises(FhoptError, match=r"state\.moments is damaged .* Remove it"):
        measure(llama.captured, options)


def test_a_place_that_cannot_be_written_is_named(llama: Fitted, tmp_path: Path) -> None:
    options = replace(OPTIONS, checkpoint=tmp_path / "absent" / "state")
    with pytest.raises(FhoptError, match=r"cannot write .*state\.moments"):
        measure(llama.captured, options)


# ---- batches that run out


def test_no_batch_at_all_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="no calibration batch"):
        measure(llama.captured, count=0)


def test_batches_that_leave_none_to_choose_bits_by_are_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="bits are chosen by others"):
        measure(llama.captured, count=6)


# ---- processes


def test_two_processes_give_the_plan_of_one(llama: Fitted, tmp_path: Path) -> None:
    """Two processes on this machine, each with every second batch; 11 batches do not divide evenly."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    one = pipeline.plan_for(measure(llama.captured), OPTIONS)
    two, same = (LatentPlan.load(tmp_path / f"plan-{rank}") for rank in (0, 1))
    assert two.digest() == same.digest()
    for a, b in zip(one.sites, two.sites, strict=True):
        assert a.layout == b.layout
        for x, y in ((a.key, b.key), (a.value, b.value)):
            assert x.tiers == y.tiers
            torch.testing.assert_close(x.encode, y.encode, rtol=1e-6, atol=1e-6)  # sums in another order
            torch.testing.assert_close(x.decode, y.decode, rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob("state*"))


def work(rank: int, folder: Path) -> None:
    """One of two processes: calibrate its share, save the plan."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    captured, _ = found(tiny_llama(), 96)
    options = replace(OPTIONS, checkpoint=folder / "state")
    pipeline.plan_for(measure(captured, options), options).save(folder / f"plan-{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
