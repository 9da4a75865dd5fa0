"""The graph compiler: it finds attention in a graph and rewrites it, exactly or by a plan.

`pipeline` runs the passes. `prepare`, `recognize` and `rewrite` hold them, `graph` what they share. README.md has their
contract.
"""

from fhopt.passes.graph.program import Program
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.passes.pipeline import absorb_projections, find, merge, optimize
from fhopt.passes.stages import watched

__all__ = ["Explanation", "Outcome", "Program", "absorb_projections", "find", "merge", "optimize", "watched"]
