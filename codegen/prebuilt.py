"""Prebuilt C++ libraries, in a wheel or an editable install: a folder for each class of CPUs.

    prebuilt/TARGET/NAME-DIGEST.so      digest: of text and flags, so that files of other sources are never loaded

The best target whose instructions this CPU has is used; libraries that it lacks are compiled at first use. FHOPT_ISA
disables prebuilt libraries. `build_prebuilt.py` writes the folder.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from fhopt.codegen.compiler import (
    AMX,
    AVX2,
    AVX2_VNNI,
    AVX512_VNNI,
    FLAGS,
    ISA_VARIABLE,
    NEON,
)  # fmt: skip
from fhopt.system import reported, text_digest

FOLDER = Path(__file__).resolve().parent / "prebuilt"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CpuTarget:
    """A class of CPUs. machine: as `platform.machine()`. flags: of GCC and Clang. cpu: flags in /proc/cpuinfo.

    unit: the vector instructions that kernels use.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    cpu: frozenset[str]
    unit: str

    def file_name(self, name: str, text: str, flags: tuple[str, ...]) -> str:
        """Return the name of a library in the folder of the target."""
        return f"{name}-{text_digest(text, *FLAGS, *flags, *self.flags)}.so"


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_VBMI = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"])
_BF16 = _VBMI | {"avx512_bf16"}
_VBMI_FLAGS = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi")
_BF16_FLAGS = (*_VBMI_FLAGS, "-mavx512bf16")
TARGETS = (  # for each machine, the fastest first
    CpuTarget(
        "x86-64-amx", "x86_64", (*_BF16_FLAGS, "-mamx-tile", "-mamx-bf16"), _BF16 | {"amx_tile", "amx_bf16"}, AMX
    ),
    CpuTarget("x86-64-v4-bf16", "x86_64", _BF16_FLAGS, _BF16, AVX512_VNNI),
    CpuTarget("x86-64-v4-vbmi", "x86_64", _VBMI_FLAGS, _VBMI, AVX512_VNNI),
    CpuTarget("x86-64-v3-vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}, AVX2_VNNI),
    CpuTarget("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3, AVX2),
    CpuTarget("aarch64-dotprod", "aarch64", ("-march=armv8.2-a+dotprod",), frozenset({"asimd", "asimddp"}), NEON),
    CpuTarget("aarch64", "aarch64", ("-march=armv8-a",), frozenset({"asimd"}), NEON),
)  # fmt: skip


def best_target(folder: Path | None = None) -> CpuTarget | None:
    """Return the fastest target that this CPU can run; None if there is none. folder: only targets that it contains."""
    known = set((reported("flags") or reported("Features")).split())
    fitting = (target for target in TARGETS if target.machine == platform.machine() and target.cpu <= known)
    return next((target for target in fitting if folder is None or (folder / target.name).is_dir()), None)


@functools.cache
def _target_in(folder: Path) -> CpuTarget | None:
    return best_target(folder)


def prebuilt_target(name: str, text: str, flags: tuple[str, ...]) -> CpuTarget | None:
    """Return the target whose prebuilt library `load_prebuilt` loads; None without one."""
    target = None if os.environ.get(ISA_VARIABLE) else _target_in(FOLDER)
    if target is None or not (FOLDER / target.name / target.file_name(name, text, flags)).is_file():
        return None
    return target


def load_prebuilt(name: str, text: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """Load the prebuilt library of the C++ file `text`; None without one, or if this system cannot load it."""
    target = prebuilt_target(name, text, flags)
    if target is None:
        return None
    try:
        return ctypes.CDLL(str(FOLDER / target.name / target.file_name(name, text, flags)))
    except OSError as error:  # an older C library
        log.warning("The prebuilt library %s of %s cannot be loaded (%s).", name, target.name, error)
        return None
