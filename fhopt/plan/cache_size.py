"""Bytes of a model's KV cache at a given context length: full precision, and with a plan.

Every printed size and ratio is computed here. A `CacheLayer` describes one layer of a full-precision cache
(fhopt/models/cache_layers.py derives it from a model). A plan compresses layers that cache all tokens, or those of a
sliding window or chunk. Others are unchanged: very short windows, states of linear attention, layers that share another
layer's keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fhopt.plan.window import COUNTED_AT, MIN_SLIDING, ResidualWindow

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.plan.site import AttentionSite
    from fhopt.plan.site_plan import SitePlan

KEY = "cache_layers"  # provenance key of the whole model's layers


@dataclass(frozen=True)
class CacheLayer:
    """Contents of one layer of transformers' KV cache, for one sequence.

    name: path of the layer, or of its attention. mask: "sliding" or "chunked" if it caches only the newest `window`
    tokens, else "". is_full: it caches keys and values of all these tokens, and nothing else. numbers: elements per
    cached token. state_bytes: bytes independent of the token count.
    """

    name: str
    mask: str = ""
    window: int = 0
    is_full: bool = True
    numbers: int = 0
    state_bytes: int = 0

    def bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Return the bytes after `tokens` tokens, with `itemsize` bytes per element."""
        kept = min(tokens, self.window) if self.window else tokens
        return kept * self.numbers * itemsize + self.state_bytes

    @property
    def sliding(self) -> int:
        """Tokens of a sliding window or chunk that a plan may compress; 0 for other layers."""
        return self.window if self.is_full and self.window >= MIN_SLIDING else 0

    @property
    def is_compressible(self) -> bool:
        """Whether a plan may compress the layer."""
        return self.is_full and (not self.window or self.sliding > 0)

    def has(self, site: str) -> bool:
        """Return whether the named attention site belongs to this layer."""
        path = site.partition("#")[0]
        return bool(self.name) and f"{path}.".startswith(f"{self.name}.")


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the KV cache for one sequence of `tokens` tokens.

    exact_bytes, plan_bytes: of the whole model, in full precision and with a plan. compressed_exact_bytes,
    compressed_bytes: the same for the layers that the plan compresses. exact_layers: number of layers that stay in full
    precision.
    """

    tokens: int
    exact_bytes: int
    plan_bytes: int
    compressed_exact_bytes: int
    compressed_bytes: int
    exact_layers: int = 0

    @property
    def ratio(self) -> float:
        """Compression ratio of the whole cache."""
        return self.exact_bytes / max(1, self.plan_bytes)

    @property
    def compressed_ratio(self) -> float:
        """Compression ratio of the layers that the plan compresses; 1 if there are none."""
        return self.compressed_exact_bytes / self.compressed_bytes if self.compressed_bytes else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return fields and ratios as JSON values."""
        return asdict(self) | {"ratio": self.ratio, "compressed_ratio": self.compressed_ratio}

    @property
    def words(self) -> str:
        """Summary of the whole model: `33.0 MB exact, 15.6 MB with the plan: 2.12x`."""
        sizes = f"{self.exact_bytes / 1e6:,.1f} MB in full precision, {self.plan_bytes / 1e6:,.1f} MB with the plan"
        return f"{sizes} at {self.tokens:,} tokens: {self.ratio:.2f}x"


def cache_size(
    plan: LatentPlan | None, tokens: int = COUNTED_AT, layers: Sequence[CacheLayer] = (), *,
    sites: Iterable[AttentionSite] = (), itemsize: int = 2, source: int | None = None,
) -> CacheSize:  # fmt: skip
    """Count the bytes of a cache for one sequence of `tokens` tokens, without and with a plan.

    layers: of the whole model; if empty, those that the plan recorded, else one per site of `sites` or of the plan.
    itemsize: bytes of an unquantized element. source: tokens of an encoder, as of `latent_bytes`.
    """
    recorded = layers or (recorded_layers(plan) if plan is not None else ())
    planned = plan.sites if plan is not None else ()
    known = recorded or site_layers(sites or [p.site for p in planned])
    compressed = compressed_sites(plan, recorded) if plan is not None else ()
    exact = sum(layer.bytes(tokens, itemsize) for layer in known)
    before = exact_bytes([p.site for p in compressed], tokens, recorded, itemsize)
    after = latent_bytes(plan, tokens, compressed, itemsize, source, recorded) if plan is not None else 0
    return CacheSize(tokens, exact, exact - before + after, before, after, len(known) - len(compressed))


def hypothetical_size(
    ratio: float, sites: Iterable[AttentionSite], tokens: int = COUNTED_AT, layers: Sequence[CacheLayer] = (), *,
    itemsize: int = 2,
) -> CacheSize:  # fmt: skip
    """Count the bytes of a cache of `tokens` tokens with a plan that compresses all eligible layers `ratio` times.

    layers: of the whole model; if empty, one per site of `sites`.
    """
    found = list(sites)
    known = tuple(layers) or site_layers(found)
    names = [s.name for s in found]
    compressed = [one for one in known if one.is_compressible and _is_one_of(one, names)]
    exact = sum(layer.bytes(tokens, itemsize) for layer in known)
    before = sum(layer.bytes(tokens, itemsize) for layer in compressed)
    after = round(before / ratio)
    return CacheSize(tokens, exact, exact - before + after, before, after, len(known) - len(compressed))


def _is_one_of(layer: CacheLayer, sites: Iterable[str]) -> bool:
    return not layer.name or any(layer.has(name) for name in sites)


def tokens_within(room: int, size: Callable[[int], int], most: int = 1 << 40) -> int:
    """Return the longest context, at most `most` tokens, whose cache fits in `room` bytes. size(tokens): bytes."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle - 1)
    return low


def latent_bytes(
    plan: LatentPlan, tokens: int, sites: Sequence[SitePlan], itemsize: int = 2, source: int | None = None,
    layers: Sequence[CacheLayer] = (),
) -> int:  # fmt: skip
    """Return the bytes of the latents of a plan's `sites`, for one sequence of `tokens` tokens.

    Includes quantized values, scales, sketches, attention sinks, residual window and means. source: encoder tokens, for
    cross attention; None: `tokens`. layers: of the whole model, for the sizes of sliding windows; if empty, sites cache
    all tokens.
    """
    own = [p for p in sites if p.site.kind == "self"]
    source = tokens if source is None else source
    total = source * sum(p.token_bytes(itemsize) for p in sites if p.site.kind != "self")
    total += sum(p.mean_bytes() for p in own) if plan.mean_tokens else 0
    slides = sliding_windows([p.site for p in own], layers)
    for sliding in sorted(set(slides.values())):
        part, window = [p for p in own if slides[p.site.name] == sliding], plan.window.within(sliding)
        packed = sum(p.token_bytes(itemsize) for p in part) + (0 if sliding else plan.sketch_bytes(part))
        total += window.split(tokens, sliding)[2] * packed + window_bytes(window, tokens, part, itemsize, sliding)
    return total


def window_bytes(
    window: ResidualWindow, tokens: int, sites: Sequence[SitePlan], itemsize: int = 2, sliding: int = 0
) -> int:
    """Return the bytes of attention sinks and residual window at `tokens` tokens, over all `sites`.

    itemsize: bytes of an unquantized element. sliding: as of `ResidualWindow.split`.
    """
    first, newest, _ = window.split(tokens, sliding)
    exact = sum(site.window_bytes(16, itemsize) for site in sites)
    return first * exact + newest * sum(site.window_bytes(window.bits, itemsize) for site in sites)


def exact_bytes(
    sites: Iterable[AttentionSite], tokens: int, layers: Sequence[CacheLayer] = (), itemsize: int = 2
) -> int:
    """Return the bytes of full-precision keys and values of `sites`, for one sequence of `tokens` tokens."""
    found = list(sites)
    slides = sliding_windows(found, layers)
    kept = [min(tokens, slides[s.name] or tokens) for s in found]
    return itemsize * sum(s.exact_numbers_per_token * count for s, count in zip(found, kept, strict=True))


def sliding_windows(sites: Iterable[AttentionSite], layers: Sequence[CacheLayer]) -> dict[str, int]:
    """Return the sliding-window size of each site's layer, by site name; 0: the layer caches all tokens."""
    return {s.name: max((one.sliding for one in layers if one.has(s.name)), default=0) for s in sites}


def compressed_sites(plan: LatentPlan, layers: Sequence[CacheLayer] = ()) -> tuple[SitePlan, ...]:
    """Return the sites of a plan that a cache compresses (`is_compressible`)."""
    return tuple(p for p in plan.sites if is_compressible(p.site, layers))


def is_compressible(site: AttentionSite, layers: Sequence[CacheLayer]) -> bool:
    """Return whether a cache may compress a site; False if the site's layer in `layers` is not compressible."""
    return all(layer.is_compressible for layer in layers if layer.has(site.name))


def site_layers(sites: Iterable[AttentionSite]) -> tuple[CacheLayer, ...]:
    """Return a layer per attention site, for modules without a transformers cache."""
    return tuple(
        CacheLayer(s.name, s.mask if s.window else "", s.window, numbers=s.exact_numbers_per_token) for s in sites
    )


def recorded_layers(plan: LatentPlan) -> tuple[CacheLayer, ...]:
    """Return the whole model's layers that a plan recorded; empty for older plans."""
    return layers_of(plan.provenance)


def layers_of(provenance: Mapping[str, Any]) -> tuple[CacheLayer, ...]:
    """Return the layers that `record_of` stored in a provenance."""
    return tuple(CacheLayer(**item) for item in provenance.get(KEY, ()))


def record_of(layers: Iterable[CacheLayer]) -> dict[str, Any]:
    """Return layers as an entry of a plan's provenance; an empty one without layers."""
    described = [asdict(layer) for layer in layers]
    return {KEY: described} if described else {}
