"""Input is data: no fhopt module unpickles it, evaluates it, or passes it to a shell.

Ruff's rules (`S` in pyproject.toml) forbid pickle, eval, exec, yaml.load and shells everywhere; these tests cover code
execution that is specific to machine-learning libraries.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    p
    for folder in ("fhopt", "passes", "codegen")
    for p in (ROOT / folder).rglob("*.py")
    if "fhopt/passes" not in str(p)
)
UNSAFE_KEYWORDS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}
PICKLED = {"torch.load", "numpy.load", "np.load", "joblib.load", "torch.hub.load", "torch.package.PackageImporter"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Return every call in a file, with its name as written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(path: Path) -> list[str]:
    found = []
    for name, call in calls(path):
        said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if name in PICKLED and said.get("weights_only") is not True:
            found.append(f"{path.name}:{call.lineno}: {name} may unpickle")
        found += [
            f"{path.name}:{call.lineno}: {key}={value}"
            for key, value in UNSAFE_KEYWORDS.items()
            if said.get(key) is value
        ]
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_input_is_executed(path: Path) -> None:
    assert unsafe(path) == []


def test_code_that_would_execute_input_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import torch\ntorch.load(p)\ntorch.load(p, weights_only=True)\nrun(p, shell=True)\nopen(p)\n")
    assert unsafe(path) == ["bad.py:2: torch.load may unpickle", "bad.py:4: shell=True"]


@pytest.mark.parametrize(
    "call", ["pickle.loads(x)", "eval(x)", "exec(x)", "yaml.load(x)", "subprocess.run(x, shell=True)"]
)
def test_the_linter_refuses_code_that_executes_input(call: str) -> None:
    text = f"import pickle\nimport subprocess\n\nimport yaml\n\n{call}\n"
    name = str(ROOT / "fhopt" / "any.py")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
        "--stdin-filename",
        name,
        "-",
    ]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    assert re.search(r"any\.py:6:\d+: S\d{3} ", done.stdout), done.stdout
