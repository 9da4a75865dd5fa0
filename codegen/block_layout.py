"""What the rows of a layer's caches hold in the blocks of a serving engine, and where.

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

    encode [J,R,n*D] and decode [G,D,R]: as in `SidePlan`; encoders of both sides are of one type, float32 or of 16
    bits. tiers: bit groups, none where latents are not quantized. bytes: of one latent head. start, scale: bytes of
    the row before quantized values, and before scales.
    """

    encode: Tensor
    decode: Tensor
    tiers: Tiers
    bytes: int
    start: int
    scale: int


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """What the rows of a layer's three caches hold, and how they are read.

    key, value: packed latents; with is_shared both are those of `key`. window: which tokens are read as what, and the
    bits of its rows. window_rows: bytes of such a row before keys, values, scales of keys, scales of values.
    first_rows: bytes of a page before the attention sinks' keys and values, the means of keys and of values.
    means_from: tokens from which on a sequence has means, 0: the plan has none. rotation: of keys that are relative to
    segments; None: they are as they came.
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
        """Return the specs of the kernels of latents, residual window and attention sinks."""
        name = str(self.dtype).removeprefix("torch.")
        widths = self.key.decode.shape[2], self.value.decode.shape[2]
        latents = KernelSpec(self.key.tiers, self.value.tiers, *widths, name, False)
        opened = KernelSpec((), (), *self.sizes, name, False)
        rounded = KernelSpec(((8, self.sizes[0], 1.0),), ((8, self.sizes[1], 1.0),), *self.sizes, name, False)
        return latents, rounded if self.window.bits == 8 else opened, opened
