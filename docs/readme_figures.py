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
from dataclasses import dataclass
from pathlib import Path

from results_tables import RESULTS, ROOT, Results, number, table

README = ROOT / "README.md"
WIDTH = 120
MODEL = "SmolLM2-135M-Instruct"
QUALITY = f"quality-{MODEL}"  # plans of the default options beside many methods
SMALL_WEIGHTS = re.compile("Q4_0|int[48]")  # in names of engines, of 4 or 8 bits
CALIBRATED = ("source", "docstrings", "topics", "mixture")  # texts of the kinds that calibrated the plans
FHOPT = "fhopt"
SIZES = 4.0, 8.0  # times smaller than a 16-bit cache: baselines are compared at the sizes nearest to them
MAX_METHODS = 3  # other methods of one size in the table, those of the lowest KL
NEAR = 1.25  # ratio up to which two sizes are compared
NAMES = {
    "fhopt": "**fhopt**",
    "kivi": "KIVI",
    "rtn": "round-to-nearest, by token and head",
    "quanto": "`QuantizedCache`, quanto",
    "hqq": "`QuantizedCache`, hqq",
    "low-rank": "low rank for each head",
    "turboquant": "TurboQuant",
    "quarot": "QuaRot",
    "kvtc": "KVTC",
    "oscar": "OSCAR",
    "aatc": "AATC",
    "q4_0-hadamard": "q4_0 of llama.cpp, rotated",
    "snapkv": "SnapKV",
    "expected-attention": "Expected Attention",
}  # families of caches in the files, in the words of the README; others by their own name
ENGINES = {
    "ik_llama": "ik_llama.cpp",
    "fhopt exact": "fhopt, exact mode",
    "fhopt 4x": "**fhopt 4x**",
    "fhopt 8x": "**fhopt 8x**",
}
UNITS = {"AVX512": "AVX-512", "AVX2": "AVX2"}


@dataclass(frozen=True)
class CacheLoss:
    """Hold the quality of one cache at one size, over held-out texts.

    name: of family and bits, in the files. size: how many times smaller than a 16-bit cache. mean, worst: rise of
    perplexity in percent. kl: mean, in nats per token. texts: how many.
    """

    name: str
    size: float
    mean: float
    worst: float
    kl: float
    texts: int

    @property
    def family(self) -> str:
        """Return the name without its size."""
        return re.sub(r"-(?:[\d.]+(?:bit|x)?|bytes)$", "", self.name)

    @property
    def shown(self) -> str:
        """Return the name in the words of the README."""
        bits = re.search(r"-([\d.]+)bit$", self.name)
        return NAMES.get(self.family, self.family) + (f", {bits[1]} bits" if bits else "")


def caches(results: Results) -> list[CacheLoss]:
    """Read the caches of the benchmark of quality, the least compressed first."""
    found: dict[tuple[float, str], dict[str, list[float]]] = {}
    for metric in ("perplexity_increase_percent", "kl"):
        for row in results.of(metric):
            text, size = row["case"].split("@")
            if text not in CALIBRATED:
                key = float(size.rstrip("x")), row["impl"]
                found.setdefault(key, {}).setdefault(metric, []).append(row["value"])
    return [
        _cache(name, size, figures["perplexity_increase_percent"], figures["kl"])
        for (size, name), figures in sorted(found.items())
    ]


def _cache(name: str, size: float, rises: list[float], kl: list[float]) -> CacheLoss:
    """Take means over texts: of perplexity the geometric one, as over all tokens of texts of one length."""
    mean = 100 * math.expm1(sum(math.log1p(rise / 100) for rise in rises) / len(rises))
    return CacheLoss(name, size, mean, max(rises), sum(kl) / len(kl), len(rises))


# --------------------------------------------------------------------------------------------------- blocks


def measured(folder: Path) -> str:
    """Tabulate quality, decode latency, throughput and memory, also where fhopt does not win."""
    plans = {cache.size: cache for cache in caches(_read(folder, QUALITY)) if cache.family == FHOPT}
    four, eight = (plans[size] for size in SIZES)
    peers = _read(folder, "peers")
    lines = [
        [f"Perplexity increase, {four.texts} held-out domains: mean (worst)", "0", _rise(four), _rise(eight)],
        ["KL divergence from the full-precision cache, nats/token", "0", f"{four.kl:.4f}", f"{eight.kl:.4f}"],
        _decode_step(_read(folder, "decode")),
        *(_compared(peers, *case) for case in (("decode", 8000), ("decode", 512), ("prefill", 8000), ("prefill", 512))),
        _memory(_read(folder, "memory")),
    ]
    caption = textwrap.fill(
        f"{MODEL} on CPU ({peers.machine['cpu']}, AVX-512, {peers.machine['threads']} threads), batch 1. Throughput: "
        "16-bit weights, compared with the fastest other engine. Below 1x, that engine is faster. "
        "[All results](docs/results.md).",
        WIDTH,
    )
    return f"{caption}\n\n{table(['', 'baseline', 'fhopt 4x', 'fhopt 8x'], lines)}"


def _rise(cache: CacheLoss) -> str:
    return f"{cache.mean:+.2f}% ({cache.worst:+.2f}%)"


def _decode_step(results: Results) -> list[str]:
    rows = {row["impl"]: row for row in results.of("step_ms") if row["case"] == "batch 1, float32, 8,192 tokens"}
    plans = [rows[f"fhopt {size:g}x, growing"] for size in SIZES]
    faster = (f"{row['value']:.1f} ({row['ratio']:.2f}x)" for row in plans)
    return ["Decode step at 8,192 tokens, FP32, ms", f"{plans[0]['baseline']:.1f} (transformers)", *faster]


def _compared(results: Results, stage: str, context: int) -> list[str]:
    """Compare the throughput of both plans with the fastest other engine, with AVX-512."""
    speeds = throughput(results, stage, context, "AVX512")
    best, engine = max((speed, name) for name, speed in speeds.items() if not name.startswith(FHOPT))
    plans = (speeds[f"fhopt {size:g}x"] for size in SIZES)
    what = f"Decode at {context:,} tokens" if stage == "decode" else f"Prompt of {context:,} tokens"
    ratios = (f"{speed:,.0f} ({speed / best:.2f}x)" for speed in plans)
    return [f"{what}, tok/s", f"{best:,.0f} ({ENGINES.get(engine, engine)})", *ratios]


def throughput(results: Results, stage: str, context: int, unit: str) -> dict[str, float]:
    """Return tok/s of each engine at batch 1 with 16-bit weights and its fastest KV-cache type."""
    speeds: dict[str, float] = {}
    for row in results.of(f"{stage}_tokens_per_second"):
        if row["case"] == f"{MODEL}/{context}/1/{unit}" and not SMALL_WEIGHTS.search(row["impl"]) and row["value"]:
            name = row["impl"] if row["impl"].startswith(FHOPT) else row["impl"].split()[0]
            speeds[name] = max(row["value"], speeds.get(name, 0.0))
    return speeds


def engines(folder: Path) -> str:
    """Tabulate decode and prompt throughput by engine, the fastest at long contexts first."""
    results = _read(folder, "peers")
    cases = [("decode", 8000, "AVX512"), ("decode", 512, "AVX512"), ("prefill", 8000, "AVX512"),
             ("decode", 8000, "AVX2"), ("decode", 512, "AVX2"), ("prefill", 8000, "AVX2")]  # fmt: skip
    speeds = [throughput(results, *case) for case in cases]
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
    results, case = _read(folder, "tasks"), "Qwen2.5-Coder-1.5B-Instruct/json_extraction@16384"
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
    all_caches = caches(_read(folder, QUALITY))
    shown = []
    for size in SIZES:
        near = [cache for cache in all_caches if _distance(cache, size) <= math.log(NEAR)]
        nearest = {c.family: c for c in sorted(near, key=lambda cache: -_distance(cache, size))}
        ranked = sorted(nearest.values(), key=lambda cache: cache.kl)
        shown += [cache for cache in ranked if cache.family == FHOPT]
        shown += [cache for cache in ranked if cache.family != FHOPT][:MAX_METHODS]
    lines = (
        [cache.shown, f"{cache.size:g}x", f"{cache.mean:+.2f}%", f"{cache.worst:+.2f}%", f"{cache.kl:.4f}"]
        for cache in shown
    )
    head = ["method", "compression", f"perplexity, mean of {shown[0].texts} domains", "worst domain", "KL, nats/token"]
    return table(head, lines)


def _distance(cache: CacheLoss, size: float) -> float:
    return abs(math.log(cache.size / size))


def found(folder: Path) -> str:
    """State in how many graphs attention is found, and how exact the rewrite is."""
    results = _read(folder, "zoo")
    passes = results.of("sites_expected")
    counts = ("expected", "found", "explained")
    expected, sites, left = (sum(row["value"] for row in results.of(f"sites_{what}")) for what in counts)
    output, gradient = (max(r["value"] for r in results.of(f"max_{what}error")) for what in ("", "gradient_"))
    built = [row for row in _read(folder, "zoo_wide").of("attentions_found") if row["status"] != "not built"]
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

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](folder)}\n{match[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.S)


def absolute(text: str, repository: str) -> str:
    """Return the README with absolute links and pictures, because a package index has no files to resolve them."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository.rstrip('/')}/{kind}/main/{match[3]})"

    text = re.sub(r'(?<=<img src=")(?!https?:)', f"{repository.rstrip('/')}/raw/main/", text)
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", link, text)


def _read(folder: Path, name: str) -> Results:
    return Results.read(folder / f"{name}.json")


def main() -> None:
    """Write README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", metavar="URL", help="address of the repository")
    repository = parser.parse_args().release
    text = filled(README.read_text(encoding="utf-8"))
    README.write_text(absolute(text, repository) if repository else text, encoding="utf-8")


if __name__ == "__main__":
    main()
