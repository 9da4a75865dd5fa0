"""What a Triton kernel needs of a GPU, found by compiling it on a machine that has none.

    compile_kernels   text and arguments of kernels -> registers, spilled bytes, shared memory, instructions
    objection, fits   does a GPU have what a kernel needs
    occupancy         how many blocks of it a multiprocessor holds at once

Triton compiles for a GPU that is not there, down to machine code, but checks no limits: a kernel that spills, or asks
for more shared memory than exists, comes out without a word. Hence a table of limits.

Kernels are compiled in one process of their own, `python -m fhopt.codegen.gpu`: Triton's interpreter and its compiler
cannot share one. What was found is kept in the file cache (build.py) by text, arguments, architecture and version of
Triton. A kernel that the compiler refuses is a result with its message.
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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhopt.codegen.build import cache_folder, cached_file
from fhopt.errors import FhoptError
from fhopt.files import appearing

SECONDS = 120  # for one kernel; most take one or two


# --------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU as the compiler's output meets them. A processor: an SM of NVIDIA, a CU of AMD."""

    name: str  # as in fhopt.cost.DEVICES
    arch: int | str  # compute capability without its point; AMD: "gfx942"
    processors: int
    block_shared: int  # bytes that a block may ask for
    processor_shared: int  # bytes; each block takes `reserved` beside what it asks for
    registers: int  # of 32 bits, of a processor
    warps: int  # resident in a processor at most
    blocks: int
    warp_size: int = 32
    reserved: int = 1024

    @property
    def backend(self) -> str:
        """Triton's name for the vendor."""
        return "cuda" if isinstance(self.arch, int) else "hip"


_K = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; numbers of SMs: data sheets.
_CC80: dict[str, Any] = dict(block_shared=163 * _K, processor_shared=164 * _K, registers=64 * _K, warps=64, blocks=32)
_CC86: dict[str, Any] = dict(block_shared=99 * _K, processor_shared=100 * _K, registers=64 * _K, warps=48, blocks=16)
_CC87: dict[str, Any] = dict(block_shared=163 * _K, processor_shared=164 * _K, registers=64 * _K, warps=48, blocks=16)
_CC89: dict[str, Any] = dict(block_shared=99 * _K, processor_shared=100 * _K, registers=64 * _K, warps=48, blocks=24)
_CC90: dict[str, Any] = dict(block_shared=227 * _K, processor_shared=228 * _K, registers=64 * _K, warps=64, blocks=32)
# AMD CDNA 3 ISA reference and LLVM's "User Guide for AMDGPU": 4 SIMDs a CU, each 512 registers of 64 lanes and 8 waves.
_CDNA3: dict[str, Any] = dict(
    block_shared=64 * _K,
    processor_shared=64 * _K,
    registers=4 * 512 * 64,
    warps=32,
    blocks=16,
    warp_size=64,
    reserved=0,
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 90, 132, **_CC90),  # SXM5
        Gpu("h200", 90, 132, **_CC90),
        Gpu("a100-80", 80, 108, **_CC80),
        Gpu("a10", 86, 72, **_CC86),
        Gpu("l4", 89, 58, **_CC89),
        Gpu("4090", 89, 128, **_CC89),
        Gpu("b200", 100, 148, **_CC90),  # 10.0 has the limits of 9.0
        Gpu("mi300x", "gfx942", 304, **_CDNA3),
        Gpu("edge", 87, 16, **_CC87),  # Jetson AGX Orin
    )
}
PARTITIONS = 4  # parts of a processor that have registers and a scheduler of their own, of both vendors
REGISTER_UNIT = 8  # a thread's registers are handed out so many at a time
SHARED_UNIT = 128  # bytes
TENSOR_COLUMNS = 512  # of the memory of Blackwell's tensor cores


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises FhoptError, listing the names."""
    if name not in GPUS:
        raise FhoptError(f"no kernels are compiled for {name!r}; expected one of {', '.join(GPUS)}.")
    return GPUS[name]


# --------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Request:
    """One kernel to compile.

    text: of the Python file that has it. signature: type of each argument ("*bf16", "i32", "constexpr", ...).
    constexprs: values of those, None for tensors that are not given. attrs: what is known of arguments, by path:
    {(0,): [["tt.divisibility", 16]]}. options: num_warps, num_stages, ... texts: forms to hand back ("ttir", "ptx",
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
        """The fields, with keys that JSON has."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"attrs": [[list(path), known] for path, known in self.attrs.items()]}

    @staticmethod
    def from_json(x: Mapping[str, Any]) -> Request:
        """Inverse of `as_json`."""
        return Request(**(dict(x) | {"attrs": {tuple(path): known for path, known in x["attrs"]}}))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs; where the compiler refused it, `error` alone says something.

    registers: of a thread. spilled: bytes of a thread that did not find a register. shared: bytes of a block.
    tensor_columns: of the tensor memory of Blackwell. tensor_cores: matrix instructions in the text of the machine code
    by kind. The rest is of the innermost loops, per thread: instructions, reads of global memory by how many bytes they
    take ("16": 4 is four of 16 bytes), and which of these are copies that run ahead of their use.
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
        """Of the bytes that the innermost loops read, those that are copied ahead of their use."""
        read, copied = (sum(int(n) * count for n, count in x.items()) for x in (self.loop_reads, self.loop_copies))
        return copied / read if read else 0.0


@dataclass(frozen=True)
class Occupancy:
    """What a processor holds at once of one kernel; `limit` names what there is no more of."""

    blocks: int
    warps: int
    share: float  # of the warps it could hold
    limit: str


def objection(resources: Resources, gpu: Gpu) -> str:
    """Why a kernel shall not run on a GPU, in words; empty where nothing speaks against it."""
    threads = resources.num_warps * gpu.warp_size
    needed = _rounded_up(resources.registers, REGISTER_UNIT) * threads
    if resources.error:
        return f"does not compile: {resources.error}"
    if resources.spilled:
        return f"spills {resources.spilled} bytes a thread"
    if resources.shared > gpu.block_shared:
        return f"needs {resources.shared:,} bytes of shared memory, a block may have {gpu.block_shared:,}"
    if resources.tensor_columns > TENSOR_COLUMNS:
        return f"needs {resources.tensor_columns} columns of tensor memory, there are {TENSOR_COLUMNS}"
    if needed > gpu.registers:
        return f"needs {needed:,} registers, there are {gpu.registers:,}"
    return ""


def fits(resources: Resources, gpu: Gpu) -> bool:
    """True when the kernel compiled, spills nothing and stays within the limits of the GPU."""
    return not objection(resources, gpu)


def occupancy(resources: Resources, gpu: Gpu) -> Occupancy:
    """How many blocks of a kernel a processor holds at once (CUDA's occupancy calculator; LLVM's for AMD)."""
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


# --------------------------------------------------------------------------------------------------- compiling


def compile_kernels(
    requests: Sequence[Request], gpu: Gpu, progress: Callable[[int, int], None] = lambda *_: None
) -> list[Resources]:
    """What each kernel needs on `gpu`, in order: from the file cache, the others compiled in one process.

    progress: told how many are done, and of how many. Raises FhoptError where there is no Triton.
    """
    version = triton_version()
    names = [_file_name(request, gpu, version) for request in requests]
    found = {name: kept for name in names if (kept := _kept(name)) is not None}
    missing = {name: request for name, request in zip(names, requests, strict=True) if name not in found}
    total = len(missing)
    while missing:
        complaint = ""
        for result in _compile(list(missing.values()), gpu):
            if isinstance(result, str):
                complaint = result
                break
            name = next(iter(missing))
            del missing[name]
            found[name] = result
            cached_file(name, functools.partial(_keep, result))
            progress(total - len(missing), total)
        if missing:  # the process ended with the next one: not a thing to remember
            name = next(iter(missing))
            del missing[name]
            found[name] = Resources(error=complaint)
    return [found[name] for name in names]


@functools.cache
def triton_version() -> str:
    """The version of Triton, which is not imported for it. Raises FhoptError where there is none."""
    module = importlib.util.find_spec("triton")
    if module is None or module.origin is None:
        raise FhoptError(
            "kernels for GPUs are checked by compiling them, and Triton is not installed. Install it: pip install "
            "'triton>=3.6' (there are wheels for Linux)."
        )
    found = re.search(r"""^__version__ = ['"](.+?)['"]""", Path(module.origin).read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def _file_name(request: Request, gpu: Gpu, version: str) -> str:
    """Where in the cache the resources of a kernel are; it depends on all that they depend on."""
    parts = [repr(gpu.arch), version, json.dumps(request.as_json(), sort_keys=True), Path(__file__).read_text()]
    for name in sorted(set(re.findall(r"^from fhopt\.codegen\.(\w+) import", request.text, re.MULTILINE))):
        parts.append(Path(__file__).with_name(f"{name}.py").read_text())  # functions that the kernel may call
    return f"{request.kernel}-{gpu.arch}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def _kept(name: str) -> Resources | None:
    try:
        return Resources(**json.loads((cache_folder() / name).read_bytes()))
    except (OSError, ValueError, TypeError, RuntimeError):  # not there, or damaged; no home folder is a RuntimeError
        return None


def _keep(resources: Resources, path: Path) -> None:
    with appearing(path) as target:
        target.write_text(json.dumps(dataclasses.asdict(resources), indent=1))


def _compile(requests: Sequence[Request], gpu: Gpu) -> Iterator[Resources | str]:
    """Results of the requests as they come; where the process ends before its time, at last why."""
    target = {"backend": gpu.backend, "arch": gpu.arch, "warp_size": gpu.warp_size}
    order = json.dumps({"target": target, "requests": [request.as_json() for request in requests]})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    command = [sys.executable, "-m", "fhopt.codegen.gpu"]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True, env=environment
        )
        limit = SECONDS * (1 + len(requests))
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died before it had read all
                process.stdin.write(order)
                process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # whole
                    yield Resources(**json.loads(line))
            process.wait()
            told.seek(0)
            yield f"the compiler died: {_last_line(told.read())}" if timer.is_alive() else f"took over {limit} seconds"
        finally:
            timer.cancel()
            process.kill()
            process.wait()


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"


# --------------------------------------------------------------------------------------------------- the process


def main() -> None:
    """Read an order from standard input, compile, and write a line for each kernel to standard output."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Triton and its tools print is no result
    order = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="fhopt-") as folder:
        for i, fields in enumerate(order["requests"]):
            resources = _resources(Request.from_json(fields), order["target"], Path(folder) / f"kernel{i}.py")
            print(json.dumps(dataclasses.asdict(resources)), file=results, flush=True)


def _resources(request: Request, target: Mapping[str, Any], path: Path) -> Resources:
    """Compile one kernel, whose file is written to `path`."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        path.write_text(request.text)  # Triton reads the source of functions from their file
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None and module_spec.loader is not None, path
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        source = triton.compiler.ASTSource(
            getattr(module, request.kernel), dict(request.signature), dict(request.constexprs), dict(request.attrs)
        )
        compiled = triton.compile(source, target=GPUTarget(**target), options=dict(request.options))
        return read_resources(compiled, request.texts)
    except Exception as error:  # a compiler fails in many ways, all of them are its answer
        return Resources(error=_message(error))


def _message(error: Exception) -> str:
    """An exception on one line."""
    told = error.__cause__ or error
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return f"{type(told).__name__}: {lines[-1] if lines else 'no message'}"


def read_resources(compiled: Any, texts: Sequence[str] = ()) -> Resources:
    """What a compiled kernel (`triton.compiler.CompiledKernel`) needs, without a driver."""
    if "cubin" in compiled.asm:
        text = compiled.asm["ptx"]
        told = _disassembled(compiled.asm["cubin"])
        registers, spilled = _numbers(told, r"REG:(\d+)", r"STACK:(\d+)")  # Triton puts nothing else on the stack
        loop = _cuda_loop(told)
    else:
        text = compiled.asm["amdgcn"]
        registers, spilled = _numbers(text, r"\.vgpr_count:\s*(\d+)", r"\.private_segment_fixed_size:\s*(\d+)")
        loop = _amd_loop(text)
    reads = [(read.group(), _size(read.group())) for read in map(_READ.search, loop) if read]
    return Resources(
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_cores=dict(sorted(Counter(_MATRIX.findall(text)).items())),
        loop_instructions=len(loop),
        loop_reads=_counted(size for _, size in reads),
        loop_copies=_counted(size for name, size in reads if name.startswith("LDGSTS")),
        texts={name: compiled.asm[name] for name in texts},
    )


# Matrix instructions as PTX and the assembler of AMD write them; those that read global memory as SASS and that do.
_MATRIX = re.compile(r"(?<![\w.])(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_smfmac|v_wmma)(?=[._])")
_READ = re.compile(r"\bLDG(?:STS)?\.E\S*|\b(?:global|buffer)_load_\w+")
_SIZES = {
    "U8": 1,
    "S8": 1,
    "U16": 2,
    "S16": 2,
    "64": 8,
    "128": 16,
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}
SHORTEST_LOOP = 8  # instructions; shorter ones wait for something


def _size(instruction: str) -> int:
    """Bytes of a thread that an instruction reads: 4 unless it says otherwise."""
    return next((_SIZES[word] for word in re.split(r"[._]", instruction) if word in _SIZES), 4)


def _counted(sizes: Iterable[int]) -> dict[str, int]:
    return {str(size): count for size, count in sorted(Counter(sizes).items())}


def _numbers(text: str, *patterns: str) -> list[int]:
    found = [re.search(pattern, text) for pattern in patterns]
    assert all(found), text[:200]
    return [int(match[1]) for match in found if match]


def _disassembled(cubin: bytes) -> str:
    """What the tool beside Triton tells of machine code: registers, then instructions."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuda_loop(text: str) -> list[str]:
    """Instructions of the innermost loops of SASS: `/*00a0*/ @P0 BRA 0x10 ;`."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
    places = {int(address, 16): i for i, (address, _) in enumerate(found)}
    targets, ends = dict[int, int](), set[int]()
    for i, (_, line) in enumerate(found):
        branch = re.search(r"\bBRA\S*.*\b(0x[0-9a-f]+)", line)
        if branch and int(branch[1], 16) in places:
            targets[i] = places[int(branch[1], 16)]
        if re.match(r"(BRA\s+0x|EXIT|RET)", line):
            ends.add(i)
    return _innermost([line for _, line in found], targets, ends)


def _amd_loop(text: str) -> list[str]:
    """The same of AMD's assembler, which has labels: `s_cbranch_scc1 .LBB0_2`."""
    lines, labels = list[str](), dict[str, int]()
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s+[a-z]", line):
            lines.append(line)
    branches = {i: re.search(r"\bs_c?branch\w*\s+(\.LBB\w+)", line) for i, line in enumerate(lines)}
    targets = {i: labels[branch[1]] for i, branch in branches.items() if branch}
    ends = {i for i, line in enumerate(lines) if re.search(r"\b(s_branch|s_endpgm)\b", line)}
    return _innermost(lines, targets, ends)


def _innermost(lines: Sequence[str], targets: Mapping[int, int], ends: Collection[int]) -> list[str]:
    """The lines of all loops without loops within. targets: of branches; ends: lines that the next does not follow.

    A loop is a set of lines each of which leads to each; those within are such sets without its first line.
    """
    import networkx

    graph = networkx.DiGraph(targets.items())
    graph.add_edges_from((i, i + 1) for i in range(len(lines) - 1) if i not in ends)
    found: set[int] = set()
    left: list[tuple[Collection[int], Collection[int]]] = [((), graph.nodes)]  # a loop, and what to look for loops in
    while left:
        loop, within = left.pop()
        parts = [set(part) for part in networkx.strongly_connected_components(graph.subgraph(within))]
        loops = [part for part in parts if len(part) >= SHORTEST_LOOP]
        left += [(part, part - {min(part)}) for part in loops]
        if not loops:
            found |= set(loop)
    return [lines[i] for i in sorted(found)]


if __name__ == "__main__":
    main()
