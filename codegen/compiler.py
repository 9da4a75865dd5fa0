"""The C++ compiler: find it, compile a generated file for this CPU, load the library.

The name of a library is the name of its kernel and a hash of text, compiler, flags and CPU, since the code is made for
that CPU: a file that exists is right and is never written again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path

from fhopt.files import appearing
from fhopt.system import cache_folder, cached_file, text_digest, warn_once, write_text

ISA_VARIABLE = "FHOPT_ISA"  # an instruction set that the compiler knows, such as x86-64-v3: what older CPUs would run
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_running: set[subprocess.Popen[str]] = set()
_ends = threading.Event()  # this process does: no compiler is started any more


class CompileError(Exception):
    """There is no compiler, or it refused the file. The message is a sentence for the user."""


def load(name: str, text: str, flags: tuple[str, ...] = (), links: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile the C++ file `text` with FLAGS and `flags`, and load the library. Raises CompileError."""
    compiler = find_compiler()
    flags = (*FLAGS, *flags, native_flag())
    file = _file_name(name, text, compiler, flags)
    library = cached_file(file, lambda path: _compile([compiler, *flags], text, path, links))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"The compiled kernel cannot be loaded ({error}).") from error


def compiles(name: str, text: str, flags: tuple[str, ...] = ()) -> bool:
    """Return whether `load(name, text, flags)` runs a compiler, which takes seconds: not where the library is kept."""
    try:
        file = _file_name(name, text, find_compiler(), (*FLAGS, *flags, native_flag()))
        return not (cache_folder() / file).is_file()
    except CompileError:  # there is none
        return False
    except (OSError, RuntimeError):  # no folder, no home
        return True


def _file_name(name: str, text: str, compiler: str, flags: tuple[str, ...]) -> str:
    return f"{name}-{text_digest(text, _identity(compiler), *flags)}.so"


def warn_without_compiler(error: CompileError) -> None:
    """Warn, once in a process, that kernels cannot be compiled, and say what follows from it; not where it ends."""
    if _ends.is_set():
        return
    warn_once(
        "compiler",
        f"{error} Attention on latents runs on plain torch operations, which is slower. "
        "Install g++ (or clang++) and start again to get compiled kernels.",
    )


def find_compiler() -> str:
    """Find the first C++ compiler on PATH. Raises CompileError."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise CompileError(f"No C++ compiler was found (looked for {', '.join(COMPILERS)}).")


def has_compiler() -> bool:
    """Return whether there is a C++ compiler on PATH."""
    return any(map(shutil.which, COMPILERS))


def compiler_version(compiler: str) -> str:
    """Return the first line that a compiler prints about its version. Raises CompileError where it cannot be run."""
    return _run([compiler, "--version"]).stdout.partition("\n")[0]


def check_compiler() -> str:
    """Compile a function of one line, load it, and return the compiler's version. Raises CompileError."""
    version = compiler_version(find_compiler())
    load("probe", '#include <cmath>\nextern "C" double probe(double x) { return std::sqrt(x); }\n')
    return version


def vector_unit() -> str:
    """Describe the vector unit that kernels are compiled for on this CPU."""
    try:
        compiler = find_compiler()
    except CompileError:
        return "plain torch operations, no C++ compiler was found"
    name, macros = Path(compiler).name, _macros(compiler)
    for needed, words in _UNITS:
        if needed <= macros:
            return f"{words}, compiled by {name}"
    return f"vectors of 4 floats, compiled by {name}"


def flags_for_products() -> tuple[str, ...]:
    """Return the flags of a file that multiplies quantized values. Raises CompileError without a compiler.

    As bytes they are multiplied with AVX-512 VBMI; without it (Skylake, Cascade Lake) as words with AVX2, which takes
    0.5 to 0.6 of the time of products of 16 floats (measured on SmolLM2's shape), so that AVX-512 is left out there.
    """
    macros = _macros(find_compiler())
    return ("-mno-avx512f",) if "__AVX512F__" in macros and not macros >= _BYTES else ()


def _macros(compiler: str) -> frozenset[str]:
    """Return the macros that a compiler defines for this CPU; none where it fails, as it then does with a file, too."""
    try:
        return _defined(compiler, native_flag())
    except CompileError:
        return frozenset()


@functools.cache
def _defined(compiler: str, flag: str) -> frozenset[str]:
    done = _run([compiler, flag, "-dM", "-E", "-x", "c++", os.devnull])
    if done.returncode:
        raise CompileError(f"{compiler} refused {flag}.")
    return frozenset(line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define "))


# Macros of a compiler, and what kernels compute with where they are defined.
_BYTES = {"__AVX512VNNI__", "__AVX512BW__", "__AVX512VL__", "__AVX512VBMI__"}
_UNITS = (
    (
        _BYTES | {"__AVX512BF16__", "__AMX_BF16__"},
        "AVX-512 VNNI: products of bytes, and of 16 floats; AMX for prompts in bfloat16",
    ),
    (_BYTES, "AVX-512 VNNI: products of bytes, and of 16 floats"),
    ({"__AVX512F__"}, "AVX-512 without VBMI: products of words, and of 16 floats"),
    ({"__AVX2__", "__F16C__", "__AVXVNNI__"}, "AVX2 with VNNI: products of words, and of 8 floats"),
    ({"__AVX2__", "__F16C__"}, "AVX2: products of words, and of 8 floats"),
    ({"__AVX2__"}, "AVX2: products of 8 floats"),
    ({"__ARM_NEON"}, "NEON: products of 4 floats"),
)


def _compile(compiler: list[str], text: str, library: Path, links: tuple[str, ...]) -> None:
    """Compile to `library` by the command `compiler`, and leave the text beside it. Raises CompileError."""
    source = library.with_suffix(".cpp")
    write_text(source, f"// {' '.join([*compiler, *links])} -fopenmp\n{text}")
    with appearing(library) as target:
        command = [*compiler, str(source), "-o", str(target), *links]
        failed = _errors([*command, "-fopenmp"])
        if failed and _errors(command):  # without OpenMP the kernel runs on one thread
            lines = failed.strip().splitlines()
            message = next((line for line in lines if "error" in line), lines[0])
            raise CompileError(f"{compiler[0]} refused a generated file: {message}.")


def _errors(command: list[str]) -> str:
    """Run the compiler and return what it said when it failed; empty when it did not."""
    done = _run(command)
    return (done.stderr or "no message") if done.returncode else ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler. Raises CompileError where it cannot be started."""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            _running.add(process)
            if _ends.is_set():
                process.terminate()
            try:
                output, errors = process.communicate()
            finally:
                _running.discard(process)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be started ({error.strerror}).") from error
    if _ends.is_set():
        raise CompileError(f"{command[0]} was stopped, since the process ends.")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def stop() -> None:
    """End all compilers that this process has started, and start no more: what they were to make is not made."""
    _ends.set()
    for process in list(_running):
        process.terminate()


def native_flag() -> str:
    """Return the flag that compiles for the CPU of this machine, or for the one that FHOPT_ISA names."""
    if isa := os.environ.get(ISA_VARIABLE):
        return f"-march={isa}"
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return "-mcpu=native" if arm else "-march=native"


@functools.cache
def _identity(compiler: str) -> str:
    """Describe compiler and CPU: code for one CPU may not run on another that shares the cache folder."""
    version = compiler_version(compiler)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = ("model name", "flags", "Features", "CPU part")
    cpu = [line for line in dict.fromkeys(lines) if line.startswith(fields)]
    return "\n".join([version, platform.machine(), platform.processor(), *cpu])
