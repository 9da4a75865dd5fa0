"""Limits of the GPUs that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fhopt.errors import FhoptError


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU for compiled kernels. A processor is an SM of NVIDIA or a CU of AMD."""

    name: str  # as in fhopt.cost.DEVICES
    arch: int | str  # compute capability without its point; AMD: "gfx942"
    processors: int
    block_shared: int  # max bytes per block
    processor_shared: int  # bytes; each block takes `reserved` in addition to its own
    registers: int  # 32-bit, per processor
    warps: int  # max resident warps per processor
    blocks: int
    warp_size: int = 32
    reserved: int = 1024

    @property
    def backend(self) -> str:
        """Triton's name for the vendor."""
        return "cuda" if isinstance(self.arch, int) else "hip"


_K = 1024


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; SM counts: data sheets.
_CC80: dict[str, Any] = dict(block_shared=163 * _K, processor_shared=164 * _K, registers=64 * _K, warps=64, blocks=32)
_CC86: dict[str, Any] = dict(block_shared=99 * _K, processor_shared=100 * _K, registers=64 * _K, warps=48, blocks=16)
_CC87: dict[str, Any] = dict(block_shared=163 * _K, processor_shared=164 * _K, registers=64 * _K, warps=48, blocks=16)
_CC89: dict[str, Any] = dict(block_shared=99 * _K, processor_shared=100 * _K, registers=64 * _K, warps=48, blocks=24)
_CC90: dict[str, Any] = dict(block_shared=227 * _K, processor_shared=228 * _K, registers=64 * _K, warps=64, blocks=32)


# AMD CDNA 3 ISA reference and LLVM's "User Guide for AMDGPU": 4 SIMDs per CU, each 512 registers of 64 lanes, 8 waves.
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


def find_gpu(name: str) -> Gpu:
    """Find the GPU called `name`. Raises FhoptError, listing the names."""
    if name not in GPUS:
        raise FhoptError(f"no kernels are compiled for {name!r}; expected one of {', '.join(GPUS)}.")
    return GPUS[name]


def gpu_named(device_name: str) -> Gpu | None:
    """Return the GPU of the table for a device name such as "NVIDIA H100 80GB HBM3"; None for others."""
    words = device_name.lower().replace("-", " ").split()
    short = {"a100-80": "a100", "edge": "orin"}
    for gpu in GPUS.values():
        if device_name == gpu.name or short.get(gpu.name, gpu.name) in words:
            return gpu
    return None
