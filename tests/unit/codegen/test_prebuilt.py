"""Prebuilt libraries: which target a CPU gets, and what is loaded."""

from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
from pathlib import Path

import pytest
from needs import needs_compiler

from fhopt.codegen import prebuilt
from fhopt.codegen.compiler import find_compiler, unit_of
from fhopt.codegen.prebuilt import TARGETS, CpuTarget, best_target, load_prebuilt, prebuilt_target

HASWELL = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe"
SKYLAKE = f"{HASWELL} avx512f avx512bw avx512cd avx512dq avx512vl"
ICE_LAKE = f"{SKYLAKE} avx512_vnni avx512vbmi avx512_vbmi2 gfni"
ZEN_4 = f"{ICE_LAKE} avx512_bf16"
CPUS = {  # machine and flags as the system reports them, target
    "Ivy Bridge": ("x86_64", "fpu avx f16c", None),
    "Haswell": ("x86_64", HASWELL, "x86-64-v3"),
    "Alder Lake": ("x86_64", f"{HASWELL} avx_vnni", "x86-64-v3-vnni"),
    "Skylake, without VBMI": ("x86_64", SKYLAKE, "x86-64-v3"),
    "Ice Lake": ("x86_64", ICE_LAKE, "x86-64-v4-vbmi"),
    "Zen 4": ("x86_64", ZEN_4, "x86-64-v4-bf16"),
    "Sapphire Rapids": ("x86_64", f"{ZEN_4} avx_vnni amx_tile amx_bf16 amx_int8", "x86-64-amx"),
    "Sapphire Rapids, AMX disabled": ("x86_64", f"{ZEN_4} avx_vnni", "x86-64-v4-bf16"),
    "Cortex-A72": ("aarch64", "fp asimd crc32", "aarch64"),
    "Neoverse N1": ("aarch64", "fp asimd asimddp", "aarch64-dotprod"),
    "not Linux": ("arm64", "", None),
}
TEXT = 'extern "C" int answer() { return 42; }\n'
HERE = CpuTarget("here", platform.machine(), ("-O1",), frozenset(), "vectors of this machine")


@pytest.fixture(autouse=True)
def prebuilt_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FHOPT_ISA")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the only target."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    monkeypatch.setattr(prebuilt, "TARGETS", (HERE,))
    (tmp_path / HERE.name).mkdir()
    return tmp_path / HERE.name


@pytest.mark.parametrize("name", CPUS)
def test_a_cpu_gets_the_fastest_target_that_it_can_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, flags, target = CPUS[name]
    field = "flags" if machine == "x86_64" else "Features"
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(prebuilt, "reported", lambda asked: flags if asked == field else "")
    found = best_target()
    assert (found.name if found else None) == target


def test_a_target_that_is_missing_is_replaced_by_a_slower_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(prebuilt, "reported", lambda _: ZEN_4)
    assert best_target(tmp_path) is None
    (tmp_path / "x86-64-v3").mkdir()
    found = best_target(tmp_path)
    assert found is not None and found.name == "x86-64-v3"


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("target", [t for t in TARGETS if t.machine == "x86_64"], ids=lambda target: target.name)
def test_the_flags_of_a_target_enable_its_vector_unit(target: CpuTarget) -> None:
    command = [find_compiler(), *target.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert unit_of(frozenset(line.split()[1] for line in output.splitlines())) == target.unit


@needs_compiler
def test_a_library_is_found_by_its_text_and_flags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prebuilt_target("answer", TEXT, ()) is None and load_prebuilt("answer", TEXT, ()) is None
    path = folder / HERE.file_name("answer", TEXT, ())
    subprocess.run([find_compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=TEXT.encode(), check=True)
    loaded = load_prebuilt("answer", TEXT, ())
    assert isinstance(loaded, ctypes.CDLL) and loaded.answer() == 42
    assert prebuilt_target("answer", TEXT, ()) is HERE
    assert prebuilt_target("answer", TEXT + "\n", ()) is None and prebuilt_target("answer", TEXT, ("-g",)) is None
    monkeypatch.setenv("FHOPT_ISA", "native")
    assert prebuilt_target("answer", TEXT, ()) is None and load_prebuilt("answer", TEXT, ()) is None


def test_a_library_that_cannot_be_loaded_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / HERE.file_name("answer", TEXT, ())).write_bytes(b"of another C library")
    with caplog.at_level(logging.WARNING):
        assert load_prebuilt("answer", TEXT, ()) is None
    assert "The prebuilt library answer of here cannot be loaded" in caplog.text
