"""Coverage measurement in parts: the unit tests of each package, and each test file outside of packages.

    build/coverage/parts/<part>/data.*         the data of a part's processes while it runs
    build/coverage/parts/<part>/measured       the same in one file
    build/coverage/parts/<part>/state.json     digests of all sources and of the part's tests, and its outcome

A part is re-measured if it did not end, or if a module of its package or one of its tests has changed since. Lines of
other modules that have changed since are dropped from it, as their line numbers are no longer valid.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coverage import Coverage, CoverageData

from benchmarks.recording import ROOT

FOLDER = ROOT / "build" / "coverage"
SOURCES = ("fhopt", "passes", "codegen")
UNIT = ROOT / "tests" / "unit"
OUTSIDE = ("integration", "robustness", "benchmarks")  # folders of tests without a package: one part per file
GRACE = 60  # seconds for an interrupted part to write its data
MEASURED, STATE = "measured", "state.json"


@dataclass(frozen=True)
class TestPart:
    """Tests that run in one process: `paths`, below tests/. name: the tested package, or the file itself."""

    name: str
    paths: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder of its data."""
        return FOLDER / "parts" / self.name.replace("/", ".")


@dataclass(frozen=True)
class PartRun:
    """The outcome of a part: "passed", "failed" (some test) or "interrupted" (timeout). seconds: 0 for a reused one."""

    part: TestPart
    state: str
    seconds: float


def parts() -> list[TestPart]:
    """List the parts: packages in the order of their names, then the files outside of them."""
    of_packages: dict[str, list[str]] = {}
    for path in sorted(UNIT.rglob("test_*.py")):
        of_packages.setdefault(_package_of_tests(path.parent), []).append(_below_tests(path))
    outside = [path for folder in OUTSIDE for path in sorted((ROOT / "tests" / folder).rglob("test_*.py"))]
    names = [_below_tests(path) for path in outside]
    return [TestPart(name, tuple(files)) for name, files in of_packages.items()] + [
        TestPart(name, (name,)) for name in names
    ]


def _package_of_tests(folder: Path) -> str:
    """Return the package that tests/unit/<folder> mirrors."""
    below = folder.relative_to(UNIT)
    if not below.parts:
        return "fhopt"
    return str(below) if below.parts[0] in SOURCES else f"fhopt/{below}"


def _below_tests(path: Path) -> str:
    return str(path.relative_to(ROOT / "tests"))


def package_of(file: str) -> str:
    """Return the package of a module: passes/graph of passes/graph/program.py and of fhopt/passes/graph/program.py."""
    folders = Path(file).parts[:-1]
    below = folders[1:] if folders[:1] == ("fhopt",) and folders[1:2] and folders[1] in SOURCES else folders
    return "/".join(below)


# --------------------------------------------------------------------------------------------------- execution


def is_current(part: TestPart) -> bool:
    """Return whether a part was measured to its end, with the current versions of its package and its tests."""
    state = _state(part)
    if not state or state["state"] == "interrupted":
        return False
    mine = {path: digest for path, digest in digests(_sources()).items() if package_of(path) == part.name}
    return state["tests"] == digests(_tests(part)) and mine.items() <= state["sources"].items()


def kept(part: TestPart) -> PartRun | None:
    """Return the outcome of a part that need not be rerun; None if it must be."""
    return PartRun(part, _state(part)["state"], 0.0) if is_current(part) else None


def run(part: TestPart, seconds: float) -> PartRun:
    """Run the tests of a part under coverage.py for at most `seconds`; save the data measured until then."""
    shutil.rmtree(part.folder, ignore_errors=True)
    part.folder.mkdir(parents=True)
    before = {"sources": digests(_sources()), "tests": digests(_tests(part))}
    start = time.monotonic()
    with (part.folder / "output.txt").open("w") as output:
        child = subprocess.Popen(
            _command(part), cwd=ROOT, env=_environment(part), stdout=output, stderr=output, start_new_session=True
        )
        state = _wait(child, seconds)
    files = [str(path) for path in part.folder.glob("data.*")]
    if files:
        whole = Coverage(data_file=str(part.folder / MEASURED), config_file=str(ROOT / "pyproject.toml"))
        whole.combine(files)
        whole.save()
    (part.folder / STATE).write_text(json.dumps(before | {"state": state}, indent=1))
    return PartRun(part, state, time.monotonic() - start)


def _wait(child: subprocess.Popen[Any], seconds: float) -> str:
    """Wait for a process; on a timeout it is interrupted as by Ctrl-C, then killed with its children."""
    try:
        return "failed" if child.wait(seconds) not in (0, 5) else "passed"  # 5: pytest has selected no test
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "interrupted"


def _command(part: TestPart) -> list[str]:
    tests = [f"tests/{path}" for path in part.paths]
    options = ["-q", "-p", "no:xdist", "-p", "no:randomly", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    return [sys.executable, "-m", "coverage", "run", "--rcfile=pyproject.toml", "-m", "pytest", *options, *tests]


def _environment(part: TestPart) -> dict[str, str]:
    """Return the environment of a part: sys.monitoring, which supports branches from Python 3.14 on, else a tracer."""
    core = "sysmon" if sys.version_info >= (3, 14) else "ctrace"
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | one_thread | {"COVERAGE_CORE": core, "COVERAGE_FILE": str(part.folder / "data")}


def _state(part: TestPart) -> dict[str, Any]:
    path = part.folder / STATE
    return json.loads(path.read_text()) if path.exists() else {}


def _sources() -> list[Path]:
    """List the modules of fhopt, those of passes and codegen by their own folders."""
    modules = (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return sorted({path for path in modules if package_of(str(path.relative_to(ROOT))) == _folder(path)})


def _folder(path: Path) -> str:
    return str(path.relative_to(ROOT).parent)


def _tests(part: TestPart) -> list[Path]:
    return [ROOT / "tests" / path for path in part.paths]


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return the digest of each file, by its path below the root of the project."""
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


# --------------------------------------------------------------------------------------------------- combination


def combined(chosen: Iterable[TestPart]) -> dict[str, Any]:
    """Return coverage.py's report on all measured parts: by path below the root, `summary` and lines."""
    report = FOLDER / "coverage.json"
    with_data = [part for part in chosen if (part.folder / MEASURED).exists()]
    copies = [str(_of_unchanged(part)) for part in with_data]
    whole = Coverage(data_file=str(FOLDER / "whole"), config_file=str(ROOT / "pyproject.toml"))
    whole.erase()
    whole.combine(copies, strict=True)
    whole.save()
    whole.json_report(outfile=str(report))
    files = json.loads(report.read_text())["files"]
    return {str(Path(file).resolve().relative_to(ROOT)): about for file, about in files.items()}


def _of_unchanged(part: TestPart) -> Path:
    """Copy the data of a part, without modules that have changed since; return the path of the copy."""
    copy = part.folder / f"{MEASURED}.unchanged"
    shutil.copyfile(part.folder / MEASURED, copy)
    now, then = digests(_sources()), _state(part)["sources"]
    data = CoverageData(str(copy))
    data.read()
    by_path = {file: str(Path(file).resolve().relative_to(ROOT)) for file in data.measured_files()}
    data.purge_files([file for file, path in by_path.items() if now.get(path) != then.get(path)])
    data.close()
    return copy
