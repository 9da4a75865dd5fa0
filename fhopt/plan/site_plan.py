"""The plan of one attention site: layout, bases and bit groups of keys and values, sketches, pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fhopt.errors import FhoptError
from fhopt.plan.site import AttentionSite

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 8, 16)
TIER_QUANTUM = 8  # the width of a bit group is a multiple of this: each of its bit planes starts on a whole byte
MIN_SEGMENT, MAX_SEGMENT = 64, 1 << 16  # tokens of a segment; kernels read as many as the least in one go
TRELLIS_BITS = (1, 2, 3, 4)  # that a trellis code may have
TRELLIS_TABLES = 2  # which tables of fhopt/ops/trellis.py: with others, what is stored stands for other numbers
# Of a quantization step, as a share of a token's scale, its root mean square: fits use 0.06 to 1.7, and 0.019 to 0.028
# for trellis codes, whose values are up to 127 steps away.
MIN_STEP, MAX_STEP, MAX_TRELLIS_STEP = 1e-4, 1e4, 0.25
SCALE_BYTES = 2  # one float16 per token and side
MEAN_BYTES = 4  # of a number in the mean of a sequence's keys or values
SKETCH_BITS = (2, 4)  # of a channel in the sketch of a token
LAYOUTS = ("band", "freq", "head", "identity", "input")  # DESIGN: Layouts


def is_trellis(bits: int, step: float) -> bool:
    """Return whether a bit group has a trellis code (fhopt/ops/trellis.py): its step is negative."""
    return bits < 16 and step < 0


def is_step(bits: int, step: float) -> bool:
    """Return whether a bit group of `bits` bits can have this quantization step."""
    if bits < 16 and step < 0:
        return bits in TRELLIS_BITS and MIN_STEP <= -step <= MAX_TRELLIS_STEP
    return (0 if bits == 16 else MIN_STEP) <= step <= MAX_STEP


@dataclass(frozen=True)
class Tier:
    """A bit group: a run of latent channels stored with the same number of bits.

    Quantized values are unsigned integers u of `bits` bits; the value is (u - (2^bits - 1)/2) * step * scale[token].
    With 16 bits the value is float16 and `step` is ignored. With a negative step it is a trellis code
    (fhopt/ops/trellis.py), in steps of this magnitude.
    """

    bits: int
    width: int
    step: float

    @property
    def is_trellis(self) -> bool:
        """Whether values are those of a trellis code."""
        return is_trellis(self.bits, self.step)


@dataclass(frozen=True, eq=False)
class SidePlan:
    """How one side (keys or values) becomes a latent.

    encode [J, R, n*D] and decode [G, D, R], float32: z = encode x, x ~ decode z, q . x ~ (decode^T q) . z.
    `tiers`: bit groups in channel order, their widths sum to R. None: latents are not quantized, and kept in the dtype
    of the model.
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
        """Return the bytes of one token's packed latent in one latent head, `itemsize` a channel without bit groups."""
        if not self.tiers:
            return self.width * itemsize
        return sum(t.bits * t.width for t in self.tiers) // 8

    def token_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of one token over all latent heads: quantized values and scales."""
        scale = SCALE_BYTES if any(t.bits < 16 for t in self.tiers) else 0
        return self.groups * (self.row_bytes(itemsize) + scale)


@dataclass(frozen=True, eq=False)
class SketchPlan:
    """How a token's key latent is sketched, for page selection (fhopt/attention/paged.py).

    channels, int64 [J, r]: the r channels that are kept, in the order of the bit groups `tiers`. mean, deviation,
    float32 [J, R]: of all channels, over tokens; a channel is quantized in deviations from its mean, times a scale of
    the token.
    """

    channels: Tensor
    mean: Tensor
    deviation: Tensor
    tiers: tuple[Tier, ...]

    def __deepcopy__(self, memo: Any) -> SketchPlan:
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's quantized values in one latent head."""
        return sum(tier.bits * tier.width for tier in self.tiers) // 8

    @property
    def width(self) -> int:
        """How many channels are kept, r."""
        return sum(tier.width for tier in self.tiers)


class HeadGather(Protocol):
    """Brings kv heads of several processes together, where a latent head reads more of them than one process has."""

    @property
    def key_heads(self) -> slice:
        """Which of all kv heads the encoder of keys reads."""

    @property
    def value_heads(self) -> slice:
        """Which of all kv heads the encoder of values reads."""

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Gather k, v [B,G,T,D] of this process and others to those of these heads. All processes must call it."""


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The plan of one site. `layout` is one of LAYOUTS.

    In the layout "input" keys and values are read from one latent (J = 1): `key.encode` [1, R, G*(D+E)] takes each
    head's key and value side by side, `value.encode` [1, R, 0] is empty, the tiers are those of the key.
    sketch: what pages are selected by; None: all of them are read. gather: of one process's part of a plan, where its
    encoders read heads of others (fhopt/parallel/tensor_parallel.py). segment: keys are encoded relative to segments of
    so many tokens (fhopt/plan/segment_rotation.py); 0: as they are.
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
        """True when keys and values are decoded from the same packed latents."""
        return self.layout == "input"

    def token_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes of one quantized token at this site, keys and values."""
        return self.key.token_bytes(itemsize) + (0 if self.is_shared else self.value.token_bytes(itemsize))

    def window_bytes(self, bits: int = 16, itemsize: int = 2) -> int:
        """Return the bytes of one token in the residual window.

        These are numbers as they came (16 bits), or 8-bit values and a scale for each head and side.
        """
        numbers = self.site.exact_numbers_per_token
        return numbers * itemsize if bits == 16 else numbers + 2 * SCALE_BYTES * self.site.kv_heads

    def mean_bytes(self) -> int:
        """Return the bytes of one sequence's means of keys and values, where a plan has them."""
        return self.site.exact_numbers_per_token * MEAN_BYTES

    @property
    def is_exact(self) -> bool:
        """True when nothing is dropped or rounded beyond float rounding."""
        unquantized = not self.key.tiers and not self.value.tiers
        if self.is_shared:
            return unquantized
        full = self.key.groups * self.key.width >= self.site.kv_heads * self.site.key_dim
        return unquantized and full and self.value.groups * self.value.width >= self.site.kv_heads * self.site.value_dim


def no_pages() -> FhoptError:
    """Make the error for page selection of keys that are relative to segments."""
    return FhoptError(
        "keys relative to segments have no page selection; expected a plan without. Fit, or calibrate, with "
        "--segment 0."
    )


@dataclass(frozen=True)
class PagePlan:
    """Which part of the quantized tokens a decode step reads (fhopt/attention/paged.py).

    tokens: of a page, a divisor of the plan's block. shares: largest share of the pages that a query may read, for each
    site in the order of the plan's sites; 1 reads all. masses: a site reads the fewest pages that leave the others, as
    estimated, no more than the rest of the attention weight; 1: as many as the share allows. lifts: threshold below
    which a page is not read, in multiples of the mean weight of a page, with the weight of attention sinks and residual
    window counted in; empty or 0: no threshold. least: sequences of no more quantized tokens are read whole. limit:
    largest weight of a query, by an upper bound, that may be left unread; above it all pages are read; 1: no limit.
    fill: for each site and query head, the factor of the estimated weight of unread pages that goes to the mean of
    values; empty: no value-mean fill.
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

        These are quantized values and a scale, and with a limit how much they lost.
        """
        if site.sketch is None:
            return 0
        return site.key.groups * (site.sketch.row_bytes + SCALE_BYTES * (1 + (self.limit < 1)))
