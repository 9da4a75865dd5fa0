"""The cross-attention cache layer: the encoder's keys and values, quantized once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fhopt.attention.cache_view import CacheView
from fhopt.cache.base_layer import LatentLayerBase, encode_sides, make_packed
from fhopt.cache.quantized_rows import PackedLatents
from fhopt.cache.store import named_stores
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan


class CrossLatentLayer(LatentLayerBase):
    """Cross-attention keys and values, all as packed latents, written once.

    The first call attends to them exactly. Shapes are the same in each decode step, so static caches use it too.
    """

    is_compileable = True

    def __init__(self, plan: LatentPlan, site: SitePlan, absorb: bool = True) -> None:
        super().__init__(plan, site, absorb)
        self.packed_keys, self.packed_values = make_packed(site, PackedLatents)
        self.stores = named_stores(None, (self.packed_keys, self.packed_values))
        self.count = 0
        self.shapes: tuple[Tensor, Tensor] | None = None  # empty keys and values: their shapes and dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record shapes and dtype."""
        self._place_bases(key_states, value_states)
        self.shapes = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B,G,T,D] as latents and return them unchanged.

        Raises FhoptError, and changes nothing, if they do not fit the plan or the layer is full.
        """
        self._check(key_states, value_states)
        if self.count:
            raise FhoptError(
                f"{self.site.site.name}: the cross-attention cache is full with {self.count} tokens, and its "
                "size is fixed. Call reset(), or use one cache per input."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        encode_sides(self.site, key_states, value_states, self._append)
        self.count = key_states.shape[2]
        return key_states, value_states

    def _append(self, side: str, x: Tensor) -> None:
        self._packed(side).append(x, 0, 1)

    @property
    def keys(self) -> Tensor | None:
        """All keys [B,G,T,D] for attention; None before the first call."""
        return self._read()[0]

    @property
    def values(self) -> Tensor | None:
        """All values [B,G,T,E] for attention; None before the first call."""
        pending, self.reader.pending = self.reader.pending, False  # set by the `keys` property, which comes first
        values = self._read()[1]
        self.reader.pending = pending
        return values

    def _read(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.count:
            return None, None
        keys, values = self._blank()
        return self._for_attention(keys, values, CacheView(*self._sides(0, self.count), 0, self.count))

    def _blank(self) -> tuple[Tensor, Tensor]:
        assert self.shapes is not None
        keys, values = [x[:1].expand(self.batch_size if self.count else x.shape[0], -1, -1, -1) for x in self.shapes]
        return keys, values

    def _counters(self) -> dict[str, Any]:
        return {"count": self.count}

    def _count(self, counters: dict[str, Any]) -> None:
        self.count = int(counters["count"])
        if {part.shape[2] for store in self.stores.values() for part in store.parts} != {self.count}:
            raise ValueError(f"packed latents for other than {self.count} tokens")

    @property
    def quantized_tokens(self) -> int:
        """Number of tokens held as latents."""
        return self.count

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask."""
        return self.count, 0

    def get_max_length(self) -> int:
        """Return -1: the encoder determines the length."""
        return -1

    def reset(self) -> None:
        """Drop all tokens."""
        for store in self.stores.values():
            store.parts = ()
        self.count, self.is_initialized, self.shapes = 0, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: the encoder's tokens are unaffected."""
