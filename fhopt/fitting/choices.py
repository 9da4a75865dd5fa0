"""What a plan may be chosen of: ratios, layouts, numbers of bits, and those that suit a device.

These are checked before anything slow starts: nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fhopt.errors import FhoptError
from fhopt.fitting.codes import CODES, TRELLIS, UNIFORM
from fhopt.hardware.devices import find_device
from fhopt.plan.site_plan import LAYOUTS, TIER_QUANTUM

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
GPU_BITS = (2, 4, 8)  # of one plane: nothing is read twice
PLANE = 16  # bytes: for a GPU every bit group of packed latents is a multiple of it, what a thread reads at once
AUTO = "auto"


def check_options(
    ratio: float, layout: str, bits: Sequence[int], device: str | None = None, code: str = UNIFORM
) -> None:
    """Raise FhoptError when a plan cannot have this ratio, layout, bits and code, on a device if one is named."""
    if not 1 <= ratio < 1000:
        raise FhoptError(f"ratio {ratio:g} is not possible; expected a number from 1 (exact) to 16. Try --ratio 4.")
    if layout != AUTO:
        check_layouts([layout])
    if not bits or any(b not in BITS for b in bits):
        raise FhoptError(f"bits {list(bits)} are not possible; expected a choice of {', '.join(map(str, BITS))}.")
    if code not in CODES:
        raise FhoptError(f"code {code!r} is unknown; expected one of {', '.join(CODES)}.")
    if code == TRELLIS and device is not None and find_device(device).kind == "gpu":
        raise FhoptError(f"trellis codes are for CPUs, and {device} is a GPU. Use --code {UNIFORM}.")
    if not grain_of(bits, device).levels:
        raise FhoptError(
            f"bits {list(bits)} make no kernel for {device}; expected some of {', '.join(map(str, GPU_BITS))}, or no "
            "device."
        )


def check_layouts(layouts: Iterable[str]) -> None:
    """Raise FhoptError when one of these is no layout."""
    for layout in layouts:
        if layout not in LAYOUTS:
            raise FhoptError(f"layout {layout!r} is unknown; expected {AUTO} or one of {', '.join(LAYOUTS)}.")


@dataclass(frozen=True)
class Grain:
    """Units in which bits are allocated: numbers of bits in rising order; bytes of a plane, 0 where none are fixed.

    code: how bit groups are quantized (`fhopt.fitting.codes`).
    """

    levels: tuple[int, ...]
    plane: int
    code: str = UNIFORM

    @property
    def least(self) -> int:
        """Bits of one latent head of a side that has the fewest possible."""
        return 8 * self.plane or TIER_QUANTUM * min(self.levels)


def grain_of(bits: Sequence[int], device: str | None, code: str = UNIFORM) -> Grain:
    """Return chunks of any bits, or for a GPU whole planes of those that its kernels read well."""
    if device is None or find_device(device).kind != "gpu":
        return Grain(tuple(sorted(set(bits))), 0, code)
    return Grain(tuple(b for b in GPU_BITS if b in bits), PLANE)
