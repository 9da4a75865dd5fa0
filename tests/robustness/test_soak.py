"""The soak test (benchmarks/soak/suite.py) on a few thousand tokens: long runs against an independent reference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.soak import endurance, runs

SHORTER = {"tokens": 1500}


FAST = "4x, window of 8 bits"  # the others are slow


@pytest.mark.parametrize(
    "variant", [pytest.param(v, id=v.name, marks=[pytest.mark.slow] * (v.name != FAST)) for v in runs.VARIANTS]
)
def test_a_run_passes_every_check(variant: runs.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LONGEST", 400)  # so that it rolls over, crops and restarts several times
    shorter = replace(variant, places=variant.places and 464)
    course = runs.run(shorter, SHORTER["tokens"], seed=1)
    assert course.tokens[-1] >= SHORTER["tokens"] and len(course.apart) == len(course.tokens)
    assert runs.broken(shorter, course) == []
    assert max(course.over) > 0.8  # the bound is tight


def test_a_cache_that_loses_a_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.cache.dynamic_layer import LatentLayer

    crop = LatentLayer.crop

    def one_too_many(self: Any, tokens_to_remove: int) -> None:
        held = self.window_keys.parts
        crop(self, tokens_to_remove)
        if held and self.window_keys.count > 8:
            self.window_keys.parts = (self.window_keys.parts[0].roll(1, 2),)

    monkeypatch.setattr(LatentLayer, "crop", one_too_many)
    course = runs.run(runs.VARIANTS[0], 400, seed=1)
    assert "logits differ" in runs.broken(runs.VARIANTS[0], course)[0]


def test_growth_and_drift_are_noticed() -> None:
    course = runs.Course(
        tokens=[1, 2, 3, 4, 5, 6, 7, 8],
        apart=[1e-9, 1e-9, 2e-9, 2e-9, 3e-9, 3e-9, 9e-9, 9e-9],
        over=[0.9] * 7 + [1.01],
        resident=[10 << 20, 12 << 20, 14 << 20, 16 << 20],
    )
    assert runs.broken(runs.VARIANTS[0], course) == [
        "the last quarter is 9.0 times as far off as the first",
        "1.010 times the bytes that the formula allows",
        "the process grew by 6.0 MB",
    ]
    lap = runs.broken(runs.VARIANTS[0], course, is_long=False)
    assert lap == ["1.010 times the bytes that the formula allows"]  # the other checks compare laps
    assert runs.VARIANTS[0].dtype == torch.float64


def course_of(bytes_an_hour: float, noise: int = 300_000, laps: int = 40) -> list[endurance.Lap]:
    """An hour of laps; the first ones still warm up."""
    rng = random.Random(0)
    sizes = [5e7 + bytes_an_hour * i / laps + rng.randrange(noise) + 2e7 * min(i, 5) for i in range(laps)]
    return [endurance.Lap(60 * i / laps, 1000 * i, int(size), ()) for i, size in enumerate(sizes)]


def test_a_process_that_grows_is_noticed_and_one_that_warms_up_is_not() -> None:
    assert endurance.endured(course_of(0)) == []
    assert endurance.endured(course_of(5e5)) == []
    (told,) = endurance.endured(course_of(3e6))
    assert told.startswith("the process grows by 3.")
    gained, error = endurance.slope(course_of(3e6))
    assert abs(gained - 3e6) < 3 * error < 1e6


def test_failures_of_a_lap_are_reported_at_the_end() -> None:
    course = course_of(0)
    course[7] = replace(course[7], broken=("4x: logits differ by 1.0e+00",))
    assert endurance.endured(course) == ["lap 7: 4x: logits differ by 1.0e+00"]


@pytest.mark.slow
def test_laps_run_every_variant_and_every_generation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "LAP", 60)
    monkeypatch.setattr(endurance, "MIN_LAPS", 2)
    monkeypatch.setattr(endurance, "VARIANTS", runs.VARIANTS[4:])  # with kernels; static
    course = list(endurance.laps(minutes=0))
    assert len(course) == 2 and all(lap.broken == () for lap in course)
    generated = 2 * (40 * 2 * 4 + 40)  # one of the modes uses a single sequence
    assert course[0].tokens >= 2 * 60 + generated and course[1].minutes > course[0].minutes
