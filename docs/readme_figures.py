"""Fill the figures of README.md from benchmarks/results/*.json.

    python docs/readme_figures.py      writes README.md

A block of README.md between `<!-- figures: NAME -->` and `<!-- end -->` holds what the function `NAME` of `BLOCKS`
returns. Every measured figure of the README is in such a block, and a test compares them with the files.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
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
MARKS = {"fhopt": "o", "kivi": "K", "kvtc": "V", "quarot": "Q", "turboquant": "T", "aatc": "A"}  # of the chart
LEGEND = {"o": "fhopt", "V": "KVTC", "K": "KIVI", "A": "AATC", "Q": "QuaRot", "T": "TurboQuant", "+": "others"}


@dataclass(frozen=True)
class CacheLoss:
    """Hold what one cache of one size loses, over the texts that calibrated nothing.

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
    """State loss, speed, engines and memory, with what each was measured on."""
    plans = {cache.size: cache for cache in caches(_read(folder, QUALITY)) if cache.family == FHOPT}
    lines = [
        _loss(plans[4.0], plans[8.0]),
        _speed(_read(folder, "decode")),
        _engines(_read(folder, "peers")),
        _memory(_read(folder, "memory")),
    ]
    return "\n".join(lines)


def _loss(four: CacheLoss, eight: CacheLoss) -> str:
    return _item(
        f"**Loss.** With a KV cache {four.size:g} times smaller, the perplexity of {four.texts} kinds of text that "
        f"were not used for calibration changes by {four.mean:+.2f} % (worst text {four.worst:+.2f} %); "
        f"{eight.size:g} times smaller, by {eight.mean:+.2f} % ({eight.worst:+.2f} %)."
    )


def _speed(results: Results) -> str:
    case = "batch 1, float32, 8,192 tokens"
    rows = {row["impl"]: row for row in results.of("step_ms") if row["case"] == case}
    four, eight, exact = (rows[name] for name in ("fhopt 4x, growing", "fhopt 8x, growing", "fhopt exact"))
    return _item(
        f"**Speed.** With 8,192 cached tokens a decode step takes {four['value']:.1f} ms, as `apply` and `generate` "
        f"run it; the fastest implementation in transformers takes {four['baseline']:.1f} ms ({four['ratio']:.2f}x). "
        f"With an 8 times smaller cache: {eight['ratio']:.2f}x; with the exact cache, compiled: {exact['ratio']:.2f}x "
        f"(batch 1, float32, {results.machine['threads']} CPU threads)."
    )


def _engines(results: Results) -> str:
    """State how fast tokens are generated behind the longest prompt, with each vector unit that was measured."""
    rows = [
        row for row in results.of("decode_tokens_per_second")
        if row["case"].split("/")[::2][:2] == [MODEL, "1"] and not SMALL_WEIGHTS.search(row["impl"])
    ]  # fmt: skip
    longest = max(int(row["case"].split("/")[1]) for row in rows)
    units: dict[str, dict[str, float]] = {}
    for row in rows:
        _, context, _, unit = row["case"].split("/")
        if int(context) == longest:
            speeds = units.setdefault(unit, {})
            name = row["impl"] if row["impl"].startswith("fhopt") else row["impl"].split()[0]
            speeds[name] = max(row["value"], speeds.get(name, 0.0))
    told = "; ".join(f"{UNITS[unit]} {_race(units[unit])}" for unit in sorted(units, key=list(UNITS).index))
    return _item(
        f"**Beside other engines**, tokens a second behind {longest:,}, 16-bit weights, the fastest cache of each: "
        f"{told} ({results.machine['threads']} CPU threads)."
    )


UNITS = {"AVX512": "with AVX-512", "AVX2": "with AVX2 alone"}


def _race(speeds: Mapping[str, float]) -> str:
    others = sorted((speed, name) for name, speed in speeds.items() if not name.startswith("fhopt"))
    listed = ", ".join(f"{name} {speed:.0f}" for speed, name in others)
    return f"{speeds['fhopt 4x']:.0f} at 4x and {speeds['fhopt 8x']:.0f} at 8x, {listed}"


def _memory(results: Results) -> str:
    exact, four = (results.value("resident_bytes", *case) / 2**20 for case in (("exact", "exact"), ("4x", "fhopt")))
    return _item(
        f"**Memory.** Over 8,192 tokens in bfloat16 the process grows by {four:.1f} MiB in place of {exact:.1f} MiB "
        f"({exact / four:.2f}x less)."
    )


def _item(text: str) -> str:
    return textwrap.fill(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def chart(folder: Path) -> str:
    """Draw loss against size in characters: KL on a logarithmic axis, caches of the benchmark of quality as letters."""
    known = [cache for cache in caches(_read(folder, QUALITY)) if cache.size >= 1.8]
    shown = sorted(known, key=lambda cache: cache.family == FHOPT)  # on top of others
    width, rows_a_decade, top, bottom = 60, 3, 0, -4
    grid = [[" "] * width for _ in range((top - bottom) * rows_a_decade + 1)]
    least, most = math.log(1.8), math.log(max(cache.size for cache in shown) * 1.04)
    for cache in shown:
        column = round((math.log(cache.size) - least) / (most - least) * (width - 1))
        depth = round((top - math.log10(max(cache.kl, 10**bottom))) * rows_a_decade)
        grid[max(0, depth)][column] = MARKS.get(cache.family, "+")
    lines = []
    for at, row in enumerate(grid):
        label = f"{10.0 ** (top - at // rows_a_decade):g}" if at % rows_a_decade == 0 else ""
        lines.append(f"{label:>8} |{''.join(row)}".rstrip())
    marks = {MARKS.get(cache.family, "+") for cache in shown}
    legend = "   ".join(f"{mark} {name}" for mark, name in LEGEND.items() if mark in marks)
    return "\n".join(["```text", "KL, nats a token", *lines, *_scale(least, most, width), f"{'':>10}{legend}", "```"])


def _scale(least: float, most: float, width: int) -> Iterable[str]:
    """Return the horizontal axis of the chart."""
    labels = [" "] * (width + 4)
    for size in (2, 3, 4, 6, 8, 12):
        column = round((math.log(size) - least) / (most - least) * (width - 1))
        if column < width:
            labels[column : column + len(f"{size}x")] = f"{size}x"
    yield f"{'':>8} +{'-' * width}"
    yield f"{'':>10}{''.join(labels)}".rstrip() + "  smaller than 16 bits"


def rivals(folder: Path) -> str:
    """Format a table: plans of fhopt, and each other method at the sizes nearest to those of `SIZES`."""
    all_caches = caches(_read(folder, QUALITY))
    shown = []
    for size in SIZES:
        near = [cache for cache in all_caches if _distance(cache, size) <= math.log(NEAR)]
        nearest = {c.family: c for c in sorted(near, key=lambda cache: -_distance(cache, size))}
        shown += sorted(nearest.values(), key=lambda cache: cache.kl)
    lines = (
        [cache.shown, f"{cache.size:g}x", f"{cache.mean:+.2f} %", f"{cache.worst:+.2f} %", f"{cache.kl:.4f}"]
        for cache in shown
    )
    head = ["KV cache", "smaller", f"perplexity, mean of {shown[0].texts} texts", "worst text", "KL to exact"]
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
    text = (
        "Each rewrite is proved from the operators to hold for all values, and checked on random ones. In "
        f"{number(len(passes))} forward passes of tiny random models, fhopt rewrites {number(sites)} of "
        f"{number(expected)} attention ops and leaves {number(left)} others with a reason. On two sets of values, "
        f"outputs match to {output:.1e} and gradients to {gradient:.1e} (relative to the largest element)."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


BLOCKS: dict[str, Callable[[Path], str]] = {"measured": measured, "chart": chart, "rivals": rivals, "found": found}


def filled(text: str, folder: Path = RESULTS) -> str:
    """Return the text of README.md with new blocks."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](folder)}\n{match[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.S)


def _read(folder: Path, name: str) -> Results:
    return Results.read(folder / f"{name}.json")


def main() -> None:
    """Write README.md."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
