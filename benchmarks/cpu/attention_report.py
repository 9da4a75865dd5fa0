"""Table of benchmarks/cpu/attention.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.cpu.attention_shapes import AttentionCase
from benchmarks.recording import Row

PROMISES = {  # speedup over the best of torch, at 32,768 tokens, batch 1, for either number of threads
    ("GQA 32/8x128", "float32", "8x"): 5.0,
    ("GQA 32/8x128", "bfloat16", "8x"): 4.0,
    ("GQA 32/8x128", "float32", "4x"): 5.0,
    ("GQA 32/8x128", "float32", "half width, float16"): 5.0,
    ("MHA 32x128", "float32", "8x"): 5.0,
    ("MHA 32x128", "bfloat16", "8x"): 5.0,
    ("MHA 32x128", "float32", "full"): 1.2,
    ("MHA 32x128", "bfloat16", "full"): 1.2,
    ("GQA 32/8x128", "float32", "full"): 1.2,
    ("GQA 32/8x128", "bfloat16", "full"): 1.2,
}


COPY = "copy"  # the implementation whose row has the copy bandwidth


def speed_gb_s(by_key: Mapping[tuple[str, str, str], Row], case: str, name: str) -> float | None:
    """Return the GB/s at which an implementation loads its keys and values, None if it was not timed."""
    time_ms, size = by_key.get((case, name, "time_ms")), by_key.get((case, name, "bytes"))
    return size.value / time_ms.value / 1e6 if time_ms and size else None


def promised(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Return (case and implementation, target, measured) of the targets whose cases were measured."""
    out = []
    for row in rows:
        shape, tokens, batch, dtype, _ = row.case.split(", ")
        target = PROMISES.get((shape, dtype, row.impl.removeprefix("fhopt ")))
        if row.metric == "time_ms" and target and (tokens, batch) == ("T=32768", "B=1") and row.ratio:
            out.append((f"{row.case}: {row.impl}", target, row.ratio))
    return out


def summary(rows: Sequence[Row]) -> Table:
    """Format a row per case, a column per implementation: milliseconds, speedup over torch, share of copy bandwidth."""
    names = [name for name in dict.fromkeys(row.impl for row in rows) if name != COPY]
    by_key = {(row.case, row.impl, row.metric): row for row in rows}
    out = Table(title="attention of one token: ms (speed-up over the fastest of torch, share of a copy's GB/s)")
    out.add_column("", overflow="fold")
    for name in names:
        out.add_column(name, justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        cells, copy = [], by_key[case, COPY, "gb_s"].value
        for name in names:
            time_ms, speed = by_key.get((case, name, "time_ms")), speed_gb_s(by_key, case, name)
            shown = time_ms and speed and f"{time_ms.value:.3g} ({time_ms.ratio:.2f}x, {100 * speed / copy:.0f} %)"
            cells.append(shown or "")
        out.add_row(case, *cells)
    return out


def _group(case: str) -> str:
    shape, _, _, dtype, _ = case.split(", ")
    return f"{shape}, {dtype}"


def _label(case: str) -> tuple[str, str, str]:
    _, tokens, batch, _, threads = case.split(", ")
    return tokens, batch, threads


def line(case: AttentionCase, rows: Sequence[Row]) -> str:
    """Format the results of a case in one line."""
    here = [row for row in rows if row.case == case.name and row.metric == "time_ms"]
    return f"{case.name}: " + ", ".join(f"{row.impl} {row.value:.3g} ({row.ratio:.2f}x)" for row in here)
