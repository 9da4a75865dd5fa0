"""Kernels that are built in the background: when, with what, and what is left when a process ends first."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from needs import needs_compiler

from fhopt.codegen import background
from fhopt.codegen.background import Builder
from fhopt.codegen.build import build_torch
from fhopt.ops.latent_attention import LatentKernel
from fhopt.plan.kernel_spec import KernelSpec

SPECS = [KernelSpec((), (), width, width, "float32", False) for width in range(8, 14)]


class Compiler:
    """Stands in for `build`: says what is built when, and builds when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 2) -> None:
        self.may, self.running, self.most, self.built = threading.Event(), 0, 0, list[KernelSpec]()
        self.lock = threading.Lock()
        monkeypatch.setattr(background, "build", self.build)
        monkeypatch.setattr(background, "needs_compiler", lambda spec: True)
        monkeypatch.setattr(background, "cores", lambda: cores)

    def build(self, spec: KernelSpec) -> LatentKernel:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.may.wait(30)
        with self.lock:
            self.running -= 1
            self.built.append(spec)
        return build_torch(spec)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def test_a_kernel_is_not_there_until_it_is_built(compiler: Compiler) -> None:
    builder = Builder()
    assert builder.kernel(SPECS[0]) is None and builder.kernel(SPECS[0]) is None
    compiler.may.set()
    builder.wait()
    assert builder.kernel(SPECS[0]) is not None
    assert compiler.built == [SPECS[0]]


def test_others_are_built_with_it_as_many_at_once_as_there_are_cores(compiler: Compiler) -> None:
    builder = Builder()
    assert builder.kernel(SPECS[0], SPECS) is None
    deadline = time.monotonic() + 30
    while compiler.running < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    compiler.may.set()
    builder.wait(SPECS)
    assert sorted(compiler.built, key=lambda spec: spec.name) == sorted(SPECS, key=lambda spec: spec.name)
    assert compiler.most == 2
    assert all(builder.kernel(spec) is not None for spec in SPECS)


def test_a_builder_may_wait_for_every_kernel(compiler: Compiler) -> None:
    compiler.may.set()
    assert Builder(waits=True).kernel(SPECS[0]) is not None


def test_a_kernel_that_needs_no_compiler_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "build", build_torch)
    monkeypatch.setattr(background, "needs_compiler", lambda spec: False)
    assert Builder().kernel(SPECS[0]) is not None


@pytest.mark.parametrize("waits", [False, True])
def test_what_cannot_be_built_is_said_to_whoever_asks(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(spec: KernelSpec) -> LatentKernel:
        raise ValueError(spec.name)

    monkeypatch.setattr(background, "build", fails)
    monkeypatch.setattr(background, "needs_compiler", lambda spec: True)
    builder = Builder(waits)
    if not waits:
        assert builder.kernel(SPECS[0]) is None
        builder.wait()
    for _ in range(2):
        with pytest.raises(ValueError, match=SPECS[0].name):
            builder.kernel(SPECS[0])


def test_threads_that_ask_at_once_get_one_kernel(compiler: Compiler) -> None:
    builder, found = Builder(waits=True), list[LatentKernel | None]()
    threads = [threading.Thread(target=lambda: found.append(builder.kernel(SPECS[0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    compiler.may.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 and len(set(map(id, found))) == 1 and compiler.built == [SPECS[0]]


PROGRAM = """
    from fhopt.codegen.background import builder
    from fhopt.plan.kernel_spec import KernelSpec
    groups = ((8, 16, 0.03), (5, 24, 0.2), (4, 88, 0.3), (3, 64, 0.6), (2, 64, 1.0))
    specs = [KernelSpec(groups, groups, 256, 256, "float32", softcap) for softcap in (False, True)]
    assert builder.kernel(specs[0], specs) is None
"""


@needs_compiler
def test_a_process_that_ends_first_stops_its_compilers_and_leaves_no_half_file(tmp_path: Path) -> None:
    environment = {**os.environ, "FHOPT_CACHE_DIR": str(tmp_path / "cache")}
    program = textwrap.dedent(PROGRAM) + "import time; time.sleep(1)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert time.monotonic() - began < 60
    assert [file for file in (tmp_path / "cache").iterdir() if ".part" in file.name or file.suffix == ".so"] == []
