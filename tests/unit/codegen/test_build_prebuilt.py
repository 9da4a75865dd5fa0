"""Compilation of prebuilt libraries: which files are written, kept and removed, and errors."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

import pytest
from needs import needs_compiler

from fhopt.codegen import build_prebuilt as module
from fhopt.codegen.build_prebuilt import LIBRARIES, build_prebuilt, cross_compiler, run_build, targets_named
from fhopt.codegen.compiler import CompileError
from fhopt.codegen.cpu import library as cpu_library
from fhopt.codegen.prebuilt import CpuTarget, best_target
from fhopt.errors import FhoptError

HERE, OTHER = (CpuTarget(name, platform.machine(), (f"-D{name}",), frozenset(), "") for name in ("ONE", "TWO"))
TEXT = """
#ifdef ONE
extern "C" int answer() { return 1; }
#else
extern "C" int answer() { return 2; }
#endif
"""


@dataclass(frozen=True)
class Probe:
    """A library of one function."""

    name: str = "probe"
    source: str = TEXT
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def text(self) -> str:
        return self.source


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARIES", (Probe(),))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"))


@needs_compiler
def test_each_target_has_a_file_that_is_compiled_once(tmp_path: Path) -> None:
    build_prebuilt(tmp_path, (HERE, OTHER))
    made = files(tmp_path)
    assert [path.parent.name for path in made] == ["ONE", "TWO"]
    assert [ctypes.CDLL(str(path)).answer() for path in made] == [1, 2]
    times = [path.stat().st_mtime_ns for path in made]
    build_prebuilt(tmp_path, (HERE, OTHER))
    assert [path.stat().st_mtime_ns for path in files(tmp_path)] == times


@needs_compiler
def test_files_of_older_sources_and_other_targets_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_prebuilt(tmp_path, (HERE, OTHER))
    old = set(files(tmp_path))
    monkeypatch.setattr(module, "LIBRARIES", (Probe(source=TEXT + "\n"),))
    build_prebuilt(tmp_path, (HERE,))
    (new,) = files(tmp_path)
    assert new not in old and new.parent.name == "ONE"


@needs_compiler
def test_a_file_that_cannot_be_compiled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARIES", (Probe(source="this is not C++\n"),))
    with pytest.raises(CompileError, match=r"failed to compile probe for ONE: .*error"):
        build_prebuilt(tmp_path, (HERE,))
    assert files(tmp_path) == []


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="names of libraries on Linux")
def test_libraries_of_torch_are_named_but_not_needed_to_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'extern "C" int missing();\nextern "C" int answer() { return missing(); }\n'
    monkeypatch.setattr(module, "LIBRARIES", (Probe(source=text, links=("-lnowhere_to_find",)),))
    build_prebuilt(tmp_path, (HERE,))
    (made,) = files(tmp_path)
    assert b"libnowhere_to_find.so" in made.read_bytes()
    with pytest.raises(OSError, match=r"libnowhere_to_find\.so"):
        ctypes.CDLL(str(made))


def test_every_library_is_prebuilt() -> None:
    sources = Path(cpu_library.__file__).parent / "sources"
    assert {library.file for library in LIBRARIES} == {path.name for path in sources.glob("*.cpp")}


def test_targets_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [target.name for target in targets_named(["x86-64-v3", "aarch64"])] == ["x86-64-v3", "aarch64"]
    if best_target():
        assert targets_named(["here"]) == (best_target(),)
    monkeypatch.setattr(module, "best_target", lambda: None)
    for name in ("here", "sparc"):
        with pytest.raises(FhoptError, match=f"target '{name}' does not exist; expected x86-64-amx, "):
            targets_named([name])


def test_another_machine_needs_a_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    with pytest.raises(CompileError, match=f"{other}-linux-gnu-g\\+\\+ was not found"):
        cross_compiler(CpuTarget("other", other, (), frozenset(), ""))


def test_the_command_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_build([str(tmp_path)]) == 2 and "usage" in capsys.readouterr().err
    assert run_build([str(tmp_path), "sparc"]) == 1 and "target 'sparc' does not exist" in capsys.readouterr().err
