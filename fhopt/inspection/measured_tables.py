"""Tables of measurements that commands print, made with rich: evaluations, throughput, costs, machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fhopt.hardware.cost_model import Cost, CostComparison, pretty
from fhopt.hardware.this_cpu import CpuRates
from fhopt.inspection.tables import group_digits, interval_words, light_table
from fhopt.plan.display import quantity, rate, times


def summary_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the demo's measurements, exact and with the plan."""
    table = Table(title=f"{result['model']}: full-precision KV cache and latents", title_justify="left")
    table.add_column("")
    for name in ("exact", "plan", "change"):
        table.add_column(name, justify="right")
    tokens = result["bytes_counted_at_tokens"]
    per_token = result["bytes_per_token"]
    table.add_row(
        f"KV cache bytes/token, everything included, at {tokens:,} tokens (16-bit)",
        f"{per_token['exact']:,.0f}",
        f"{per_token['plan']:,.0f}",
        f"{per_token['exact'] / per_token['plan']:.2f}x smaller",
    )
    held = result["cache_nbytes"]
    table.add_row(
        f"KV cache bytes after {result['decode_tokens']:,} tokens ({result['dtype']})", f"{held['exact']:,}",
        f"{held['plan']:,}", f"{held['exact'] / held['plan']:.2f}x smaller",
    )  # fmt: skip
    for text, values in result["perplexity"].items():
        change = values["plan"] / values["exact"] - 1
        table.add_row(f"perplexity, {text}", f"{values['exact']:.4f}", f"{values['plan']:.4f}", f"{change:+.2%}")
    for length, speed in result["speed_by_context"].items():
        table.add_row(
            f"decode tok/s at a {int(length):,}-token context", f"{speed['exact']:.1f}", f"{speed['plan']:.1f}",
            f"{speed['plan'] / speed['exact']:.2f}x",
        )  # fmt: skip
    return table


def evaluation_tables(result: Mapping[str, Any]) -> Group:
    """Tabulate `fhopt eval`: perplexity of each text; each task as a whole, then by length and depth."""
    title = result["model"] + (f", {result['ratio']:.2f}x plan" if result["ratio"] else ", exact")
    parts = [_perplexity_table(result["perplexity"], title)] if result["perplexity"] else []
    parts += [_tasks_table(result["tasks"], title)] if result["tasks"] else []
    return Group(*parts)


def _perplexity_table(texts: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"Perplexity: {title} (95% CI)", title_justify="left")
    for name in ("text", "tokens", "exact", "plan", "increase", "KL, nats/token"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for text, row in texts.items():
        cells = [text, f"{row['tokens']:,}", f"{row['exact']:.4f}"]
        if "plan" in row:
            increase = f"{row['increase_percent']:+.2f}%" + interval_words(row["increase_percent_ci"], "+.2f")
            cells += [f"{row['plan']:.4f}", increase, f"{row['kl']:.4f}" + interval_words(row["kl_ci"], ".4f")]
        table.add_row(*cells)
    return table


def _tasks_table(tasks: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"Correct answers: {title} (95% CI)", title_justify="left")
    for name in ("task", "tokens", "depth", "items", "exact", "plan", "log-probability, plan - full precision"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, whole in tasks.items():
        table.add_row(task, "all", "all", *_answers(whole))
        for cell in whole["cells"]:
            table.add_row("", f"{cell['length']:,}", _depth(cell["depth"]), *_answers(cell))
        table.add_section()
    return table


def _depth(percent: int | None) -> str:
    return "spread" if percent is None else f"{percent}%"


def _answers(results: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: items, rates, change."""
    rates = [results["exact"], results["plan"]]
    shown = ["" if r is None else f"{100 * r['rate']:.0f}%" + _percents(r["rate_ci"]) for r in rates]
    change = results["log_prob_change"]
    text = "" if change is None else f"{change:+.3f}" + interval_words(results["log_prob_change_ci"], "+.3f")
    return [str(results["exact"]["items"]), *shown, text]


def _percents(interval: tuple[float, float]) -> str:
    return interval_words((100 * interval[0], 100 * interval[1]), ".0f")


def cost_tables(costs: Mapping[str, Cost], comparison: CostComparison, title: str) -> Group:
    """Tabulate the formulas of a decode step, its cost on devices, and the max speedup of a whole step."""
    bound = "Upper bound on the speedup of a memory-bound decode step: (W + KV) / (W + KV/c)"
    return Group(_formulas(costs), "", _figures(comparison, title), "", Text(bound, "italic"), _bounds(comparison))


def throughput_heading(result: Mapping[str, Any]) -> str:
    """Return a one-line description of a `fhopt bench` run."""
    weights = ", block-quantized weights" if result["weights_in_blocks"] else ""
    return f"{result['model']}: {result['dtype']}{weights} on {result['device']}, medians of {result['rounds']} rounds"


def throughput_table(result: Mapping[str, Any]) -> Table:
    """Tabulate `fhopt bench`, a row per context, batch and KV cache; factors are over the full-precision cache."""
    columns = ("prefill,\ntok/s", "first\ntoken", "decode,\ntok/s", "KV cache,\nbytes")
    return _by_case(throughput_heading(result), columns, result["rows"], _throughput_cells)


PARTS = {"weights": "weights", "attention": "attention", "rest": "rest of\nlayers"}


def parts_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the time breakdown of a decode step in `fhopt bench`, a row per context, batch and KV cache."""
    title = "Time of a decode step in ms; -: no attention is in a native call"
    return _by_case(title, ("step", *PARTS.values(), "around", "layers\ncounted"), result["rows"], _parts_cells)


def _by_case(
    title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]],
    cells: Callable[[Mapping[str, Any]], list[str]],
) -> Table:  # fmt: skip
    """Tabulate rows of `fhopt bench` by context, batch if there are several, and KV cache."""
    batches, table = {row["batch"] for row in rows}, light_table(Text(title))
    for name in ("context", *(["batch"] if len(batches) > 1 else []), "KV cache", *columns):
        is_name = name == "KV cache"
        table.add_column(name, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for (context, batch), group in groupby(rows, key=lambda r: (r["context"], r["batch"])):
        labels = [f"{context:,}", *([f"{batch:,}"] if len(batches) > 1 else [])]
        for row in group:
            table.add_row(*labels, Text(row["cache"]), *cells(row))
            labels = [""] * len(labels)
        table.add_section()
    return table


def _parts_cells(row: Mapping[str, Any]) -> list[str]:
    parts = row["step_milliseconds"]
    if parts is None:
        return [f"{1e3 * row['batch'] / row['decode_tokens_per_second']:.2f}", *["-"] * (len(PARTS) + 2)]
    times_ms = [parts[name] for name in ("total", *PARTS, "around")]
    return [*[f"{ms:.2f}" for ms in times_ms], f"{row['layers_counted']:.3g}"]


def _throughput_cells(row: Mapping[str, Any]) -> list[str]:
    prefill, decode = (rate(row[f"{kind}_tokens_per_second"]) for kind in ("prefill", "decode"))
    cells = {"prefill_speedup": prefill, "decode_speedup": decode, "ratio": quantity(row["cache_bytes"], "B")}
    prefill, decode, size = (f"{cell} {times(row[name]):>5}" for name, cell in cells.items())
    return [prefill, quantity(row["time_to_first_token_s"], "s"), decode, size]


def machine_table(results: Sequence[CpuRates]) -> Table:
    """Tabulate measured rates of this machine's CPU, a row per number of threads."""
    table = Table(title=f"{results[0].cpu}, {results[0].memory_gb:.0f} GB", title_justify="left")
    columns = ("threads", "read, GB/s", "copy, GB/s", "float32, TFLOP/s", "bfloat16, TFLOP/s")
    for name in columns:
        table.add_column(name, justify="right")
    for one in results:
        rates = (one.read_gb_s, one.copy_gb_s, one.float32_tflops, one.bfloat16_tflops)
        table.add_row(str(one.threads), *[f"{rate:.3g}" for rate in rates])
    return table


def _formulas(costs: Mapping[str, Cost]) -> Table:
    table = Table.grid(padding=(0, 2))
    latent = max(costs.values(), key=lambda c: c.open_tokens)
    legend = (
        f"B batch, T cached tokens, S new queries (here 1), T_quantized = max(0, T - {latent.open_tokens}) on average"
    )
    table.add_row("symbols", "", legend)
    for name, cost in costs.items():
        table.add_row(name, "bytes", group_digits(pretty(cost.bytes)))
        table.add_row("", "operations", group_digits(pretty(cost.operations)))
    weights = costs["exact"].weights
    table.add_row("weights", "bytes", group_digits(pretty(weights.bytes)))
    table.add_row("", "operations", group_digits(pretty(weights.operations)))
    table.add_row("time", "", "sum over operations of max(bytes / bandwidth, operations / throughput)")
    table.add_row("faster from", "T =", f"{latent.open_tokens} + bases / (exact token - quantized token), in time")
    return table


def _figures(comparison: CostComparison, title: str) -> Table:
    lengths = sorted({row.tokens for row in comparison.rows})
    is_one = len(lengths) == 1
    table = light_table(f"{title}, {lengths[0]:,} cached tokens" if is_one else title)
    for name in ("device", *([] if is_one else ["cached\ntokens"]), "cache", "read", "attention", "faster",
                 "bound by", "step", "faster", "faster\nfrom"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("device", "cache", "bound by") else "right", no_wrap=True)
    for (device, tokens), rows in groupby(comparison.rows, key=lambda r: (r.device, r.tokens)):
        labels = [device, *([] if is_one else [f"{tokens:,}"])]
        for row in rows:
            now, is_exact = row.figures, row.cache == "exact"
            pays = f"{math.ceil(row.pays_from):,}" if row.pays_from is not None else row.pays
            step = quantity(now.step_seconds, "s") + ("" if now.fits else " [red]!")
            table.add_row(
                *labels, row.cache, quantity(now.bytes, "B"), quantity(now.attention_seconds, "s"),
                "" if is_exact else f"{row.attention_speedup:.2f}x", now.bound, step,
                "" if is_exact else f"{row.step_speedup:.2f}x", pays,
            )  # fmt: skip
            labels = [""] * len(labels)
        table.add_section()
    table.caption, table.caption_justify = (
        "These are upper bounds: kernels reach only part of the peak throughput.",
        "left",
    )
    if not all(row.figures.fits for row in comparison.rows):
        table.caption += " ! weights and KV cache do not fit into the device's memory."
    return table


def _bounds(comparison: CostComparison) -> Table:
    table = Table()
    table.add_column("cached tokens", justify="right")
    rows = [(tokens, list(bounds)) for tokens, bounds in groupby(comparison.bounds, key=lambda b: b.tokens)]
    for bound in rows[0][1]:
        table.add_column("no KV cache" if bound.cache == "none" else bound.cache, justify="right")
    for tokens, bounds in rows:
        cells = ["no limit" if b.step_speedup is None else f"{b.step_speedup:.2f}x" for b in bounds]
        table.add_row(f"{tokens:,}", *cells)
    return table
