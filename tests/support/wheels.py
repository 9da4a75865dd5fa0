"""Wheels and source distributions of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy_project(folder: Path) -> Path:
    """Copy the files of a distribution, without prebuilt kernels."""
    for name in ("fhopt", "passes", "codegen"):
        ignored = shutil.ignore_patterns("__pycache__", "prebuilt")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def built(kind: str, project: Path, folder: Path, **variables: str) -> Path:
    """Build the "wheel", "editable" wheel or "sdist" of a project, as pip does."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    command, environment = [sys.executable, "-c", code], os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]
