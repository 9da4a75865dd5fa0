"""Benchmark of the resident memory of SmolLM2's KV caches at 8,192 tokens, measured on the process.

    python -m benchmarks.cpu.memory          writes benchmarks/results/memory.json; about 15 minutes
    python -m benchmarks.cpu.memory --quick  1,024 tokens, plain 4 bits instead of fitted plans (also QUICK=1)

Every cache has its own process. The model, in bfloat16, prefills in chunks of 512 tokens and decodes the last 64 one by
one, so that storage grows as in use; the result is the growth of the process's anonymous memory. It does the same once
before, so that kernels and workspaces exist. Freed blocks retained by the C library are returned before both
measurements (`malloc_trim`); `untrimmed_bytes` is the result without that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

import fhopt
from benchmarks.recording import Row, child_environment, is_quick, process_bytes, record
from fhopt.cache.report import REGIONS, cache_bytes, cache_report
from fhopt.calibration.options import FitOptions
from fhopt.calibration.run import plan_from_calibration
from fhopt.evaluation.perplexity import new_cache
from fhopt.fitting import fit_plan
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument
from fhopt.models.sites import find_sites
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan
from fhopt.planning.pipeline import calibrate_source, text_source
from fhopt.texts import tokens as texts_tokens

TOKENS, CHUNK, SINGLE = 8192, 512, 64
RATIOS = (4.0, 5.3, 8.0)
EXACT = "exact"
MAX_SHARE = 1.03  # max ratio of measured to planned share


# --------------------------------------------------------------------------------------------------- one process


@torch.no_grad()
def fill(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Run `ids` [1, T] through the model into the cache: prefill chunks, then single tokens."""
    many, few = ids[:, : ids.shape[1] - SINGLE], ids[:, ids.shape[1] - SINGLE :]
    for part in (*many.split(CHUNK, 1), *few.split(1, 1)):
        model(part, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)


def measured(plan_path: str, tokens: int) -> dict[str, Any]:
    """Measure the memory of a cache of `tokens` tokens in this process, and its own report."""
    loaded = load_model("demo", torch.bfloat16)
    model = loaded.language_model()
    plan = None if plan_path == EXACT else LatentPlan.load(plan_path)
    if plan is not None:
        fhopt.apply(model, plan)
    ids = texts_tokens.calibration_ids(loaded.tokenizer, ("source",), count=1, length=tokens)[:1]
    fill(model, new_cache(model, plan), ids)
    before = process_bytes()
    cache = new_cache(model, plan)
    fill(model, cache, ids)
    untrimmed = process_bytes(trim=False) - before
    regions = {name: sum(row[name] for row in cache_report(cache)) for name in REGIONS}
    return {
        "resident_bytes": process_bytes() - before,
        "untrimmed_bytes": untrimmed,
        "held_bytes": cache_bytes(cache),
        "formula_bytes": plan.cache_bytes(tokens) if plan is not None else cache_bytes(cache),
        "ratio": plan.ratio(tokens) if plan is not None else 1.0,
        "regions": regions,
    }


# --------------------------------------------------------------------------------------------------- all processes


def plain_plan(loaded: LoadedModel) -> LatentPlan:
    """Create a plan with 4 bits for every channel, without calibration."""

    def in_four_bits(side: SidePlan) -> SidePlan:
        return replace(side, tiers=(BitGroup(4, side.width, 0.4),))

    sites = fit_plan.exact_plan(find_sites(loaded).sites.values(), recent=64).sites
    plans = tuple(SitePlan(s.site, s.layout, in_four_bits(s.key), in_four_bits(s.value)) for s in sites)
    return LatentPlan(plans, 4, 64, 64, window_bits=8)


def plans(folder: Path, quick: bool) -> dict[str, Path]:
    """Fit plans once, store them in `folder`, and return their paths by name."""
    loaded = load_model("demo")
    if quick:
        return {"plain 4 bits": plain_plan(loaded).save(folder / "plain")}
    options = FitOptions(ratio=RATIOS[0], tokens=TOKENS)
    collected = calibrate_source(text_source(loaded), options)
    return {
        f"{ratio:g}x": plan_from_calibration(collected, replace(options, ratio=ratio)).save(folder / f"{ratio:g}x")
        for ratio in RATIOS
    }


def in_a_process(plan: str, tokens: int) -> dict[str, Any]:
    """Run `measured` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu.memory", "--only", plan, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    if done.returncode:
        raise click.ClickException(f"the process for {plan} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_of(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Return results for all caches, with the full-precision cache as baseline."""
    rows, exact = [], results[EXACT]
    for name, result in results.items():
        for metric in ("resident_bytes", "untrimmed_bytes", "held_bytes", "formula_bytes"):
            value, base = float(result[metric]), float(exact[metric])
            rows.append(Row(name, "fhopt" if name != EXACT else EXACT, metric, value, "bytes", base, base / value))
        rows += [
            Row(name, "fhopt" if name != EXACT else EXACT, f"{region}_bytes", float(size), "bytes")
            for region, size in result["regions"].items()
        ]
    return rows


def verdicts(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return a sentence per plan: whether it keeps its share of the full-precision cache's resident bytes."""
    words_by_plan, exact = {}, results[EXACT]["resident_bytes"]
    for name, result in results.items():
        if name != EXACT:
            share, most = result["resident_bytes"] / exact, MAX_SHARE / result["ratio"]
            words_by_plan[name] = (
                f"{share:.4f} of the exact cache, {'at most' if share <= most else 'MORE THAN'} {most:.4f}"
            )
    return words_by_plan


def summary(results: dict[str, dict[str, Any]]) -> Table:
    """Format a line for each cache."""
    table = Table("cache", "growth of process", "of exact", "held", "formula", title="MiB")
    for name, result in results.items():
        sizes = [f"{result[key] / 2**20:.1f}" for key in ("resident_bytes", "held_bytes", "formula_bytes")]
        table.add_row(name, sizes[0], f"{result['resident_bytes'] / results[EXACT]['resident_bytes']:.4f}", *sizes[1:])
    return table


@click.command()
@click.option("--quick", is_flag=True, help="1,024 tokens, a plan without calibration.")
@click.option("--only", help="Measure this plan (a folder, or 'exact') in this process and print JSON.")
@click.option(
    "--plan", "plan_paths", multiple=True, type=click.Path(exists=True), help="Measure these plans of the demo's model."
)
@click.option("--tokens", type=int, help="Tokens to read.")
def main(quick: bool, only: str | None, plan_paths: tuple[str, ...], tokens: int | None) -> None:
    """Measure the full-precision cache and those of plans, each in a separate process."""
    quick = quick or is_quick()
    tokens = tokens or (1024 if quick else TOKENS)
    if only is not None:
        click.echo(json.dumps(measured(only, tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {Path(p).name: Path(p) for p in plan_paths} or plans(Path(folder), quick)
        results = {name: in_a_process(str(path), tokens) for name, path in ({EXACT: EXACT} | paths).items()}
    record("memory", rows_of(results), summary=summary(results))
    words_by_plan = verdicts(results)
    for name, words in words_by_plan.items():
        click.echo(f"{name}: resident bytes are {words}")
    sys.exit(any("MORE" in words for words in words_by_plan.values()))


if __name__ == "__main__":
    main()
