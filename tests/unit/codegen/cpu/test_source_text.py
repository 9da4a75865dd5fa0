"""The C++ sources: every header compiles alone, and a source with all of its headers compiles by itself."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from attention_cases import CASES
from needs import needs_compiler, sampled

from fhopt.codegen.build import render_kernel
from fhopt.codegen.compiler import find_compiler
from fhopt.codegen.cpu.calls.headers import headers
from fhopt.codegen.cpu.source_text import read_cpp, write_headers

SOURCES = Path(__file__).parents[4] / "codegen" / "cpu" / "sources"
ARM = "aarch64-linux-gnu-g++"
X86 = ["-march=x86-64-v3", "-march=sapphirerapids", "-march=x86-64"]  # AVX2, AVX-512, vectors of 4 floats


@needs_compiler
@pytest.mark.parametrize("flag", sampled([*X86[::-1], "arm"], 4))
def test_every_header_compiles_alone(flag: str, tmp_path: Path) -> None:
    if flag == "arm" and not shutil.which(ARM):
        pytest.skip("there is no compiler for ARM")
    if flag in X86 and platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    write_headers(tmp_path)
    compiler, flag = (ARM, "-mcpu=neoverse-n1") if flag == "arm" else (find_compiler(), flag)
    files = sorted([*SOURCES.glob("*.h"), *tmp_path.glob("*.h")])
    include = ["-I", str(tmp_path), "-I", str(SOURCES)]
    command = [compiler, "-std=c++17", flag, "-fopenmp", "-fsyntax-only", *include, "-x", "c++", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_headers_include_one_another_without_a_circle() -> None:
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.h")} | headers()
    left = {name: set(re.findall(r'#include "(.+)"', text)) for name, text in texts.items()}
    assert all("#pragma once" in text for text in texts.values())
    while ready := [name for name, included in left.items() if not included & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", [path.name for path in SOURCES.glob("*.cpp")])
def test_a_source_has_every_header_once(name: str) -> None:
    text = read_cpp(name)
    assert "#pragma once" not in text and '#include "' not in text
    assert text.count("struct Rows {") <= 1 and text.count("#define UNROLL(times)") <= 2  # of GCC and of Clang


@needs_compiler
def test_a_kernel_compiles_by_the_command_in_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "kernel.cpp").write_text(text := render_kernel(CASES["one token"].spec(), "cpp"))
    mark, compiler, *flags = shlex.split(text.partition("\n")[0])
    assert (mark, compiler) == ("//", "c++")
    command = [find_compiler(), *flags, "-O0", "kernel.cpp", "-o", "kernel.so"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
