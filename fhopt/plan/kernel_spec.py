"""Kernel specification: the parameters that determine the source of a generated kernel."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, fields

from fhopt.plan.site_plan import SidePlan, SitePlan


@dataclass(frozen=True)
class KernelSpec:
    """Exactly the parameters that determine the source of a latent attention kernel.

    Tiers are bit groups (bits, width, quantization step) per side; dtype is that of queries and of unquantized latents
    ("float32", ...).
    """

    key_tiers: tuple[tuple[int, int, float], ...]
    value_tiers: tuple[tuple[int, int, float], ...]
    key_width: int
    value_width: int
    dtype: str
    softcap: bool

    @staticmethod
    def of(site: SitePlan, dtype: str) -> KernelSpec:
        """Return the kernel specification for a site's latents and queries of `dtype`."""

        def tiers(side: SidePlan) -> tuple[tuple[int, int, float], ...]:
            return tuple((t.bits, t.width, t.step) for t in side.tiers)

        sides = tiers(site.key), tiers(site.value)
        return KernelSpec(*sides, site.key.width, site.value.width, dtype, site.site.softcap != 0.0)

    @functools.cached_property
    def name(self) -> str:
        """Readable parameters and a short hash: the name of the generated file."""

        def side(tiers: tuple[tuple[int, int, float], ...], width: int) -> str:
            return "x".join(f"{w}b{b}" for b, w, _ in tiers) or f"{width}f"

        parameters = {field.name: getattr(self, field.name) for field in fields(self)}
        digest = hashlib.sha256(repr(parameters).encode()).hexdigest()[:8]
        cap = "_cap" if self.softcap else ""
        key, value = side(self.key_tiers, self.key_width), side(self.value_tiers, self.value_width)
        return f"latent_k{key}_v{value}_{self.dtype}{cap}_{digest}"
