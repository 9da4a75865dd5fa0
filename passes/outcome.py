"""What the pipeline did to a program: sites, explanations of what was left alone, seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from fhopt.passes.graph.program import Program
from fhopt.plan.site import AttentionSite


@dataclass(frozen=True)
class Explanation:
    """Why a candidate was left alone: the pass, the node, how far it came, and the line of the user's code."""

    stage: str
    node: str
    reason: str
    source: str
    reached: str = ""


@dataclass
class Outcome:
    """What the pipeline did: sites by canonical node name, explanations of what it left alone, seconds per pass."""

    program: Program
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    compressed: dict[str, str] = field(default_factory=dict)  # site name -> layout
    lowered: dict[str, str] = field(default_factory=dict)  # name of a site that stays exact -> what runs it
    reading: tuple[str, ...] = ()  # modules whose attention reads the latents of a cache
    missed: list[Explanation] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
