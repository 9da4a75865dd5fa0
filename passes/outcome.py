"""The outcome of the pipeline: attention sites, explanations of misses, time per pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from fhopt.passes.certificate import Certificate
from fhopt.passes.graph.program import Program
from fhopt.plan.site import AttentionSite


@dataclass(frozen=True)
class Explanation:
    """Why a candidate was not rewritten.

    stage: the pass. node: its name. source: the line of the user's code. reached: what was recognized up to then.
    """

    stage: str
    node: str
    reason: str
    source: str
    reached: str = ""


@dataclass
class Outcome:
    """The pipeline's result for one program.

    sites: by name of the canonical node. compressed: site name -> layout. lowered: name of an exact site, or of the
    node of an attention without a site -> its implementation. reading: modules whose attention already runs on the
    latents of a cache. missed: candidates that were not rewritten. certificates: evidence for each rewrite, by name of
    the canonical node. assumed: extra input of a plan -> the weights and caches it is computed from. seconds: per pass.
    """

    program: Program
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    compressed: dict[str, str] = field(default_factory=dict)
    lowered: dict[str, str] = field(default_factory=dict)
    reading: tuple[str, ...] = ()
    missed: list[Explanation] = field(default_factory=list)
    certificates: dict[str, Certificate] = field(default_factory=dict)
    assumed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def proofs(self) -> dict[str, Certificate]:
        """Certificates by site name, or by node name for attention without a site."""
        return {self.sites[n].name if n in self.sites else n: found for n, found in self.certificates.items()}
