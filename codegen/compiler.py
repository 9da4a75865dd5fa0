"""The C++ compiler: find it, compile a generated file for this CPU, load the library.

A library is named by its kernel and a hash of text, compiler, flags and CPU, since the code is CPU-specific: an
existing file is valid and is never rewritten.
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

ISA_VARIABLE = "FHOPT_ISA"  # compile for this instruction set, such as x86-64-v3 or native; no prebuilt libraries
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_running: set[subprocess.Popen[str]] = set()
_ends = threading.Event()  # set at process exit: start no more compilers


class CompileError(Exception):
    """No compiler was found, or it rejected the file. The message is a sentence for the user."""


def compile_and_load(name: str, text: str, flags: tuple[str, ...] = (), links: tuple[str, ...] = ()) -> ctypes.CDLL:
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
    """Return whether `load(name, text, flags)` runs a compiler, which takes seconds: not if the library is cached."""
    try:
        file = _file_name(name, text, find_compiler(), (*FLAGS, *flags, native_flag()))
        return not (cache_folder() / file).is_file()
    except CompileError:  # no compiler
        return False
    except (OSError, RuntimeError):  # no folder, no home
        return True


def _file_name(name: str, text: str, compiler: str, flags: tuple[str, ...]) -> str:
    return f"{name}-{text_digest(text, _identity(compiler), *flags)}.so"


def warn_without_compiler(error: CompileError) -> None:
    """Warn, once per process and not during exit, that kernels cannot be compiled, and of the consequences."""
    if _ends.is_set():
        return
    warn_once(
        "compiler",
        f"{error} Attention on latents runs on plain torch operations, which is slower. Install g++ (or "
        "clang++) and restart to use compiled kernels.",
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
    """Return the first line of a compiler's version output. Raises CompileError if it cannot be run."""
    return _run([compiler, "--version"]).stdout.partition("\n")[0]


def check_compiler() -> str:
    """Compile a one-line function, load it, and return the compiler's version. Raises CompileError."""
    version = compiler_version(find_compiler())
    compile_and_load("probe", '#include <cmath>\nextern "C" double probe(double x) { return std::sqrt(x); }\n')
    return version


def vector_unit() -> str:
    """Describe the vector unit that kernels are compiled for on this CPU."""
    try:
        compiler = find_compiler()
    except CompileError:
        return "plain torch operations, no C++ compiler was found"
    return f"{unit_of(_macros(compiler))}, compiled by {Path(compiler).name}"


def unit_of(macros: frozenset[str]) -> str:
    """Describe the vector unit that kernels use if a compiler defines these macros."""
    return next((words for needed, words in _UNITS if needed <= macros), "vectors of 4 floats")


def flags_for_products() -> tuple[str, ...]:
    """Return the flags for a file that multiplies quantized values. Raises CompileError without a compiler.

    With AVX-512 VBMI they are multiplied as bytes. Without it (Skylake, Cascade Lake) AVX2 multiplies them as words,
    1.7 to 2 times faster than 16-float multiplications (measured on SmolLM2's shape), so AVX-512 is disabled there.
    """
    macros = _macros(find_compiler())
    return ("-mno-avx512f",) if "__AVX512F__" in macros and not macros >= _BYTES else ()


def _macros(compiler: str) -> frozenset[str]:
    """Return the macros that a compiler defines for this CPU; none if it fails, as it then does with any file."""
    try:
        return _defined(compiler, native_flag())
    except CompileError:
        return frozenset()


@functools.cache
def _defined(compiler: str, flag: str) -> frozenset[str]:
    done = _run([compiler, flag, "-dM", "-E", "-x", "c++", os.devnull])
    if done.returncode:
        raise CompileError(f"{compiler} rejected {flag}.")
    return frozenset(line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define "))


# Compiler macros, and the vector instructions that kernels use if they are defined.
_BYTES = {"__AVX512VNNI__", "__AVX512BW__", "__AVX512VL__", "__AVX512VBMI__"}
AVX512_VNNI = "AVX-512 VNNI: 8-bit integer and 16-lane float dot products"
AMX = f"{AVX512_VNNI}; AMX for BF16 prefill"
AVX2_VNNI = "AVX2 with VNNI: 16-bit integer and 8-lane float dot products"
AVX2 = "AVX2: 16-bit integer and 8-lane float dot products"
NEON = "NEON: 4-lane float dot products"
_UNITS = (
    (_BYTES | {"__AVX512BF16__", "__AMX_BF16__"}, AMX),
    (_BYTES, AVX512_VNNI),
    ({"__AVX512F__"}, "AVX-512 without VBMI: 16-bit integer and 16-lane float dot products"),
    ({"__AVX2__", "__F16C__", "__AVXVNNI__"}, AVX2_VNNI),
    ({"__AVX2__", "__F16C__"}, AVX2),
    ({"__AVX2__"}, "AVX2: 8-lane float dot products"),
    ({"__ARM_NEON"}, NEON),
)


def _compile(compiler: list[str], text: str, library: Path, links: tuple[str, ...]) -> None:
    """Compile to `library` with the command `compiler`, and leave the source next to it. Raises CompileError."""
    source = library.with_suffix(".cpp")
    write_text(source, f"// {' '.join([*compiler, *links])} -fopenmp\n{text}")
    with appearing(library) as target:
        command = [*compiler, str(source), "-o", str(target), *links]
        failed = compiler_errors([*command, "-fopenmp"])
        if failed and compiler_errors(command):  # without OpenMP the kernel is single-threaded
            raise CompileError(f"{compiler[0]} failed to compile a generated file: {first_error(failed)}.")


def first_error(output: str) -> str:
    """Return the line of a compiler's output that names the first error."""
    lines = output.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0])


def compiler_errors(command: list[str]) -> str:
    """Run a compiler and return its error output if it failed, else "". Raises CompileError if it cannot be started."""
    done = _run(command)
    return (done.stderr or "no message") if done.returncode else ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler. Raises CompileError if it cannot be started."""
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
        raise CompileError(f"{command[0]} was stopped because the process is exiting.")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def stop() -> None:
    """Terminate all compilers that this process has started, and start no more; their outputs are not written."""
    _ends.set()
    for process in list(_running):
        process.terminate()


def native_flag() -> str:
    """Return the flag that compiles for the CPU of this machine, or for the ISA in FHOPT_ISA."""
    isa = os.environ.get(ISA_VARIABLE)
    if isa and isa != "native":
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
