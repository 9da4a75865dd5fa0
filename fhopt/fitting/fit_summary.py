"""Evidence of a fit, stored with the plan for display: spectra, bits, expected KL, other sizes.

JSON values in the plan's provenance under "evidence"; they do not affect the plan:

    {"sites": {NAME: {"nats": float, "sides": [{"side", "spectrum", "bits", "nats", "sensitivity_nats"}, ...]}},
     "curve": [{"ratio", "bytes_per_token", "nats"}, ...]}

All values are expected KL in nats/token. A site with keys and values in one latent has one side. Dimensions: J latent
heads of R channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fhopt.plan.latent_plan import LatentPlan

KEY = "evidence"
DIGITS = 4  # significant digits; there are many values
CURVE_RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
SIDES = ("keys", "values")
SHARED = "keys and values"


@dataclass(frozen=True)
class SideEvidence:
    """Evidence of one side of one site.

    spectrum: R values, the nats that dropping a channel costs, summed over latent heads, in descending order. bits: of
    each chunk of TIER_QUANTUM of these channels. nats: expected KL with those bits. sensitivity_nats: expected KL with
    2 bits in every channel, or with the fewest bits that were measured.
    """

    side: str
    spectrum: tuple[float, ...]
    bits: tuple[int, ...]
    nats: float
    sensitivity_nats: float


@dataclass(frozen=True)
class PlanSize:
    """A plan of another size from the same calibration: ratio, bytes per token including everything, expected KL."""

    ratio: float
    bytes_per_token: float
    nats: float


@dataclass(frozen=True)
class Evidence:
    """All evidence of a fit: sides by site name, and other sizes in ascending order of ratio."""

    sites: Mapping[str, tuple[SideEvidence, ...]]
    curve: tuple[PlanSize, ...]

    def nats(self, site: str) -> float:
        """Return the expected KL of a site in nats/token."""
        return sum(side.nats for side in self.sites[site])

    def as_json(self) -> dict[str, Any]:
        """Return the JSON values for a plan's provenance."""
        return {
            "sites": {name: [_side_json(side) for side in sides] for name, sides in self.sites.items()},
            "curve": [vars(size) for size in self.curve],
        }


def _side_json(side: SideEvidence) -> dict[str, Any]:
    return vars(side) | {"spectrum": list(side.spectrum), "bits": list(side.bits)}


def round_digits(number: float) -> float:
    """Round to DIGITS significant digits."""
    return float(f"{number:.{DIGITS}g}")


def side_evidence(
    side: str, variance: Tensor, costs: Mapping[int, Sequence[float]], bits: Sequence[int]
) -> SideEvidence:
    """Summarize one side.

    variance [J, R]: of its basis. costs: bits -> nats of each chunk. bits: of each chunk of the plan; chunks past the
    last channel are left out.
    """
    chunks = len(costs[0])
    least = 2 if 2 in costs else min(b for b in costs if b)
    used = tuple(bits[:chunks])
    lost = sum(costs[b][i] for i, b in enumerate(used))
    spectrum = tuple(round_digits(v) for v in (0.5 * variance.sum(0)).tolist())
    return SideEvidence(side, spectrum, used, round_digits(lost), round_digits(sum(costs[least])))


def evidence_of(plan: LatentPlan) -> Evidence | None:
    """Return the evidence in a plan's provenance; None for plans that were not fitted or predate it."""
    held = plan.provenance.get(KEY)
    if held is None:
        return None
    sites = {
        name: tuple(SideEvidence(**s | {"spectrum": tuple(s["spectrum"]), "bits": tuple(s["bits"])}) for s in sides)
        for name, sides in held["sites"].items()
    }
    return Evidence(sites, tuple(PlanSize(**size) for size in held["curve"]))
