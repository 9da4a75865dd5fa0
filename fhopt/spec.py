"""Data that crosses a boundary: sites, statistics, plans, kernel specs.

Frozen dataclasses without behaviour beyond counting and checking. Plans are saved as one safetensors file (tensors) and
one JSON file (everything else) in a folder; never pickle.

Letters: B batch, H query heads, G kv heads (H % G == 0), S queries, T keys, D head size, J latent heads, R width,
F rotary frequencies, L layers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.files import write_folder

PLAN_VERSION = 4  # of plans with pages; those without are written as they always were
PLAN_VERSIONS = (3, PLAN_VERSION)  # that can be read
PLAN_FILES = ("plan.json", "plan.safetensors")
SUPPORTED_BITS = (1, 2, 3, 4, 5, 6, 8, 16)
TIER_QUANTUM = 8  # a tier's width is a multiple of this: every bit plane of every tier starts on a whole byte
SCALE_BYTES = 2  # one float16 per token and side
SKETCH_BITS = (2, 4)  # of a channel in the sketch of a token
LAYOUTS = ("band", "freq", "head", "identity", "input")  # DESIGN: Layouts


# --------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Rope:
    """A rotation found by running the segment from the projection to the core.

    `pairing` is "half" (i and i + n/2 of a block of n channels form one complex number) or "interleaved" (2i, 2i + 1).
    `rotary_dim` channels from `offset` on rotate, cut into `blocks` blocks of n (axial rotation: one block an axis).
    `angles` holds the measured angle per position step of each frequency, in radians, F values; where `positions` is
    "grid" (2-D rotation), the first step that turns it.
    """

    pairing: str
    rotary_dim: int
    angles: tuple[float, ...]
    offset: int = 0
    blocks: int = 1
    positions: str = "sequence"

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The channels (real, imaginary) of each frequency, F pairs."""
        size = self.rotary_dim // self.blocks
        starts = range(self.offset, self.offset + self.rotary_dim, size)
        if self.pairing == "half":
            return tuple((s + i, s + i + size // 2) for s in starts for i in range(size // 2))
        return tuple((s + 2 * i, s + 2 * i + 1) for s in starts for i in range(size // 2))


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model: what reads what, in which shapes, with which extras.

    `name` is the longest common module path of the projections, so that the graphs of prefill and decode agree on it.
    `projections` maps "q", "k", "v", "o" to the qualified parameter names that were found (possibly several: LoRA).
    """

    name: str
    projections: Mapping[str, tuple[str, ...]]
    kind: str  # "self" or "cross"
    heads: int  # H
    kv_heads: int  # G
    key_dim: int  # D of queries and keys
    value_dim: int  # D of values
    scale: float
    rope: Rope | None
    key_norm: bool  # the key is not affine in the projection (QK-norm)
    mask: str  # see passes.masks
    softcap: float  # 0.0: none
    cache: str  # "none", "cat", "in-place", "bare" (filled elsewhere)
    source: str  # file:line of the core
    window: int = 0  # keys that a query sees with a "sliding" mask
    sinks: bool = False  # further logits take weight and give nothing

    def _repr_html_(self) -> str:
        from fhopt.seeing.notebook import site_html

        return site_html(self)

    def exact_tokens(self, sinks: int, recent: int) -> tuple[int, int]:
        """(first, newest) tokens that stay exact: none of those that a decoder reads of its encoder."""
        return (sinks, recent) if self.kind == "self" else (0, 0)

    @property
    def cached_weights(self) -> tuple[str, ...]:
        """Parameters that keys and values are projected by: what the bases of a plan belong to."""
        return tuple(dict.fromkeys([*self.projections.get("k", ()), *self.projections.get("v", ())]))

    @property
    def exact_numbers_per_token(self) -> int:
        """Numbers that an ordinary cache keeps per token at this site: keys and values of all kv heads."""
        return self.kv_heads * (self.key_dim + self.value_dim)


# --------------------------------------------------------------------------------------------------- statistics


@dataclass
class SideStatistics:
    """Streamed second moments of one side (keys or values) of one site, float64, summed over tokens.

    `moment` [J, c, c], c = n*D: x x^T of the n = G/J kv heads of a latent head, side by side, as a cache would hold
    them (keys with norm and rotation). `metric` [J, c, c]: g g^T, where g is the gradient of a sampled label's
    log-likelihood with respect to x, so `metric / count` is the Fisher information: what a unit of error costs.
    """

    groups: int  # J
    moment: Tensor
    metric: Tensor
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


@dataclass
class SiteStatistics:
    """Second moments of the keys and values of one site.

    `cross` and `cross_metric` [G*D, G*E] are the sums of k v^T and of their gradients' product, kept where keys and
    values may be maps of one narrower input (no rotation), else None.
    """

    site: AttentionSite
    key: SideStatistics
    value: SideStatistics
    cross: Tensor | None = None
    cross_metric: Tensor | None = None


# --------------------------------------------------------------------------------------------------- plans


def sealed_tokens(tokens: int, sinks: int, recent: int, block: int) -> int:
    """How many of `tokens` cached tokens stand in sealed blocks."""
    return max(0, (tokens - sinks - recent) // block) * block


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
    """How a token's key latent is sketched, to tell which pages matter to a query (fhopt/pages.py).

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
    its encoders read heads of others (fhopt/sharding.py).
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
        from fhopt.seeing.notebook import site_plan_html

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
    """Which part of the sealed tokens a decoding step reads (fhopt/pages.py).

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


@dataclass(frozen=True, eq=False)
class LatentPlan:
    """What to do at every site of one model, and where that came from.

    sinks: first tokens kept exact. recent: newest tokens that are never in latents. block: tokens sealed at once.
    window_bits: 16 keeps the open window as it came, 8 rounds it to 8 bits with a scale per token, head and side.
    provenance: model fingerprint, calibration text hash, versions, options, measured quality (JSON values only).
    pages: what decoding reads of the sealed tokens; None: all of them.
    """

    sites: tuple[SitePlan, ...]
    sinks: int
    recent: int
    block: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    window_bits: int = 16
    pages: PagePlan | None = None

    def __post_init__(self) -> None:
        _check_plan(self)

    def __deepcopy__(self, memo: Any) -> LatentPlan:
        return self

    def _repr_html_(self) -> str:
        from fhopt.seeing.notebook import plan_html

        return plan_html(self)

    @property
    def window(self) -> int:
        """Tokens in the open window at which its oldest block is sealed."""
        return self.recent + self.block

    def site(self, name: str) -> SitePlan:
        """The plan of the site called `name`. Raises FhoptError when the plan has none."""
        for plan in self.sites:
            if plan.site.name == name:
                return plan
        raise FhoptError(
            f"the plan has no site named {name!r}; it has {len(self.sites)} sites, the first is "
            f"{self.sites[0].site.name!r}. Fit a plan for this model: fhopt fit MODEL."
        )

    def page_share(self, site: SitePlan) -> float:
        """Share of its sealed pages that a site of this plan reads at most; 1 where it reads all."""
        return 1.0 if self.pages is None else self.pages.shares[self.sites.index(site)]

    def page_read(self, site: SitePlan) -> float:
        """Share of its sealed pages that a site of this plan read on average where its pages were calibrated; the most
        that it reads where that is not known."""
        told = self.provenance.get("pages") or {}
        return float(told.get("read", {}).get(site.site.name, self.page_share(site)))

    def page_fill(self, site: SitePlan) -> tuple[float, ...]:
        """See `PagePlan.fill`: of the query heads of a site of this plan; empty where nothing takes their place."""
        return self.pages.fill[self.sites.index(site)] if self.pages is not None and self.pages.fill else ()

    def page_mass(self, site: SitePlan) -> float:
        """Share of attention's weight with which a site of this plan has read enough; 1: never."""
        return 1.0 if self.pages is None else self.pages.masses[self.sites.index(site)]

    def page_lift(self, site: SitePlan) -> float:
        """See `PagePlan.lifts`: of a site of this plan; 0 where pages need not weigh anything."""
        return self.pages.lifts[self.sites.index(site)] if self.pages is not None and self.pages.lifts else 0.0

    def sketch_bytes(self) -> int:
        """Bytes of the sketches of one sealed token, over all sites that choose pages."""
        if self.pages is None:
            return 0
        shares = zip(self.sites, self.pages.shares, strict=True)
        return sum(self.pages.sketch_bytes(site) for site, share in shares if share < 1)

    def exact_token_bytes(self, itemsize: int = 2) -> int:
        """Bytes per token of an ordinary cache over all sites, `itemsize` bytes a number."""
        return sum(p.site.exact_numbers_per_token * itemsize for p in self.sites)

    def cache_bytes(self, tokens: int, itemsize: int = 2, source: int | None = None) -> int:
        """Bytes that a latent cache of one sequence needs for `tokens` tokens: codes, scales, sinks, window, sketches.

        source: tokens of the encoder, for a decoder that reads one; as many as `tokens` unless it is given.
        """
        sealed = sealed_tokens(tokens, self.sinks, self.recent, self.block)
        first = min(tokens, self.sinks)
        own = [p for p in self.sites if p.site.kind == "self"]
        coded = sum(p.token_bytes(itemsize) for p in own) + self.sketch_bytes()
        exact = sum(p.open_bytes(16, itemsize) for p in own)
        window = sum(p.open_bytes(self.window_bits, itemsize) for p in own)
        read = sum(p.token_bytes(itemsize) for p in self.sites if p.site.kind != "self")
        source = tokens if source is None else source
        return sealed * coded + first * exact + (tokens - first - sealed) * window + source * read

    def ratio(self, tokens: int = 8192) -> float:
        """How many times smaller than 16-bit keys and values the whole cache is at `tokens` tokens."""
        return tokens * self.exact_token_bytes() / self.cache_bytes(tokens)

    @property
    def weights(self) -> Mapping[str, str]:
        """`weight_print` of what projects the keys and values of each site; empty where nobody took it down."""
        found: Mapping[str, str] = self.provenance.get("weights", {})
        return found

    def digest(self) -> str:
        """Hash of everything that changes numbers (not of the provenance)."""
        h = hashlib.sha256(json.dumps(_describe(self), sort_keys=True).encode())
        for name, tensor in sorted(_tensors(self).items()):
            h.update(name.encode())
            h.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def with_provenance(self, **items: Any) -> LatentPlan:
        """The same plan with `items` added to its provenance."""
        return replace(self, provenance={**self.provenance, **items})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `plan.json` and `plan.safetensors` to `folder`, whole or not at all. Raises FhoptError."""
        from safetensors.torch import save

        path = Path(folder)
        description = _describe(self) | {"provenance": dict(self.provenance), "digest": self.digest()}
        files = {
            "plan.safetensors": save(_tensors(self)),
            "plan.json": (json.dumps(description, indent=1, sort_keys=True) + "\n").encode(),
        }
        write_folder(path, files)
        return path

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> LatentPlan:
        """Read a plan written by `save`. Raises FhoptError when it is absent, cut short, altered or too new."""
        return _load_plan(Path(folder))


def weight_print(weights: Iterable[Tensor]) -> str:
    """Identity of some weights: shapes and sampled signs, which survive a change of dtype and small updates."""
    h = hashlib.sha256()
    for weight in weights:
        h.update(shape_and_signs(weight))
    return h.hexdigest()[:16]


def shape_and_signs(weight: Tensor) -> bytes:
    """The shape of a weight and the signs of up to 256 of its numbers, evenly spread.

    Of a weight that is spread over processes, those of the whole: all of them must call it.
    """
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # of a DTensor
    flat = whole.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 256)][:256] > 0
    return f"{tuple(weight.shape)}".encode() + bytes(sample.cpu().to(torch.uint8).tolist())


@dataclass(frozen=True)
class KernelSpec:
    """All and only what the text of a latent attention kernel depends on.

    Tiers are (bits, width, step) per side; dtype is that of queries and of uncoded latents ("float32", ...).
    """

    key_tiers: tuple[tuple[int, int, float], ...]
    value_tiers: tuple[tuple[int, int, float], ...]
    key_width: int
    value_width: int
    dtype: str
    softcap: bool

    @staticmethod
    def of(site: SitePlan, dtype: str) -> KernelSpec:
        """Of the kernel that reads the latents of a site, for queries of `dtype`."""

        def tiers(side: SidePlan) -> tuple[tuple[int, int, float], ...]:
            return tuple((t.bits, t.width, t.step) for t in side.tiers)

        sides = tiers(site.key), tiers(site.value)
        return KernelSpec(*sides, site.key.width, site.value.width, dtype, site.site.softcap != 0.0)

    @property
    def name(self) -> str:
        """Readable parameters and a short hash: the name of the generated file."""

        def side(tiers: tuple[tuple[int, int, float], ...], width: int) -> str:
            return "x".join(f"{w}b{b}" for b, w, _ in tiers) or f"{width}f"

        digest = hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]
        cap = "_cap" if self.softcap else ""
        key, value = side(self.key_tiers, self.key_width), side(self.value_tiers, self.value_width)
        return f"latent_k{key}_v{value}_{self.dtype}{cap}_{digest}"


# --------------------------------------------------------------------------------------------------- files


def _tensors(plan: LatentPlan) -> dict[str, Tensor]:
    """Every basis by name, each in memory of its own: safetensors refuses tensors that share some."""
    out: dict[str, Tensor] = {}
    held: set[int] = set()
    for site in plan.sites:
        named = {f"{n}.{part}": getattr(getattr(site, n), part) for n in ("key", "value") for part in _BASES}
        if site.sketch is not None:
            named |= {f"sketch.{part}": getattr(site.sketch, part) for part in _SKETCH}
        for name, given in named.items():
            tensor = given.contiguous()
            tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in held else tensor
            held.add(tensor.untyped_storage().data_ptr())
            out[f"{site.site.name}.{name}"] = tensor
    return out


_BASES, _SKETCH = ("encode", "decode"), ("channels", "mean", "deviation")


def _describe(plan: LatentPlan) -> dict[str, Any]:
    paged: dict[str, Any] = {} if plan.pages is None else {"pages": asdict(plan.pages)}
    for name in ("fill", "lifts"):
        if plan.pages is not None and not getattr(plan.pages, name):
            del paged["pages"][name]
    return paged | {
        "version": PLAN_VERSION if paged or any(s.sketch for s in plan.sites) else PLAN_VERSIONS[0],
        "sinks": plan.sinks,
        "recent": plan.recent,
        "block": plan.block,
        "window_bits": plan.window_bits,
        "sites": [
            {
                "site": asdict(s.site) | {"projections": {k: list(v) for k, v in s.site.projections.items()}},
                "layout": s.layout,
                "key": [[t.bits, t.width, t.step] for t in s.key.tiers],
                "value": [[t.bits, t.width, t.step] for t in s.value.tiers],
            }
            | ({} if s.sketch is None else {"sketch": [[t.bits, t.width, t.step] for t in s.sketch.tiers]})
            for s in plan.sites
        ],
    }


def _load_plan(folder: Path) -> LatentPlan:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        text = (folder / "plan.json").read_bytes()
        blob = (folder / "plan.safetensors").read_bytes()
    except OSError as error:
        raise FhoptError(
            f"{folder} is not a plan: {error.strerror} ({Path(error.filename).name}). "
            "Expected a folder with plan.json and plan.safetensors, as `fhopt fit MODEL -o FOLDER` writes."
        ) from error
    try:
        description, tensors = json.loads(text), load(blob)
        if description["version"] not in PLAN_VERSIONS:
            raise FhoptError(
                f"{folder} has plan version {description['version']}; this fhopt reads versions "
                f"{' and '.join(map(str, PLAN_VERSIONS))}. Fit the plan again with this version."
            )
        plan = LatentPlan(
            sites=tuple(_site_plan(item, tensors) for item in description["sites"]),
            sinks=description["sinks"],
            recent=description["recent"],
            block=description["block"],
            provenance=description["provenance"],
            window_bits=description["window_bits"],
            pages=_page_plan(description.get("pages")),
        )
        intact = plan.digest() == description["digest"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise FhoptError(f"{folder} is damaged ({type(error).__name__}: {error}). Fit the plan again.") from error
    if not intact:
        raise FhoptError(f"{folder} was altered after it was written (digest mismatch). Fit the plan again.")
    return plan


def _site_plan(item: dict[str, Any], tensors: dict[str, Tensor]) -> SitePlan:
    raw = dict(item["site"])
    rope = raw["rope"] and Rope(**{**raw["rope"], "angles": tuple(raw["rope"]["angles"])})
    projections = {k: tuple(v) for k, v in raw["projections"].items()}
    site = AttentionSite(**{**raw, "rope": rope or None, "projections": projections})

    def side(which: str) -> SidePlan:
        prefix = f"{site.name}.{which}"
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item[which])
        return SidePlan(tensors[f"{prefix}.encode"], tensors[f"{prefix}.decode"], tiers)

    sketch = None
    if "sketch" in item:
        tiers = tuple(Tier(int(b), int(w), float(s)) for b, w, s in item["sketch"])
        parts = {part: tensors[f"{site.name}.sketch.{part}"] for part in _SKETCH}
        sketch = SketchPlan(**parts, tiers=tiers)
    return SitePlan(site, item["layout"], side("key"), side("value"), sketch=sketch)


def _page_plan(item: dict[str, Any] | None) -> PagePlan | None:
    if item is None:
        return None
    numbers = {name: tuple(map(float, item.get(name, ()))) for name in ("shares", "masses", "lifts")}
    return PagePlan(**(item | numbers | {"fill": tuple(tuple(map(float, heads)) for heads in item.get("fill", ()))}))


def _check_plan(plan: LatentPlan) -> None:
    if not plan.sites:
        raise FhoptError("the plan has no sites; expected at least one. Was attention found in the model?")
    if len({s.site.name for s in plan.sites}) < len(plan.sites):
        raise FhoptError("two sites of the plan have the same name. Fit the plan again.")
    if plan.sinks < 0 or plan.recent < 1 or plan.block < 1:
        raise FhoptError(
            f"sinks={plan.sinks}, recent={plan.recent}, block={plan.block}: expected sinks >= 0, others >= 1."
        )
    if plan.window_bits not in (8, 16):
        raise FhoptError(f"window_bits={plan.window_bits}: expected 8 or 16.")
    for site in plan.sites:
        if site.layout not in LAYOUTS:
            raise FhoptError(f"{site.site.name} has the layout {site.layout!r}; expected one of {', '.join(LAYOUTS)}.")
        _check_sides(site)
        if site.is_shared and (site.key.groups != 1 or site.key.tiers != site.value.tiers):
            raise FhoptError(f"{site.site.name}: keys and values must share one latent head and its tiers. Fit again.")
        if site.sketch is not None:
            _check_sketch(site.site.name, site.key, site.sketch)
    if plan.pages is not None:
        _check_pages(plan, plan.pages)


def _check_pages(plan: LatentPlan, pages: PagePlan) -> None:
    if pages.tokens < 1 or plan.block % pages.tokens:
        raise FhoptError(f"pages of {pages.tokens} tokens: expected a divisor of the plan's block, {plan.block}.")
    if not len(pages.shares) == len(pages.masses) == len(plan.sites):
        raise FhoptError(
            f"pages for {len(pages.shares)} and {len(pages.masses)} sites, the plan has {len(plan.sites)}. Calibrate "
            "them again."
        )
    if not all(0 < x <= 1 for x in (*pages.shares, *pages.masses, pages.limit)) or pages.least < 0:
        raise FhoptError(f"{pages}: expected shares, masses and the limit above 0 and at most 1, and least from 0 on.")
    if len(pages.lifts) not in (0, len(plan.sites)) or not all(0 <= x < math.inf for x in pages.lifts):
        raise FhoptError(
            f"pages have lifts {pages.lifts}; expected numbers from 0 on for {len(plan.sites)} sites, or none. "
            "Calibrate pages again."
        )
    _check_fill(plan, pages)
    for site, share in zip(plan.sites, pages.shares, strict=True):
        if share < 1 and site.site.kind != "self":
            raise FhoptError(f"{site.site.name} reads an encoder, all of it; expected a share of 1. Leave it out.")
        if share < 1 and site.sketch is None:
            raise FhoptError(f"{site.site.name} has no sketches to choose pages by. Calibrate pages for this plan.")


def _check_fill(plan: LatentPlan, pages: PagePlan) -> None:
    if not pages.fill:
        return
    found, wanted = [len(heads) for heads in pages.fill], [site.site.heads for site in plan.sites]
    if found != wanted or not all(0 <= x < math.inf for heads in pages.fill for x in heads):
        raise FhoptError(
            f"pages are filled for {found} heads; expected numbers from 0 on for {wanted}. Calibrate pages again."
        )
    if pages.limit < 1:
        raise FhoptError("pages with a limit are read or bounded, not filled; expected one of both. Leave fill out.")


def _check_sketch(name: str, key: SidePlan, sketch: SketchPlan) -> None:
    groups, width = key.groups, key.width
    found = tuple(sketch.channels.shape), tuple(sketch.mean.shape), tuple(sketch.deviation.shape)
    expected = (groups, sketch.width), (groups, width), (groups, width)
    if found != expected or sketch.channels.dtype != torch.int64:
        raise FhoptError(f"{name}: sketches have shapes {found}, expected {expected}. Calibrate pages again.")
    for tier in sketch.tiers:
        if tier.bits not in SKETCH_BITS or tier.width < 1 or tier.width % TIER_QUANTUM or not tier.step > 0:
            raise FhoptError(f"{name}: sketches of {tier}; expected a width of {TIER_QUANTUM}k, bits of {SKETCH_BITS}.")
    if not bool(((sketch.channels >= 0) & (sketch.channels < width)).all()):
        raise FhoptError(f"{name}: sketches name channels beyond the {width} that there are. Calibrate pages again.")
    if not (sketch.mean.isfinite().all() and sketch.deviation.isfinite().all() and (sketch.deviation > 0).all()):
        raise FhoptError(f"{name}: sketches have deviations that are no positive numbers. Calibrate pages again.")


def _check_sides(plan: SitePlan) -> None:
    name, heads, dims = plan.site.name, plan.site.kv_heads, (plan.site.key_dim, plan.site.value_dim)
    read = (sum(dims), 0) if plan.is_shared else dims
    encoded = [heads, heads]
    if plan.gather is not None:
        encoded = [part.stop - part.start for part in (plan.gather.key_heads, plan.gather.value_heads)]
    _check_side(f"{name}.key", plan.key, (encoded[0], read[0]), (heads, dims[0]))
    _check_side(f"{name}.value", plan.value, (encoded[1], read[1]), (heads, dims[1]))


def _check_side(name: str, side: SidePlan, encoded: tuple[int, int], decoded: tuple[int, int]) -> None:
    """encoded, decoded: (heads, numbers of each) that the encoders read, and that the decoders give."""
    groups, width = side.groups, side.width
    expected = (groups, width, encoded[0] // groups * encoded[1]), (*decoded, width)
    found = tuple(side.encode.shape), tuple(side.decode.shape)
    if found != expected:
        raise FhoptError(f"{name}: bases have shapes {found}, expected {expected}. Fit the plan again.")
    if not (side.encode.isfinite().all() and side.decode.isfinite().all()):
        raise FhoptError(f"{name}: bases hold non-finite numbers. Fit the plan again.")
    if any(t.bits not in SUPPORTED_BITS or t.width < 1 or t.width % TIER_QUANTUM for t in side.tiers):
        raise FhoptError(
            f"{name}: tiers {side.tiers} are not widths of {TIER_QUANTUM}k with bits of {SUPPORTED_BITS}. Fit the plan "
            "again."
        )
    if side.tiers and sum(t.width for t in side.tiers) != width:
        raise FhoptError(
            f"{name}: tiers cover {sum(t.width for t in side.tiers)} channels of {width}. Fit the plan again."
        )
