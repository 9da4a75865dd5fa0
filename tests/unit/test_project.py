"""The layers of the project, and its README."""

from __future__ import annotations

import ast
import re
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


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, fhopt, fhopt.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def readme_programs() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(readme_programs()) if (ROOT / "README.md").exists() else 0))
def test_programs_in_the_readme_run(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", readme_programs()[number]], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
