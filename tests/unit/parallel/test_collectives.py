"""Sums over batches, shared between processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from interrupted_calibration import OPTIONS, measure
from small_models import FittedModel, found, tiny_llama

from fhopt.calibration import run
from fhopt.plan.latent_plan import LatentPlan


@pytest.mark.slow
def test_two_processes_give_the_plan_of_one(llama: FittedModel, tmp_path: Path) -> None:
    """Two processes on this machine take every second batch each; 11 batches do not divide evenly."""
    processes.launch(__file__, 2, tmp_path)
    one = run.plan_from_calibration(measure(llama.captured), OPTIONS)
    two, same = (LatentPlan.load(tmp_path / f"plan-{rank}") for rank in (0, 1))
    assert two.digest() == same.digest()
    for a, b in zip(one.sites, two.sites, strict=True):
        assert a.layout == b.layout
        for x, y in ((a.key, b.key), (a.value, b.value)):
            assert x.tiers == y.tiers
            torch.testing.assert_close(x.encode, y.encode, rtol=1e-6, atol=1e-6)  # sums in another order
            torch.testing.assert_close(x.decode, y.decode, rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob("state*"))


def work(folder: Path) -> None:
    """Calibrate one process's share of the batches and save the plan."""
    torch.distributed.init_process_group("gloo")
    captured, _ = found(tiny_llama(), 96)
    options = replace(OPTIONS, checkpoint=folder / "state")
    run.plan_from_calibration(measure(captured, options), options).save(folder / f"plan-{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
