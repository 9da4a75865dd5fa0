"""Evidence of a fit, kept with the plan so that it can be shown: spectra, bits, expected losses, other sizes.

It stands in the plan's provenance under "evidence", as JSON values, and changes no number of the plan:

    {"sites": {NAME: {"nats": float, "sides": [{"side", "spectrum", "bits", "nats", "sensitivity_nats"}, ...]}},
     "curve": [{"ratio", "bytes_per_token", "nats"}, ...]}

All losses are in nats per token, as the fit expects them. A site that keeps keys and values in one latent has one side.

Letters: J latent heads, R channels of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fhopt.plan.latent_plan import LatentPlan

KEY = "evidence"
DIGITS = 4  # of the numbers that are kept, of which there are many
CURVE_RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
SIDES = ("keys", "values")
SHARED = "keys and values"


@dataclass(frozen=True)
class SideEvidence:
    """One side of one site.

    spectrum: R values, nats that dropping a channel costs, all latent heads together, dearest first. bits: of each
    chunk of TIER_QUANTUM of these channels. nats: what is lost with those bits. sensitivity_nats: what would be lost
    with 2 bits in every channel, or with the fewest bits that were measured.
    """

    side: str
    spectrum: tuple[float, ...]
    bits: tuple[int, ...]
    nats: float
    sensitivity_nats: float


@dataclass(frozen=True)
class Size:
    """A plan of another size from one calibration: its ratio, its bytes per token all counted, its expected loss."""

    ratio: float
    bytes_per_token: float
    nats: float


@dataclass(frozen=True)
class Evidence:
    """Everything that is kept: sides by the name of their site, and other sizes in order of their ratio."""

    sites: Mapping[str, tuple[SideEvidence, ...]]
    curve: tuple[Size, ...]

    def nats(self, site: str) -> float:
        """Return the expected loss of a site, nats per token."""
        return sum(side.nats for side in self.sites[site])

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values that stand in a plan's provenance."""
        return {
            "sites": {name: [_side_json(side) for side in sides] for name, sides in self.sites.items()},
            "curve": [vars(size) for size in self.curve],
        }


def _side_json(side: SideEvidence) -> dict[str, Any]:
    return vars(side) | {"spectrum": list(side.spectrum), "bits": list(side.bits)}


def short(number: float) -> float:
    """Round a number to DIGITS significant digits."""
    return float(f"{number:.{DIGITS}g}")


def side_evidence(
    side: str, variance: Tensor, costs: Mapping[int, Sequence[float]], bits: Sequence[int]
) -> SideEvidence:
    """Summarize one side.

    variance [J, R]: of its basis. costs: bits -> nats of each chunk. bits: of each chunk of the plan. Bits of chunks
    past the last channel are left out.
    """
    chunks = len(costs[0])
    least = 2 if 2 in costs else min(b for b in costs if b)
    used = tuple(bits[:chunks])
    lost = sum(costs[b][i] for i, b in enumerate(used))
    spectrum = tuple(short(v) for v in (0.5 * variance.sum(0)).tolist())
    return SideEvidence(side, spectrum, used, short(lost), short(sum(costs[least])))


def evidence_of(plan: LatentPlan) -> Evidence | None:
    """Read the evidence from a plan's provenance; None for plans that were not fitted, or fitted before it was kept."""
    held = plan.provenance.get(KEY)
    if held is None:
        return None
    sites = {
        name: tuple(SideEvidence(**s | {"spectrum": tuple(s["spectrum"]), "bits": tuple(s["bits"])}) for s in sides)
        for name, sides in held["sites"].items()
    }
    return Evidence(sites, tuple(Size(**size) for size in held["curve"]))
