"""The plan of one attention site: layout, bases and bit groups of keys and values, sketches, pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fhopt.errors import FhoptError
from fhopt.plan.site import AttentionSite

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 8, 16)
TIER_QUANTUM = 8  # bit-group widths are multiples of this: each bit plane starts on a byte boundary
MIN_SEGMENT, MAX_SEGMENT = 64, 1 << 16  # tokens per segment; kernels process at least the minimum at once
TRELLIS_BITS = (1, 2, 3, 4)  # supported by trellis codes
TRELLIS_TABLES = 2  # version of the tables in fhopt/ops/trellis.py, which determine decoded values
# Of a quantization step, as a share of a token's scale (root mean square): fits use 0.06 to 1.7, and 0.019 to 0.028 for
# trellis codes, whose values are up to 127 steps away.
MIN_STEP, MAX_STEP, MAX_TRELLIS_STEP = 1e-4, 1e4, 0.25
SCALE_BYTES = 2  # one float16 per token and side
MEAN_BYTES = 4  # per element of the mean of a sequence's keys or values
SKETCH_BITS = (2, 4)  # per channel of a token's sketch
LAYOUTS = ("band", "freq", "head", "identity", "input")  # docs/reference/glossary.md


def is_trellis(bits: int, step: float) -> bool:
    """Return whether a bit group has a trellis code (fhopt/ops/trellis.py), marked by a negative step."""
    return bits < 16 and step < 0


def trellis_unsupported(what: str) -> FhoptError:
    """Make the error for trellis codes in a place, `what`, that does not support them."""
    return FhoptError(
        f"{what} does not support trellis codes, which this plan uses. Refit with: fhopt fit MODEL --code uniform."
    )


def is_step(bits: int, step: float) -> bool:
    """Return whether a quantization step is valid for a bit group of `bits` bits."""
    if bits < 16 and step < 0:
        return bits in TRELLIS_BITS and MIN_STEP <= -step <= MAX_TRELLIS_STEP
    return (0 if bits == 16 else MIN_STEP) <= step <= MAX_STEP


@dataclass(frozen=True)
class BitGroup:
    """A bit group: consecutive latent channels stored with the same number of bits.

    Quantized values are unsigned integers u of `bits` bits; the value is (u - (2^bits - 1)/2) * step * scale[token].
    With 16 bits the value is float16 and `step` is ignored. A negative step marks a trellis code (fhopt/ops/trellis.py)
    with steps of this magnitude.
    """

    bits: int
    width: int
    step: float

    @property
    def is_trellis(self) -> bool:
        """Whether the bit group has a trellis code."""
        return is_trellis(self.bits, self.step)


@dataclass(frozen=True, eq=False)
class SidePlan:
    """Encoding of one side (keys or values) as a latent.

    encode [J, R, n*D] and decode [G, D, R], float32: z = encode x, x ~ decode z, q . x ~ (decode^T q) . z.
    `tiers`: bit groups in channel order, with widths that sum to R. Empty: latents are not quantized, and stored in the
    model's dtype.
    """

    encode: Tensor
    decode: Tensor
    tiers: tuple[BitGroup, ...]

    def __deepcopy__(self, memo: Any) -> SidePlan:
        return self  # immutable; copies of a model's cache share its plan

    @property
    def groups(self) -> int:
        """J, the number of latent heads."""
        return int(self.encode.shape[0])

    @property
    def width(self) -> int:
        """R, the number of channels of one latent head."""
        return int(self.encode.shape[1])

    def row_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of one token's packed latent per latent head; `itemsize` per channel without bit groups."""
        if not self.tiers:
            return self.width * itemsize
        return sum(t.bits * t.width for t in self.tiers) // 8

    def token_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of one token over all latent heads: quantized values and scales."""
        scale = SCALE_BYTES if any(t.bits < 16 for t in self.tiers) else 0
        return self.groups * (self.row_bytes(itemsize) + scale)


@dataclass(frozen=True, eq=False)
class SketchPlan:
    """Sketch format of a token's key latent, for page selection (fhopt/attention/paged.py).

    channels, int64 [J, r]: the r sketched channels, in the order of the bit groups `tiers`. mean, deviation, float32
    [J, R]: of all channels, over tokens; a channel is quantized in deviations from its mean, times a scale per token.
    """

    channels: Tensor
    mean: Tensor
    deviation: Tensor
    tiers: tuple[BitGroup, ...]

    def __deepcopy__(self, memo: Any) -> SketchPlan:
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's quantized values in one latent head."""
        return sum(tier.bits * tier.width for tier in self.tiers) // 8

    @property
    def width(self) -> int:
        """r, the number of sketched channels."""
        return sum(tier.width for tier in self.tiers)


class HeadGather(Protocol):
    """Gathers kv heads of several processes, if a latent head spans more of them than one process has."""

    @property
    def key_heads(self) -> slice:
        """The kv heads that the encoder of keys takes as input."""

    @property
    def value_heads(self) -> slice:
        """The kv heads that the encoder of values takes as input."""

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Gather these heads' k, v [B,G,T,D] from all processes. All processes must call it."""


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The plan of one site. `layout` is one of LAYOUTS.

    In the layout "input" keys and values are decoded from one latent (J = 1): `key.encode` [1, R, G*(D+E)] takes each
    head's key and value concatenated, `value.encode` [1, R, 0] is empty, the tiers are those of the key. sketch: for
    page selection; None: attention uses all pages. gather: in one process's part of a plan, if its encoders need heads
    of other processes (fhopt/parallel/tensor_parallel.py). segment: tokens per segment, if keys are encoded relative to
    segments (fhopt/plan/segment_rotation.py); else 0.
    """

    site: AttentionSite
    layout: str
    key: SidePlan
    value: SidePlan
    sketch: SketchPlan | None = field(default=None, kw_only=True)
    gather: HeadGather | None = field(default=None, kw_only=True)
    segment: int = field(default=0, kw_only=True)

    def __deepcopy__(self, memo: Any) -> SitePlan:
        return self

    def _repr_html_(self) -> str:
        from fhopt.plan.display import site_plan_html

        return site_plan_html(self)

    @property
    def is_shared(self) -> bool:
        """Whether keys and values are decoded from the same packed latents."""
        return self.layout == "input"

    def token_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of one quantized token at this site, keys and values."""
        return self.key.token_bytes(itemsize) + (0 if self.is_shared else self.value.token_bytes(itemsize))

    def window_bytes(self, bits: int = 16, itemsize: int = 2) -> int:
        """Return the bytes of one token in the residual window.

        Unquantized elements (16 bits), or 8-bit values with a scale per head and side.
        """
        numbers = self.site.exact_numbers_per_token
        return numbers * itemsize if bits == 16 else numbers + 2 * SCALE_BYTES * self.site.kv_heads

    def mean_bytes(self) -> int:
        """Return the bytes of one sequence's means of keys and values."""
        return self.site.exact_numbers_per_token * MEAN_BYTES

    @property
    def is_exact(self) -> bool:
        """Whether encoding is lossless except for floating-point rounding."""
        unquantized = not self.key.tiers and not self.value.tiers
        if self.is_shared:
            return unquantized
        full = self.key.groups * self.key.width >= self.site.kv_heads * self.site.key_dim
        return unquantized and full and self.value.groups * self.value.width >= self.site.kv_heads * self.site.value_dim


def no_pages() -> FhoptError:
    """Make the error for page selection with keys relative to segments."""
    return FhoptError(
        "page selection does not support segments; expected a plan without them. Refit, or calibrate again, "
        "with --segment 0."
    )


@dataclass(frozen=True)
class PagePlan:
    """Page selection: which quantized tokens a decode step attends to (fhopt/attention/paged.py).

    tokens: per page, a divisor of the plan's block. shares: maximum fraction of pages per query, for each site in plan
    order; 1 uses all. masses: a site selects the fewest pages that leave at most 1 - mass of the estimated attention
    weight to the others; 1: as many as the share allows. lifts: threshold of a page's weight in multiples of the mean
    page weight, with sinks and residual window included; empty or 0: no threshold. least: sequences of up to this many
    quantized tokens use all pages. limit: maximum weight of unselected pages, by an upper bound; above it all pages are
    used; 1: no limit. fill: for each site and query head, the factor of the estimated weight of unselected pages that
    goes to the mean of values; empty: no value-mean fill.
    """

    tokens: int
    shares: tuple[float, ...]
    masses: tuple[float, ...]
    least: int = 512
    limit: float = 1.0
    fill: tuple[tuple[float, ...], ...] = ()
    lifts: tuple[float, ...] = ()

    def sketch_bytes(self, site: SitePlan) -> int:
        """Return the bytes of one token's sketch at a site, over all latent heads.

        Includes quantized values and a scale, and with a limit the error.
        """
        if site.sketch is None:
            return 0
        return site.key.groups * (site.sketch.row_bytes + SCALE_BYTES * (1 + (self.limit < 1)))
