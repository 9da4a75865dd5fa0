"""Resources that a Triton kernel needs on a GPU, measured by compiling it on any machine.

    compile_kernels   text and arguments of kernels -> registers, spilled bytes, shared memory, instructions
    objection         the resource that a kernel needs and a GPU lacks
    occupancy         how many blocks of it a multiprocessor holds at once

Triton compiles for an absent GPU, down to machine code, but checks no limits: a kernel that spills, or needs more
shared memory than exists, compiles without a warning. Hence a table of limits.

Kernels are compiled in one separate process (compile_worker.py): Triton's interpreter and its compiler cannot share
one. Results are cached on disk by text, arguments, architecture and Triton version. A kernel that the compiler rejects
is a result with its message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhopt.codegen.gpu.gpus import Gpu
from fhopt.errors import FhoptError
from fhopt.files import appearing, read_file
from fhopt.system import cache_folder, cached_file

SECONDS = 120  # per kernel; most take one or two
_OWN_FILES = ("resources.py", "compile_worker.py", "machine_code.py")  # that results depend on
PARTITIONS = 4  # parts of a processor with separate registers and schedulers, for both vendors
REGISTER_UNIT = 8  # allocation granularity of a thread's registers
SHARED_UNIT = 128  # bytes
TENSOR_COLUMNS = 512  # of the memory of Blackwell's tensor cores


# --------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class CompileRequest:
    """One kernel to compile.

    text: the Python file that contains it. signature: type of each argument ("*bf16", "i32", "constexpr", ...).
    constexprs: their values, None for omitted tensors. attrs: known facts about arguments, by path: {(0,):
    [["tt.divisibility", 16]]}. options: num_warps, num_stages, ... texts: representations to return ("ttir", "ptx",
    "amdgcn", ...), as Triton names them.
    """

    text: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int, ...], Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    texts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Convert the fields to JSON types."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"attrs": [[list(path), known] for path, known in self.attrs.items()]}

    @staticmethod
    def from_json(x: Mapping[str, Any]) -> CompileRequest:
        """Create a request from the result of `as_json`."""
        return CompileRequest(**(dict(x) | {"attrs": {tuple(path): known for path, known in x["attrs"]}}))


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel; if the compiler rejected it, only `error` is set.

    registers: per thread. spilled: bytes per thread. shared: bytes per block. tensor_columns: of Blackwell's tensor
    memory. tensor_cores: matrix instructions in the machine code, by kind. The rest describes the innermost loops, per
    thread: instructions, global loads by size in bytes ("16": 4 is four of 16 bytes), and those that are asynchronous
    copies.
    """

    num_warps: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_columns: int = 0
    tensor_cores: Mapping[str, int] = field(default_factory=dict)
    loop_instructions: int = 0
    loop_reads: Mapping[str, int] = field(default_factory=dict)
    loop_copies: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def copied_share(self) -> float:
        """Share of the bytes loaded by the innermost loops that are asynchronous copies."""
        read, copied = (sum(int(n) * count for n, count in x.items()) for x in (self.loop_reads, self.loop_copies))
        return copied / read if read else 0.0


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps of one kernel that a processor holds at once; `limit` names the limiting resource."""

    blocks: int
    warps: int
    share: float  # of the warps it could hold
    limit: str


def objection(resources: Resources, gpu: Gpu) -> str:
    """Return why a kernel must not run on a GPU; "" if there is no reason."""
    threads = resources.num_warps * gpu.warp_size
    needed = _rounded_up(resources.registers, REGISTER_UNIT) * threads
    if resources.error:
        return f"does not compile: {resources.error}"
    if resources.spilled:
        return f"spills {resources.spilled} bytes per thread"
    if resources.shared > gpu.block_shared:
        return f"needs {resources.shared:,} bytes of shared memory; a block may have {gpu.block_shared:,}"
    if resources.tensor_columns > TENSOR_COLUMNS:
        return f"needs {resources.tensor_columns} columns of tensor memory; there are {TENSOR_COLUMNS}"
    if needed > gpu.registers:
        return f"needs {needed:,} registers; there are {gpu.registers:,}"
    return ""


def occupancy(resources: Resources, gpu: Gpu) -> Occupancy:
    """Compute how many blocks a processor holds at once (as CUDA's occupancy calculator; for AMD as LLVM)."""
    warp_registers = _rounded_up(max(1, resources.registers), REGISTER_UNIT) * gpu.warp_size
    by_registers = PARTITIONS * (gpu.registers // PARTITIONS // warp_registers) // resources.num_warps
    shared = _rounded_up(resources.shared, SHARED_UNIT) + gpu.reserved
    limits = {
        "registers": by_registers,
        "shared memory": gpu.processor_shared // shared if shared else gpu.blocks,
        "warps": gpu.warps // resources.num_warps,
        "blocks": gpu.blocks,
    }
    if resources.tensor_columns:
        limits["tensor memory"] = TENSOR_COLUMNS // resources.tensor_columns
    limit = min(limits, key=lambda name: limits[name])
    warps = limits[limit] * resources.num_warps
    return Occupancy(limits[limit], warps, warps / gpu.warps, limit)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# --------------------------------------------------------------------------------------------------- compilation


def compile_kernels(
    requests: Sequence[CompileRequest], gpu: Gpu, progress: Callable[[int, int], None] = lambda *_: None
) -> list[Resources]:
    """Compile kernels for `gpu`, unless they are in the file cache, and return their resources in order.

    Missing ones are compiled in one process. progress: called with the number done and the total. Raises FhoptError
    without Triton.
    """
    version = triton_version()
    names = [_file_name(request, gpu, version) for request in requests]
    results = {name: kept for name in names if (kept := _kept(name)) is not None}
    missing = {name: request for name, request in zip(names, requests, strict=True) if name not in results}
    total = len(missing)
    while missing:
        complaint = ""
        for result in _compile(list(missing.values()), gpu):
            if isinstance(result, str):
                complaint = result
                break
            name = next(iter(missing))
            del missing[name]
            results[name] = result
            cached_file(name, functools.partial(_keep, result))
            progress(total - len(missing), total)
        if missing:  # the process ended at the next one: do not cache this
            name = next(iter(missing))
            del missing[name]
            results[name] = Resources(error=complaint)
    return [results[name] for name in names]


@functools.cache
def triton_version() -> str:
    """Return the version of Triton without importing it. Raises FhoptError if it is not installed."""
    module = importlib.util.find_spec("triton")
    if module is None or module.origin is None:
        raise FhoptError(
            "Triton is not installed; checking GPU kernels requires it. Install it with: pip install "
            "'triton>=3.6' (wheels exist for Linux)."
        )
    version = re.search(r"""^__version__ = ['"](.+?)['"]""", Path(module.origin).read_text(), re.MULTILINE)
    return version[1] if version else "unknown"


def _file_name(request: CompileRequest, gpu: Gpu, version: str) -> str:
    """Return the cache file name of a kernel's resources, by everything they depend on."""
    parts = [repr(gpu.arch), version, json.dumps(request.as_json(), sort_keys=True)]
    parts += [Path(__file__).with_name(name).read_text() for name in _OWN_FILES]
    for name in sorted(set(re.findall(r"^from fhopt\.codegen\.([\w.]+) import", request.text, re.MULTILINE))):
        file = Path(__file__).parents[1] / f"{name.replace('.', '/')}.py"
        parts.append(file.read_text())  # functions that the kernel may call
    return f"{request.kernel}-{gpu.arch}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def _kept(name: str) -> Resources | None:
    try:
        return Resources(**json.loads(read_file(cache_folder() / name)))
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        FhoptError,
    ):
        return None  # missing or damaged; no home folder is a RuntimeError


def _keep(resources: Resources, path: Path) -> None:
    with appearing(path) as target:
        target.write_text(json.dumps(dataclasses.asdict(resources), indent=1))


def _compile(requests: Sequence[CompileRequest], gpu: Gpu) -> Iterator[Resources | str]:
    """Yield results of the requests in order; if the process ends early, finally the reason."""
    target = {"backend": gpu.backend, "arch": gpu.arch, "warp_size": gpu.warp_size}
    order = json.dumps({"target": target, "requests": [request.as_json() for request in requests]})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    command = [sys.executable, "-m", "fhopt.codegen.gpu.compile_worker"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        limit = SECONDS * (1 + len(requests))
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died before it had read everything
                process.stdin.write(order)
                process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # complete
                    yield Resources(**json.loads(line))
            process.wait()
            errors.seek(0)
            died = f"the compiler crashed: {_last_line(errors.read())}"
            yield died if timer.is_alive() else f"took more than {limit} seconds"
        finally:
            timer.cancel()
            process.kill()
            process.wait()


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"
