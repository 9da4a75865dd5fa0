"""Tables of quality results: means over held-out texts for the pages, values by text for CSV files.

Texts from domains that calibrated the plans are listed in the CSV files and left out of means.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from typing import Any

from results_tables import Results, table

BUILT_IN = ("source", "docstrings", "topics", "mixture")  # texts from the domains of the default calibration
CALIBRATED = {
    "quality": ("topics",),
    "quality-SmolLM2-135M-Instruct-codes": ("docstrings",),
    "quality-Qwen2.5-Coder-0.5B-Instruct": (*BUILT_IN, "python.txt"),
}  # texts from calibration domains, by results file; for other files: BUILT_IN
RISE = "perplexity_increase_percent"
NAMES = {
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
    "q4_0-hadamard": "llama.cpp q4_0, rotated",
    "snapkv": "SnapKV",
    "expected-attention": "Expected Attention",
}  # families of caches in the files, as their papers spell them; others by their own name
COLUMNS = (RISE, f"{RISE}_low", f"{RISE}_high", "kl")


@dataclass(frozen=True)
class CacheQuality:
    """Hold the quality of one cache at one size over held-out texts.

    rise: change in perplexity in percent, geometric mean. kl: mean in nats/token. worst_*: the largest of any text.
    """

    name: str
    size: float
    texts: int
    rise: float
    worst_rise: float
    kl: float
    worst_kl: float

    @property
    def is_plan(self) -> bool:
        """Say whether this is a plan of fhopt."""
        return self.name.startswith("fhopt")

    @property
    def family(self) -> str:
        """Return the name without its size."""
        return re.sub(r"-(?:[\d.]+(?:bit|x)?|bytes)$", "", self.name)

    @property
    def shown(self) -> str:
        """Format the name `kivi-3bit` as `KIVI, 3 bits`."""
        bits = re.search(r"-([\d.]+)bit$", self.name)
        return NAMES.get(self.family, self.family) + (f", {bits[1]} bits" if bits else "")


def caches(results: Results) -> list[CacheQuality]:
    """Return every cache of a results file, the least compressed first."""
    seen = CALIBRATED.get(results.name, BUILT_IN)
    by_cache: dict[tuple[float, str], dict[str, list[float]]] = {}
    for metric in (RISE, "kl"):
        for row in results.of(metric):
            text, size = _parts(row)
            if text not in seen:
                by_cache.setdefault((size, row["impl"]), {}).setdefault(metric, []).append(row["value"])
    return [_cache(name, size, values[RISE], values["kl"]) for (size, name), values in sorted(by_cache.items())]


def _parts(row: dict[str, Any]) -> tuple[str, float]:
    text, size = row["case"].split("@")
    return text, float(size.rstrip("x"))


def _cache(name: str, size: float, rises: list[float], kl: list[float]) -> CacheQuality:
    mean = 100 * math.expm1(sum(math.log1p(rise / 100) for rise in rises) / len(rises))
    return CacheQuality(name, size, len(rises), mean, max(rises), sum(kl) / len(kl), max(kl))


def percent(value: float) -> str:
    """Format a change in percent."""
    return f"{value:+.2f}%" if abs(value) < 100 else f"{value:+.0f}%"


def nats(value: float) -> str:
    """Format a KL divergence with two significant digits."""
    return f"{value:.2g}" if 1e-4 <= value < 1 else f"{value:.1e}" if value < 1 else f"{value:.1f}"


def means(results: Results) -> str:
    """Format a row for each cache: means and the worst text; link the values by text."""
    rows = caches(results)
    lines = (
        [c.name, f"{c.size:g}x", f"{c.texts}", percent(c.rise), percent(c.worst_rise), nats(c.kl), nats(c.worst_kl)]
        for c in rows
    )
    head = ["KV cache", "compression", "texts", "perplexity, mean", "worst text", "KL, nats/token, mean", "worst text"]
    return f"{table(head, lines)}\n\nBy text, with 95% intervals: [{results.name}.csv]({results.name}.csv)."


def as_csv(results: Results) -> str:
    """Return a row for each cache, size and text."""
    cells: dict[tuple[str, float, str], dict[str, float]] = {}
    for metric in COLUMNS:
        for row in results.of(metric):
            text, size = _parts(row)
            cells.setdefault((row["impl"], size, text), {})[metric] = row["value"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["cache", "compression", "text", *COLUMNS])
    for (name, size, text), values in sorted(cells.items()):
        writer.writerow([name, f"{size:g}", text, *(values.get(metric, "") for metric in COLUMNS)])
    return out.getvalue()


def best_other(results: Results, plan: CacheQuality, near: float = 1.25) -> CacheQuality | None:
    """Return the cache of another method with the least KL among those that are no smaller than 1 / near of the plan.

    A method that compresses up to `near` times less than the plan counts as comparable.
    """
    others = [c for c in caches(results) if not c.is_plan and plan.size / near <= c.size]
    return min(others, key=lambda cache: cache.kl, default=None)
