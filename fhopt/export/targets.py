"""Targets of `fhopt export`, MLIR and IREE devices, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fhopt.errors import FhoptError

# IREE backend, its default architecture, and its options, by target. `{arch}` is the value of --arch.
TARGETS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "iree-cpu": ("llvm-cpu", "host", ()),
    "iree-vulkan": ("vulkan-spirv", "", ("--iree-vulkan-target={arch}",)),
    "iree-cuda": ("cuda", "sm_80", ("--iree-cuda-target={arch}",)),
    "iree-rocm": ("rocm", "gfx942", ("--iree-rocm-target={arch}",)),
    "iree-metal": ("metal-spirv", "", ()),
}


@dataclass(frozen=True)
class Target:
    """Target of an export: `name` is "mlir" or one of TARGETS; `arch` as IREE names it, "" for the default."""

    name: str
    arch: str = ""
    dialect: str = "linalg"
    bytecode: bool = False

    def check(self) -> None:
        """Raise FhoptError for an unknown target and for options that it does not take."""
        if self.name != "mlir" and self.name not in TARGETS:
            raise FhoptError(f"target {self.name!r} is unknown; expected one of mlir, {', '.join(TARGETS)}.")
        if self.name == "mlir" and self.arch:
            raise FhoptError(
                "--arch requires an IREE target; expected --target iree-*. Drop --arch, or choose such a target."
            )
        if self.name != "mlir" and self.dialect != "linalg":
            raise FhoptError(
                "--dialect torch requires --target mlir, since IREE compiles linalg. Drop --dialect, or use "
                "--target mlir."
            )
