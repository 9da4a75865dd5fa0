"""Compile the prebuilt libraries (prebuilt.py), at installation or for a wheel.

    python -m fhopt.codegen.build_prebuilt FOLDER TARGET...     `here`: the best target for this machine

For other machines than this one, Debian's cross compilers are used (`aarch64-linux-gnu-g++`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fhopt.codegen.compiler import FLAGS, CompileError, compiler_errors, find_compiler, first_error
from fhopt.codegen.cpu import (
    attention,
    block_tables,
    gguf_blocks,
    graph_kernels,
    lm_head,
    packing,
    pages,
    prefill,
    skinny_linear,
    wide_linear,
)
from fhopt.codegen.cpu.library import CppLibrary
from fhopt.codegen.prebuilt import TARGETS, CpuTarget, best_target
from fhopt.codegen.programs import program
from fhopt.errors import FhoptError
from fhopt.files import appearing
from fhopt.system import cores

LIBRARIES = tuple(
    module.LIBRARY
    for module in (
        attention, block_tables, gguf_blocks, graph_kernels, lm_head, packing, pages, prefill, skinny_linear,
        wide_linear, program,
    )
)  # fmt: skip


def targets_named(names: Sequence[str]) -> tuple[CpuTarget, ...]:
    """Return the targets with these names; `here` is the best one for this machine. Raises FhoptError."""
    known = {target.name: target for target in TARGETS}
    found = []
    for name in names:
        target = best_target() if name == "here" else known.get(name)
        if target is None:
            raise FhoptError(f"target {name!r} does not exist; expected {', '.join(known)}, or here on one of these.")
        found.append(target)
    return tuple(found)


def build_prebuilt(folder: Path, targets: Iterable[CpuTarget]) -> None:
    """Compile every library for each target into `folder`; existing files stay, and others are removed.

    Raises CompileError, without a compiler or if it fails.
    """
    wanted = {
        folder / target.name / target.file_name(library.name, library.text(), library.flags): (target, library)
        for target in targets
        for library in LIBRARIES
    }
    for path in set(folder.rglob("*.so")) - wanted.keys():
        path.unlink()
        with contextlib.suppress(OSError):  # it has other files
            path.parent.rmdir()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(cores()) as pool:
        missing = [(path, *about, Path(temporary)) for path, about in wanted.items() if not path.exists()]
        for _ in pool.map(lambda job: _compile(*job), missing):
            pass


def cross_compiler(target: CpuTarget) -> str:
    """Return the compiler for a target. Raises CompileError without one."""
    if target.machine == platform.machine():
        return find_compiler()
    name = f"{target.machine}-linux-gnu-g++"
    found = shutil.which(name)
    if found is None:
        raise CompileError(f"{name} was not found. Install g++-{target.machine}-linux-gnu (Debian).")
    return found


def _compile(path: Path, target: CpuTarget, library: CppLibrary, temporary: Path) -> None:
    """Compile a library of a target to `path`. Raises CompileError."""
    folder = temporary / target.name
    folder.mkdir(exist_ok=True)
    source, compiler = folder / f"{library.name}.cpp", cross_compiler(target)
    source.write_text(library.text())
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as made:
        include = f"-I{Path(torch.__file__).parent / 'include'}"
        command = [compiler, *FLAGS, *library.flags, *target.flags, include, "-fopenmp", "-s", str(source)]
        links = ["-o", str(made), *_links(compiler, library, folder)]
        if errors := compiler_errors([*command, *links]):
            raise CompileError(f"{compiler} failed to compile {library.name} for {target.name}: {first_error(errors)}.")


def _links(compiler: str, library: CppLibrary, folder: Path) -> list[str]:
    """Return the flags of the linker. Raises CompileError.

    Empty libraries with the names of torch's are linked: torch loads its own before, and has none for cross builds.
    """
    for link in library.links:
        name = f"lib{link.removeprefix('-l')}.so"
        empty = [compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, f"-Wl,-soname,{name}", "-o", str(folder / name)]
        if errors := compiler_errors(empty):
            raise CompileError(f"{compiler} failed to link: {first_error(errors)}.")
    return [f"-L{folder}", "-Wl,--no-as-needed", *library.links] if library.links else []


def run_build(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit code."""
    if len(arguments) < 2:
        print("usage: python -m fhopt.codegen.build_prebuilt FOLDER TARGET...", file=sys.stderr)
        return 2
    try:
        build_prebuilt(Path(arguments[0]), targets_named(arguments[1:]))
    except (CompileError, FhoptError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_build(sys.argv[1:]))
