"""Modules that an import loads."""

from __future__ import annotations

import subprocess
import sys


def imported_by(*modules: str) -> set[str]:
    """Names of all modules that a new process has loaded after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
