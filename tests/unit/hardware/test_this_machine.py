"""The machine's features, and messages about missing ones."""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from needs import needs_compiler

from fhopt.codegen.compiler import AVX512_VNNI, NEON
from fhopt.hardware import this_cpu
from fhopt.hardware.this_machine import (
    GOOD,
    MISSING,
    PACKAGES,
    SLOW,
    GpuFacts,
    Machine,
    examine,
    findings,
    triton_fault,
)
from fhopt.system import cores

COMPILER = importlib.import_module("fhopt.codegen.compiler")
MACHINE = Machine(
    cpu="AMD EPYC", vector_units=("AVX2",), cores=4, threads=4, memory_gb=16.0, free_gb=8.0, read_gb_s=20.0,
    kernels=f"{AVX512_VNNI}, compiled by g++", compiler="g++ 12", compiler_fault="",
    gpus=(), gpu_fault="", versions=dict.fromkeys(PACKAGES, "1.0"), cache_folder="/cache", cache_bytes=0,
    cache_fault="",
)  # fmt: skip
GPU = GpuFacts("NVIDIA H100", "sm_90", "h100", 80.0, 70.0, "")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(this_cpu, "SECONDS", 0.0)
    monkeypatch.setattr(this_cpu, "VECTOR", 1 << 20)


@needs_compiler
def test_this_machine_is_examined_and_its_compiler_tested(own_cache: Path) -> None:
    found = examine()
    assert found.cores == cores() and found.threads == torch.get_num_threads() and found.read_gb_s > 0
    assert 0 < found.free_gb <= found.memory_gb
    assert found.compiler and not found.compiler_fault and "compiled by" in found.kernels
    assert found.versions["torch"] == metadata.version("torch")
    assert found.cache_folder == str(own_cache) and found.cache_bytes > 0 and not found.cache_fault
    assert findings(found)[0].state == GOOD


def test_nothing_that_is_missing_stops_the_examination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FHOPT_CACHE_DIR", str(tmp_path / "file"))

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    found = examine()
    assert "No C++ compiler was found" in found.compiler_fault and found.kernels == ""
    assert found.cache_fault and set(found.versions.values()) - {None} == {
        found.versions["fhopt"],
        found.versions["python"],
    }
    assert {one.state for one in findings(found)} == {SLOW, MISSING}


@needs_compiler
def test_a_compiler_that_fails_counts_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "g++"
    script.write_text("#!/bin/sh\necho 'error: no headers' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    COMPILER._identity.cache_clear()
    assert "failed to compile a generated file: error: no headers" in examine().compiler_fault


def test_prebuilt_kernels_need_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    prebuilt = f"{AVX512_VNNI}, prebuilt for x86-64-v4-vbmi"
    monkeypatch.setattr("fhopt.hardware.this_machine.describe_kernels", lambda: prebuilt)
    found = examine()
    assert "No C++ compiler was found" in found.compiler_fault and found.kernels == prebuilt
    assert f"CPU decoding runs on C++ kernels ({prebuilt})." in [one.words for one in findings(found)]


def test_a_complete_machine_has_only_good_news() -> None:
    assert {one.state for one in findings(replace(MACHINE, gpus=(GPU,)))} == {GOOD}


@pytest.mark.parametrize(
    ("change", "state", "words", "cure"),
    [
        ({"compiler_fault": "No C++ compiler.", "kernels": ""}, SLOW, "No C++ compiler. CPU decoding", "Install g++"),
        ({"kernels": NEON}, SLOW, "convert quantized values to floats", ""),
        ({"gpu_fault": "the driver is too old"}, MISSING, "the driver is too old", "pytorch.org"),
        ({"gpus": (replace(GPU, triton_fault="no cc"),)}, SLOW, "(no cc)", "Install the triton"),
        ({"free_gb": 0.5}, SLOW, "Only 0.5 GB", "--dtype bfloat16"),
        ({"cache_fault": "read-only"}, SLOW, "(read-only)", "Set FHOPT_CACHE_DIR"),
        ({"versions": {"transformers": "5", "gguf": None}}, MISSING, "gguf, accelerate are", "hf"),
    ],
)
def test_slow_or_missing_features_come_with_a_fix(change: dict[str, object], state: str, words: str, cure: str) -> None:
    found = [one for one in findings(replace(MACHINE, **change)) if words in one.words]  # type: ignore[arg-type]
    assert [one.state for one in found] == [state] and cure in found[0].cure


def test_threads_limited_by_a_variable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (found,) = (one for one in findings(replace(MACHINE, threads=1)) if one.state == SLOW)
    assert found.words == "1 of 4 cores are used: OMP_NUM_THREADS is 1." and found.cure == "Unset OMP_NUM_THREADS."
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert findings(replace(MACHINE, threads=2)) == findings(MACHINE)  # one thread per core, of two


def test_triton_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_fault(torch.device("cuda", 0)) or torch.cuda.is_available()
    monkeypatch.setattr("fhopt.hardware.this_machine.has_triton", lambda: False)
    assert triton_fault(torch.device("cuda", 0)) == "Triton is not installed"
