"""Tables that commands print, made with rich: sites, plans, misses. Measurements: measured_tables.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fhopt.inspection.facts import InspectedSite, Inspection, Missed, PlannedSite, common_form, short_name
from fhopt.passes.certificate import Certificate, by_kind
from fhopt.passes.outcome import Explanation
from fhopt.plan.display import mask_words, rope_words
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
    rows = [dict(zip(_SITE_COLUMNS, _site_cells(site), strict=True)) for site in inspection.sites]
    alike = [n for n in _SITE_COLUMNS if inspection.plan and len(rows) > 1 and len({row[n] for row in rows}) == 1]
    table = light_table(Text(f"Attention of {inspection.model}{_pattern(form)}"))
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


def _pattern(form: tuple[str, str]) -> str:
    """Return the part of site names that tables leave out."""
    return f": {'.'.join(filter(None, (form[0], '…', form[1])))}" if any(form) else ""


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
    table.add_row("full-precision KV cache", f"{inspection.exact_bytes:,} bytes/token in 16 bits")
    exact = inspection.cache
    if exact.exact_bytes != exact.tokens * sum(site.exact_bytes for site in inspection.sites):  # some store less
        table.add_row("", f"at {exact.tokens:,} tokens: {exact.exact_bytes / 1e6:,.1f} MB, all layers")
    table.add_row("full-precision decode step, bytes", Text(group_digits(inspection.formulas.bytes)))
    table.add_row("full-precision decode step, operations", Text(group_digits(inspection.formulas.operations)))
    if inspection.plan is not None:
        plan = inspection.plan
        size = f"{plan.bytes_per_token:,.1f} bytes/token, everything included, at {plan.tokens:,} tokens"
        table.add_row("plan", f"{size}: {plan.ratio:.2f}x smaller")
        if plan.cache.exact_layers:
            table.add_row(
                "", f"{plan.cache.exact_layers} layers stay in full precision. Whole model: {plan.cache.words} smaller"
            )
        table.add_row("expected loss", plan.expected_words)
        if plan.warning:
            table.add_row("warning", plan.warning)
        table.add_row("attention sinks", f"first {plan.sinks} tokens, in full precision")
        table.add_row("residual window", f"newest {plan.recent} tokens in {plan.window_bits} bits")
        if plan.mean_tokens:
            table.add_row(
                "means", f"of the first {plan.mean_tokens} tokens of a sequence, subtracted before quantizing"
            )
        if plan.segment:
            table.add_row("segments", f"quantized keys are relative to segments of {plan.segment} tokens")
        if plan.has_trellis:
            table.add_row("codes", "trellis codes for channels of up to 4 bits (CPU only)")
        table.add_row("keys, values", "channels of a latent head x mean bits. Bit groups and formulas: --site NAME")
        table.add_row("B batch, S queries, T tokens", "T_quantized of them quantized")
    return table


def _quality(card: QualityCard) -> Group:
    """Tabulate a quality card: what a plan was calibrated on, and its measured quality."""
    calibrated = f"Calibrated on {card.tokens:,} tokens: {', '.join(card.calibrated_on) or 'unknown'}."
    if not card.texts and not card.tasks:
        return Group(calibrated, "Its quality was not measured. Measure it with: fhopt eval MODEL --plan PLAN --record")
    table = Table(title="Quality card (95% CI)", title_justify="left")
    for name in ("measured on", "tokens or items", "exact", "plan", "change", "KL, nats/token"):
        table.add_column(name, justify="left" if name == "measured on" else "right")
    for text in card.texts:
        change = f"{text.increase_percent:+.2f}%" + interval_words(text.increase_percent_ci, "+.2f")
        table.add_row(
            Text(text.name), f"{text.tokens:,}", f"{text.exact:.4f}", f"{text.plan:.4f}", change, f"{text.kl:.4f}"
        )
    for task in card.tasks:
        change = f"{task.plan - task.exact:+.1f} points"
        table.add_row(Text(task.name), f"{task.items:,}", f"{task.exact:.1f}%", f"{task.plan:.1f}%", change, "")
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
    table.add_row("full-precision decode step, bytes", Text(group_digits(site.formulas.bytes)))
    table.add_row("full-precision decode step, operations", Text(group_digits(site.formulas.operations)))
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
    table.add_row("expected loss", f"{_nats(plan.expected_nats) or 'unknown'} nats/token")
    if plan.page_share < 1:
        table.add_row("pages read", f"{plan.page_read:.0%}, at most {plan.page_share:.0%}; formulas count all pages")
    table.add_row("decode step with the plan, bytes", Text(group_digits(plan.formulas.bytes)))
    table.add_row("decode step with the plan, operations", Text(group_digits(plan.formulas.operations)))
    for pays in plan.pays:
        table.add_row(f"faster on {pays.device}", pays.words)


def plan_table(plan: LatentPlan) -> Table:
    """Tabulate a plan, a row per site: layout, channels x mean bits of keys and values, bytes per quantized token."""
    form = common_form(tuple(p.site.name for p in plan.sites))
    table = light_table("Latent plan (channels x mean bits)")
    if any(form):
        table.caption, table.caption_justify = Text(f"sites{_pattern(form)}"), "left"
    for name in ("site", "layout", "keys", "values"):
        table.add_column(name, overflow="fold")
    for name in ("bytes/token", "exact", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in describe(plan):
        ratio = row["exact_bytes"] / row["bytes"]
        table.add_row(
            Text(short_name(row["site"], form)),
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


def interval_words(interval: tuple[float, float] | None, digits: str) -> str:
    """Format an interval in brackets, with a space before it; "" for None."""
    return "" if interval is None else f" ({interval[0]:{digits}} to {interval[1]:{digits}})"


def group_digits(formula: str) -> str:
    """Group the thousands of long numbers in a formula."""
    return re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", formula)
