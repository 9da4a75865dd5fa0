"""Valid ratios, layouts and bit widths of a plan, and those that suit a device.

Checked before anything slow starts, without importing torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fhopt.errors import FhoptError
from fhopt.fitting.codes import CODES, TRELLIS, UNIFORM
from fhopt.hardware.devices import find_device
from fhopt.plan.site_plan import LAYOUTS, TIER_QUANTUM

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
GPU_BITS = (2, 4, 8)  # powers of 2: one plane each, so no byte is loaded twice
PLANE = 16  # bytes a GPU thread loads at once; for GPUs every bit group of packed latents is a multiple
AUTO = "auto"


def check_options(
    ratio: float, layout: str, bits: Sequence[int], device: str | None = None, code: str = UNIFORM
) -> None:
    """Raise FhoptError if a plan cannot have this ratio, layout, bits and code, on `device` if given."""
    if not 1 <= ratio < 1000:
        raise FhoptError(f"ratio {ratio:g} is invalid; expected a number from 1 (exact mode) to 16. Try --ratio 4.")
    if layout != AUTO:
        check_layouts([layout])
    if not bits or any(b not in BITS for b in bits):
        raise FhoptError(f"bits {list(bits)} are invalid; expected a subset of {', '.join(map(str, BITS))}.")
    if code not in CODES:
        raise FhoptError(f"code {code!r} is unknown; expected one of {', '.join(CODES)}.")
    if code == TRELLIS and device is not None and find_device(device).kind == "gpu":
        raise FhoptError(f"trellis codes require a CPU, but {device} is a GPU. Use --code {UNIFORM}.")
    if not grain_of(bits, device).levels:
        raise FhoptError(
            f"bits {list(bits)} have no kernel for {device}; expected a subset of "
            f"{', '.join(map(str, GPU_BITS))}. Change the bits, or drop --device."
        )


def check_layouts(layouts: Iterable[str]) -> None:
    """Raise FhoptError for an unknown layout."""
    for layout in layouts:
        if layout not in LAYOUTS:
            raise FhoptError(f"layout {layout!r} is unknown; expected {AUTO} or one of {', '.join(LAYOUTS)}.")


@dataclass(frozen=True)
class Grain:
    """Granularity of bit allocation: bit widths in ascending order, and bytes per plane (0: no planes).

    code: how bit groups are quantized (`fhopt.fitting.codes`).
    """

    levels: tuple[int, ...]
    plane: int
    code: str = UNIFORM

    @property
    def least(self) -> int:
        """Minimum bits of one latent head of a side."""
        return 8 * self.plane or TIER_QUANTUM * min(self.levels)


def grain_of(bits: Sequence[int], device: str | None, code: str = UNIFORM) -> Grain:
    """Return chunks of any bit width, or for a GPU whole planes of the widths that its kernels load efficiently."""
    if device is None or find_device(device).kind != "gpu":
        return Grain(tuple(sorted(set(bits))), 0, code)
    return Grain(tuple(b for b in GPU_BITS if b in bits), PLANE)
