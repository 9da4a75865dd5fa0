"""The compiler on one page.

    decompose        composites (nn.MultiheadAttention, flex, checkpoints) -> their parts     exact
    functionalize    in-place changes -> new values, written back at the end                  exact
    normalize        every spelling of attention -> fhopt::attention          exact, checked by execution
    find_attention   who projects, rotates, caches -> AttentionSite           reads only
    absorb_projection  attention of models that keep latents reads these      exact, where it pays, inference only
    compress         keys, values -> decode(encode(.)) by the plan            approximate only where the plan says so
    latent_buffers   K/V buffers of a module -> a cache of latents            likewise
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
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import fx

from fhopt.errors import Miss, PassError
from fhopt.passes.absorb import Absorb
from fhopt.passes.absorb_projection import AbsorbProjection
from fhopt.passes.compress import Compress
from fhopt.passes.decompose import Decompose
from fhopt.passes.find_attention import FindAttention, site_name
from fhopt.passes.functionalize import Functionalize
from fhopt.passes.graph import Evaluator, Program, is_ours, module_path, print_graph, remove_dead_code, source_line
from fhopt.passes.latent_buffers import Keeper, LatentBuffers
from fhopt.passes.lower import Lower, is_decoding, is_spelled_out
from fhopt.passes.normalize import Normalize
from fhopt.passes.roles import Roles
from fhopt.passes.verify import verify
from fhopt.spec import AttentionSite, LatentPlan

__all__ = ["Explanation", "Outcome", "Program", "absorb_projections", "find", "merge", "optimize", "watched"]


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


def find(program: Program, inline_checkpoints: bool = True) -> Outcome:
    """Find every attention of `program`, in place. Exact: no number changes beyond rounding.

    inline_checkpoints: look into activation checkpoints and dissolve them (else they stay, and are reported).
    """
    outcome = Outcome(program, reading=readers(program))
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


def readers(program: Program) -> tuple[str, ...]:
    """Module paths of attention that reads the latents of a cache: nothing is left to be done there."""
    ops = [getattr(torch.ops.fhopt, name, None) for name in ("latent_attention", "attend_latents")]
    calls = [n for n in program.graph.nodes if getattr(n.target, "overloadpacket", n.target) in ops]
    return tuple(dict.fromkeys(module_path(n) for n in calls))


@contextlib.contextmanager
def _missing(outcome: Outcome, stage: str, node: fx.Node) -> Iterator[None]:
    """A miss within leaves the candidate alone and is explained."""
    at = source_line(node)
    try:
        yield
    except Miss as miss:
        if miss.reason and not (outcome.reading and is_ours(at)):  # none: nothing like an attention
            outcome.missed.append(_explain(stage, miss, node, at))


def _with_own_name(site: AttentionSite, taken: set[str]) -> AttentionSite:
    """The site; a second one of the same module is numbered in graph order, `#2`, `#3`, ..."""
    return replace(site, name=_own_name(site.name, taken))


def _own_name(name: str, taken: Collection[str]) -> str:
    names = (name if n == 1 else f"{name}#{n}" for n in itertools.count(1))
    return next(n for n in names if n not in taken)


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


def optimize(
    outcome: Outcome, plan: LatentPlan, training: bool = False, trusting: bool = False, keeper: Keeper | None = None
) -> Outcome:
    """compress, absorb and lower what `find` found, by the plan, in place.

    training: keep it differentiable. trusting: use the plan for weights that have changed since it was fitted. keeper:
    holds latents in place of K/V buffers of modules; None: these stay as they are.
    """
    compress, absorb = Compress(plan, training, trusting), Absorb()
    buffers = None if keeper is None else LatentBuffers(compress, keeper)
    program, weights = outcome.program, outcome.program.weights
    roles, base = Roles(program), Evaluator(program)
    with _stage(outcome, compress.name):
        for name, site in outcome.sites.items():
            node = next(n for n in program.graph.nodes if n.name == name)
            with _missing(outcome, compress.name, node):
                if buffers is not None and buffers.is_for(node, site, program):
                    found = buffers.match(node, site, program, roles, base)
                    buffers.rewrite(program, found)
                    fitted = found.fitted
                else:
                    fitted = compress.match(node, site, weights)
                    compress.rewrite(program, node, fitted)
                outcome.compressed[site.name] = fitted.site.layout
    if buffers is not None:
        buffers.check(program, sorted({m.reason for m in outcome.missed if m.stage == compress.name}))
    with _stage(outcome, absorb.name):
        for node in absorb.candidates(outcome.program):
            absorb.rewrite(outcome.program, absorb.match(node))
    return lower(outcome, training)


def absorb_projections(outcome: Outcome, plan: LatentPlan | None = None) -> Outcome:
    """Run attention on the latents that a model keeps already, in place, where that pays. For inference.

    Exact, with no plan; sites that `plan` has are left to it. What is absorbed is no site of a plan any more.
    """
    stage, program = AbsorbProjection(), outcome.program
    planned = {site.site.name for site in plan.sites} if plan is not None else set()
    with _stage(outcome, stage.name):
        roles, base = Roles(program), Evaluator(program)
        for node in stage.candidates(program):
            site = outcome.sites.get(node.name)
            if site is not None and site.name in planned:
                continue
            known = [m for m in outcome.missed if m.stage == FindAttention.name and m.node == node.name]
            try:
                found = stage.match(node, program, roles, base)
            except Miss as miss:
                outcome.missed += [_explain(stage.name, miss, node)] if known else []
                continue
            taken = {s.name for s in outcome.sites.values()} | outcome.compressed.keys()
            name = site.name if site is not None else _own_name(site_name(node, roles), taken)
            outcome.sites.pop(node.name, None)
            outcome.missed = [m for m in outcome.missed if m not in known]
            outcome.compressed[name] = "absorbed"
            stage.rewrite(program, found)
    return outcome


def exact(outcome: Outcome, original: fx.Graph, training: bool = False) -> bool:
    """Every attention by the best exact way, in place; False, and nothing done, where the `original` has it already."""
    nodes = {n.name: n for n in outcome.program.graph.nodes}
    sites = [nodes[name] for name in outcome.sites]
    pays = bool(outcome.compressed) or (not training and any(map(is_decoding, sites))) or is_spelled_out(original)
    if not pays:
        return False
    lower(outcome, training)
    return True


def lower(outcome: Outcome, training: bool = False) -> Outcome:
    """Hand the canonical ops back as torch ops, so that inductor sees nothing new, or to kernels where they pay."""
    stage = Lower(training)
    with _stage(outcome, stage.name):
        for node in stage.candidates(outcome.program):
            site = outcome.sites.get(node.name)
            how = stage.rewrite(outcome.program, node)
            if site is not None:
                outcome.lowered[site.name] = how
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


_watcher: ContextVar[Callable[[Outcome, str], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(by: Callable[[Outcome, str], None]) -> Iterator[None]:
    """Within, `by(outcome, pass)` is called after every pass, and once with "input" before the first of a graph."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def _explain(stage: str, miss: Miss, node: fx.Node, line: str = "") -> Explanation:
    at = miss.node if isinstance(miss.node, fx.Node) else node
    return Explanation(stage, at.name, miss.reason, source_line(at) or line, miss.reached)


def _dump(outcome: Outcome, name: str) -> None:
    """Write the graph to the folder in FHOPT_DUMP, if set: `NN-<pass>.txt`, the first line says what happened."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(outcome, name)
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
