"""The page of measured results, made from benchmarks/results/*.json.

    python docs/results_page.py        writes docs/results.md

Each benchmark writes one file (benchmarks/recording.py): machine, versions, commit and rows of figures. Nothing is
measured here, and no figure stands on the page that is not in a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
MOST_ROWS = 40  # of a benchmark that this page has no table of its own for


@dataclass(frozen=True)
class Results:
    """One file: name, what it was made on, and its rows (benchmarks/recording.py: `Row`)."""

    name: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    rows: tuple[dict[str, Any], ...]

    @staticmethod
    def read(path: Path) -> Results:
        """From a file of results."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(path.stem, content["machine"], content["versions"], content["commit"], tuple(content["rows"]))

    def of(self, metric: str) -> list[dict[str, Any]]:
        """The rows of one metric that have a value."""
        return [row for row in self.rows if row["metric"] == metric and row["value"] is not None]

    def value(self, metric: str, case: str, impl: str) -> float:
        """One figure."""
        return next(float(r["value"]) for r in self.of(metric) if (r["case"], r["impl"]) == (case, impl))


@dataclass(frozen=True)
class Section:
    """How one file is shown."""

    title: str
    command: str
    about: str
    table: Callable[[Results], str]


# --------------------------------------------------------------------------------------------------- tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; numbers to the right."""
    names = list(head)
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, thousands apart; whole numbers whole."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def with_ratio(row: dict[str, Any]) -> str:
    """A figure, and how many times better than its baseline it is."""
    ratio = row["ratio"]
    return number(row["value"]) + (f" ({ratio:.2f}x)" if ratio is not None else "")


def pivot(results: Results, metric: str, show: Callable[[dict[str, Any]], str] = with_ratio) -> str:
    """A line for each implementation, a column for each case."""
    rows = results.of(metric)
    cases, impls = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "impl"))
    cells = {(row["impl"], row["case"]): show(row) for row in rows}
    return table(
        [_heading(metric, rows[0]["unit"]), *cases],
        ([impl, *(cells.get((impl, case), "-") for case in cases)] for impl in impls),
    )


def _heading(metric: str, unit: str) -> str:
    words = metric.replace("_", " ")
    return words if not unit or metric.endswith(f"_{unit}") else f"{words}, {unit}"


def by_case(results: Results) -> str:
    """A line for each case and implementation, a column for each metric."""
    metrics = list(dict.fromkeys(row["metric"] for row in results.rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results.rows:
        shown = "-" if row["value"] is None else with_ratio(row)
        cells.setdefault((row["case"], row["impl"]), {})[row["metric"]] = shown
    if len(cells) > MOST_ROWS:
        return f"{len(cells):,} cases, {len(results.rows):,} figures: see the file."
    units = {row["metric"]: row["unit"] for row in results.rows}
    names = [_heading(name, units[name]) for name in metrics]
    lines = (
        [f"{case}, {impl}" if impl != case else case, *(found.get(m, "-") for m in metrics)]
        for (case, impl), found in cells.items()
    )
    return table(["case", *names], lines)


# --------------------------------------------------------------------------------------------------- sections


def quality(results: Results) -> str:
    """What each cache at each size adds to the perplexity of each text."""
    rows = results.of("perplexity_increase_percent")
    texts = list(dict.fromkeys(row["case"].split("@")[0] for row in rows))
    cells: dict[tuple[float, str], dict[str, str]] = {}
    for row in rows:
        text, size = row["case"].split("@")
        cells.setdefault((float(size.rstrip("x")), row["impl"]), {})[text] = f"{row['value']:+.2f} %"
    lines = ([impl, f"{size:g}x", *(found.get(t, "-") for t in texts)] for (size, impl), found in sorted(cells.items()))
    return table(["cache", "size", *texts], lines)


def attention(results: Results) -> str:
    """One table for each shape, in milliseconds."""
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
    """Step times, then the bytes of the caches."""
    return (
        pivot(results, "step_ms") + "\n\n" + pivot(results, "cache_bytes", lambda row: f"{row['value'] / 1e6:,.0f} MB")
    )


def zoo(results: Results) -> str:
    """Sums over all passes."""
    expected, found, explained = (
        sum(row["value"] for row in results.of(f"sites_{what}")) for what in ("expected", "found", "explained")
    )
    lines = [
        ["forward passes", number(len(results.of("sites_expected")))],
        ["attentions expected", number(expected)],
        ["attentions found", number(found)],
        ["left alone for an expected reason", number(explained)],
        ["largest difference of an output, relative", f"{max(r['value'] for r in results.of('max_error')):.1e}"],
        ["largest difference of a gradient", f"{max(r['value'] for r in results.of('max_gradient_error')):.1e}"],
    ]
    return table(["", "all"], lines)


def head(results: Results) -> str:
    """Times, then what was certain and what agreed."""
    others = tuple(row for row in results.rows if row["metric"] != "time_ms")
    return pivot(results, "time_ms") + "\n\n" + by_case(replace(results, rows=others))


def compiled_zoo(results: Results) -> str:
    """Sums over all tasks, beside inductor's."""
    lines = [["tasks", number(len(results.of("max_error"))), ""]]
    for metric in ("graphs", "breaks"):
        rows = results.of(metric)
        lines.append([metric, number(sum(r["value"] for r in rows)), number(sum(r["baseline"] or 0 for r in rows))])
    for metric, name in (("max_error", "an output"), ("max_gradient_error", "a gradient")):
        for words, is_half in (("float32", False), ("16 bits", True)):
            found = [r["value"] for r in results.of(metric) if r["case"].endswith(HALVES) == is_half]
            lines.append([f"largest difference of {name}, {words}", f"{max(found):.1e}", ""])
    return table(["", "flashhead", "inductor"], lines)


HALVES = ("/bfloat16", "/autocast")  # tasks of the compiled zoo that round to 16 bits


SECTIONS = {
    "quality": Section(
        "Loss against bytes", "make bench-quality",
        "What each cache adds to the perplexity of SmolLM2-135M-Instruct, bytes counted at 8,192 tokens. Only `topics` "
        "is of the kind that calibrated the plans. Intervals, means, divergence: [loss against bytes](quality.md).",
        quality,
    ),
    "decode": Section(
        "A decode step behind 8,192 tokens", "make bench-decode",
        "SmolLM2 on a CPU, in turns. In brackets: times the best that transformers has.", decode,
    ),
    "decode-contexts": Section(
        "A decode step behind fewer tokens", "python benchmarks/decode.py --tokens 640 --tokens 2048",
        "The same at other contexts.", decode,
    ),
    "attention": Section(
        "Attention of one token", "make bench-attention",
        "One token on 32,768, in turns. In brackets: times the fastest way that torch has. With GB/s: "
        "[attention of one token](attention.md).", attention,
    ),
    "memory": Section(
        "Bytes of the process", "make bench-memory", "SmolLM2 in bfloat16 over 8,192 tokens, each cache in a process.",
        by_case,
    ),
    "healing": Section(
        "Healing", "make bench-heal",
        "The 8x plan before and after `fhopt heal` on `topics`; `source` was not read. `kl left` is the share of the "
        "divergence that is left.", by_case,
    ),
    "soak": Section(
        "Long runs", "make soak", "Small models beside a reference that keeps every token, in float64.", by_case
    ),
    "endurance": Section(
        "Memory over time", "make soak MINUTES=60",
        "The same variants, mixed with every way of `generate()`, over and over: bytes of the process after each lap.",
        by_case,
    ),
    "zoo": Section(
        "Finding attention", "make zoo", "Tiny random models; pass by pass: [the zoo](zoo.md).", zoo
    ),
    "compiled-zoo-traced": Section(
        "The zoo through torch.compile", "make compiled-zoo",
        "Tasks that eager and inductor can do, with `ratio: 1`. Differences are relative, from eager; in 16 bits eager "
        "rounds, too, in other places.", compiled_zoo,
    ),
    "retrieval": Section(
        "Reading one page in eight", "make bench-retrieval",
        "SmolLM2, 4x plan, beside the same plan with all pages. `same token`: how often the likeliest one is the same.",
        by_case,
    ),
    "retrieval_tasks": Section(
        "Answers from one page in eight", "make bench-retrieval",
        "Errors are standard errors, over texts, of the change. `gained`, `lost`: questions that only one of both "
        "answers.", by_case,
    ),
    "retrieval_operator": Section(
        "Attention to one page in eight", "make bench-retrieval",
        "One token on 32,768, random codes, in turns. In brackets: times all pages.", by_case,
    ),
    "retrieval_head": Section(
        "The language-model head by search", "make bench-retrieval",
        "From hidden states to the arg-max, in turns. In brackets: times the fastest dense head, ours included.", head,
    ),
    "matrix": Section(
        "Versions", "make test-matrix",
        "Tests that depend on versions, in each environment: [which, and why](versions.md). Skipped are tests of what "
        "is not there.", by_case,
    ),
    "coverage": Section(
        "What the tests cover", "make coverage", "Of the tests that are not slow, without a GPU.", by_case
    ),
    "finding": Section("What finding costs", "make bench-find", "Seconds and nodes.", by_case),
}  # fmt: skip

HEAD = """<!-- Made by docs/results_page.py from benchmarks/results. Do not edit. -->

# Measured results

Everything on this page was written by a benchmark of the repository into `benchmarks/results`; the page is made from
these files by `make docs`. Each command measures again on your machine. What the figures do not show is said in
[limits](limits.md): above all, quality was measured on one model of 135M parameters and on one encoder, and the rivals
were run as published, not tuned.
"""


def page(folder: Path = RESULTS) -> str:
    """docs/results.md, known benchmarks first, in the order of `SECTIONS`."""
    found = {path.stem: Results.read(path) for path in sorted(folder.glob("*.json"))}
    order = [name for name in SECTIONS if name in found] + [name for name in found if name not in SECTIONS]
    return "\n".join([HEAD, *(section(found[name], folder) for name in order)])


def section(results: Results, folder: Path) -> str:
    """Title, command, table, picture, and what it was measured on."""
    shown = SECTIONS.get(results.name) or Section(results.name, f"benchmarks/{results.name}.py", "", by_case)
    parts = [f"## {shown.title}", f"{shown.about} `{shown.command}`".strip(), shown.table(results)]
    if (folder / f"{results.name}.png").exists():
        parts.append(f"![{shown.title.lower()}](../benchmarks/results/{results.name}.png)")
    return "\n\n".join([*parts, made_on(results)]) + "\n"


def made_on(results: Results) -> str:
    """Machine, versions and commit in one sentence."""
    on, versions = results.machine, results.versions
    device = on.get("gpu") or f"{on['cpu']} ({on['cpu_capability']}), {on['cores']} cores, {on['threads']} threads"
    known = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    commit, _, dirty = results.commit.partition("-")
    state = " with changes" if dirty else ""
    file = f"[{results.name}.json](../benchmarks/results/{results.name}.json)"
    return f"*Measured on {device}; {known}; commit {commit[:12]}{state}. All figures: {file}.*"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
