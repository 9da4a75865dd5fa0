"""Fill the figures of README.md from benchmarks/results/*.json.

    python docs/readme_figures.py                       writes README.md
    python docs/readme_figures.py --release URL         also makes links absolute, for package indexes

A block of README.md between `<!-- figures: NAME -->` and `<!-- end -->` holds what the function `NAME` of `BLOCKS`
returns. Every measured figure of the README is in such a block, and a test compares them with the files.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from quality_tables import CacheQuality, caches
from results_tables import RESULTS, ROOT, Results, engine_throughput, fill_blocks, number, read_results, table

README = ROOT / "README.md"
WIDTH = 120
MODEL = "SmolLM2-135M-Instruct"
QUALITY = f"quality-{MODEL}"  # plans of the default options beside many methods
FHOPT = "fhopt"
SIZES = 4.0, 8.0  # times smaller than a 16-bit cache: baselines are compared at the sizes nearest to them
MAX_METHODS = 3  # other methods of one size in the table, those of the lowest KL
NEAR = 1.25  # ratio up to which two sizes are compared
ENGINES = {
    "ik_llama": "ik_llama.cpp",
    "fhopt exact": "fhopt, exact mode",
    "fhopt 4x": "**fhopt 4x**",
    "fhopt 8x": "**fhopt 8x**",
}
UNITS = {"AVX512": "AVX-512", "AVX2": "AVX2"}


# --------------------------------------------------------------------------------------------------- blocks


def measured(folder: Path) -> str:
    """Tabulate quality, decode latency, throughput and memory, also where fhopt does not win."""
    plans = {cache.size: cache for cache in caches(read_results(folder, QUALITY)) if cache.is_plan}
    four, eight = (plans[size] for size in SIZES)
    peers = read_results(folder, "peers")
    lines = [
        [f"Perplexity increase, {four.texts} held-out domains: mean (worst)", "0", _rise(four), _rise(eight)],
        ["KL divergence from the full-precision cache, nats/token", "0", f"{four.kl:.4f}", f"{eight.kl:.4f}"],
        _decode_step(read_results(folder, "decode")),
        *(_compared(peers, *case) for case in (("decode", 8000), ("decode", 512), ("prefill", 8000), ("prefill", 512))),
        _memory(read_results(folder, "memory")),
    ]
    caption = textwrap.fill(
        f"{MODEL} on CPU ({peers.machine['cpu']}, AVX-512, {peers.machine['threads']} threads), batch 1. Throughput: "
        "16-bit weights, compared with the fastest other engine. Below 1x, that engine is faster. "
        "[All results](docs/results.md).",
        WIDTH,
    )
    return f"{caption}\n\n{table(['', 'baseline', 'fhopt 4x', 'fhopt 8x'], lines)}"


def _rise(cache: CacheQuality) -> str:
    return f"{cache.rise:+.2f}% ({cache.worst_rise:+.2f}%)"


def _decode_step(results: Results) -> list[str]:
    rows = {row["impl"]: row for row in results.of("step_ms") if row["case"] == "batch 1, float32, 8,192 tokens"}
    plans = [rows[f"fhopt {size:g}x, growing"] for size in SIZES]
    faster = (f"{row['value']:.1f} ({row['ratio']:.2f}x)" for row in plans)
    return ["Decode step at 8,192 tokens, FP32, ms", f"{plans[0]['baseline']:.1f} (transformers)", *faster]


def _compared(results: Results, stage: str, context: int) -> list[str]:
    """Compare the throughput of both plans with the fastest other engine, with AVX-512."""
    speeds = engine_throughput(results, f"{MODEL}/{context}/1/AVX512", stage)
    best, engine = max((speed, name) for name, speed in speeds.items() if not name.startswith(FHOPT))
    plans = (speeds[f"fhopt {size:g}x"] for size in SIZES)
    what = f"Decode at {context:,} tokens" if stage == "decode" else f"Prompt of {context:,} tokens"
    ratios = (f"{speed:,.0f} ({speed / best:.2f}x)" for speed in plans)
    return [f"{what}, tok/s", f"{best:,.0f} ({ENGINES.get(engine, engine)})", *ratios]


def engines(folder: Path) -> str:
    """Tabulate decode and prompt throughput by engine, the fastest at long contexts first."""
    results = read_results(folder, "peers")
    cases = [("decode", 8000, "AVX512"), ("decode", 512, "AVX512"), ("prefill", 8000, "AVX512"),
             ("decode", 8000, "AVX2"), ("decode", 512, "AVX2"), ("prefill", 8000, "AVX2")]  # fmt: skip
    speeds = [engine_throughput(results, f"{MODEL}/{context}/1/{unit}", stage) for stage, context, unit in cases]
    names = sorted(speeds[0], key=lambda name: -speeds[0][name])
    rows = (
        [ENGINES.get(name, name), *(f"{column[name]:,.0f}" if name in column else "-" for column in speeds)]
        for name in names
    )
    stages = {"decode": "decode", "prefill": "prompt"}
    head = ["tok/s", *(f"{stages[stage]} {context:,}, {UNITS[unit]}" for stage, context, unit in cases)]
    cpu = f"{results.machine['threads']} threads of an {results.machine['cpu']}"
    caption = f"{MODEL}, batch 1, 16-bit weights, {cpu}; each engine's fastest KV type:"
    return f"{caption}\n\n{table(head, rows)}"


def _memory(results: Results) -> list[str]:
    exact, four = (results.value("resident_bytes", *case) / 2**20 for case in (("exact", "exact"), ("4x", "fhopt")))
    return ["Process memory for 8,192 tokens, BF16, MiB", f"{exact:.1f}", f"{four:.1f} ({exact / four:.2f}x)", "-"]


def tasks(folder: Path) -> str:
    """State how many fields of JSON are right at the longest context, as an example of exact strings."""
    results, case = read_results(folder, "tasks"), "Qwen2.5-Coder-1.5B-Instruct/json_extraction@16384"
    rows = {(row["impl"], row["metric"]): row["value"] for row in results.rows if row["case"] == case}
    items = rows["exact", "items"]
    right = [round(rows[impl, "accuracy_percent"] * items / 100) for impl in ("exact", "fhopt@4x", "fhopt@8x")]
    text = (
        f"- **Tasks.** Accuracy was measured on small samples only. Of {items:.0f} JSON fields in 16,384-token "
        f"contexts, Qwen2.5-Coder-1.5B-Instruct extracts {right[0]} with the full-precision cache, {right[1]} at 4x "
        f"and {right[2]} at 8x."
    )
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def methods(folder: Path) -> str:
    """Format a table: plans of fhopt, and the best other methods at the sizes nearest to those of `SIZES`."""
    all_caches = caches(read_results(folder, QUALITY))
    shown = []
    for size in SIZES:
        near = [cache for cache in all_caches if _distance(cache, size) <= math.log(NEAR)]
        nearest = {c.family: c for c in sorted(near, key=lambda cache: -_distance(cache, size))}
        ranked = sorted(nearest.values(), key=lambda cache: cache.kl)
        shown += [cache for cache in ranked if cache.is_plan]
        shown += [cache for cache in ranked if not cache.is_plan][:MAX_METHODS]
    lines = (
        [
            f"**{cache.shown}**" if cache.is_plan else cache.shown,
            f"{cache.size:g}x",
            f"{cache.rise:+.2f}%",
            f"{cache.worst_rise:+.2f}%",
            f"{cache.kl:.4f}",
        ]
        for cache in shown
    )
    head = ["method", "compression", f"perplexity, mean of {shown[0].texts} domains", "worst domain", "KL, nats/token"]
    return table(head, lines)


def _distance(cache: CacheQuality, size: float) -> float:
    return abs(math.log(cache.size / size))


def found(folder: Path) -> str:
    """State in how many graphs attention is found, and how exact the rewrite is."""
    results = read_results(folder, "zoo")
    passes = results.of("sites_expected")
    counts = ("expected", "found", "explained")
    expected, sites, left = (sum(row["value"] for row in results.of(f"sites_{what}")) for what in counts)
    output, gradient = (max(r["value"] for r in results.of(f"max_{what}error")) for what in ("", "gradient_"))
    built = [row for row in read_results(folder, "zoo_wide").of("attentions_found") if row["status"] != "not built"]
    all_found, counted = (sum(row[key] or 0 for row in built) for key in ("value", "baseline"))
    text = (
        f"On {number(len(passes))} forward passes of tiny random models, fhopt rewrites {number(sites)} of "
        f"{number(expected)} attention ops and reports a reason for {number(left)} others. Outputs match to "
        f"{output:.1e}, gradients to {gradient:.1e} (relative to the largest element). In "
        f"{len(built)} model classes of transformers and five other libraries, it detects {number(all_found)} of "
        f"{number(counted)}. "
        "`fhopt explain MODEL` lists misses."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "measured": measured,
    "engines": engines,
    "methods": methods,
    "found": found,
    "tasks": tasks,
}


def filled(text: str, folder: Path = RESULTS) -> str:
    """Return the text of README.md with new blocks."""
    return fill_blocks(text, BLOCKS, folder, gap="\n")


def absolute(text: str, repository: str) -> str:
    """Return the README with absolute links and pictures, because a package index has no files to resolve them."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository.rstrip('/')}/{kind}/main/{match[3]})"

    text = re.sub(r'(?<=<img src=")(?!https?:)', f"{repository.rstrip('/')}/raw/main/", text)
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", link, text)


def main() -> None:
    """Write README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", metavar="URL", help="address of the repository")
    repository = parser.parse_args().release
    text = filled(README.read_text(encoding="utf-8"))
    README.write_text(absolute(text, repository) if repository else text, encoding="utf-8")


if __name__ == "__main__":
    main()
