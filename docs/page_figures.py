"""Fill the measured numbers of documentation pages from benchmarks/results/*.json.

    python docs/page_figures.py        writes the pages of `PAGES`

A block between `<!-- figures: NAME -->` and `<!-- end -->` holds what the function `NAME` of `BLOCKS` returns. Every
measured number of these pages is in such a block, and a test compares the blocks with the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality_tables
from quality_tables import CacheQuality, nats, percent
from results_tables import (
    RESULTS,
    ROOT,
    Results,
    compiled_zoo,
    engine_throughput,
    fill_blocks,
    number,
    read_results,
    table,
)
from results_tables import zoo as zoo_table
from results_tables import zoo_wide as zoo_wide_table

DOCS = ROOT / "docs"
PAGES = ("measurements.md", "explanation/finding.md", "howto/choose_bytes.md", "howto/serve_with_vllm.md",
         "howto/small_weights.md")  # fmt: skip
SMOLLM2 = "quality-SmolLM2-135M-Instruct"
MODELS = {
    SMOLLM2: "SmolLM2-135M",
    "quality-Qwen2.5-Coder-0.5B-Instruct": "Qwen2.5-Coder-0.5B, without segments",
    "quality-Qwen2.5-Coder-1.5B-Instruct-codes": "Qwen2.5-Coder-1.5B",
    "quality-Qwen2.5-Coder-1.5B-Instruct-float32": "Qwen2.5-Coder-1.5B, `--device cpu`",
}  # files of the comparison of models


def plans(results: Results) -> dict[float, CacheQuality]:
    """Return the plans of a results file by compression ratio, those with most texts."""
    found = sorted((c for c in quality_tables.caches(results) if c.is_plan), key=lambda cache: cache.texts)
    return {cache.size: cache for cache in found}


def quality(folder: Path) -> str:
    """Format plans of default options with the best comparable method."""
    results = read_results(folder, SMOLLM2)
    lines = []
    for size, plan in sorted(plans(results).items()):
        other = quality_tables.best_other(results, plan)
        against = "none of this size"
        if other:
            against = f"{other.kl / plan.kl:.1f}x ({other.shown}, {other.size:g}x)"
        lines.append([f"{size:g}x", f"{percent(plan.rise)} ({percent(plan.worst_rise)})", nats(plan.kl), against])
    return table(
        ["compression", "perplexity, mean (worst text)", "KL, nats/token", "KL of the best other method"], lines
    )


def expected_quality(folder: Path) -> str:
    """Format what each size costs, without other methods."""
    found = plans(read_results(folder, SMOLLM2))
    lines = (
        [f"{size:g}x", percent(plan.rise), percent(plan.worst_rise), nats(plan.kl)]
        for size, plan in sorted(found.items())
    )
    return table(["compression", "perplexity, mean", "worst text", "KL, nats/token"], lines)


def models(folder: Path) -> str:
    """Format 4x and 8x plans of every model, with KIVI at 3 bits."""
    lines = []
    for file, name in MODELS.items():
        results = read_results(folder, file)
        kivi = [c for c in quality_tables.caches(results) if c.name == "kivi-3bit"]
        four, eight = (plans(results)[size] for size in (4.0, 8.0))
        lines.append([
            name, *(f"{nats(plan.kl)} ({percent(plan.worst_rise)})" for plan in (four, eight)),
            nats(kivi[0].kl) if kivi else "-",
        ])  # fmt: skip
    return table(["model", "4x: KL (worst perplexity)", "8x: KL (worst perplexity)", "KIVI 3-bit, 3.58x: KL"], lines)


def trellis(folder: Path) -> str:
    """Format uniform and trellis codes of one calibration."""
    found = {(c.size, c.name): c for c in quality_tables.caches(read_results(folder, f"{SMOLLM2}-codes"))}
    lines = []
    for size in sorted({size for size, _ in found}):
        uniform, code = (found[size, f"fhopt, {name}"] for name in ("uniform", "trellis"))
        change = f"{100 * (code.kl / uniform.kl - 1):+.0f}%"
        lines.append(
            [f"{size:g}x", nats(uniform.kl), nats(code.kl), change, f"{100 * (uniform.kl / code.kl - 1):+.0f}%"]
        )
    return table(["compression", "KL, uniform", "KL, trellis", "trellis vs. uniform", "uniform vs. trellis"], lines)


def calibration(folder: Path) -> str:
    """Format KL by the number of calibration tokens."""
    by_case: dict[str, dict[tuple[str, str], float]] = {}
    for row in read_results(folder, "calibration_curve").rows:
        by_case.setdefault(row["case"], {})[row["impl"], row["metric"]] = row["value"]
    lines = (
        [f"{int(case.split('/')[1]):,}", case.split("/")[0].split(", ")[1], nats(found["fhopt@4x", "kl_nats"]),
         nats(found["fhopt@8x", "kl_nats"]), f"{found['calibration', 'seconds']:.0f} s"]
        for case, found in by_case.items()
    )  # fmt: skip
    return table(["tokens", "dtype", "KL at 4x", "KL at 8x", "calibration time"], lines)


def tasks(folder: Path) -> str:
    """Format accuracy of tasks with at least ten items."""
    results = read_results(folder, "tasks")
    cells = {(row["case"], row["impl"], row["metric"]): row["value"] for row in results.rows}
    lines = []
    for row in results.of("items"):
        case = row["case"]
        if row["value"] >= 10:
            right = [cells[case, impl, "accuracy_percent"] for impl in ("exact", "fhopt@4x", "fhopt@8x")]
            low, high = (cells.get((case, "fhopt@8x", f"accuracy_change_{end}")) for end in ("low", "high"))
            task, context = case.split("/")[1].split("@")
            interval = "-" if low is None or high is None else f"{low:+.0f} to {high:+.0f}"
            lines.append(
                [f"`{task}`, {int(context):,}", f"{row['value']:.0f}", *(f"{x:.0f}%" for x in right), interval]
            )
    return table(["task, context", "n", "full precision", "4x", "8x", "8x: 95% CI of the change, points"], lines)


def decode(folder: Path) -> str:
    """Format the latency of a decode step at each context, batch 1."""
    steps: dict[int, dict[str, dict[str, Any]]] = {}
    for name in ("decode-contexts", "decode"):
        for row in read_results(folder, name).of("step_ms"):
            if row["case"].startswith("batch 1, float32"):
                tokens = int(re.sub(r"\D", "", row["case"].removeprefix("batch 1, float32")))
                steps.setdefault(tokens, {})[row["impl"]] = row
    lines = []
    for tokens, found in steps.items():
        ours = (found[name] for name in ("fhopt exact", "fhopt 4x, growing", "fhopt 8x, growing"))
        baseline = found["fhopt exact"]["baseline"]
        lines.append([f"{tokens:,}", f"{baseline:.1f} ms", *(f"{r['value']:.1f} ms ({r['ratio']:.2f}x)" for r in ours)])
    return table(["context", "fastest in transformers", "exact mode, compiled", "4x, eager", "8x, eager"], lines)


def engines(folder: Path) -> str:
    """Format decode and prompt throughput beside the fastest other engine, 16-bit weights, batch 1."""
    results, lines = read_results(folder, "peers"), []
    for unit in ("AVX512", "AVX2"):
        for stage, words in (("decode", "decode"), ("prefill", "prompt")):
            for context in (512, 2048, 8000):
                speeds = engine_throughput(results, f"SmolLM2-135M-Instruct/{context}/1/{unit}", stage)
                if "fhopt 4x" in speeds:
                    lines.append([f"{UNITS[unit]}, {words}", f"{context:,}", *_race(speeds)])
    return table(["CPU, phase", "context", "exact mode", "4x", "8x", "fastest other engine"], lines)


UNITS = {"AVX512": "AVX-512", "AVX2": "AVX2 only"}


def _race(found: dict[str, float]) -> list[str]:
    """Return throughputs of fhopt, and of the fastest other engine."""
    other = max((name for name in found if not name.startswith("fhopt")), key=lambda name: found[name])
    ours = (found[name] for name in ("fhopt exact", "fhopt 4x", "fhopt 8x"))
    return [*(f"{x:,.0f} ({x / found[other]:.2f}x)" for x in ours), f"{found[other]:,.0f} ({other})"]


def small_weights(folder: Path) -> str:
    """Format throughput of 4-bit weights on both models, AVX-512 and AVX2."""
    names = ("fhopt 4x", "fhopt 4x, Q4_0", "llama.cpp Q4_0, K/V f16", "ik_llama Q4_0, K/V q8_0")
    cases: dict[str, dict[tuple[str, str], float]] = {}
    for row in read_results(folder, "peers").rows:
        if row["case"].count("/") == 3 and row["case"].split("/")[2] == "1" and row["value"] and row["impl"] in names:
            cases.setdefault(row["case"], {})[row["impl"], row["metric"]] = row["value"]
    lines = []
    for case, found in cases.items():
        if ("fhopt 4x, Q4_0", "decode_tokens_per_second") in found:
            model, context, _, unit = case.split("/")
            shown = (_pair(found, name) for name in names)
            lines.append([f"{model.removesuffix('-Instruct')}, {int(context):,}, {UNITS[unit]}", *shown])
    head = ["model, context, CPU", "fhopt 4x, BF16 weights", "fhopt 4x, Q4_0", "llama.cpp Q4_0, K/V f16",
            "ik_llama Q4_0, K/V q8_0"]  # fmt: skip
    return table(head, lines)


def _pair(found: dict[tuple[str, str], float], name: str) -> str:
    """Return decode and prompt throughput."""
    values = [found.get((name, f"{phase}_tokens_per_second")) for phase in ("decode", "prefill")]
    return " / ".join("-" if value is None else f"{value:,.0f}" for value in values)


def memory(folder: Path) -> str:
    """Format how much a process grows."""
    results = read_results(folder, "memory")
    rows = (("full precision", "exact", "exact"), ("4x", "4x", "fhopt"))
    lines = (
        [
            name,
            *(f"{results.value(metric, case, impl) / 2**20:.1f} MiB" for metric in ("resident_bytes", "formula_bytes")),
        ]
        for name, case, impl in rows
    )
    return table(["KV cache", "growth of the process", "size by the plan's formula"], lines)


SERVED = {"exact": "no plan", "fhopt@4x": "4x", "fhopt@4x-cpu": "4x, `--layout head`", "fhopt@8x": "8x"}


def capacity(folder: Path) -> str:
    """Format how many requests vLLM serves at once."""
    rows = read_results(folder, "serving").of("concurrency")
    lines = ([SERVED[row["impl"]], f"{row['value']:.2f}", f"{row['ratio']:.2f}x"] for row in rows)
    return table(["served with", "8,192-token requests in 1 GiB", "relative"], lines)


def serving(folder: Path) -> str:
    """Format throughput and time to first token in vLLM, relative to vLLM without a plan."""
    results = read_results(folder, "serving")
    cells = {(row["case"], row["impl"], row["metric"]): row["ratio"] for row in results.rows}
    cases = dict.fromkeys(row["case"] for row in results.of("decode_tokens_per_second"))
    impls = list(SERVED)[1:]
    lines = (
        [case, *(f"{cells[case, impl, metric]:.2f}x" for metric in SERVED_METRICS for impl in impls)] for case in cases
    )
    names = [SERVED[impl] for impl in impls]
    return table(["requests x prompt", *(f"{what}: {n}" for what in ("decode", "first token") for n in names)], lines)


SERVED_METRICS = ("decode_tokens_per_second", "time_to_first_token_ms")


def load(folder: Path) -> str:
    """Format throughput and latency of vLLM under load."""
    results = read_results(folder, "serving")
    cells = {(row["impl"], row["metric"]): row["value"] for row in results.rows}
    lines = (
        [name, f"{cells[impl, 'requests_per_minute']:.1f}", f"{cells[impl, 'mean_first_token_ms'] / 1000:.0f} s",
         f"{cells[impl, 'mean_token_ms'] / 1000:.2f} s"]
        for impl, name in SERVED.items()
    )  # fmt: skip
    return table(["", "requests/min", "mean time to first token", "mean time per output token"], lines)


def page_selection(folder: Path) -> str:
    """Format the change in perplexity by text, and right answers, when one page in eight is attended to."""
    cells: dict[str, dict[str, float]] = {}
    for row in read_results(folder, "retrieval").rows:
        if row["impl"] == "one page in eight" and "last" in row["case"]:
            cells.setdefault(row["case"], {})[row["metric"]] = row["value"]
    lines = (
        [
            case.split(", last")[0],
            f"{percent(c['loss_rise'])} (SE {c['standard_error']:.2f})",
            f"{c['same_token']:.1f}%",
        ]
        for case, c in cells.items()
        if "loss_rise" in c
    )
    return table(["text, context", "change in perplexity", "same most likely token"], lines)


def zoo(folder: Path) -> str:
    """Format the totals of the curated zoo."""
    return zoo_table(read_results(folder, "zoo"))


def zoo_wide(folder: Path) -> str:
    """Format the families of the wide zoo."""
    return zoo_wide_table(read_results(folder, "zoo_wide"))


def found(folder: Path) -> str:
    """Format how many attentions are found in both zoos."""
    curated, wide = read_results(folder, "zoo"), read_results(folder, "zoo_wide").rows
    sums = [sum(row["value"] for row in curated.of(f"sites_{what}")) for what in ("expected", "found")]
    counts = [sum(r["baseline"] for r in wide), sum(min(r["value"], r["baseline"]) for r in wide)]
    silent = sum(row["status"] == "silent" for row in wide)
    lines = [
        ["curated models", *map(number, sums), "-"],
        ["every class of transformers, timm and others", *map(number, counts), number(silent)],
    ]
    return table(["benchmark", "attentions", "found", "classes missed silently"], lines)


def compiled(folder: Path) -> str:
    """Format the totals of the compiled zoo."""
    return compiled_zoo(read_results(folder, "compiled-zoo-traced"))


BLOCKS: dict[str, Callable[[Path], str]] = {
    block.__name__: block
    for block in (
        quality, expected_quality, models, trellis, calibration, tasks, decode, engines, small_weights, memory,
        capacity, serving, load, page_selection, zoo, zoo_wide, found, compiled,
    )
}  # fmt: skip


def filled(text: str, folder: Path = RESULTS) -> str:
    """Return the text of a page with new blocks."""
    return fill_blocks(text, BLOCKS, folder, gap="\n\n")


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        page = DOCS / name
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
