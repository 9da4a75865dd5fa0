"""Compiling C++: without a compiler, with a failing one, in two processes at once."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import CASES, assert_same, build_cpp, expected, inputs
from needs import needs_compiler

from fhopt.codegen import build_kernel
from fhopt.codegen.compiler import find_compiler, vector_unit
from fhopt.codegen.cpu import library as cpu_library
from fhopt.hardware.this_cpu import vector_units

pytestmark = pytest.mark.usefixtures("nothing_built")

ROOT = Path(__file__).resolve().parents[3]
COMPILER = importlib.import_module("fhopt.codegen.compiler")


def test_without_a_compiler_the_torch_kernel_runs_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("9 heads read one latent", "one token"):
        case = CASES[name]
        x = inputs(case)
        assert_same(build_kernel(case.spec())(*x, None, **case.options()), expected(case, x, None))
    messages = [str(w.message) for w in recwarn if "No C++ compiler was found" in str(w.message)]
    assert len(messages) == 1
    assert "Install g++" in messages[0]


def test_after_a_failed_compilation_the_torch_kernel_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "g++"
    script.write_text("#!/bin/sh\necho 'no vectors here' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "cache"))
    case = CASES["one token"]
    x = inputs(case)
    with pytest.warns(RuntimeWarning, match="failed to compile a generated file: no vectors here"):
        kernel = build_kernel(case.spec())
    assert_same(kernel(*x, None, **case.options()), expected(case, x, None))
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.slow
@needs_compiler
def test_two_processes_that_need_a_kernel_at_once_compile_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = CASES["one token"].spec()
    code = f"from fhopt.codegen import build_kernel; from fhopt.plan import KernelSpec; build_kernel({spec!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    compiled = [line for line in log.read_text().splitlines() if "-o" in line.split()]
    assert len(compiled) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".cpp", ".lock", ".so"]


@needs_compiler
def test_a_cached_kernel_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    build_cpp(CASES["one token"].spec())
    cpu_library._load.cache_clear()
    monkeypatch.setattr(COMPILER, "_compile", lambda *_: pytest.fail("compiled again"))
    for case in CASES.values():  # one library contains all
        build_cpp(case.spec())


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="an instruction set of x86-64")
@pytest.mark.parametrize(
    ("isa", "unit"),
    [
        ("x86-64-v2", "vectors of 4 floats"), ("x86-64-v3", "AVX2: 16-bit integer"),
        ("alderlake", "AVX2 with VNNI"), ("cascadelake", "AVX-512 without VBMI: 16-bit integer"),
    ],
)  # fmt: skip
def test_kernels_of_another_instruction_set_agree(isa: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FHOPT_ISA", isa)
    assert vector_unit().startswith(unit)
    if isa == "alderlake" and "AVX-VNNI" not in vector_units():
        pytest.skip("this CPU has no AVX-VNNI")
    for case in CASES.values():
        x = inputs(case)
        assert_same(build_cpp(case.spec())(*x, None, **case.options()), expected(case, x, None))


def test_the_vector_unit_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compiled by" in vector_unit() or shutil.which("g++") is None
    monkeypatch.setenv("PATH", "")
    assert vector_unit() == "plain torch operations, no C++ compiler was found"
