"""Run Triton in separate processes: its interpreter must be chosen before the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
INTERPRET = "from {module} import CHECKS; from triton_processes import interpret; interpret(CHECKS)"


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


def failures(module: str, folder: Path) -> dict[str, str]:
    """Names of a module's checks that fail under the interpreter, with their errors."""
    found: dict[str, str] = run(INTERPRET.format(module=module), folder, TRITON_INTERPRET="1")
    return found


def interpret(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run every check and print the failures."""
    torch.set_num_threads(1)
    failed = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))
