"""The invariants checked after each pass: a valid graph, fake values on fhopt's own calls, values for all inputs."""

from __future__ import annotations

from torch import fx

from fhopt.errors import PassError
from fhopt.passes.graph.nodes import fake
from fhopt.passes.graph.program import Program


def check_invariants(program: Program, after: str) -> None:
    """Check the invariants of a pass. Raises PassError, which names the pass, if the graph violates one."""
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise PassError(f"pass {after} left an invalid graph: {error}") from error
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    if placeholders != list(program.values):
        extra = set(placeholders) ^ set(program.values)
        raise PassError(f"pass {after} left placeholders without values, or in another order: {sorted(extra)}")
    bare = [n for n in program.graph.nodes if _is_ours(n) and fake(n) is None]
    if bare:
        raise PassError(f"pass {after} left {bare[0].name} ({bare[0].target}) without a fake value")


def _is_ours(node: fx.Node) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith("fhopt")
