"""The soak (benchmarks/soak.py), a few thousand tokens of it: long runs and a reference of another make."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import soak

SHORTER = {"tokens": 1500}


@pytest.mark.parametrize("variant", soak.VARIANTS, ids=lambda v: v.name)
def test_a_run_keeps_every_promise(variant: soak.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LONGEST", 400)  # so that it rolls over, crops and starts again several times
    shorter = replace(variant, places=variant.places and 464)
    course = soak.run(shorter, SHORTER["tokens"], seed=1)
    assert course.tokens[-1] >= SHORTER["tokens"] and len(course.apart) == len(course.tokens)
    assert soak.broken(shorter, course) == []
    assert max(course.over) > 0.8  # the bound is not a loose one


def test_a_cache_that_loses_a_token_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fhopt.layers import LatentLayer

    crop = LatentLayer.crop

    def one_too_many(self: Any, tokens_to_remove: int) -> None:
        held = self.open_keys.parts
        crop(self, tokens_to_remove)
        if held and self.open_keys.count > 8:
            self.open_keys.parts = (self.open_keys.parts[0].roll(1, 2),)

    monkeypatch.setattr(LatentLayer, "crop", one_too_many)
    course = soak.run(soak.VARIANTS[0], 400, seed=1)
    assert "logits differ" in soak.broken(soak.VARIANTS[0], course)[0]


def test_growth_and_drift_are_found_out() -> None:
    course = soak.Course(
        tokens=[1, 2, 3, 4, 5, 6, 7, 8],
        apart=[1e-9, 1e-9, 2e-9, 2e-9, 3e-9, 3e-9, 9e-9, 9e-9],
        over=[0.9] * 7 + [1.01],
        resident=[10 << 20, 12 << 20, 14 << 20, 16 << 20],
    )
    assert soak.broken(soak.VARIANTS[0], course) == [
        "the last quarter is 9.0 times as far off as the first",
        "1.010 times the bytes that the formula allows",
        "the process grew by 6.0 MB",
    ]
    assert soak.VARIANTS[0].dtype == torch.float64
