"""Expected gains of a model from a plan on this machine, before fitting: bytes, contexts that fit, and speed.

    prospects(loaded, outcome, places)  ->  Prospects      for `fhopt doctor MODEL` and its --json

The plans are hypothetical: compressible layers have a quarter or an eighth of their bytes. Sizes come from
fhopt/plan/cache_size.py, times from fhopt/hardware/cost_model.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fhopt.hardware import cost_model
from fhopt.hardware.devices import Device
from fhopt.inspection.facts import PaysFrom
from fhopt.models.cache_layers import measured_layers
from fhopt.models.model_facts import decoder_sites, encoder_path, positions_of
from fhopt.passes.outcome import Outcome
from fhopt.plan.cache_size import CacheLayer, CacheSize, hypothetical_size, site_layers, tokens_within
from fhopt.plan.site import AttentionSite
from fhopt.plan.window import COUNTED_AT

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel

RATIOS = (1, 4, 8)  # 1: the full-precision KV cache
CONTEXTS = (2048, COUNTED_AT, 32_768)  # for speedups, up to the model's positions


@dataclass(frozen=True)
class Placement:
    """A place to run a model: a device of the cost model, and the bytes of its memory that are free."""

    device: Device
    free_bytes: int


@dataclass(frozen=True)
class KeptExact:
    """Layers whose keys and values a plan leaves in full precision, and the reason."""

    layers: int
    reason: str


@dataclass(frozen=True)
class FitsAt:
    """The longest context whose KV cache fits with the weights into the free memory of a device; 0 for none."""

    device: str
    free_bytes: int
    tokens: int


@dataclass(frozen=True)
class Prospect:
    """A KV cache of the whole model: full precision, or that of a plan.

    bytes_per_token, ratio: at `COUNTED_AT` tokens, everything included. speedups: upper bounds for a decode step at
    each of the contexts, by the bytes that it loads. pays: break-even context of attention, by the roofline model.
    """

    cache: str
    bytes_per_token: float
    ratio: float
    speedups: tuple[float, ...]
    fits: tuple[FitsAt, ...]
    pays: tuple[PaysFrom, ...]


@dataclass(frozen=True)
class Prospects:
    """A model on this machine. weight_bytes: of all parameters, `itemsize` bytes each. positions: None: unknown."""

    model: str
    parameters: int
    itemsize: int
    weight_bytes: int
    positions: int | None
    sites: int
    not_rewritten: int
    kept_exact: tuple[KeptExact, ...]
    contexts: tuple[int, ...]
    caches: tuple[Prospect, ...]


def prospects(loaded: LoadedModel, outcome: Outcome, places: Sequence[Placement], itemsize: int = 2) -> Prospects:
    """Compute the prospects of a loaded model. itemsize: bytes per weight and per full-precision KV-cache element."""
    weights = loaded.weights()
    parameters = sum({w.data_ptr(): w.numel() for w in weights.values()}.values())
    has_config = hasattr(getattr(loaded.module, "config", None), "get_text_config")
    return site_prospects(
        loaded.name,
        decoder_sites(outcome.sites.values(), encoder_path(loaded.module)),
        places,
        parameters,
        layers=measured_layers(loaded.module) if loaded.module is not None else (),
        positions=positions_of(loaded.module) if has_config else None,
        missed=len(outcome.missed),
        itemsize=itemsize,
    )


def site_prospects(
    model: str, sites: Sequence[AttentionSite], places: Sequence[Placement], parameters: int = 0,
    layers: Sequence[CacheLayer] = (), positions: int | None = None, missed: int = 0, itemsize: int = 2,
) -> Prospects:  # fmt: skip
    """Compute the prospects of sites. layers: of the model's KV cache, as measured; if empty, one per site."""
    contexts = tuple(t for t in CONTEXTS if positions is None or t <= positions) or (positions or COUNTED_AT,)
    made = _Caches(sites, layers, parameters, itemsize, places, contexts)
    return Prospects(
        model=model,
        parameters=parameters,
        itemsize=itemsize,
        weight_bytes=parameters * itemsize,
        positions=positions,
        sites=len(sites),
        not_rewritten=missed,
        kept_exact=kept_exact(sites, layers),
        contexts=contexts,
        caches=tuple(made(ratio) for ratio in RATIOS),
    )


def kept_exact(sites: Sequence[AttentionSite], layers: Sequence[CacheLayer] = ()) -> tuple[KeptExact, ...]:
    """Count the layers that a plan leaves exact, by reason, the most frequent first."""
    reasons = Counter(_reason(layer, sites) for layer in layers or site_layers(sites))
    return tuple(KeptExact(count, reason) for reason, count in reasons.most_common() if reason)


def _reason(layer: CacheLayer, sites: Sequence[AttentionSite]) -> str:
    """Return why a layer stays exact; "" if a plan may compress it."""
    if layer.window and not layer.sliding:
        return f"caches only the newest {layer.window:,} tokens ({layer.mask or 'sliding'} window)"
    if not layer.is_full and not layer.numbers:
        return "caches a fixed-size state (linear attention)" if layer.state_bytes else "caches no tokens"
    if not layer.is_full:
        return "uses its own kind of KV cache"
    if layer.name and not any(layer.has(site.name) for site in sites):
        return "no attention found; see fhopt explain"
    return ""


class _Caches:
    """KV caches of one model by ratio: sizes, and gains over the full-precision cache."""

    def __init__(
        self, sites: Sequence[AttentionSite], layers: Sequence[CacheLayer], parameters: int, itemsize: int,
        places: Sequence[Placement], contexts: Sequence[int],
    ) -> None:  # fmt: skip
        self.sites, self.layers, self.parameters, self.itemsize = sites, layers, parameters, itemsize
        self.places, self.contexts, self.weights = places, contexts, parameters * itemsize
        self.exact = cost_model.model_cost(sites, parameters=parameters, itemsize=itemsize)

    def __call__(self, ratio: int) -> Prospect:
        size = self._size(ratio, COUNTED_AT)
        return Prospect(
            cache="exact" if ratio == 1 else f"{ratio}x",
            bytes_per_token=size.plan_bytes / COUNTED_AT,
            ratio=size.ratio,
            speedups=tuple(self._speedup(ratio, tokens) for tokens in self.contexts),
            fits=tuple(self._fits(ratio, place) for place in self.places),
            pays=tuple(self._pays(ratio, place.device) for place in self.places) if ratio > 1 else (),
        )

    def _size(self, ratio: int, tokens: int) -> CacheSize:
        return hypothetical_size(ratio, self.sites, tokens, self.layers, itemsize=self.itemsize)

    def _speedup(self, ratio: int, tokens: int) -> float:
        """Return the max speedup of a decode step that loads weights and KV cache once."""
        size = self._size(ratio, tokens)
        return cost_model.upper_bound(self.weights, size.exact_bytes, size.ratio)

    def _fits(self, ratio: int, place: Placement) -> FitsAt:
        room = place.free_bytes - self.weights
        tokens = tokens_within(room, lambda count: self._size(ratio, count).plan_bytes) if room > 0 else 0
        return FitsAt(place.device.name, place.free_bytes, tokens)

    def _pays(self, ratio: int, device: Device) -> PaysFrom:
        latent = cost_model.hypothetical_cost(self.sites, ratio, parameters=self.parameters, itemsize=self.itemsize)
        result = cost_model.break_even(self.exact, latent, device)
        return PaysFrom(device.name, result.verdict, result.tokens)
