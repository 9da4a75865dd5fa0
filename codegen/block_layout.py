"""Layout of the rows that a layer's caches store in the blocks of a serving engine.

Letters: H query heads, G kv heads, J latent heads, D and E head size of keys and values, R latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.tiers import Tiers
from fhopt.plan.kernel_spec import KernelSpec
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.window import ResidualWindow


@dataclass(frozen=True, eq=False)
class SideLayout:
    """Packed latents of keys or of values in a token's row.

    encode [J,R,n*D] and decode [G,D,R]: as in `SidePlan`; encoders of both sides have one type, float32 or 16-bit.
    tiers: bit groups, empty if latents are not quantized. bytes: per latent head. start, scale: byte offsets in the row
    of quantized values and of scales.
    """

    encode: Tensor
    decode: Tensor
    tiers: Tiers
    bytes: int
    start: int
    scale: int


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Contents of the rows of a layer's three caches, and the kernels' parameters for them.

    key, value: packed latents; with is_shared both are those of `key`. window: which tokens are sinks, recent or
    latent, and the bits of window rows. window_rows: byte offsets in such a row of keys, values, scales of keys, scales
    of values. first_rows: byte offsets in a page of the attention sinks' keys and values, the means of keys and of
    values. means_from: minimum length of a sequence with means, 0: the plan has none. rotation: of keys relative to
    segments; None: keys are cached as projected.
    """

    heads: int
    kv_heads: int
    sizes: tuple[int, int]  # D, E
    dtype: torch.dtype
    scale: float
    key: SideLayout
    value: SideLayout
    is_shared: bool
    window: ResidualWindow
    window_rows: tuple[int, int, int, int]
    first_rows: tuple[int, int, int, int]
    means_from: int
    rotation: SegmentRotation | None = None

    def specs(self) -> tuple[KernelSpec, KernelSpec, KernelSpec]:
        """Return the specs of the kernels for latents, recent window and attention sinks."""
        name = str(self.dtype).removeprefix("torch.")
        widths = self.key.decode.shape[2], self.value.decode.shape[2]
        latents = KernelSpec(self.key.tiers, self.value.tiers, *widths, name, False)
        opened = KernelSpec((), (), *self.sizes, name, False)
        rounded = KernelSpec(((8, self.sizes[0], 1.0),), ((8, self.sizes[1], 1.0),), *self.sizes, name, False)
        return latents, rounded if self.window.bits == 8 else opened, opened
