"""Kernel sources: loading, few clang-format exceptions, and their presence in an installed fhopt."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from wheels import built, copy_project

from fhopt.codegen import source_files

ROOT = Path(__file__).parents[3]
FOLDERS = {
    "fhopt.codegen": ROOT / "codegen/sources",
    "fhopt.codegen.cpu": ROOT / "codegen/cpu/sources",
    "fhopt.codegen.gpu": ROOT / "codegen/gpu/sources",
}
FILES = [(package, file) for package, folder in FOLDERS.items() for file in sorted(folder.iterdir())]
CPP = [file for package, file in FILES if package == "fhopt.codegen.cpu"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder `sources` of a package made for the test, `made_kernels`."""
    folder = tmp_path / "made_kernels" / "sources"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_kernels", raising=False)
    return folder


def test_a_placeholder_on_its_own_line_is_replaced_by_whole_lines(package: Path) -> None:
    (package / "lines.py.in").write_text("a = $a\n$lines\nb = 1\n")
    source = source_files.read_package_source.__wrapped__("made_kernels", "lines.py.in")
    assert source.substitute(a=1, lines="c\nd\n") == "a = 1\nc\nd\nb = 1\n"
    assert source.substitute(a=1, lines="") == "a = 1\nb = 1\n"


@pytest.mark.parametrize("file", CPP, ids=[file.name for file in CPP])
def test_clang_format_is_off_for_a_few_lines_only(file: Path) -> None:
    lines = [line.strip() for line in file.read_text().splitlines()]
    marks = [i for i, line in enumerate(lines) if line.startswith("// clang-format")]
    off, on = marks[::2], marks[1::2]
    assert [lines[i] for i in marks] == ["// clang-format off", "// clang-format on"] * len(on)
    assert all(end - begin <= 10 for begin, end in zip(off, on, strict=True)) and len(off) <= 6


# --------------------------------------------------------------------------------------------------- installed

RENDERS = """
import hashlib, sys
import fhopt.codegen
from fhopt.codegen import render_kernel
from fhopt.codegen.cpu import block_tables, graph_kernels, lm_head, packing, pages, skinny_linear, wide_linear
from fhopt.codegen.gpu import prefill
from fhopt.codegen.programs import program
from fhopt.plan import KernelSpec

spec = KernelSpec(((4, 16, 0.25),), ((3, 16, 0.5), (16, 8, 0.0)), 16, 24, "bfloat16", True)
texts = [render_kernel(spec, target) for target in ("cpp", "torch", "triton")] + [prefill.render_prefill(spec)]
plain = block_tables, graph_kernels, lm_head, packing, pages, program, skinny_linear, wide_linear
texts += [module.LIBRARY.text() for module in plain]
print(fhopt.codegen.__file__)
print(*[hashlib.sha256(text.encode()).hexdigest() for text in texts])
"""


def rendered(path: Path, cwd: Path) -> tuple[Path, str]:
    """Return the location of fhopt.codegen in a process with `path` first, and the digests of its rendered kernels."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", RENDERS], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    file, digests = done.stdout.splitlines()
    return Path(file), digests


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77,
    reason="builds with setuptools 77 or newer",
)
def test_a_wheel_built_from_the_sdist_renders_the_same_kernels_as_the_checkout(tmp_path: Path) -> None:
    project, made, target = copy_project(tmp_path / "project"), tmp_path / "made", tmp_path / "target"
    shutil.unpack_archive(built("sdist", project, made), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = built("wheel", unpacked, made, FHOPT_TARGETS="")  # without kernels
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, target, format="zip")
    place, digests = rendered(target, tmp_path)
    assert place == target / "fhopt/codegen/__init__.py"
    assert digests == rendered(ROOT, tmp_path)[1]
    for package, file in FILES:
        installed = target / package.replace(".", "/") / "sources" / file.name
        assert hashlib.sha256(installed.read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()
