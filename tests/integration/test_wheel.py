"""A wheel with kernels, on a machine without a compiler and with an empty kernel cache."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from needs import needs_compiler
from wheels import ROOT, built, copy_project

from fhopt.codegen.prebuilt import best_target

TARGET = best_target()
pytestmark = [
    pytest.mark.slow,
    needs_compiler,
    pytest.mark.skipif(TARGET is None, reason="kernels are not prebuilt for this CPU"),
]
SMALL = {"data": "topics", "sequences": 2, "rate-sequences": 1, "context": 512, "tokens": 2048, "recent": 64}
TIMES = """
import json, sys, time
import torch
from transformers.generation.streamers import BaseStreamer
import fhopt
from fhopt.codegen.prebuilt import FOLDER


class Clock(BaseStreamer):
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


model, clock = fhopt.load("demo"), Clock()
ids = torch.randint(100, 20000, (1, 400), generator=torch.Generator().manual_seed(0))
if len(sys.argv) > 1:
    fhopt.apply(model, fhopt.LatentPlan.load(sys.argv[1]))
start = time.perf_counter()
model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, streamer=clock)
print(json.dumps([str(FOLDER), [time - start for time in clock.times[1:]]]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository without prebuilt kernels."""
    return copy_project(tmp_path_factory.mktemp("wheel") / "project")


@pytest.fixture(scope="module")
def installed(project: Path) -> Path:
    """Return the folder of an unpacked wheel."""
    wheel = built("wheel", project, project.parent)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    shutil.unpack_archive(wheel, project.parent / "installed", format="zip")
    return project.parent / "installed"


def in_process(folder: Path, cache: Path, *arguments: str) -> str:
    """Run Python with the installed wheel, without a compiler; return its output."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PATH": "/nonexistent", "FHOPT_CACHE_DIR": str(cache)}
    environment.pop("FHOPT_ISA")
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fhopt compiles" not in done.stderr and "torch operations" not in done.stderr
    return done.stdout


def test_the_first_token_waits_at_most_a_second_and_later_ones_are_fast(installed: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    subprocess.run([sys.executable, "-m", "fhopt.cli", "fit", "demo", *options, "--out", plan], check=True, cwd=ROOT)

    def times(*arguments: str) -> list[float]:
        place, found = json.loads(in_process(installed, tmp_path / "cache", "-c", TIMES, *arguments).splitlines()[-1])
        assert Path(place).is_relative_to(installed) and not list((tmp_path / "cache").glob("*.so"))
        return list(found)

    runs = [(times(), times(str(plan))) for _ in range(2)]  # the faster one of each: others may delay a process
    plain, planned = (min(both, key=lambda ends: ends[1]) for both in zip(*runs, strict=True))
    assert planned[0] <= plain[0] + 1.0 and planned[1] <= plain[1] + 1.0  # the second is the first decode step
    usual, steps = ([b - a for a, b in itertools.pairwise(ends[1:])] for ends in (plain, planned))
    assert statistics.median(steps) < statistics.median(usual)
    assert sorted(steps)[-3] < 2 * statistics.median(steps)


def test_doctor_names_the_library(installed: Path, tmp_path: Path) -> None:
    assert TARGET is not None
    found: dict[str, Any] = json.loads(in_process(installed, tmp_path, "-m", "fhopt.cli", "doctor", "--json"))
    assert found["machine"]["kernels"].endswith(f"prebuilt for {TARGET.name}")
    assert "No C++ compiler was found" in found["machine"]["compiler_fault"]


def test_an_editable_install_compiles_the_kernels_of_this_machine(project: Path, installed: Path) -> None:
    assert TARGET is not None
    made = installed / "fhopt" / "codegen" / "prebuilt" / TARGET.name
    here = project / "codegen" / "prebuilt" / TARGET.name
    shutil.copytree(made, here)  # those are not compiled again
    (missing,) = here.glob("pack-*.so")
    times = {path.name: path.stat().st_mtime_ns for path in here.glob("*.so") if path != missing}
    missing.unlink()
    built("editable", project, project.parent)
    assert missing.is_file() and {name: (here / name).stat().st_mtime_ns for name in times} == times
