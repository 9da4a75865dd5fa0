"""Timing of whole decode steps of models with random weights on a GPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from transformers import AutoModelForCausalLM, StaticCache

import fhopt
from benchmarks.gpu.cases import SPARE, HeadShape, LatentStorage, ModelShapes
from benchmarks.gpu.report import GpuReport, line
from benchmarks.gpu.timing import SHARE, WARM, TimedDevice
from benchmarks.recording import Row
from fhopt.codegen.tiers import Tiers
from fhopt.hf.apply import latent_cache
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan

STEPS, ROUNDS = 10, 5  # per model
CHUNK = 1024  # tokens added to a cache at once


def measure_steps(machine: TimedDevice, report: GpuReport, network: ModelShapes, batch: int, tokens: int) -> None:
    """Measure decode steps of one model with every implementation."""
    case = report.case(network.name, batch, tokens)
    fitting = network.depth(batch, tokens, SHARE * machine.free() / machine.dtype.itemsize)
    if fitting < min(2, network.layers):
        report.note(case, "all", f"left out, {fitting} layers fit beside their exact caches, expected 2 or more")
        return
    measured = depths(fitting, network.layers)
    times = {depth: step_times(machine, report, network, depth, batch, tokens) for depth in measured}
    report.add(step_rows(case, network.layers, times))
    click.echo(line(case, report.rows), err=True)


def depths(fitting: int, layers: int) -> tuple[int, ...]:
    """Return the numbers of layers to measure: all, or two to extrapolate from."""
    return (layers,) if fitting == layers else (fitting, fitting // 2)


def step_rows(case: str, layers: int, times: dict[int, dict[str, float]]) -> list[Row]:
    """Return the measurements, and the decode step of all layers, with the fastest exact implementation as baseline."""
    metric, whole = "step_ms", dict(times.get(layers, {}))
    rows = []
    if not whole:
        (n, at_n), (m, at_m) = times.items()
        metric = "step_ms_scaled"
        whole = {name: scaled(layers, n, at_n[name], m, at_m[name]) for name in at_n}
        for depth, times_ms in times.items():
            part = f"{case}, {depth} of {layers} layers"
            rows += [Row(part, name, "step_ms", ms, "ms") for name, ms in times_ms.items()]
    best = min(ms for name, ms in whole.items() if not name.startswith("fhopt"))
    for name, ms in whole.items():
        rows.append(Row(case, name, metric, ms, "ms", baseline=best, ratio=best / ms))
    return rows


def scaled(layers: int, n: int, at_n: float, m: int, at_m: float) -> float:
    """Extrapolate the decode step of all layers from those of n and of m layers."""
    return at_n + (layers - n) * (at_n - at_m) / (n - m)


def step_times(
    machine: TimedDevice, report: GpuReport, network: ModelShapes, layers: int, batch: int, tokens: int
) -> dict[str, float]:
    """Measure milliseconds per decode step of each implementation, one by one: two caches may not fit."""
    places = tokens + SPARE
    model = random_model(machine, network, layers, places)
    give = functools.partial(fill, machine, network, batch, tokens)
    time_step = functools.partial(step_ms, machine, report, model, batch)
    times_ms, cache = {}, give(StaticCache(model.config, places))
    for attention in ("sdpa", "grouped"):
        model.set_attn_implementation(attention)
        compiled = torch.compile(model, backend=machine.compiler, mode="reduce-overhead")
        times_ms[f"transformers, {attention}"] = time_step(compiled, cache, f"{network.name}, {attention}")
    model.set_attn_implementation("sdpa")
    for latent in network.latents:
        del cache
        label = network.shape.label(latent, machine.dtype)
        fhopt.apply(model, hand_plan(network, latent, layers))
        cache = give(latent_cache(model, max_cache_len=places))
        # Equals mode="reduce-overhead", which torch accepts only without options. ratio 1: no second plan.
        compiled = torch.compile(model, backend="flashhead", options={"ratio": 1, "triton.cudagraphs": True})
        times_ms[label] = time_step(compiled, cache, f"{network.name}, {label}")
        fhopt.unapply(model)
    return times_ms


def step_ms(
    machine: TimedDevice, report: GpuReport, model: Any, batch: int, compiled: Callable[..., Any], cache: Any, what: str
) -> float:
    """Measure milliseconds per decode step; the median over rounds of STEPS."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=machine.device)
    options = {cache_argument(model): cache, "use_cache": True}
    counters.clear()
    times = []
    with torch.no_grad():
        for turn in range(1 + ROUNDS):
            machine.wait()
            start = time.perf_counter()
            for _ in range(STEPS if turn else WARM):
                torch.compiler.cudagraph_mark_step_begin()
                compiled(token, **options)
            machine.wait()
            times.append(1e3 * (time.perf_counter() - start) / STEPS)
    if counters["inductor"]["cudagraph_skips"]:
        case = f"{machine.mark}{what}, {len(cache.layers)} layers"
        report.note(case, "CUDA graphs", "inductor recorded none of some part of the step")
    torch._dynamo.reset()
    reset_cudagraph_trees()  # they hold memory; torch 2.13 does it in the line above
    return statistics.median(times[1:])


def random_model(machine: TimedDevice, network: ModelShapes, layers: int, places: int) -> Any:
    """Build the model with random weights."""
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(network.config(layers, places), dtype=machine.dtype).eval()


@torch.no_grad()
def fill(machine: TimedDevice, network: ModelShapes, batch: int, tokens: int, cache: Any) -> Any:
    """Fill a cache with random tokens."""
    for start in range(0, tokens, CHUNK):
        size = batch, network.shape.kv_heads, min(CHUNK, tokens - start), network.shape.dim
        pair = [torch.randn(size, dtype=machine.dtype, device=machine.device) for _ in range(2)]
        for layer in range(len(cache.layers)):
            cache.update(*pair, layer)
    return cache


def hand_plan(network: ModelShapes, latent: LatentStorage, layers: int) -> LatentPlan:
    """Create a plan with `latent` at every layer and random orthonormal bases: only its size is realistic."""
    shape = network.shape
    sites = []
    for layer in range(layers):
        site = AttentionSite(
            f"model.layers.{layer}.self_attn", {}, "self", heads=shape.heads, kv_heads=shape.kv_heads,
            key_dim=shape.dim, value_dim=shape.dim, scale=shape.dim**-0.5, rope=None, key_norm=False, mask="causal",
            softcap=0.0, cache="in-place", source="",
        )  # fmt: skip
        sides = [random_side(shape, latent.heads, side) for side in (latent.key, latent.value)]
        sites.append(SitePlan(site, "head" if latent.heads == shape.kv_heads else "freq", *sides))
    return LatentPlan(tuple(sites), sinks=4, recent=64, block=64)


def random_side(shape: HeadShape, heads: int, side: Tiers) -> SidePlan:
    """Return encode [J,R,n*D], decode [G,D,R]: the same orthonormal rows in each latent head of n = G/J kv heads."""
    width, shared = sum(w for _, w, _ in side), shape.kv_heads // heads
    basis = torch.linalg.qr(torch.randn(shared * shape.dim, width))[0]  # [n*D, R]
    decode = basis.unflatten(0, (shared, shape.dim)).repeat(heads, 1, 1)
    return SidePlan(basis.T.repeat(heads, 1, 1), decode, tuple(BitGroup(*tier) for tier in side))
