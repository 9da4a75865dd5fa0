"""C++ libraries for CPUs: compiled once, and replaced by torch if they cannot be compiled."""

from __future__ import annotations

import ctypes
import logging
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from needs import needs_compiler

from fhopt.codegen import build_prebuilt, prebuilt
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.cpu import packing
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.prebuilt import CpuTarget


def probe(text: str, monkeypatch: pytest.MonkeyPatch) -> CppLibrary:
    """Return a library of one function, whose file is `text`."""
    monkeypatch.setattr(CppLibrary, "text", lambda _: text)
    return CppLibrary("probe", "probe.cpp", lambda loaded: loaded.answer, "Nothing is answered.")


@needs_compiler
def test_a_library_is_compiled_once_per_machine(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    library = probe('extern "C" int answer() { return 42; }\n', monkeypatch)
    assert library.compiles()
    function = library.load()
    assert function() == 42 and library.load() is function and not library.compiles()
    again = replace(library, otherwise="Another instance.")
    assert again.load()() == 42 and len(list(own_cache.glob("probe-*.so"))) == 1


@needs_compiler
def test_a_prebuilt_library_is_not_compiled(monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path) -> None:
    library = probe('extern "C" int answer() { return 42; }\n', monkeypatch)
    target = CpuTarget("here", platform.machine(), (), frozenset(), "")
    monkeypatch.setattr(build_prebuilt, "LIBRARIES", (library,))
    build_prebuilt.build_prebuilt(tmp_path / "prebuilt", (target,))
    monkeypatch.setattr(prebuilt, "TARGETS", (target,))
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    monkeypatch.delenv("FHOPT_ISA")
    monkeypatch.setenv("PATH", "")
    assert library.prebuilt_for() is target and not library.compiles() and library.load()() == 42
    assert not own_cache.exists()


@needs_compiler
def test_flags_make_another_library(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    text = 'extern "C" int answer() { return ANSWER; }\n'
    library = probe(text, monkeypatch)
    one, two = replace(library, flags=("-DANSWER=1",)), replace(library, flags=("-DANSWER=2",))
    assert one.load()() == 1 and two.load()() == 2


@needs_compiler
def test_a_file_that_cannot_be_compiled_is_logged_with_the_consequence(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, cpu_library.__name__)
    assert probe("this is not C++\n", monkeypatch).load() is None
    assert caplog.messages[0].endswith("Nothing is answered.")


def test_bind_may_refuse_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "compile_and_load", lambda *_: ctypes.CDLL(None))
    refused: Any = replace(packing.LIBRARY, bind=lambda _: None)
    assert refused.load() is None
