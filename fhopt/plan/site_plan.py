"""The plan of one site: layout, bases and bit groups of keys and values, sketches, pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fhopt.plan.site import AttentionSite

SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 8, 16)
TIER_QUANTUM = 8  # a tier's width is a multiple of this: every bit plane of every tier starts on a whole byte
SCALE_BYTES = 2  # one float16 per token and side
SKETCH_BITS = (2, 4)  # of a channel in the sketch of a token
LAYOUTS = ("band", "freq", "head", "identity", "input")  # DESIGN: Layouts


@dataclass(frozen=True)
class Tier:
    """A run of latent channels stored with the same number of bits.

    Codes are unsigned integers u of `bits` bits; the value is (u - (2^bits - 1)/2) * step * scale[token].
    With 16 bits the value is float16 and `step` is ignored.
    """

    bits: int
    width: int
    step: float


@dataclass(frozen=True, eq=False)
class SidePlan:
    """How one side (keys or values) becomes a latent.

    encode [J, R, n*D] and decode [G, D, R], float32: z = encode x, x ~ decode z, q . x ~ (decode^T q) . z.
    `tiers` in channel order, their widths sum to R. No tiers: latents are kept uncoded, in the dtype of the model.
    """

    encode: Tensor
    decode: Tensor
    tiers: tuple[Tier, ...]

    def __deepcopy__(self, memo: Any) -> SidePlan:
        return self  # what is frozen needs no copies: those of a model's cache share its plan

    @property
    def groups(self) -> int:
        """J, the number of latent heads."""
        return int(self.encode.shape[0])

    @property
    def width(self) -> int:
        """R, the number of channels of one latent head."""
        return int(self.encode.shape[1])

    def row_bytes(self, itemsize: int = 2) -> int:
        """Bytes of one token's codes in one latent head; uncoded channels count `itemsize` bytes each."""
        if not self.tiers:
            return self.width * itemsize
        return sum(t.bits * t.width for t in self.tiers) // 8

    def token_bytes(self, itemsize: int = 2) -> int:
        """Bytes of one token over all latent heads: codes and scales."""
        scale = SCALE_BYTES if any(t.bits < 16 for t in self.tiers) else 0
        return self.groups * (self.row_bytes(itemsize) + scale)


@dataclass(frozen=True, eq=False)
class SketchPlan:
    """How a token's key latent is sketched, to tell which pages matter to a query (fhopt/attention/paged.py).

    channels, int64 [J, r]: those that are kept, in the order of `tiers`, of r channels in all. mean, deviation, float32
    [J, R]: of all channels, over tokens; a channel is coded in deviations from its mean, times a scale of the token.
    """

    channels: Tensor
    mean: Tensor
    deviation: Tensor
    tiers: tuple[Tier, ...]

    def __deepcopy__(self, memo: Any) -> SketchPlan:
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's codes in one latent head."""
        return sum(tier.bits * tier.width for tier in self.tiers) // 8

    @property
    def width(self) -> int:
        """r."""
        return sum(tier.width for tier in self.tiers)


class HeadGather(Protocol):
    """Brings kv heads of several processes together, where a latent head reads more of them than one process has.

    key_heads, value_heads: those that this process's encoders read.
    """

    @property
    def key_heads(self) -> slice:
        """Of all kv heads."""

    @property
    def value_heads(self) -> slice:
        """Of all kv heads."""

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B,G,T,D] of this process -> those of these heads. All processes must call it."""


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The plan of one site. `layout` is one of LAYOUTS.

    In the layout "input" keys and values are read from one latent (J = 1): `key.encode` [1, R, G*(D+E)] takes each
    head's key and value side by side, `value.encode` [1, R, 0] is empty, the tiers are those of the key.
    sketch: by which decoding chooses pages; None: it reads all of them. gather: of one process's part of a plan, where
    its encoders read heads of others (fhopt/parallel/tensor_parallel.py).
    """

    site: AttentionSite
    layout: str
    key: SidePlan
    value: SidePlan
    sketch: SketchPlan | None = field(default=None, kw_only=True)
    gather: HeadGather | None = field(default=None, kw_only=True)

    def __deepcopy__(self, memo: Any) -> SitePlan:
        return self

    def _repr_html_(self) -> str:
        from fhopt.plan.display import site_plan_html

        return site_plan_html(self)

    @property
    def is_shared(self) -> bool:
        """True when keys and values are decoded from the same rows."""
        return self.layout == "input"

    def token_bytes(self, itemsize: int = 2) -> int:
        """Bytes of one sealed token at this site, keys and values."""
        return self.key.token_bytes(itemsize) + (0 if self.is_shared else self.value.token_bytes(itemsize))

    def open_bytes(self, window_bits: int = 16, itemsize: int = 2) -> int:
        """Bytes of one token in the open window: numbers as they are, or 8-bit codes and a scale per head and side."""
        numbers = self.site.exact_numbers_per_token
        return numbers * itemsize if window_bits == 16 else numbers + 2 * SCALE_BYTES * self.site.kv_heads

    @property
    def is_exact(self) -> bool:
        """True when nothing is dropped or rounded beyond float rounding."""
        uncoded = not self.key.tiers and not self.value.tiers
        if self.is_shared:
            return uncoded
        full = self.key.groups * self.key.width >= self.site.kv_heads * self.site.key_dim
        return uncoded and full and self.value.groups * self.value.width >= self.site.kv_heads * self.site.value_dim


@dataclass(frozen=True)
class PagePlan:
    """Which part of the sealed tokens a decoding step reads (fhopt/attention/paged.py).

    tokens: of a page, a divisor of the plan's block. shares: of the pages that each query may read at most, of each
    site in the order of the plan's sites; 1 reads all. masses: a site reads the fewest pages, so that it expects of the
    others that they have no more than the rest of attention's weight; 1: as many as the share says. lifts: it reads no
    pages of which it expects less than so many times the mean of a page, the weight of open tokens counted in; empty or
    0: likewise. least: sequences of no more sealed tokens are read whole. limit: of the weight of a query that pages
    left out may have, by a bound; beyond it they are read after all; 1: no limit. fill: of each site and query head, by
    what the weight of pages left out, as sketches have it, is multiplied where the mean of the values takes their
    place; empty: nothing does.
    """

    tokens: int
    shares: tuple[float, ...]
    masses: tuple[float, ...]
    least: int = 512
    limit: float = 1.0
    fill: tuple[tuple[float, ...], ...] = ()
    lifts: tuple[float, ...] = ()

    def sketch_bytes(self, site: SitePlan) -> int:
        """Bytes of one token's sketch at a site, over all latent heads: codes, scale, with a limit what that lost."""
        if site.sketch is None:
            return 0
        return site.key.groups * (site.sketch.row_bytes + SCALE_BYTES * (1 + (self.limit < 1)))
