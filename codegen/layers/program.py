"""Layer programs of decoder layers, and the C++ file that executes them.

In eager mode, a layer of a small model spends more time between its matmuls than in them: about 60 torch operations of
a few microseconds each, and a Python call per module. As a layer program the same arithmetic costs a twentieth of that.
A layer program is data: layers with equal traces share it, and nothing is compiled per model.
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
class ProgramSegment:
    """Instructions up to an attention or to the end, as C++ reads them, and the tensors that they write."""

    instructions: ctypes.Array[PackedInstruction]
    stored: tuple[Stored, ...]


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """A lowered trace. Externals are numbered like the trace's values, followed by the tensors that segments write.

    arena: floats that a run needs. externals: their count. read: numbers of the loaded values.
    """

    segments: tuple[ProgramSegment, ...]
    arena: int
    externals: int
    read: frozenset[int]


class Functions(NamedTuple):
    """Compiled functions; skinny_group: an address. `are_held` runs with the GIL, if there is one."""

    run_layer: Any
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
    return Functions(library.run_layer, library.run_decode_steps, checks(("are_held", library)), group)


def is_built() -> bool:
    """Build the libraries, and return whether that succeeded."""
    return functions() is not None


def compiles_layers() -> bool:
    """Return whether `is_built` runs a compiler, which takes seconds; it does once per machine."""
    return LIBRARY.compiles() or skinny_linear.LIBRARY.compiles()


def run_segment(program: LayerProgram, number: int, externals: Any, address: int, threads: int) -> None:
    """Run one segment. externals: array of addresses, at `address`, of tensors that must be alive."""
    compiled = functions()
    assert compiled is not None
    compiled.run_layer(ctypes.byref(run_of(program, number, address, threads)))


def run_of(program: LayerProgram, number: int, address: int, threads: int) -> ProgramRun:
    """Return the C++ struct that runs a segment. externals: at `address`, as for `run_segment`."""
    compiled, segment = functions(), program.segments[number]
    assert compiled is not None
    return ProgramRun(
        instructions=ctypes.addressof(segment.instructions), count=len(segment.instructions), arena=program.arena,
        threads=threads, externals=address, skinny=compiled.skinny_group,
    )  # fmt: skip


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    library.run_layer.argtypes, library.run_layer.restype = (ctypes.c_void_p,), None
    library.run_decode_steps.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.run_decode_steps.restype = None
    return library


LIBRARY = CppLibrary("layer", "layer_program.cpp", _bind, "Layers run operation by operation, which is slower.")
