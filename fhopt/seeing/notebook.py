"""How sites, plans and journals look in a notebook: small HTML tables that need nothing but a browser.

The classes call these from their `_repr_html_`. Names and reasons are the user's: all of them are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fhopt.errors import FhoptError
from fhopt.seeing.drawing import draw, tiers
from fhopt.seeing.inspection import mask_words, rope_words
from fhopt.spec import AttentionSite, LatentPlan, SitePlan

if TYPE_CHECKING:
    from fhopt.journal import Journal


def site_html(site: AttentionSite) -> str:
    """A site's facts, and its drawing where that can be made."""
    facts = [
        ("kind", site.kind),
        ("heads H / G / D", f"{site.heads} / {site.kv_heads} / {_dims(site.key_dim, site.value_dim)}"),
        ("rotation", rope_words(site)),
        ("mask", mask_words(site)),
        ("key norm", "yes" if site.key_norm else "no"),
        ("bytes per token, 16 bits", f"{2 * site.exact_numbers_per_token:,}"),
        ("source", site.source or "unknown"),
    ]
    return _titled(site.name, _table((), facts)) + _drawn(site)


def site_plan_html(plan: SitePlan) -> str:
    """What a plan does to one site."""
    return _titled(plan.site.name, _table(_HEAD, [_planned(plan)])) + _drawn(plan)


def plan_html(plan: LatentPlan) -> str:
    """A plan: its size, and one row a site."""
    title = f"{plan.ratio():.2f}x plan of {plan.provenance.get('model', 'a model')}: {len(plan.sites)} sites"
    return _titled(title, _table(_HEAD, [_planned(p) for p in plan.sites]))


def journal_html(journal: Journal) -> str:
    """What became of a compiled model: sites and events."""
    rows = dict.fromkeys((s.name, s.how, s.reason, s.source) for graph in journal.graphs for s in graph.sites)
    events = "".join(f"<li>{html.escape(event)}</li>" for event in journal.events)
    title = f"{journal.model}: {journal.state}, graphs: {len(journal.graphs)}"
    return _titled(title, _table(("site", "became", "because", "source"), rows)) + (
        f"<ul>{events}</ul>" if events else ""
    )


_HEAD = ("site", "layout", "keys", "values", "bytes/token", "exact", "ratio")


def _planned(plan: SitePlan) -> tuple[str, ...]:
    size, exact = plan.token_bytes(), 2 * plan.site.exact_numbers_per_token
    value = "shared" if plan.is_shared else tiers(plan.value)
    return (plan.site.name, plan.layout, tiers(plan.key), value, f"{size:,}", f"{exact:,}", f"{exact / size:.2f}x")


def _dims(key: int, value: int) -> str:
    return str(key) if key == value else f"{key} and {value}"


def _drawn(site: AttentionSite | SitePlan) -> str:
    try:
        drawing = draw(site)
    except FhoptError:  # the extra `view` is not installed: the table says it all
        return ""
    figures = [drawing.before] + ([drawing.after] if drawing.after else [])
    parts = "".join(f'<div style="flex: 1; min-width: 18rem; background: white">{svg}</div>' for svg in figures)
    return f'<div style="display: flex; flex-wrap: wrap; max-width: 72rem">{parts}</div>'


def _titled(title: str, body: str) -> str:
    return f"<p><b>{html.escape(title)}</b></p>{body}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"
