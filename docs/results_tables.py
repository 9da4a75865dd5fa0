"""Tables of measured results, made from benchmarks/results/*.json.

Each benchmark writes one file (benchmarks/recording.py): machine, versions, commit and rows of values.
`results_sections` puts the tables into sections.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL_WEIGHTS = re.compile("Q4_0|int[48]")  # in names of engines, of 4 or 8 bits
MAX_ROWS = 40  # of a benchmark that has no table of its own
HALVES = ("/bfloat16", "/autocast")  # tasks of the compiled zoo that round to 16 bits


@dataclass(frozen=True)
class Results:
    """Hold one results file: name, machine, versions, commit, and its rows (benchmarks/recording.py: `Row`)."""

    name: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    rows: tuple[dict[str, Any], ...]

    @staticmethod
    def read(path: Path) -> Results:
        """Read a results file."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(path.stem, content["machine"], content["versions"], content["commit"], tuple(content["rows"]))

    def of(self, metric: str) -> list[dict[str, Any]]:
        """Return the rows of one metric that have a value."""
        return [row for row in self.rows if row["metric"] == metric and row["value"] is not None]

    def value(self, metric: str, case: str, impl: str) -> float:
        """Return one figure."""
        return next(float(r["value"]) for r in self.of(metric) if (r["case"], r["impl"]) == (case, impl))


def read_results(folder: Path, name: str) -> Results:
    """Read the results file of a benchmark."""
    return Results.read(folder / f"{name}.json")


def engine_throughput(results: Results, case: str, stage: str) -> dict[str, float]:
    """Return tok/s of each engine with 16-bit weights and its fastest KV-cache type. stage: decode or prefill."""
    speeds: dict[str, float] = {}
    for row in results.of(f"{stage}_tokens_per_second"):
        if row["case"] == case and not SMALL_WEIGHTS.search(row["impl"]) and row["value"]:
            name = row["impl"] if row["impl"].startswith("fhopt") else row["impl"].split()[0]
            speeds[name] = max(row["value"], speeds.get(name, 0.0))
    return speeds


def fill_blocks(text: str, blocks: Mapping[str, Callable[[Path], str]], folder: Path, gap: str) -> str:
    """Return a text with new blocks between `<!-- figures: NAME -->` and `<!-- end -->`. gap: around each block."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{gap}{blocks[match[2]](folder)}{gap}{match[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.S)


# ------------------------------------------------------------------------------------------------------ parts of tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table; all columns but the first are right-aligned."""
    names = list(head)
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Format a number with three digits and thousands separators; integers in full."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def with_ratio(row: dict[str, Any]) -> str:
    """Format a figure with its ratio to the baseline; more than 1 is better."""
    ratio = row["ratio"]
    return number(row["value"]) + (f" ({ratio:.2f}x)" if ratio is not None else "")


def pivot(results: Results, metric: str, show: Callable[[dict[str, Any]], str] = with_ratio) -> str:
    """Format one metric: a row for each implementation, a column for each case."""
    rows = results.of(metric)
    cases, impls = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "impl"))
    cells = {(row["impl"], row["case"]): show(row) for row in rows}
    return table(
        [_heading(metric, rows[0]["unit"]), *map(in_words, cases)],
        ([in_words(impl), *(cells.get((impl, case), "-") for case in cases)] for impl in impls),
    )


def _heading(metric: str, unit: str) -> str:
    words = METRICS.get(metric) or metric.replace("_", " ")
    return words if metric in METRICS or not unit or metric.endswith(f"_{unit}") else f"{words}, {unit}"


METRICS = {
    "step_ms": "decode step, ms",
    "cache_bytes": "KV cache, bytes",
    "step_bytes": "bytes loaded by attention in a decode step",
    "sinks_bytes": "attention sinks, bytes",
    "sealed_bytes": "packed latents, bytes",
    "window_bytes": "recent window, bytes",
    "exact_bytes": "full-precision keys and values, bytes",
    "spare_bytes": "spare capacity, bytes",
    "weight_left_out": "attention weight left out",
    "right": "correct answers",
    "right_error": "correct answers, standard error",
    "loss_rise": "change in perplexity, %",
    "same_token": "same most likely token, %",
}  # headings of metrics whose name in the files is not a term of the glossary
NAMES = {
    ", growing": ", dynamic cache",
    ", static": ", static cache",
    "x codes": "x smaller latents",
    "window of 8 bits": "8-bit recent window",
    "fhopt, certain": "fhopt, guaranteed",
}  # likewise parts of the names of cases and implementations


def in_words(name: str) -> str:
    """Return the name of a case or implementation in the terms of the glossary."""
    for part, words in NAMES.items():
        name = name.replace(part, words)
    return name


def by_case(results: Results) -> str:
    """Format all metrics: a row for each case and implementation, a column for each metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in results.rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results.rows:
        shown = "-" if row["value"] is None else with_ratio(row)
        cells.setdefault((row["case"], row["impl"]), {})[row["metric"]] = shown
    if len(cells) > MAX_ROWS:
        return f"{len(cells):,} cases, {len(results.rows):,} figures: see the file."
    units = {row["metric"]: row["unit"] for row in results.rows}
    names = [_heading(name, units[name]) for name in metrics]
    lines = (
        [in_words(f"{case}, {impl}" if impl != case else case), *(result.get(m, "-") for m in metrics)]
        for (case, impl), result in cells.items()
    )
    return table(["case", *names], lines)


# ------------------------------------------------------------------------------------------------- tables of benchmarks


def contexts(results: Results) -> str:
    """Format KL and perplexity increase of each plan, a row for each model, dtype and context length."""
    found = {(row["case"], row["impl"], row["metric"]): row["value"] for row in results.rows}
    plans = list(dict.fromkeys(row["impl"] for row in results.rows))

    def cell(case: str, plan: str, metric: str, form: str) -> str:
        value, low, high = (found.get((case, plan, name)) for name in (metric, f"{metric}_low", f"{metric}_high"))
        interval = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
        return "-" if value is None else f"{value:{form}}{interval}"

    lines = []
    for case in dict.fromkeys(row["case"] for row in results.rows):
        model, _, context = case.rpartition("/")
        first = (model, f"{int(context):,}", number(found[case, plans[0], "tokens"]))
        kl = (cell(case, plan, "kl", ".4f") for plan in plans)
        lines.append([*first, *kl, *(cell(case, plan, "increase_percent", "+.2f") for plan in plans)])
    headings = [*(f"KL {plan}, nats/token" for plan in plans), *(f"perplexity {plan}, %" for plan in plans)]
    return table(["model", "context", "n", *headings], lines)


def attention(results: Results) -> str:
    """Format one table for each shape, in milliseconds."""
    shapes = list(dict.fromkeys(row["case"].split(", T=")[0] for row in results.rows))
    parts = []
    for shape in shapes:
        rows = tuple(
            {**row, "case": row["case"].removeprefix(f"{shape}, ")}
            for row in results.rows
            if row["case"].startswith(f"{shape}, ")
        )
        parts += [f"{shape}:", pivot(replace(results, rows=rows), "time_ms")]
    return "\n\n".join(parts)


def decode(results: Results) -> str:
    """Format times of a decode step, then the bytes of the KV caches."""
    return (
        pivot(results, "step_ms") + "\n\n" + pivot(results, "cache_bytes", lambda row: f"{row['value'] / 1e6:,.0f} MB")
    )


def zoo(results: Results) -> str:
    """Format sums over all forward passes."""
    expected, result, explained = (
        sum(row["value"] for row in results.of(f"sites_{what}")) for what in ("expected", "found", "explained")
    )
    lines = [
        ["forward passes", number(len(results.of("sites_expected")))],
        ["attentions expected", number(expected)],
        ["attentions found", number(result)],
        ["other softmaxes, not rewritten, with a reason", number(explained)],
        [
            "max error of an output, relative to the largest element",
            f"{max(r['value'] for r in results.of('max_error')):.1e}",
        ],
        ["max error of a gradient, relative", f"{max(r['value'] for r in results.of('max_gradient_error')):.1e}"],
    ]
    return table(["", "total"], lines)


def zoo_wide(results: Results) -> str:
    """Format sums of each family: classes, attentions found, and what there must be none of."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        families.setdefault(row["family"], []).append(row)
    bad = ("silent", "wrong", "crashed")
    lines = [
        [family, number(len(rows)), number(sum(r["baseline"] for r in rows)),
         number(sum(min(r["value"], r["baseline"]) for r in rows)),
         *(str(sum(r["status"] == status for r in rows)) for status in bad)]
        for family, rows in families.items()
    ]  # fmt: skip
    return table(["family", "classes", "attentions", "found", "missed silently", "wrong results", "crashed"], lines)


def zoo_plans(results: Results) -> str:
    """Format how many plans of each ratio are as expected, refused, or other than expected."""
    statuses = ("works", "more", "refused", "wrong", "crashed", "not built")
    by_ratio: dict[str, list[str]] = {}
    for row in results.rows:
        by_ratio.setdefault(row["impl"], []).append(row["status"])
    lines = [[ratio, *(str(found.count(status)) for status in statuses)] for ratio, found in by_ratio.items()]
    return table(["", "as expected", "KL above expected", "refused", "wrong", "crashed", "does not generate"], lines)


def zoo_programs(results: Results) -> str:
    """Format how many classes run their decode step as one program, in segments, or by the original forward."""
    titles = {
        "whole": "one program", "segments": "segments", "original": "original forward", "wrong": "other logits",
        "crashed": "crashed", "refused": "takes no plan", "not built": "does not generate",
    }  # fmt: skip
    found = [row["status"] for row in results.rows]
    largest = max((row["value"] for row in results.rows), default=0.0)
    lines = [[str(found.count(status)) for status in titles] + [f"{largest:.1e}"]]
    return table([*titles.values(), "max relative error"], lines)


def head(results: Results) -> str:
    """Format times, then certificates and agreement with the dense head."""
    others = tuple(row for row in results.rows if row["metric"] != "time_ms")
    return pivot(results, "time_ms") + "\n\n" + by_case(replace(results, rows=others))


def compiled_zoo(results: Results) -> str:
    """Format sums over all tasks, with those of inductor."""
    counts = results.of("tasks")
    lines = [
        ["tasks", f"{number(sum(r['value'] for r in counts))} of {number(sum(r['baseline'] for r in counts))}", ""]
    ]
    for metric in ("graphs", "breaks"):
        rows = results.of(metric)
        lines.append([metric, number(sum(r["value"] for r in rows)), number(sum(r["baseline"] or 0 for r in rows))])
    for metric, name in (("max_error", "an output"), ("max_gradient_error", "a gradient")):
        for words, is_half in (("float32", False), ("16 bits", True)):
            collected = [r["value"] for r in results.of(metric) if r["case"].endswith(HALVES) == is_half]
            lines.append([f"max relative error of {name}, {words}", f"{max(collected):.1e}", ""])
    return table(["", "flashhead", "inductor"], lines)


def coverage(results: Results) -> str:
    """Format lines and branches of each package, then the modules of which few lines are run, with the reason."""
    packages = [row for row in results.rows if row["metric"] != "lines_of_module"]
    cells = {(row["case"], row["metric"]): f"{row['value']:.1f}" for row in packages}
    names = dict.fromkeys(row["case"] for row in packages)
    lines = ([name, cells[name, "lines"], cells.get((name, "branches"), "-")] for name in names)
    parts = [table(["package", "lines, %", "branches, %"], lines)]
    modules = [[f"`{row['case']}`", f"{row['value']:.1f}", row["impl"]] for row in results.of("lines_of_module")]
    if modules:
        parts.append("Modules with line coverage below 80%:")
        parts.append(table(["module", "lines, %", "why"], modules))
    return "\n\n".join(parts)


def tasks(results: Results) -> str:
    """Format accuracy and its change, the change in log-probability, and KL by generated position."""
    size = re.compile(r"@([0-9.]+)x$")

    def order(impl: str) -> tuple[float, str]:
        return float(known[1]) if (known := size.search(impl)) else float("inf"), impl

    plans = sorted({row["impl"] for row in results.rows} - {"exact"}, key=order)
    found = {(row["case"], row["impl"], row["metric"]): row["value"] for row in results.rows}

    def cell(case: str, impl: str, metric: str, shown: str) -> str:
        value = found.get((case, impl, metric))
        return "-" if value is None else format(value, shown)

    def accuracy(case: str, impl: str) -> str:
        low, high = (cell(case, impl, f"accuracy_change_{end}", "+.0f") for end in ("low", "high"))
        value = cell(case, impl, "accuracy_percent", ".1f")
        return value if low == "-" else f"{value} ({low} to {high})"

    def lines(metric: str, row: Callable[[str], list[str]]) -> list[list[str]]:
        return [[case, *row(case)] for case in dict.fromkeys(r["case"] for r in results.of(metric))]

    answers = lines("accuracy_percent", lambda case: [
        cell(case, "exact", "items", ".0f"), cell(case, "exact", "accuracy_percent", ".1f"),
        *(accuracy(case, plan) for plan in plans),
    ])  # fmt: skip
    changes = lines("log_prob_change", lambda case: [cell(case, plan, "log_prob_change", "+.3f") for plan in plans])
    kl = lines("kl_nats", lambda case: [cell(case, plan, "kl_nats", ".5f") for plan in plans])
    shown = [plan.replace("@", " ") for plan in plans]
    return "\n\n".join(
        [
            "Accuracy, % (in parentheses: 95% interval of the change, percentage points):",
            table(["task", "n", "full precision", *shown], answers),
            "Change in log-probability of the correct answer, nats/token:",
            table(["task", *shown], changes),
            "KL divergence from the full-precision cache, nats/token; `generation@N`: up to N generated tokens:",
            table(["text", *shown], [line for line in kl if "@" in line[0]]),
        ]
    )


def engines(results: Results) -> str:
    """Format a table for each model, batch and metric, columns are contexts; then what was not run, and sizes."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results.rows:
        if row["case"].count("/") >= 3:
            model, context, batch, unit = row["case"].rsplit("/", 3)
            groups.setdefault((model, batch, unit), []).append({**row, "case": f"{int(context):,}"})
    parts = []
    for (model, batch, unit), rows in groups.items():
        shown = replace(results, rows=tuple(row for row in rows if row.get("error") is None))
        for metric, (words, show) in ENGINE_METRICS.items():
            if shown.of(metric):
                parts += [f"{model}, batch {batch}, {unit}: {words}", _by_context(shown, metric, show)]
    failed = [[row["impl"], row["case"], row["error"]] for row in results.rows if row.get("error")]
    if failed:
        parts += ["Not run:", table(["engine", "case", "error"], failed)]
    sizes = [[row["impl"], f"{row['value'] / 1e9:.2f}"] for row in results.of("installed_bytes")]
    if sizes:
        parts += ["Installed size, without fhopt's own requirements:", table(["environment", "GB"], sizes)]
    return "\n\n".join(parts)


def _by_context(results: Results, metric: str, show: Callable[[dict[str, Any]], str]) -> str:
    """Format one metric: a row for each engine, a column for each context, shortest first."""
    rows = results.of(metric)
    contexts = sorted({row["case"] for row in rows}, key=lambda text: int(text.replace(",", "")))
    cells = {(row["impl"], row["case"]): show(row) for row in rows}
    impls = dict.fromkeys(row["impl"] for row in rows)
    return table(
        ["context, tokens", *contexts], ([impl, *(cells.get((impl, c), "-") for c in contexts)] for impl in impls)
    )


ENGINE_METRICS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "decode_tokens_per_second": ("decode throughput, tok/s", with_ratio),
    "prefill_tokens_per_second": ("prompt throughput, tok/s", with_ratio),
    "first_token_s": ("time to first token from process start, s", with_ratio),
    "second_token_cold_s": ("time to second token, s, with empty compile caches", with_ratio),
    "peak_bytes": ("peak process memory, MiB", lambda row: f"{row['value'] / 2**20:,.0f}"),
}
