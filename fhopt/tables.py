"""Tables for people, made with rich: sites, plans, and the demo's summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from fhopt.fitting import describe
from fhopt.passes import Explanation
from fhopt.spec import AttentionSite, LatentPlan


def sites_table(sites: Iterable[AttentionSite]) -> Table:
    """One row a site: shapes, rotation, mask, norm, and bytes that an exact 16-bit cache keeps per token."""
    table = Table(title="Attention sites", title_justify="left")
    for name, justify in (
        ("site", "left"), ("kind", "left"), ("H", "right"), ("G", "right"), ("D", "right"), ("rope", "left"),
        ("mask", "left"), ("key norm", "left"), ("bytes/token", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for site in sites:
        table.add_row(
            site.name, site.kind, str(site.heads), str(site.kv_heads), str(site.key_dim), _rope(site), _mask(site),
            "yes" if site.key_norm else "no", f"{2 * site.exact_numbers_per_token:,}",
        )  # fmt: skip
    return table


def _rope(site: AttentionSite) -> str:
    if site.rope is None:
        return "none"
    grid = ", grid" if site.rope.positions == "grid" else ""
    return f"{site.rope.pairing} {site.rope.rotary_dim}{grid}"


def _mask(site: AttentionSite) -> str:
    parts = [f"{site.mask} {site.window}" if site.window else site.mask]
    parts += [f"cap {site.softcap:g}"] if site.softcap else []
    return ", ".join([*parts, "sinks"] if site.sinks else parts)


def plan_table(plan: LatentPlan) -> Table:
    """One row a site: layout, channels x bits of keys and values, bytes per sealed token."""
    table = Table(title="Latent plan (channels x bits)", title_justify="left")
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


def missed_table(missed: Iterable[Explanation]) -> Table:
    """Candidates that were left alone: how far they came, why, and where they stand in the user's code."""
    table = Table(title="Left alone", title_justify="left")
    for name in ("pass", "recognised", "reason", "source"):
        table.add_column(name, overflow="fold")
    for miss in missed:
        table.add_row(miss.stage, miss.reached or "-", miss.reason, miss.source or miss.node)
    return table


def summary_table(result: Mapping[str, Any]) -> Table:
    """The demo's figures, before and after."""
    table = Table(title=f"{result['model']}: exact cache against latents", title_justify="left")
    table.add_column("")
    for name in ("exact", "plan", "change"):
        table.add_column(name, justify="right")
    tokens = result["bytes_counted_at_tokens"]
    per_token = result["bytes_per_token"]
    table.add_row(
        f"cache bytes per token, all counted, at {tokens:,} tokens (16-bit)",
        f"{per_token['exact']:,.0f}",
        f"{per_token['plan']:,.0f}",
        f"{per_token['exact'] / per_token['plan']:.2f}x smaller",
    )
    held = result["cache_nbytes"]
    table.add_row(
        f"cache bytes held behind {result['decode_tokens']:,} tokens ({result['dtype']})", f"{held['exact']:,}",
        f"{held['plan']:,}", f"{held['exact'] / held['plan']:.2f}x smaller",
    )  # fmt: skip
    for text, values in result["perplexity"].items():
        change = values["plan"] / values["exact"] - 1
        table.add_row(f"perplexity, {text}", f"{values['exact']:.4f}", f"{values['plan']:.4f}", f"{change:+.2%}")
    speed = result["tokens_per_second"]
    table.add_row(
        f"tokens per second behind {result['decode_tokens']:,} tokens", f"{speed['exact']:.1f}", f"{speed['plan']:.1f}",
        f"{speed['plan'] / speed['exact']:.2f}x",
    )  # fmt: skip
    return table
