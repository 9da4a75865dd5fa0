"""The three caches of one layer in a serving engine's blocks, and the layout of their rows.

Letters: H query heads, G kv heads, T tokens, D and E head size of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.segment_rotation import SegmentRotation
from fhopt.plan.site_plan import SitePlan
from fhopt.serving.batch import Batch, Sequence, SequenceBlocks, means_from
from fhopt.serving.rows import FirstRows, LatentRows, WindowRows

CPU = torch.device("cpu")


@dataclass(eq=False, slots=True)  # not frozen, for speed: one per cache, layer and step
class CacheMemory:
    """Memory of one cache of a layer, uint8 [blocks, 1, tokens per block, bytes], and a batch's blocks in it."""

    cache: Tensor
    blocks: SequenceBlocks

    def read(self, sequence: Sequence, start: int, stop: int) -> Tensor:
        """Return the rows [stop - start, bytes] of a sequence's tokens at positions `start` to `stop`."""
        return self.blocks.read(self.cache, sequence.index, start, stop)


@dataclass(eq=False, slots=True)
class Caches:
    """The three caches of a layer, for one batch."""

    latents: CacheMemory
    window: CacheMemory
    first: CacheMemory

    @property
    def batch(self) -> Batch:
        """The batch of the blocks."""
        return self.latents.blocks.batch

    def page(self, sequence: Sequence) -> Tensor:
        """Return the page uint8 [1, bytes] of a sequence's first tokens, as a view."""
        return self.first.cache[int(self.first.blocks.table[sequence.index, 0]), 0]


class LayerRows:
    """Row layout of one layer's caches, given by the plan of its site; bases are on `device`.

    For 16-bit models, encoders are rounded to float16, which changes latents less than the rounding of the keys and
    values themselves: for one sequence, a decode step loads more bytes of encoders than of the cache.
    """

    def __init__(
        self, plan: LatentPlan, site: SitePlan, scale: float, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        site, self.device = _placed(site, dtype, device), device
        self.window, self.site, self.scale, self.dtype = plan.window, site, scale, dtype
        self.means_from = means_from(plan)
        self.latent_rows = LatentRows(site, dtype)
        self.window_rows = WindowRows(site, plan.window_bits, dtype)
        self.first_rows = FirstRows(site, plan.sinks, self.means_from > 0, dtype)
        rope, segment = site.site.rope, site.segment
        self.rotation = SegmentRotation.on(rope, segment, device) if segment and rope is not None else None
        self.decode = site.key.decode.to(dtype), site.value.decode.to(dtype)
        self.groups = self.latent_rows.groups[0], self.latent_rows.groups[-1]


def _placed(site: SitePlan, dtype: torch.dtype, device: torch.device) -> SitePlan:
    """Return the plan of a site with its bases on a device, and encoders in the precision for a model dtype."""
    encoders = [side.encode.to(device, torch.float32) for side in (site.key, site.value)]
    halves = [encode.half() for encode in encoders]
    if dtype.itemsize == 2 and all(bool(half.isfinite().all()) for half in halves):
        encoders = halves
    key, value = (
        replace(side, encode=encode, decode=side.decode.to(device))
        for side, encode in zip((site.key, site.value), encoders, strict=True)
    )
    return replace(site, key=key, value=value)
