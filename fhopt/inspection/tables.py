"""Tables that commands print, made with rich: sites, plans, misses, costs, evaluations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fhopt.hardware.cost_model import Cost, CostComparison, pretty
from fhopt.hardware.this_cpu import CpuRates
from fhopt.inspection.facts import InspectedSite, Inspection, Missed, PlannedSite, common_form, short_name
from fhopt.passes.certificate import Certificate, by_kind
from fhopt.passes.outcome import Explanation
from fhopt.plan.display import mask_words, quantity, rate, rope_words, times
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import QualityCard
from fhopt.plan.site import AttentionSite


def light_table(title: str | Text | None = None) -> Table:
    """Build a table without vertical lines: ten columns fit into 80 characters."""
    return Table(title=title, title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0), pad_edge=False)


def describe(plan: LatentPlan) -> list[dict[str, Any]]:
    """Tabulate latent plans, a row per site: layout, width and mean bits of each side, bytes per token and ratio."""
    return [
        {
            "site": p.site.name,
            "layout": p.layout,
            "key": mean_bits(p.key.width, ((t.bits, t.width) for t in p.key.tiers)),
            "value": mean_bits(p.value.width, ((t.bits, t.width) for t in p.value.tiers)),
            "bytes": p.token_bytes(),
            "exact_bytes": 2 * p.site.exact_numbers_per_token,
        }
        for p in plan.sites
    ]


def sites_table(sites: Iterable[AttentionSite]) -> Table:
    """Tabulate sites, a row each: shapes, rotation, mask, norm, and bytes per token of a 16-bit KV cache."""
    table = Table(title="Attention sites", title_justify="left")
    for name, justify in (
        ("site", "left"), ("kind", "left"), ("H", "right"), ("G", "right"), ("D", "right"), ("rope", "left"),
        ("mask", "left"), ("key norm", "left"), ("bytes/token", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for site in sites:
        table.add_row(
            site.name, site.kind, str(site.heads), str(site.kv_heads), str(site.key_dim), rope_words(site),
            mask_words(site), "yes" if site.key_norm else "no", f"{2 * site.exact_numbers_per_token:,}",
        )  # fmt: skip
    return table


def inspection_tables(inspection: Inspection, site: str | None = None) -> Group:
    """Show `fhopt inspect`: all sites, totals and attention that was not rewritten; or all facts of one site."""
    if site is not None:
        return Group(_one_site(inspection.site(site)))
    parts: list[Any] = [_sites_in_rows(inspection), _totals(inspection)]
    if inspection.plan is not None:
        parts.append(_quality(inspection.plan.card))
    return Group(*parts, *([missed_table(inspection.missed)] if inspection.missed else []))


def _sites_in_rows(inspection: Inspection) -> Table:
    """Tabulate sites, a row each. With a plan, columns with the same cell in every row become one line."""
    form = common_form(tuple(s.site.name for s in inspection.sites))
    pattern = f": {'.'.join(filter(None, (form[0], '…', form[1])))}" if any(form) else ""
    rows = [dict(zip(_SITE_COLUMNS, _site_cells(site), strict=True)) for site in inspection.sites]
    alike = [n for n in _SITE_COLUMNS if inspection.plan and len(rows) > 1 and len({row[n] for row in rows}) == 1]
    table = light_table(Text(f"Attention of {inspection.model}{pattern}"))
    table.caption_justify = "left"
    table.add_column("site", overflow="fold")
    for name in _SITE_COLUMNS:
        if name not in alike:
            table.add_column(name, justify="right" if name == "exact B/token" else "left")
    if inspection.plan is not None:
        _add_plan_columns(table, inspection)
    for site, row in zip(inspection.sites, rows, strict=True):
        cells = [row[name] for name in _SITE_COLUMNS if name not in alike]
        planned = _plan_cells(site.plan, len(inspection.rooflines)) if inspection.plan else []
        table.add_row(*map(Text, (short_name(site.site.name, form), *cells, *planned)))
    if alike:
        table.caption = Text("every site: " + ", ".join(f"{name} {rows[0][name]}" for name in alike))
    return table


_SITE_COLUMNS = ("kind", "H/G/D", "rope", "mask", "key norm", "exact B/token")


def _add_plan_columns(table: Table, inspection: Inspection) -> None:
    for name in ("layout", "keys", "values"):
        table.add_column(name)
    for name in ("B/token", "ratio", "nats"):
        table.add_column(name, justify="right", no_wrap=True)
    for roofline in inspection.rooflines:
        table.add_column(f"faster\nfrom,\n{roofline.device}", justify="right", no_wrap=True)


def _site_cells(inspected: InspectedSite) -> list[str]:
    site = inspected.site
    dims = str(site.key_dim) if site.key_dim == site.value_dim else f"{site.key_dim}|{site.value_dim}"
    heads = f"{site.heads}/{site.kv_heads}/{dims}"
    return [
        site.kind,
        heads,
        inspected.rope,
        inspected.mask,
        "yes" if site.key_norm else "no",
        f"{inspected.exact_bytes:,}",
    ]


def _plan_cells(plan: PlannedSite | None, devices: int) -> list[str]:
    if plan is None:
        return ["exact", *[""] * (5 + devices)]
    words = [mean_bits(side.width, side.tiers) for side in plan.sides]
    sides = [words[0], words[1] if len(words) > 1 else "shared"]
    pays = [paying.words.removeprefix("from ") for paying in plan.pays]
    return [plan.layout, *sides, f"{plan.bytes:,}", f"{plan.ratio:.2f}x", _nats(plan.expected_nats), *pays]


def mean_bits(width: int, tiers: Iterable[tuple[int, int]]) -> str:
    """Format the channels of a latent head and their mean bits: `192x5.4`. tiers: (bits, channels) of each group."""
    bits = sum(b * channels for b, channels in tiers)
    return f"{width}x{bits / width:.1f}" if bits else f"{width} not quantized"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _totals(inspection: Inspection) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("sites", str(len(inspection.sites)))
    table.add_row("exact KV cache", f"{inspection.exact_bytes:,} bytes per token in 16 bits")
    exact = inspection.cache
    if exact.exact_bytes != exact.tokens * sum(site.exact_bytes for site in inspection.sites):  # some store less
        table.add_row("", f"at {exact.tokens:,} tokens: {exact.exact_bytes / 1e6:,.1f} MB, all layers")
    table.add_row("exact decode step, bytes", Text(_grouped(inspection.formulas.bytes)))
    table.add_row("exact decode step, operations", Text(_grouped(inspection.formulas.operations)))
    if inspection.plan is not None:
        plan = inspection.plan
        size = f"{plan.bytes_per_token:,.1f} bytes per token, everything included, at {plan.tokens:,} tokens"
        table.add_row("plan", f"{size}: {plan.ratio:.2f}x smaller")
        if plan.cache.exact_layers:
            table.add_row("", f"{plan.cache.exact_layers} layers stay exact. Whole model: {plan.cache.words} smaller")
        table.add_row("expected loss", plan.expected_words)
        if plan.warning:
            table.add_row("warning", plan.warning)
        table.add_row("attention sinks", f"first {plan.sinks} tokens, exact")
        table.add_row("residual window", f"newest {plan.recent} tokens in {plan.window_bits} bits")
        if plan.mean_tokens:
            table.add_row("means", f"of the first {plan.mean_tokens} tokens of a sequence, taken off what is quantized")
        if plan.segment:
            table.add_row("segments", f"quantized keys are relative to segments of {plan.segment} tokens")
        if plan.has_trellis:
            table.add_row("codes", "trellis codes where a channel has up to 4 bits, for CPUs")
        table.add_row("keys, values", "channels of a latent head x mean bits. Bit groups and formulas: --site NAME")
        table.add_row("B batch, S queries, T tokens", "T_quantized of them quantized")
    return table


def _quality(card: QualityCard) -> Group:
    """Tabulate a quality card: what a plan was calibrated on, and its measured quality."""
    calibrated = f"Calibrated on {card.tokens:,} tokens: {', '.join(card.calibrated_on) or 'unknown'}."
    if not card.texts and not card.tasks:
        return Group(calibrated, "Its loss was not measured; fhopt eval MODEL --plan PLAN --record does.")
    table = Table(title="Quality card (95 % intervals)", title_justify="left")
    for name in ("measured on", "tokens or items", "exact", "plan", "change", "KL, nats per token"):
        table.add_column(name, justify="left" if name == "measured on" else "right")
    for text in card.texts:
        change = f"{text.increase_percent:+.2f} %" + _between(text.increase_percent_ci, "+.2f")
        table.add_row(
            Text(text.name), f"{text.tokens:,}", f"{text.exact:.4f}", f"{text.plan:.4f}", change, f"{text.kl:.4f}"
        )
    for task in card.tasks:
        change = f"{task.plan - task.exact:+.1f} points"
        table.add_row(Text(task.name), f"{task.items:,}", f"{task.exact:.1f} %", f"{task.plan:.1f} %", change, "")
    return Group(calibrated, table)


def _one_site(site: InspectedSite) -> Table:
    """Tabulate the facts of one site, a row each."""
    table = Table(title=Text(site.site.name), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, cell in zip(_SITE_COLUMNS, _site_cells(site), strict=True):
        table.add_row(name, Text(cell))
    for role, parameters in site.site.projections.items():
        table.add_row(f"projection {role}", Text(" + ".join(parameters)))
    table.add_row("cache", site.site.cache)
    table.add_row("source", Text(site.site.source or "unknown"))
    table.add_row("exact decode step, bytes", Text(_grouped(site.formulas.bytes)))
    table.add_row("exact decode step, operations", Text(_grouped(site.formulas.operations)))
    if site.plan is not None:
        _add_plan(table, site.plan)
    return table


def _add_plan(table: Table, plan: PlannedSite) -> None:
    table.add_section()
    table.add_row("layout", plan.layout)
    for side in plan.sides:
        lost = f", expected loss {_nats(side.evidence.nats)} nats" if side.evidence else ""
        table.add_row(
            side.side, f"{side.latent_heads} latent heads of {side.width}: {side.words}, {side.bytes:,} bytes{lost}"
        )
    table.add_row("bytes per quantized token", f"{plan.bytes:,}, {plan.ratio:.2f}x smaller")
    table.add_row("expected loss", f"{_nats(plan.expected_nats) or 'unknown'} nats per token")
    if plan.page_share < 1:
        table.add_row("pages read", f"{plan.page_read:.0%}, at most {plan.page_share:.0%}; formulas count all pages")
    table.add_row("decode step with the plan, bytes", Text(_grouped(plan.formulas.bytes)))
    table.add_row("decode step with the plan, operations", Text(_grouped(plan.formulas.operations)))
    for pays in plan.pays:
        table.add_row(f"faster on {pays.device}", pays.words)


def plan_table(plan: LatentPlan) -> Table:
    """Tabulate a plan, a row per site: layout, channels x mean bits of keys and values, bytes per quantized token."""
    table = Table(title="Latent plan (channels x mean bits)", title_justify="left")
    for name in ("site", "layout", "keys", "values"):
        table.add_column(name, overflow="fold")
    for name in ("bytes/token", "exact", "ratio"):
        table.add_column(name, justify="right")
    for row in describe(plan):
        ratio = row["exact_bytes"] / row["bytes"]
        table.add_row(
            row["site"],
            row["layout"],
            row["key"],
            row["value"],
            f"{row['bytes']:,}",
            f"{row['exact_bytes']:,}",
            f"{ratio:.2f}x",
        )
    return table


def proofs_text(proofs: Mapping[str, Certificate]) -> str:
    """Format the certificates of rewrites, one for all sites that share it."""
    parts = []
    for name, names in by_kind(proofs).items():
        rest = [f"  the same for {len(names) - 1} more, to {names[-1]}"] if len(names) > 1 else []
        parts.append("\n".join((*proofs[name].lines(name), *rest, "")))
    return "\n".join(parts)


def missed_table(missed: Iterable[Explanation | Missed]) -> Table:
    """Tabulate attention that is not rewritten: what was recognized, the reason, and its place in the user's code."""
    table = Table(title="Not rewritten", title_justify="left")
    for name in ("pass", "recognized", "reason", "source"):
        table.add_column(name, overflow="fold")
    for miss in missed:
        table.add_row(*map(Text, (miss.stage, miss.reached or "-", miss.reason, miss.source or miss.node)))
    return table


def summary_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the demo's measurements, exact and with the plan."""
    table = Table(title=f"{result['model']}: exact KV cache and latents", title_justify="left")
    table.add_column("")
    for name in ("exact", "plan", "change"):
        table.add_column(name, justify="right")
    tokens = result["bytes_counted_at_tokens"]
    per_token = result["bytes_per_token"]
    table.add_row(
        f"KV cache bytes per token, everything included, at {tokens:,} tokens (16-bit)",
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
            f"tokens per second after {int(length):,} tokens", f"{speed['exact']:.1f}", f"{speed['plan']:.1f}",
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
    table = Table(title=f"Perplexity: {title} (95 % intervals)", title_justify="left")
    for name in ("text", "tokens", "exact", "plan", "increase", "KL, nats per token"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for text, row in texts.items():
        cells = [text, f"{row['tokens']:,}", f"{row['exact']:.4f}"]
        if "plan" in row:
            increase = f"{row['increase_percent']:+.2f} %" + _between(row["increase_percent_ci"], "+.2f")
            cells += [f"{row['plan']:.4f}", increase, f"{row['kl']:.4f}" + _between(row["kl_ci"], ".4f")]
        table.add_row(*cells)
    return table


def _tasks_table(tasks: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    table = Table(title=f"Correct answers: {title} (95 % intervals)", title_justify="left")
    for name in ("task", "tokens", "depth", "items", "exact", "plan", "log-probability, plan - exact"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, whole in tasks.items():
        table.add_row(task, "all", "all", *_answers(whole))
        for cell in whole["cells"]:
            table.add_row("", f"{cell['length']:,}", _depth(cell["depth"]), *_answers(cell))
        table.add_section()
    return table


def _depth(percent: int | None) -> str:
    return "spread" if percent is None else f"{percent} %"


def _answers(results: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row: items, rates, change."""
    rates = [results["exact"], results["plan"]]
    shown = ["" if r is None else f"{100 * r['rate']:.0f} %" + _percents(r["rate_ci"]) for r in rates]
    change = results["log_prob_change"]
    text = "" if change is None else f"{change:+.3f}" + _between(results["log_prob_change_ci"], "+.3f")
    return [str(results["exact"]["items"]), *shown, text]


def _percents(interval: tuple[float, float]) -> str:
    return _between((100 * interval[0], 100 * interval[1]), ".0f")


def _between(interval: tuple[float, float] | None, digits: str) -> str:
    return "" if interval is None else f" ({interval[0]:{digits}} to {interval[1]:{digits}})"


def cost_tables(costs: Mapping[str, Cost], comparison: CostComparison, title: str) -> Group:
    """Tabulate the formulas of a decode step, its cost on devices, and the max speedup of a whole step."""
    bound = "Largest possible speedup of a whole decode step that is bound by memory: (W + KV) / (W + KV/c)"
    return Group(_formulas(costs), "", _figures(comparison, title), "", Text(bound, "italic"), _bounds(comparison))


def throughput_heading(result: Mapping[str, Any]) -> str:
    """Return a one-line description of a `fhopt bench` run."""
    weights = ", weights in blocks" if result["weights_in_blocks"] else ""
    return f"{result['model']}: {result['dtype']}{weights} on {result['device']}, medians of {result['rounds']} rounds"


def throughput_table(result: Mapping[str, Any]) -> Table:
    """Tabulate `fhopt bench`, a row per context, batch and KV cache; factors are over the full-precision cache."""
    columns = ("prefill,\ntokens/s", "first\ntoken", "decode,\ntokens/s", "KV cache,\nbytes")
    return _by_case(throughput_heading(result), columns, result["rows"], _throughput_cells)


PARTS = {"weights": "weights", "attention": "attention", "rest": "rest of\nlayers", "output": "output\nlayer"}


def parts_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the time breakdown of a decode step in `fhopt bench`, a row per context, batch and KV cache."""
    title = "Milliseconds of a decode step; -: no layer is one call of machine code with its cache"
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
    return [*["-" if ms is None else f"{ms:.2f}" for ms in times_ms], f"{row['layers_counted']:.3g}"]


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
        table.add_row(name, "bytes", _grouped(pretty(cost.bytes)))
        table.add_row("", "operations", _grouped(pretty(cost.operations)))
    weights = costs["exact"].weights
    table.add_row("weights", "bytes", _grouped(pretty(weights.bytes)))
    table.add_row("", "operations", _grouped(pretty(weights.operations)))
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
    table.caption, table.caption_justify = "Upper bounds: kernels reach a part of the peak figures.", "left"
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


def _grouped(formula: str) -> str:
    """Group the thousands of long numbers in a formula."""
    return re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", formula)
