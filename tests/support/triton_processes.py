"""Run Triton in separate processes: its interpreter must be chosen before the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
INTERPRET = "from {module} import CHECKS; from triton_processes import interpret; interpret(CHECKS, {names})"


def run(program: str, folder: Path, **variables: str) -> Any:
    """Return the output of a process that can import from this folder and stores its kernels in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "FHOPT_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def failures(module: str, folder: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Names of a module's checks that fail under the interpreter, with their errors.

    Only the checks that are parameters `check` of selected tests in the requesting file run.
    """
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = sorted({item.callspec.params["check"] for item in items if "check" in item.callspec.params})
    found: dict[str, str] = run(INTERPRET.format(module=module, names=names), folder, TRITON_INTERPRET="1")
    return found


def interpret(checks: Mapping[str, Callable[[], None]], names: Sequence[str]) -> None:
    """Run the named checks and print the failures."""
    torch.set_num_threads(1)
    failed = {}
    for name, check in checks.items():
        if name not in names:
            continue
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))
