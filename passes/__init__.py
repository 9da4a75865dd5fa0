"""The compiler on one page.

    decompose        composites (nn.MultiheadAttention, flex, checkpoints) -> their parts     exact
    functionalize    in-place changes -> new values, written back at the end                  exact
    normalize        every spelling of attention -> fhopt::attention          exact, checked by execution
    find_attention   who projects, rotates, caches -> AttentionSite           reads only
    compress         keys, values -> decode(encode(.)) by the plan            approximate only where the plan says so
    absorb           decode moves onto q and o -> fhopt::latent_attention     exact
    lower            canonical ops -> torch ops for inductor                  exact

Every pass works on a private copy of the graph (a `Program`), has `candidates`, `match` (raises `Miss` with a reason)
and `rewrite` (cannot fail). The pipeline here is the only place that times, dumps and verifies.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from fhopt.errors import Miss, PassError
from fhopt.passes.absorb import Absorb
from fhopt.passes.compress import Compress
from fhopt.passes.decompose import Decompose
from fhopt.passes.find_attention import FindAttention
from fhopt.passes.functionalize import Functionalize
from fhopt.passes.graph import Evaluator, Program, print_graph, remove_dead_code, source_line
from fhopt.passes.lower import Lower
from fhopt.passes.normalize import Normalize
from fhopt.passes.roles import Roles
from fhopt.passes.verify import verify
from fhopt.spec import AttentionSite, LatentPlan

__all__ = ["Explanation", "Outcome", "Program", "find", "merge", "optimize"]


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
    missed: list[Explanation] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def find(program: Program, inline_checkpoints: bool = True) -> Outcome:
    """Find every attention of `program`, in place. Exact: no number changes beyond rounding.

    inline_checkpoints: look into activation checkpoints and dissolve them (else they stay, and are reported).
    """
    outcome = Outcome(program)
    _dump(outcome, "input")
    functional, parts, normalize, describe = (
        Functionalize(),
        Decompose(inline_checkpoints=inline_checkpoints),
        Normalize(),
        FindAttention(),
    )
    with _stage(outcome, parts.name):
        for node in parts.candidates(program):
            with _missing(outcome, parts.name, node):
                parts.rewrite(program, parts.match(node, program))
    with _stage(outcome, functional.name):
        functional.run(program)
    base, roles = Evaluator(program), Roles(program)
    with _stage(outcome, normalize.name):
        for node in normalize.candidates(program):
            with _missing(outcome, normalize.name, node):
                normalize.rewrite(program, normalize.match(node, roles, base))
        remove_dead_code(program)
    with _stage(outcome, describe.name):
        for node in describe.candidates(program):
            with _missing(outcome, describe.name, node):
                site = describe.match(node, program, roles, base)
                outcome.sites[node.name] = _with_own_name(site, {s.name for s in outcome.sites.values()})
    return outcome


@contextlib.contextmanager
def _missing(outcome: Outcome, stage: str, node: fx.Node) -> Iterator[None]:
    """A miss within leaves the candidate alone and is explained."""
    at = source_line(node)
    try:
        yield
    except Miss as miss:
        if miss.reason:  # none: nothing like an attention
            outcome.missed.append(_explain(stage, miss, node, at))


def _with_own_name(site: AttentionSite, taken: set[str]) -> AttentionSite:
    """The site; a second one of the same module is numbered in graph order, `#2`, `#3`, ..."""
    names = (site.name if n == 1 else f"{site.name}#{n}" for n in itertools.count(1))
    return replace(site, name=next(n for n in names if n not in taken))


def merge(outcomes: list[Outcome]) -> Outcome:
    """What was found in several graphs of one model, as one outcome; its program is that with the most sites."""
    if len(outcomes) == 1:
        return outcomes[0]
    merged = Outcome(max(outcomes, key=lambda o: len(o.sites)).program)
    for index, outcome in enumerate(outcomes):
        for node, site in outcome.sites.items():
            merged.sites[f"{index}:{node}"] = _with_own_name(site, {s.name for s in merged.sites.values()})
        merged.missed += outcome.missed
        for stage, seconds in outcome.seconds.items():
            merged.seconds[stage] = merged.seconds.get(stage, 0.0) + seconds
    return merged


def optimize(outcome: Outcome, plan: LatentPlan, training: bool = False) -> Outcome:
    """compress, absorb and lower what `find` found, by the plan, in place; `training` keeps it differentiable."""
    compress, absorb = Compress(plan, training), Absorb()
    with _stage(outcome, compress.name):
        for name, site in outcome.sites.items():
            node = next(n for n in outcome.program.graph.nodes if n.name == name)
            try:
                site_plan = compress.match(node, site)
            except Miss as miss:
                outcome.missed.append(_explain(compress.name, miss, node))
                continue
            compress.rewrite(outcome.program, node, site_plan)
            outcome.compressed[site.name] = site_plan.layout
    with _stage(outcome, absorb.name):
        for node in absorb.candidates(outcome.program):
            absorb.rewrite(outcome.program, absorb.match(node))
    lower(outcome)
    return outcome


def lower(outcome: Outcome) -> Outcome:
    """Hand the canonical ops back as torch ops, so that inductor sees nothing new."""
    stage = Lower()
    with _stage(outcome, stage.name):
        for node in stage.candidates(outcome.program):
            stage.rewrite(outcome.program, node)
    return outcome


class _stage:
    """Times a pass, checks its result, dumps the graph; a failure is raised once, with the pass's name."""

    def __init__(self, outcome: Outcome, name: str) -> None:
        self.outcome, self.name = outcome, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            if isinstance(error, Exception):
                raise PassError(f"pass {self.name} failed: {type(error).__name__}: {error}") from error
            return
        self.outcome.program.module.recompile()
        verify(self.outcome.program, self.name)
        self.outcome.seconds[self.name] = time.perf_counter() - self.start
        _dump(self.outcome, self.name)


def _explain(stage: str, miss: Miss, node: fx.Node, line: str = "") -> Explanation:
    at = miss.node if isinstance(miss.node, fx.Node) else node
    return Explanation(stage, at.name, miss.reason, source_line(at) or line, miss.reached)


def _dump(outcome: Outcome, name: str) -> None:
    """Write the graph to the folder in FHOPT_DUMP, if set: `NN-<pass>.txt`, the first line says what happened."""
    folder = os.environ.get("FHOPT_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    number = len(outcome.seconds)
    head = (
        f"# {name}: {len(outcome.sites)} sites, {len(outcome.compressed)} compressed, "
        f"{outcome.seconds.get(name, 0.0) * 1e3:.0f} ms\n"
    )
    misses = "".join(f"# missed in {m.stage}: {m.node}: {m.reason} ({m.source})\n" for m in outcome.missed)
    (path / f"{number:02d}-{name}.txt").write_text(head + misses + print_graph(outcome.program.graph))
