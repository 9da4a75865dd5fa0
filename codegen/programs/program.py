"""Segments of decode programs, and the C++ file that executes them.

In eager mode, a layer of a small model spends more time between its matmuls than in them: about 60 torch operations of
a few microseconds each, and a Python call per module. As instructions the same arithmetic costs a twentieth of that.
A segment is data: equal layers share it, and nothing is compiled per model.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fhopt.codegen.cpu import skinny_linear
from fhopt.codegen.cpu.calls.caches import PackedInstruction, ProgramRun
from fhopt.codegen.cpu.library import CppLibrary


@dataclass(frozen=True)
class Stored:
    """A tensor that a segment writes: its index among the externals; dense, of this shape and type."""

    external: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class SegmentProgram:
    """Instructions as C++ reads them. Externals are the segment's inputs, followed by the tensors that it writes.

    sources: of each instruction, the name of the fx node that it computes. arena: floats that a run needs. externals:
    their count.
    """

    instructions: ctypes.Array[PackedInstruction]
    sources: tuple[str, ...]
    stored: tuple[Stored, ...]
    arena: int
    externals: int


class Functions(NamedTuple):
    """Compiled functions; skinny_group: an address. `are_held` runs with the GIL, if there is one."""

    run_segment: Any
    run_decode_steps: Any
    are_held: Any
    skinny_group: int


@functools.cache
def functions() -> Functions | None:
    """Return the functions of the libraries; None if they cannot be compiled."""
    library, few = LIBRARY.load(), skinny_linear.LIBRARY.load()
    if library is None or few is None:
        return None
    group = ctypes.cast(few.skinny_group, ctypes.c_void_p).value
    assert group is not None
    checks = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, *(ctypes.c_void_p, ctypes.c_int64) * 2)
    return Functions(library.run_segment, library.run_decode_steps, checks(("are_held", library)), group)


def is_built() -> bool:
    """Build the libraries, and return whether that succeeded."""
    return functions() is not None


def compiles_programs() -> bool:
    """Return whether `is_built` runs a compiler, which takes seconds; it does once per machine."""
    return LIBRARY.compiles() or skinny_linear.LIBRARY.compiles()


@dataclass(frozen=True, eq=False)
class SegmentCall:
    """A segment with its externals: an array of the addresses of tensors, which must be alive when it runs."""

    program: SegmentProgram
    externals: ctypes.Array[ctypes.c_int64]


def run_segment(call: SegmentCall, threads: int) -> None:
    """Run one segment."""
    compiled = functions()
    assert compiled is not None
    compiled.run_segment(ctypes.byref(run_of(call, threads)))


def run_of(call: SegmentCall | None, threads: int) -> ProgramRun:
    """Return the C++ struct that runs a segment; None: the one that runs nothing."""
    compiled = functions()
    assert compiled is not None
    if call is None:
        return ProgramRun(instructions=0, count=0, arena=0, threads=threads, externals=0, skinny=compiled.skinny_group)
    instructions = call.program.instructions
    return ProgramRun(
        instructions=ctypes.addressof(instructions), count=len(instructions), arena=call.program.arena,
        threads=threads, externals=ctypes.addressof(call.externals), skinny=compiled.skinny_group,
    )  # fmt: skip


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    library.run_segment.argtypes, library.run_segment.restype = (ctypes.c_void_p,), None
    library.run_decode_steps.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.run_decode_steps.restype = None
    return library


LIBRARY = CppLibrary("decode", "decode_program.cpp", _bind, "Decode steps run operation by operation, which is slower.")
