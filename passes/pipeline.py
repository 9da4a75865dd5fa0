"""The compiler on one page: the order of the passes.

    find      decompose            MultiheadAttention(x), flex_attention(q, k, v)     ->  linear, matmul, softmax, ...
              functionalize        k_cache[:, :, pos] = k                              ->  k_new = written(k_cache, ...)
              normalize            softmax(q k^T * c + mask) v                         ->  fhopt::attention(q, k, v, m)
              find_attention       fhopt::attention                                    ->  AttentionSite

    absorb_projections             k, v = up(latent)                                   ->  fhopt::latent_attention

    optimize  compress             fhopt::attention(q, k, v)            ->  latent_attention(q, decode(encode(k)), ...)
              latent_buffers       K/V buffers of a module              ->  buffers of latents
              absorb               latent_attention(q, decode(z), ...)  ->  latent_attention(q~, z, ...)
    lower                          fhopt::attention                     ->  scaled_dot_product_attention, or a kernel

Every pass works on a private copy of the graph, a `Program`. A pass has `candidates`, `match`, which raises `Miss` with
a reason, and `rewrite`, which cannot fail. Only the pipeline times, verifies and dumps (`stages`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import fx

from fhopt.errors import FhoptError, Miss
from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.graph.nodes import is_ours, remove_dead_code, source_line
from fhopt.passes.graph.program import Program, module_path
from fhopt.passes.outcome import Outcome
from fhopt.passes.prepare.casts import resolve_casts
from fhopt.passes.prepare.decompose import Decompose
from fhopt.passes.prepare.functionalize import Functionalize
from fhopt.passes.recognize.canonical import certificate
from fhopt.passes.recognize.find_attention import FindAttention, reader_name, site_name
from fhopt.passes.recognize.masks import windowed
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.recognize.normalize import Normalize
from fhopt.passes.recognize.readable import left_out
from fhopt.passes.rewrite.absorb import Absorb
from fhopt.passes.rewrite.absorb_projection import AbsorbProjection
from fhopt.passes.rewrite.compress import Compress
from fhopt.passes.rewrite.latent_buffers import Keeper, LatentBuffers
from fhopt.passes.rewrite.lower import Lower, is_decoding, is_spelled_out
from fhopt.passes.stages import dump_certificates, dump_stage, explain_miss, failure, run_stage
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite


def find_attentions(program: Program, inline_checkpoints: bool = True, assume_finite: bool = False) -> Outcome:
    """Find every attention of `program`, in place. Exact up to rounding.

    inline_checkpoints: replace activation checkpoints by their contents; if False they stay and are reported.
    assume_finite: see `Normalize`.
    """
    outcome = Outcome(program, reading=readers(program))
    dump_stage(outcome, "input")
    functional, parts, normalize, describe = (
        Functionalize(),
        Decompose(inline_checkpoints=inline_checkpoints),
        Normalize(assume_finite=assume_finite),
        FindAttention(),
    )
    with run_stage(outcome, parts.name):
        for node in parts.candidates(program):
            with _isolated(outcome, parts.name, node):
                parts.rewrite(program, parts.match(node, program))
        resolve_casts(program)
    with run_stage(outcome, functional.name):
        functional.run(program)
    base, roles = Evaluator(program), Roles(program)
    with run_stage(outcome, normalize.name):
        candidates = normalize.candidates(program)
        for node in candidates:
            with _isolated(outcome, normalize.name, node):
                core = normalize.match(node, roles, base)
                outcome.certificates[normalize.rewrite(program, core).name] = certificate(core)
        explained = {m.node for m in outcome.missed}
        known = [n for n in program.graph.nodes if n in candidates or n.name in explained]
        outcome.missed += [explain_miss(normalize.name, miss, miss.node) for miss in left_out(program, known)]
        remove_dead_code(program)
    with run_stage(outcome, describe.name):
        for node in describe.candidates(program):
            with _isolated(outcome, describe.name, node):
                site = describe.match(node, program, roles, base)
                site = replace(site, name=reader_name(site, outcome.sites.values()))
                site = _with_own_name(site, {s.name for s in outcome.sites.values()})
                outcome.sites[node.name] = windowed(site, program.layers)
    dump_certificates(outcome)
    return outcome


def readers(program: Program) -> tuple[str, ...]:
    """Return the paths of modules whose attention already runs on the latents of a cache; they need no rewriting."""
    ops = [getattr(torch.ops.fhopt, name, None) for name in ("latent_attention", "attend_latents")]
    calls = [n for n in program.graph.nodes if getattr(n.target, "overloadpacket", n.target) in ops]
    return tuple(dict.fromkeys(module_path(n) for n in calls))


@contextlib.contextmanager
def _explained(outcome: Outcome, stage: str, node: fx.Node) -> Iterator[None]:
    """Record a Miss raised within as an explanation; the candidate stays unchanged."""
    at = source_line(node)
    try:
        yield
    except Miss as miss:
        if miss.reason and not (outcome.reading and is_ours(at)):  # without a reason: not attention-like
            outcome.missed.append(explain_miss(stage, miss, node, at))


@contextlib.contextmanager
def _isolated(outcome: Outcome, stage: str, node: fx.Node) -> Iterator[None]:
    """Record any exception raised within, except FhoptError, as an explanation; other sites are still rewritten."""
    at = source_line(node)
    try:
        with _explained(outcome, stage, node):
            yield
    except FhoptError:
        raise
    except Exception as error:
        outcome.missed.append(explain_miss(stage, failure(stage, error, node), node, at))


def _with_own_name(site: AttentionSite, taken: set[str]) -> AttentionSite:
    """Give a second site of the same module a number in graph order: `#2`, `#3`, ..."""
    return replace(site, name=_own_name(site.name, taken))


def _own_name(name: str, taken: Collection[str]) -> str:
    names = (name if n == 1 else f"{name}#{n}" for n in itertools.count(1))
    return next(n for n in names if n not in taken)


def merge_outcomes(outcomes: list[Outcome]) -> Outcome:
    """Merge the outcomes of several graphs of one model; the program is taken from the graph with the most sites."""
    if len(outcomes) == 1:
        return outcomes[0]
    merged = Outcome(max(outcomes, key=lambda o: len(o.sites)).program)
    for index, outcome in enumerate(outcomes):
        for node, site in outcome.sites.items():
            merged.sites[f"{index}:{node}"] = _with_own_name(site, {s.name for s in merged.sites.values()})
        merged.missed += outcome.missed
        merged.certificates |= {f"{index}:{node}": found for node, found in outcome.certificates.items()}
        merged.assumed |= outcome.assumed
        for stage, seconds in outcome.seconds.items():
            merged.seconds[stage] = merged.seconds.get(stage, 0.0) + seconds
    return merged


def optimize(
    outcome: Outcome, plan: LatentPlan, training: bool = False, trusting: bool = False, keeper: Keeper | None = None
) -> Outcome:
    """Run `compress`, `absorb` and `lower` on the sites of `find_attentions`, according to the plan, in place.

    training: keep the graph differentiable. trusting: use the plan for weights that have changed since it was fitted.
    keeper: stores latents instead of the K/V buffers of modules; None: these buffers stay unchanged.
    """
    compress, absorb = Compress(plan, training, trusting), Absorb()
    buffers = None if keeper is None else LatentBuffers(compress, keeper)
    program, weights = outcome.program, outcome.program.weights
    roles, base = Roles(program), Evaluator(program)
    with run_stage(outcome, compress.name):
        for name, site in outcome.sites.items():
            node = next(n for n in program.graph.nodes if n.name == name)
            with _explained(outcome, compress.name, node):
                if buffers is not None and buffers.is_for(node, site, program):
                    buffered = buffers.match(node, site, program, roles, base)
                    buffers.rewrite(program, buffered)
                    fitted = buffered.fitted
                else:
                    fitted = compress.match(node, site, weights)
                    compress.rewrite(program, node, fitted)
                outcome.compressed[site.name] = fitted.site.layout
    names = program.parameters | program.buffers
    outcome.assumed = {n: tuple(names.get(s, s) for s in bound.sources) for n, bound in program.bound.items()}
    if buffers is not None:
        buffers.check(program, sorted({m.reason for m in outcome.missed if m.stage == compress.name}))
    with run_stage(outcome, absorb.name):
        for node in absorb.candidates(outcome.program):
            absorb.rewrite(outcome.program, absorb.match(node))
    return lower_program(outcome, training)


def absorb_projections(outcome: Outcome, plan: LatentPlan | None = None) -> Outcome:
    """Run attention on the latents that a model already caches, in place, if that is faster. For inference.

    Exact, without a plan; sites of `plan` are left to `optimize`. An absorbed attention is no longer a site.
    """
    stage, program = AbsorbProjection(), outcome.program
    planned = {site.site.name for site in plan.sites} if plan is not None else set()
    with run_stage(outcome, stage.name):
        roles, base = Roles(program), Evaluator(program)
        for node in stage.candidates(program):
            site = outcome.sites.get(node.name)
            if site is not None and site.name in planned:
                continue
            known = [m for m in outcome.missed if m.stage == FindAttention.name and m.node == node.name]
            try:
                kept = stage.match(node, program, roles, base)
            except Miss as miss:
                outcome.missed += [explain_miss(stage.name, miss, node)] if known else []
                continue
            taken = {s.name for s in outcome.sites.values()} | outcome.compressed.keys()
            name = site.name if site is not None else _own_name(site_name(node, roles), taken)
            outcome.sites.pop(node.name, None)
            outcome.missed = [m for m in outcome.missed if m not in known]
            outcome.compressed[name] = "absorbed"
            stage.rewrite(program, kept)
    return outcome


def exact(outcome: Outcome, original: fx.Graph, training: bool = False) -> bool:
    """Lower every attention exactly, in place; return False, changing nothing, if `original` is as fast."""
    canonical = FindAttention().candidates(outcome.program)  # with or without projections (then no site)
    attentions = [n for n in canonical if n.name in outcome.sites or not outcome.reading]
    decodes = not training and any(map(is_decoding, attentions))
    if not outcome.compressed and not (attentions and (decodes or is_spelled_out(original))):
        return False
    lower_program(outcome, training)
    return True


def lower_program(outcome: Outcome, training: bool = False) -> Outcome:
    """Lower the canonical ops to torch ops, which inductor fuses, or to kernels if these are faster."""
    stage = Lower(training)
    with run_stage(outcome, stage.name):
        for node in stage.candidates(outcome.program):
            site, name = outcome.sites.get(node.name), node.name
            is_exact = node.target is torch.ops.fhopt.attention.default
            how = stage.rewrite(outcome.program, node)
            if is_exact:
                outcome.lowered[site.name if site is not None else name] = how
    return outcome
