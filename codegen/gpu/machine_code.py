"""Registers, spills, instructions and global loads of a compiled Triton kernel, from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fhopt.codegen.gpu.resources import Resources

# Matrix instructions in PTX and AMD assembly; global loads in SASS and AMD assembly.
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
SHORTEST_LOOP = 8  # instructions; shorter loops are waits


def read_resources(compiled: Any, texts: Sequence[str] = ()) -> Resources:
    """Return the resources of a compiled kernel (`triton.compiler.CompiledKernel`), without a driver."""
    if "cubin" in compiled.asm:
        text = compiled.asm["ptx"]
        listing = _disassembled(compiled.asm["cubin"])
        registers, spilled = _numbers(listing, r"REG:(\d+)", r"STACK:(\d+)")  # Triton puts nothing else on the stack
        loop = _cuda_loop(listing)
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


def _size(instruction: str) -> int:
    """Return the bytes per thread that an instruction loads: 4 unless it says otherwise."""
    return next((_SIZES[word] for word in re.split(r"[._]", instruction) if word in _SIZES), 4)


def _counted(sizes: Iterable[int]) -> dict[str, int]:
    return {str(size): count for size, count in sorted(Counter(sizes).items())}


def _numbers(text: str, *patterns: str) -> list[int]:
    matches = [re.search(pattern, text) for pattern in patterns]
    assert all(matches), text[:200]
    return [int(match[1]) for match in matches if match]


def _disassembled(cubin: bytes) -> str:
    """Disassemble machine code with Triton's bundled tool: registers, then instructions."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuda_loop(text: str) -> list[str]:
    """Return the instructions of the innermost loops of SASS: `/*00a0*/ @P0 BRA 0x10 ;`."""
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
    places = {int(address, 16): i for i, (address, _) in enumerate(instructions)}
    targets, ends = dict[int, int](), set[int]()
    for i, (_, line) in enumerate(instructions):
        branch = re.search(r"\bBRA\S*.*\b(0x[0-9a-f]+)", line)
        if branch and int(branch[1], 16) in places:
            targets[i] = places[int(branch[1], 16)]
        if re.match(r"(BRA\s+0x|EXIT|RET)", line):
            ends.add(i)
    return _innermost([line for _, line in instructions], targets, ends)


def _amd_loop(text: str) -> list[str]:
    """Return the instructions of the innermost loops of AMD assembly, which has labels: `s_cbranch_scc1 .LBB0_2`."""
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
    """Return the lines of innermost loops. targets: of branches; ends: lines without fall-through.

    A loop is a strongly connected set of lines; inner loops are such sets without its first line.
    """
    import networkx

    graph = networkx.DiGraph(targets.items())
    graph.add_edges_from((i, i + 1) for i in range(len(lines) - 1) if i not in ends)
    innermost: set[int] = set()
    left: list[tuple[Collection[int], Collection[int]]] = [((), graph.nodes)]  # a loop, and the lines to search
    while left:
        loop, within = left.pop()
        parts = [set(part) for part in networkx.strongly_connected_components(graph.subgraph(within))]
        loops = [part for part in parts if len(part) >= SHORTEST_LOOP]
        left += [(part, part - {min(part)}) for part in loops]
        if not loops:
            innermost |= set(loop)
    return [lines[i] for i in sorted(innermost)]
