"""The main job on the real model, as a user starts it; guards the promises of the README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fhopt.spec import LatentPlan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "fhopt.cli", "demo", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_all_sites_are_found_and_the_cache_is_four_times_smaller(demo: dict[str, Any]) -> None:
    assert demo["model"] == "SmolLM2-135M-Instruct"
    assert demo["sites_found"] == 30
    assert 4 <= demo["ratio"] < 4.05
    per_token = demo["bytes_per_token"]
    assert per_token["exact"] == 30 * 2 * 3 * 64 * 2  # layers, sides, kv heads, head size, 16 bits
    assert per_token["exact"] / per_token["plan"] == pytest.approx(demo["ratio"])


def test_perplexity_rises_by_at_most_one_and_a_half_percent_on_both_texts(demo: dict[str, Any]) -> None:
    assert set(demo["perplexity"]) == {"topics", "source"}
    for text, values in demo["perplexity"].items():
        assert values["plan"] / values["exact"] - 1 <= 0.015, text


def test_the_answer_stays_sensible(demo: dict[str, Any]) -> None:
    assert "Paris" in demo["answer"]["exact"] and "Paris" in demo["answer"]["plan"]


def test_the_bytes_reported_are_those_of_the_plan(demo: dict[str, Any]) -> None:
    plan = LatentPlan.load(demo["plan_path"])
    held, needed = demo["cache_nbytes"]["plan"], plan.cache_bytes(2048, itemsize=4)  # the demo runs in float32
    assert needed <= held <= needed * 1.15  # spare room of the sealed blocks
    assert demo["cache_nbytes"]["exact"] == 2048 * plan.exact_token_bytes(itemsize=4)


def test_plan_and_report_are_where_it_says(demo: dict[str, Any]) -> None:
    assert Path(demo["report_path"]).stat().st_size > 10_000
    assert demo["tokens_per_second"]["exact"] > 0 and demo["tokens_per_second"]["plan"] > 0
