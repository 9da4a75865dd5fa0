"""Measured rates of this machine's CPU: the device called "here" in every command.

    read      sum of a vector larger than all caches      bytes read / seconds
    copy      one such vector to another                  bytes read and written / seconds
    float32   matmul of two square matrices by torch      operations / seconds
    bfloat16  matmul of two square matrices by torch      operations / seconds

Each is the fastest of repeated runs, because other load only slows runs down. Results are cached in the cache folder
(FHOPT_CACHE_DIR), one file per CPU, torch version and number of threads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from fhopt.errors import FhoptError
from fhopt.files import appearing, read_file
from fhopt.system import cache_folder, cores, make_private, memory_bytes, multiplies_by_loops, reported

VECTOR = 1 << 26  # float32 elements: 256 MB, more than caches hold
SIDE = 1536  # of square matrices: they fit into the L2 cache, and take some milliseconds
SECONDS = 0.6  # per measurement


@dataclass(frozen=True)
class CpuRates:
    """Rates of `threads` threads. GB/s are 10^9 bytes, TFLOP/s 10^12 operations, two for a multiply-add."""

    cpu: str
    threads: int
    read_gb_s: float
    copy_gb_s: float
    float32_tflops: float
    bfloat16_tflops: float
    memory_gb: float


@functools.cache
def measured(threads: int) -> CpuRates:
    """Return the rates of this CPU from the cache folder; measures them, in about 3 seconds, if they are missing."""
    path = cache_folder() / f"machine-{_digest(threads)}.json"
    try:
        return CpuRates(**json.loads(read_file(path)))
    except (OSError, ValueError, TypeError, RecursionError, FhoptError):  # missing, damaged, or of another version
        return measure_cpu(threads)


def measure_cpu(threads: int) -> CpuRates:
    """Measure the rates of this CPU, and cache them if the cache folder is writable."""
    rates = CpuRates(
        cpu=cpu_name(),
        threads=threads,
        read_gb_s=round(measure_read(threads), 1),
        copy_gb_s=round(measure_copy(threads), 1),
        float32_tflops=round(measure_products(threads, torch.float32), 3),
        bfloat16_tflops=round(measure_products(threads, torch.bfloat16), 3),
        memory_gb=round(memory_bytes()[0] / 1e9, 1),
    )
    path = cache_folder() / f"machine-{_digest(threads)}.json"
    try:
        make_private(path.parent)
        with appearing(path) as target:
            target.write_text(json.dumps(asdict(rates)) + "\n", encoding="utf-8")
    except OSError:
        pass  # measured again next time
    measured.cache_clear()
    return rates


# --------------------------------------------------------------------------------------------------- measurements


def measure_read(threads: int) -> float:
    """Measure memory read bandwidth in GB/s."""
    x = torch.ones(VECTOR)
    return _size(x) / _shortest(threads, lambda: x.sum()) / 1e9


def measure_copy(threads: int) -> float:
    """Measure memory copy bandwidth in GB/s: bytes read plus bytes written."""
    x, y = torch.ones(VECTOR), torch.zeros(VECTOR)
    return 2 * _size(x) / _shortest(threads, lambda: y.copy_(x)) / 1e9


def measure_products(threads: int, dtype: torch.dtype) -> float:
    """Measure matmul throughput in TFLOP/s."""
    x, y = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / _shortest(threads, lambda: torch.mm(x, y)) / 1e12


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _shortest(threads: int, call: Callable[[], object]) -> float:
    """Return the seconds of the fastest call out of those that fit into SECONDS, at least five."""
    times: list[float] = []
    with torch_threads(threads):
        call()
        end = time.perf_counter() + SECONDS
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- which machine


def cpu_name() -> str:
    """Return the name of the CPU as the system reports it."""
    return reported("model name") or platform.processor() or platform.machine()


def vector_units() -> tuple[str, ...]:
    """Return the CPU's vector units that kernels can use, as the system reports them; empty if it does not."""
    known = set((reported("flags") or reported("Features")).split())
    return tuple(words for flag, words in _UNITS.items() if flag in known)


def closest_cpu() -> str:
    """Return the CPU in the device table whose kernels use the same instructions on quantized values as this one's."""
    return "cpu" if {"AVX-512 VNNI", "AVX-512 VBMI"} <= set(vector_units()) else "cpu-avx2"


_UNITS = {  # flags of /proc/cpuinfo
    "avx2": "AVX2", "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx512vbmi": "AVX-512 VBMI",
    "avx512_bf16": "AVX-512 BF16", "amx_int8": "AMX INT8", "amx_bf16": "AMX BF16",
    "asimd": "NEON", "asimddp": "NEON DotProd", "i8mm": "NEON I8MM", "bf16": "NEON BF16", "sve": "SVE",
}  # fmt: skip


def multiplies_bfloat16() -> bool:
    """Return whether torch runs bfloat16 matmuls with native instructions of this CPU: x86-64, by its flags.

    They then take half the time of float32 (Zen 5, oneDNN), otherwise more. Other architectures were not measured.
    """
    has_them = bool({"avx512_bf16", "amx_bf16"} & set(reported("flags").split()))
    return has_them and not multiplies_by_loops(torch.bfloat16)


def _digest(threads: int) -> str:
    about = (cpu_name(), platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, cores())
    return hashlib.sha256(repr((*about, threads)).encode()).hexdigest()[:12]
