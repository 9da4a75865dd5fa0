"""Kernel sources, and which targets can be built."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attention_cases import CASES, HALVES, LONGEST, UNCODED, KernelCase
from needs import needs_compiler

from fhopt.codegen.build import render_kernel
from fhopt.codegen.compiler import find_compiler, native_flag
from fhopt.codegen.tiers import Tiers
from fhopt.errors import FhoptError
from fhopt.ops.packing import planes
from fhopt.plan.kernel_spec import KernelSpec

pytestmark = pytest.mark.usefixtures("nothing_built")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_the_same_spec_gives_the_same_bytes(target: str) -> None:
    texts = {name: render_kernel(case.spec(), target) for name, case in CASES.items()}
    assert texts == {name: render_kernel(case.spec(), target) for name, case in CASES.items()}
    assert len(set(texts.values())) == len(texts)
    assert str(ROOT) not in "".join(texts.values())


@pytest.mark.parametrize(
    "case", [*CASES.values(), KernelCase(LONGEST, LONGEST, 1, 1, 1, 1, 1)], ids=[*CASES, "longest"]
)
def test_a_generated_torch_file_passes_its_linter(case: KernelCase, tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    path, config = tmp_path / "kernel.py", ROOT / "pyproject.toml"
    path.write_text(render_kernel(case.spec(), "torch"))
    for command in (
        ["check", "--ignore", "D4"],
        ["format", "--check"],
    ):  # kernel docstrings have their own form
        done = subprocess.run([ruff, *command, "--config", config, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@needs_compiler
@pytest.mark.parametrize("flag", ["-mno-avx", "-march=x86-64-v3", native_flag()])
def test_a_generated_cpp_file_compiles_without_a_warning(flag: str, tmp_path: Path) -> None:
    if flag != native_flag() and platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    path = tmp_path / "kernel.cpp"
    path.write_text(render_kernel(KernelCase(HALVES, LONGEST, 1, 1, 1, 1, 1, softcap=4.0).spec(), "cpp"))
    assert max(map(len, path.read_text().splitlines())) <= 120
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")  # no OpenMP; no AVX
    command = [find_compiler(), "-std=c++17", flag, *warnings, "-fsyntax-only", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(FhoptError, match=r"target 'fortran' has no renderer.*cpp, torch"):
        render_kernel(CASES["one token"].spec(), "fortran")


@pytest.mark.parametrize("target", ["cpp", "torch"])
@pytest.mark.parametrize("bits", [3, 5, 6])
def test_a_file_contains_code_only_for_its_planes(target: str, bits: int) -> None:
    tiers: Tiers = ((bits, 8, 0.3),)
    text = render_kernel(KernelSpec(tiers, UNCODED, 8, 8, "float32", False), target)
    assert "3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2" in text  # the header documents the format
    if target == "cpp":
        assert f"{{{bits}, 8, 0.3}},\n" in text
    else:
        functions = {n for n in range(1, 9) if f"def codes{n}(" in text}
        assert functions == {bits, *planes(bits)}


@pytest.mark.parametrize("target", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("tiers", "width", "dtype", "reason"),
    [
        (((7, 8, 0.3),), 8, "float32", "have no kernel"),
        (((4, 12, 0.3),), 12, "float32", "multiples of 8"),
        (((4, 16, 0.3),), 24, "float32", "do not add up"),
        ((), 24, "float64", "no kernel supports unquantized float64"),
    ],
)
def test_a_spec_without_kernel_support_is_refused(
    target: str, tiers: Tiers, width: int, dtype: str, reason: str
) -> None:
    with pytest.raises(FhoptError, match=reason):
        render_kernel(KernelSpec(tiers, tiers, width, width, dtype, False), target)
