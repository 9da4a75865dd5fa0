"""From a `KernelSpec` to something that can be called: render, keep in the file cache, compile, load.

Files go to the folder named by FHOPT_CACHE_DIR, else XDG_CACHE_HOME/fhopt or ~/.cache/fhopt, where nobody else may
write: what is in it is run. A file's name is the name of the spec and a hash of its text (for C++ also of compiler,
flags and host CPU, since the code is made for that CPU), so a file that exists is right and is never written again.
Files appear whole (written aside, then renamed) and are made under a lock, so that processes that need the same kernel
at once build it once.

Letters: B batch, H query heads, J latent heads, S queries, T tokens, R latent width.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fhopt.codegen import cpp, torch_ops, triton_attention
from fhopt.codegen.call import LibraryKernel
from fhopt.codegen.triton_call import TritonKernel
from fhopt.errors import FhoptError
from fhopt.files import appearing
from fhopt.ops import LatentKernel
from fhopt.spec import KernelSpec

CACHE_VARIABLE = "FHOPT_CACHE_DIR"
COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class CompileError(Exception):
    """No compiler, or one that refused the file. The message is a sentence for the user."""


def render(spec: KernelSpec, target: str) -> str:
    """The text of the kernel of `spec` for `target`, "cpp", "torch" or "triton". Raises FhoptError for another."""
    renderers: dict[str, Callable[[KernelSpec], str]] = {
        "cpp": cpp.render,
        "torch": torch_ops.render,
        "triton": triton_attention.render,
    }
    if target not in renderers:
        raise FhoptError(f"there is no renderer for {target!r}; expected one of {', '.join(renderers)}.")
    return renderers[target](spec)


@functools.cache
def build(spec: KernelSpec) -> LatentKernel:
    """The kernel of `spec`, with the signature of `fhopt.ops.latent_attention_reference`; built once in a process.

    Compiled C++ where a compiler is found, else (with one warning) plain torch operations. The kernel ignores the tier
    arguments: they are fixed by `spec`.
    """
    try:
        return build_cpp(spec)
    except CompileError as error:
        warn_without_compiler(error)
    return build_torch(spec)


def build_cpp(spec: KernelSpec) -> LatentKernel:
    """The compiled kernel of `spec`. Raises CompileError."""
    return LibraryKernel(load(spec.name, cpp.render(spec)).latent_attention, spec)


def load(name: str, text: str, flags: tuple[str, ...] = (), links: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of the C++ file `text`, compiled with `flags` beside the usual ones. Raises CompileError."""
    compiler = find_compiler()
    flags = (*_FLAGS, *flags, _native(compiler))
    stem = f"{name}-{_digest(text, _identity(compiler), *flags)}"
    library = cached_file(f"{stem}.so", lambda path: _compile([compiler, *flags], text, path, links))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"The compiled kernel cannot be loaded ({error}).") from error


def warn_without_compiler(error: CompileError) -> None:
    """Say, once in a process, that kernels cannot be compiled and what follows from it."""
    _warn_once(
        "compiler",
        f"{error} Attention on latents runs on plain torch operations, which is slower. "
        "Install g++ (or clang++) and start again to get compiled kernels.",
    )


def build_torch(spec: KernelSpec) -> LatentKernel:
    """The kernel of `spec` in plain torch operations."""
    kernel: LatentKernel = load_module(spec.name, torch_ops.render(spec)).latent_attention
    return kernel


@functools.cache
def build_triton(spec: KernelSpec) -> TritonKernel:
    """The kernel of `spec` for GPUs. Raises ImportError where there is no Triton."""
    return TritonKernel(load_module(f"{spec.name}_triton", triton_attention.render(spec)), spec)


def load_module(name: str, text: str) -> ModuleType:
    """The module of the Python file `text`, which is kept in the file cache (Triton reads it again)."""
    stem = f"{name}-{_digest(text)}"
    path = cached_file(f"{stem}.py", lambda path: _write(path, text))
    module_spec = importlib.util.spec_from_file_location(f"fhopt_kernel_{_digest(stem)}", path)
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------- compiler


def find_compiler() -> str:
    """Path of the first C++ compiler on PATH. Raises CompileError."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise CompileError(f"No C++ compiler was found (looked for {', '.join(COMPILERS)}).")


def vector_unit() -> str:
    """What generated kernels compute with on this CPU, in words; it is settled when they are compiled."""
    try:
        compiler = find_compiler()
    except CompileError:
        return "plain torch operations, no C++ compiler was found"
    defined = _run([compiler, _native(compiler), "-dM", "-E", "-x", "c++", os.devnull]).stdout
    macros = {line.split()[1] for line in defined.splitlines() if line.startswith("#define ")}
    name = Path(compiler).name
    for needed, words in _UNITS:
        if needed <= macros:
            return f"{words}, compiled by {name}"
    return f"vectors of 4 floats, compiled by {name}"


# Macros of a compiler, and what the text of `cpp` does where they are defined.
_UNITS = (
    (
        {"__AVX512VNNI__", "__AVX512BW__", "__AVX512VL__", "__AVX512VBMI__"},
        "AVX-512 VNNI: products of bytes, and of 16 floats",
    ),
    ({"__AVX512F__"}, "AVX-512: products of 16 floats"),
    ({"__AVX2__"}, "AVX2: products of 8 floats"),
    ({"__ARM_NEON"}, "NEON: products of 4 floats"),
)


def _compile(compiler: list[str], text: str, library: Path, links: tuple[str, ...]) -> None:
    """Compile to `library` by the command `compiler`, and leave the text beside it. Raises CompileError."""
    source = library.with_suffix(".cpp")
    _write(source, text)
    with appearing(library) as target:
        command = [*compiler, str(source), "-o", str(target), *links]
        failed = _errors([*command, "-fopenmp"])
        if failed and _errors(command):  # without OpenMP the kernel runs on one thread
            lines = failed.strip().splitlines()
            said = next((line for line in lines if "error" in line), lines[0])
            raise CompileError(f"{compiler[0]} refused a generated file: {said}.")


def _errors(command: list[str]) -> str:
    """What the compiler said when it failed; empty when it did not."""
    done = _run(command)
    return (done.stderr or "no message") if done.returncode else ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler. Raises CompileError when it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be started ({error.strerror}).") from error


def _native(compiler: str) -> str:
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return "-mcpu=native" if arm else "-march=native"


@functools.cache
def _identity(compiler: str) -> str:
    """Which compiler and which CPU: code for one CPU may not run on another that shares the cache folder."""
    version = _run([compiler, "--version"]).stdout.partition("\n")[0]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    cpu = [line for line in dict.fromkeys(lines) if line.startswith(wanted)]
    return "\n".join([version, platform.machine(), platform.processor(), *cpu])


# --------------------------------------------------------------------------------------------------- files


def cached_file(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's file `name`, made by `make(path)` under a lock when it is not there yet."""
    try:
        return _found_or_made(cache_folder() / name, make)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        other = _temporary_folder()
        _warn_once(
            "cache",
            f"The kernel cache cannot be used ({error}); the kernels of this process go to {other} and are built "
            f"again next time. Set {CACHE_VARIABLE} to a folder that you, and nobody else, may write to.",
        )
    return _found_or_made(other / name, make)


def cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where generated files are kept: FHOPT_CACHE_DIR, or `fhopt` below XDG_CACHE_HOME, else ~/.cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fhopt"


def make_private(folder: Path) -> None:
    """Make `folder`, where it is not there, for this user alone. Raises PermissionError when others may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others may write to it", str(folder))


def _found_or_made(path: Path, make: Callable[[Path], None]) -> Path:
    make_private(path.parent)
    if path.exists():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():  # another process may have made it while this one waited
            make(path)
    return path


def _write(path: Path, text: str) -> None:
    with appearing(path) as target:
        target.write_text(text)


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fhopt-")  # removed when the process ends


def _temporary_folder() -> Path:
    return Path(_temporary_directory().name)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


_warned: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    """Warn once in a process, not once a kernel."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
