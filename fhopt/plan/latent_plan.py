"""`LatentPlan`: how to cache every attention site of a model, as data.

Modules that compute on plans import this one: sizes (fhopt/plan/cache_size.py), files and digest (serialization.py),
tables (display.py). The public methods for these import them lazily.

Letters: B batch, H query heads, G kv heads (H % G == 0), S queries, T keys, D head size, J latent heads, R width,
F rotary frequencies, L layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from fhopt.errors import FhoptError
from fhopt.plan.site_plan import PagePlan, SitePlan, trellis_unsupported
from fhopt.plan.validation import check_parts
from fhopt.plan.window import COUNTED_AT, ResidualWindow


@dataclass(frozen=True, eq=False)
class LatentPlan:
    """The plan of every site of a model, with its provenance.

    sinks, recent, block, window_bits: see `ResidualWindow`; `window` combines them. mean_tokens: quantized tokens of
    self-attention are encoded as differences from their sequence's mean over at most this number of tokens after the
    sinks (fhopt/cache/sequence_means.py); 0: no means. provenance: model fingerprint, calibration text hash, versions,
    options, measured quality (JSON values only). pages: page selection for decoding; None: attention uses all quantized
    tokens.
    """

    sites: tuple[SitePlan, ...]
    sinks: int
    recent: int
    block: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    window_bits: int = 16
    pages: PagePlan | None = None
    mean_tokens: int = 0

    def __post_init__(self) -> None:
        check_parts(self.sites, self.window, self.pages, self.mean_tokens)

    def __deepcopy__(self, memo: Any) -> LatentPlan:
        return self

    def _repr_html_(self) -> str:
        from fhopt.plan.display import plan_html

        return plan_html(self)

    @cached_property
    def window(self) -> ResidualWindow:
        """Which tokens of a sequence are not quantized."""
        return ResidualWindow(self.sinks, self.recent, self.block, self.window_bits)

    def check_no_means(self, what: str) -> None:
        """Raise FhoptError if latents exclude means or keys are relative to segments, which `what` does not support."""
        if self.mean_tokens:
            raise FhoptError(
                f"{what} does not support sequence means, which this plan uses "
                f"(mean_tokens={self.mean_tokens}). Refit with: fhopt fit MODEL --mean-tokens 0."
            )
        if self.segment:
            raise FhoptError(
                f"{what} does not support segments, which this plan uses (segment={self.segment}). Refit "
                "with: fhopt fit MODEL --segment 0."
            )

    @property
    def has_trellis(self) -> bool:
        """Whether any bit group has a trellis code."""
        return any(tier.is_trellis for site in self.sites for side in (site.key, site.value) for tier in side.tiers)

    def check_uniform(self, what: str) -> None:
        """Raise FhoptError if latents have trellis codes, which `what` does not support."""
        if self.has_trellis:
            raise trellis_unsupported(what)

    @property
    def segment(self) -> int:
        """Tokens per segment, if keys of any site are encoded relative to segments; else 0."""
        return max((s.segment for s in self.sites), default=0)

    def site(self, name: str) -> SitePlan:
        """Return the plan of the site called `name`. Raises FhoptError if the plan has none."""
        for plan in self.sites:
            if plan.site.name == name:
                return plan
        raise FhoptError(
            f"the plan has no site named {name!r}; expected one of its {len(self.sites)} sites, such as "
            f"{self.sites[0].site.name!r}. Fit a plan for this model: fhopt fit MODEL."
        )

    def page_share(self, site: SitePlan) -> float:
        """Return the maximum fraction of its pages that a site selects; 1 if it uses all."""
        return 1.0 if self.pages is None else self.pages.shares[self.sites.index(site)]

    def page_read(self, site: SitePlan) -> float:
        """Return the average fraction of its pages that a site selected in page calibration.

        If unknown, returns the maximum fraction.
        """
        calibrated = self.provenance.get("pages") or {}
        return float(calibrated.get("read", {}).get(site.site.name, self.page_share(site)))

    def page_fill(self, site: SitePlan) -> tuple[float, ...]:
        """Return `PagePlan.fill` of a site's query heads; empty without value-mean fill."""
        return self.pages.fill[self.sites.index(site)] if self.pages is not None and self.pages.fill else ()

    def page_mass(self, site: SitePlan) -> float:
        """Return the fraction of the attention weight at which a site stops selecting pages; 1: never."""
        return 1.0 if self.pages is None else self.pages.masses[self.sites.index(site)]

    def page_lift(self, site: SitePlan) -> float:
        """Return `PagePlan.lifts` of a site; 0 without a threshold."""
        return self.pages.lifts[self.sites.index(site)] if self.pages is not None and self.pages.lifts else 0.0

    def sketch_bytes(self, sites: Sequence[SitePlan] | None = None) -> int:
        """Return the bytes of one quantized token's sketches, over those `sites` (None: all) with page selection."""
        if self.pages is None:
            return 0
        wanted = self.sites if sites is None else sites
        return sum(self.pages.sketch_bytes(site) for site in wanted if self.page_share(site) < 1)

    def exact_token_bytes(self, itemsize: int = 2) -> int:
        """Return the bytes per token of a full-precision KV cache over all sites, with `itemsize` bytes per element."""
        return sum(p.site.exact_numbers_per_token * itemsize for p in self.sites)

    def cache_bytes(self, tokens: int, itemsize: int = 2, source: int | None = None) -> int:
        """Return the bytes of all sites' latents for one sequence of `tokens` tokens (`cache_size.latent_bytes`).

        source: encoder tokens, for cross attention; None: `tokens`.
        """
        from fhopt.plan.cache_size import latent_bytes, recorded_layers

        return latent_bytes(self, tokens, self.sites, itemsize, source, recorded_layers(self))

    def ratio(self, tokens: int = COUNTED_AT) -> float:
        """Return the compression ratio of all sites versus 16-bit keys and values, at `tokens` tokens.

        For the whole cache, including full-precision layers, see `cache_size`.
        """
        from fhopt.plan.cache_size import exact_bytes, recorded_layers

        return exact_bytes([p.site for p in self.sites], tokens, recorded_layers(self)) / self.cache_bytes(tokens)

    @property
    def weights(self) -> Mapping[str, str]:
        """`weight_print` of the key and value projections of each site; empty if not recorded."""
        prints: Mapping[str, str] = self.provenance.get("weights", {})
        return prints

    def digest(self) -> str:
        """Return a hash of everything that affects results (not of the provenance)."""
        from fhopt.plan.serialization import plan_digest

        return plan_digest(self)

    def with_provenance(self, **items: Any) -> LatentPlan:
        """Return this plan with `items` added to its provenance."""
        return replace(self, provenance={**self.provenance, **items})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `plan.json` and `plan.safetensors` to `folder`, atomically. Raises FhoptError."""
        from fhopt.plan.serialization import save_plan

        return save_plan(self, folder)

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> LatentPlan:
        """Load a plan written by `save`. Raises FhoptError if it is absent, truncated, modified or too new."""
        from fhopt.plan.serialization import load_plan

        return load_plan(folder)


PlanOrPath: TypeAlias = LatentPlan | str | os.PathLike[str]


def as_plan(plan: PlanOrPath, name: str = "plan") -> LatentPlan:
    """Return a plan unchanged, or load it from a path.

    name: of the argument, for messages. Raises FhoptError for other types, and for a path without a plan.
    """
    if isinstance(plan, LatentPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return LatentPlan.load(plan)
    raise FhoptError(
        f"{name} is a {type(plan).__name__}; expected a LatentPlan or the path of one. Pass the result of fhopt.fit, "
        "or the folder that `fhopt fit` wrote."
    )
