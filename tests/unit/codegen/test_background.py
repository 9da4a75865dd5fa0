"""Background builds of libraries: their order, and cleanup when a process ends first."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from needs import needs_compiler

from fhopt.codegen import background
from fhopt.codegen.background import Builder
from fhopt.codegen.build import build_torch
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec

NAMES = [f"library {number}" for number in range(6)]
SPEC = KernelSpec((), (), 8, 8, "float32", False)


class Compiler:
    """A mock library build that records its calls, and completes when permitted."""

    def __init__(self) -> None:
        self.may, self.running, self.most, self.built = threading.Event(), 0, 0, list[str]()
        self.lock = threading.Lock()

    def job(self, name: str) -> Callable[[], str]:
        return functools.partial(self.build, name)

    def build(self, name: str) -> str:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.may.wait(30)
        with self.lock:
            self.running -= 1
            self.built.append(name)
        return name.upper()

    def get(self, builder: Builder, name: str) -> Any:
        return builder.get(name, self.job(name), lambda: True)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(background, "cores", lambda: 2)
    return Compiler()


@pytest.mark.parametrize(("quiet", "lines"), [(0.01, 2), (30.0, 0)])
def test_a_call_waits_for_its_library_and_lines_report_a_long_wait(
    quiet: float, lines: int, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "QUIET", quiet)
    threading.Timer(0.3, compiler.may.set).start()
    builder = Builder()
    assert [compiler.get(builder, "pack") for _ in range(2)] == ["PACK", "PACK"] and compiler.built == ["pack"]
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == lines
    assert all(line.startswith("fhopt compile") and line.endswith(": pack") for line in output.err.splitlines())


def test_one_line_reports_every_library_that_is_being_built(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "QUIET", 0.01)
    builder = Builder()
    for name in NAMES:
        builder.start(name, compiler.job(name))
    threading.Timer(0.3, compiler.may.set).start()
    for name in NAMES:
        builder.wait([name])
    names = ", ".join(NAMES)
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"fhopt compiles kernels for this CPU, once per machine: {names}"
    assert last.startswith("fhopt compiled kernels in ") and last.endswith(f" s: {names}")
    threading.Timer(0.3, compiler.may.set).start()
    compiler.may.clear()
    assert compiler.get(builder, "another") == "ANOTHER"
    assert [line.endswith(": another") for line in capsys.readouterr().err.splitlines()] == [True, True]


def test_as_many_are_built_concurrently_as_there_are_cores(compiler: Compiler) -> None:
    builder = Builder()
    for name in NAMES:
        builder.start(name, compiler.job(name))
    deadline = time.monotonic() + 30
    while compiler.running < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    compiler.may.set()
    builder.wait(NAMES)
    assert sorted(compiler.built) == NAMES and compiler.most == 2
    assert [compiler.get(builder, name) for name in NAMES] == [name.upper() for name in NAMES]


def test_a_library_that_needs_no_compiler_is_available_at_once() -> None:
    assert Builder().get("pack", lambda: 7, lambda: False) == 7


def test_a_failed_build_raises_in_every_caller() -> None:
    def fails() -> None:
        raise ValueError("no library")

    builder = Builder()
    for _ in range(2):
        with pytest.raises(ValueError, match="no library"):
            builder.get("pack", fails, lambda: True)


def test_concurrent_requests_share_one_build(compiler: Compiler) -> None:
    builder, found = Builder(), list[str]()
    threads = [threading.Thread(target=lambda: found.append(compiler.get(builder, "pack"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    compiler.may.set()
    for thread in threads:
        thread.join(30)
    assert found == ["PACK"] * 8 and compiler.built == ["pack"]


def test_a_job_that_ends_in_any_way_is_reported_and_the_next_one_is_built() -> None:
    def ends() -> None:
        raise SystemExit("stopped")

    builder = Builder()
    with pytest.raises(SystemExit, match="stopped"):
        builder.get("pack", ends, lambda: True)
    assert builder.get("next", lambda: 7, lambda: True) == 7


@pytest.mark.parametrize("count", [1, 2])
def test_a_job_started_as_a_thread_ends_is_not_lost(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "cores", lambda: count)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    builder = Builder()
    try:
        for number in range(300):
            for name in (f"{number} a", f"{number} b", f"{number} c"):
                builder.start(name, lambda: 7)
            assert builder.get(f"{number} c", lambda: 7, lambda: True) == 7
    finally:
        sys.setswitchinterval(before)


FORKS = """
    import os, signal, threading
    from fhopt.codegen.background import builder
    may = threading.Event()
    for number in range(64):
        builder.start(str(number), may.wait)
    child = os.fork()
    signal.alarm(60)
    if child == 0:
        os._exit(builder.get("pack", lambda: 7, lambda: True) + builder.get("0", lambda: 3, lambda: True))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    may.set()
    builder.wait()
    os._exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_builds_what_its_parent_was_building() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FORKS)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 10, done.stderr


def test_every_spec_is_served_once_the_kernel_library_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[object]()

    def built(spec: KernelSpec) -> LatentKernel:
        order.append(spec)
        return build_torch(spec)

    library = SimpleNamespace(name="attention", load=lambda: order.append("library"), compiles=lambda: True)
    monkeypatch.setattr(background, "LIBRARY", library)
    monkeypatch.setattr(background, "build_kernel", built)
    builder, specs = Builder(), [SPEC, replace(SPEC, softcap=True)]
    assert None not in [builder.kernel(spec) for spec in specs]
    assert order == ["library", *specs]


PROGRAM = """
    from fhopt.codegen.background import builder
    builder.start_attention()
"""


@pytest.mark.slow
@needs_compiler
def test_a_process_that_ends_first_stops_its_compilers_and_leaves_no_partial_file(tmp_path: Path) -> None:
    environment = {**os.environ, "FHOPT_CACHE_DIR": str(tmp_path / "cache")}
    program = textwrap.dedent(PROGRAM) + "import time; time.sleep(1)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert time.monotonic() - began < 60
    assert [file for file in (tmp_path / "cache").iterdir() if ".part" in file.name or file.suffix == ".so"] == []
