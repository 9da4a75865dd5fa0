"""HTML tables of sites, plans and journals for notebooks, without scripts or style sheets.

Classes call these from `_repr_html_`. Names and reasons are user input: all are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.plan.site import AttentionSite
    from fhopt.plan.site_plan import SidePlan, SitePlan


def tiers(side: SidePlan) -> str:
    """Describe the bit groups of one latent head as `8x6 + 40x3t`: channels x bits, t for a trellis code."""
    return " + ".join(f"{t.width}x{t.bits}{'t' if t.is_trellis else ''}" for t in side.tiers) or f"{side.width} uncoded"


# --------------------------------------------------------------------------------------------------- words


def rope_words(site: AttentionSite) -> str:
    """Describe the rotary embedding: `half 64`."""
    if site.rope is None:
        return "none"
    grid = ", grid" if site.rope.positions == "grid" else ""
    return f"{site.rope.pairing} {site.rope.rotary_dim}{grid}"


def mask_words(site: AttentionSite) -> str:
    """Describe the mask: `sliding 512, cap 50, sinks`."""
    parts = [f"{site.mask} {site.window}" if site.window else site.mask]
    parts += [f"cap {site.softcap:g}"] if site.softcap else []
    return ", ".join([*parts, "sinks"] if site.sinks else parts)


def site_html(site: AttentionSite) -> str:
    """Tabulate the properties of a site; `fhopt.draw(site)` draws it."""
    facts = [
        ("kind", site.kind),
        ("heads H / G / D", f"{site.heads} / {site.kv_heads} / {_dims(site.key_dim, site.value_dim)}"),
        ("rotation", rope_words(site)),
        ("mask", mask_words(site)),
        ("key norm", "yes" if site.key_norm else "no"),
        ("bytes per token, 16 bits", f"{2 * site.exact_numbers_per_token:,}"),
        ("source", site.source or "unknown"),
    ]
    return html_titled(site.name, html_table((), facts))


def site_plan_html(plan: SitePlan) -> str:
    """Tabulate the plan of one site."""
    return html_titled(plan.site.name, html_table(_HEAD, [_planned(plan)]))


def plan_html(plan: LatentPlan) -> str:
    """Tabulate a plan: its size, and one row per site."""
    title = f"{plan.ratio():.2f}x plan of {plan.provenance.get('model', 'a model')}: {len(plan.sites)} sites"
    return html_titled(title, html_table(_HEAD, [_planned(p) for p in plan.sites]))


_HEAD = ("site", "layout", "keys", "values", "bytes/token", "exact", "ratio")


def _planned(plan: SitePlan) -> tuple[str, ...]:
    size, exact = plan.token_bytes(), 2 * plan.site.exact_numbers_per_token
    value = "shared" if plan.is_shared else tiers(plan.value)
    return (plan.site.name, plan.layout, tiers(plan.key), value, f"{size:,}", f"{exact:,}", f"{exact / size:.2f}x")


def _dims(key: int, value: int) -> str:
    return str(key) if key == value else f"{key} and {value}"


def html_titled(title: str, body: str) -> str:
    """Put a title above HTML. title: text, escaped here."""
    return f"<p><b>{html.escape(title)}</b></p>{body}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format cells of text, escaped here, as an HTML table."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def quantity(value: float, unit: str) -> str:
    """Format a number with three digits and an SI prefix: 1.28 ms, 653 MB."""
    power = min(4, max(-3, math.floor(math.log10(value) / 3))) if value > 0 else 0
    scaled = value / 1000**power
    digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    prefix = ("n", "µ", "m", "", "k", "M", "G", "T")[power + 3]
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def rate(value: float) -> str:
    """Format tokens per second with three digits; all digits from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(factor: float) -> str:
    """Format a factor: 0.85x, 14.1x."""
    return f"{factor:.2f}x" if factor < 10 else f"{factor:.1f}x"
