"""Drawings of one attention site: exact, and with a plan. `fhopt.draw(site)` shows them in a notebook.

    exact        x -> projections -> rotation -> cache of keys and values -> attention -> output projection
    with a plan  x -> projections -> rotation -> encode -> cache of latents -> latent attention -> decode -> output
                                  query -> absorb ->

Every arrow has a shape as its label. Graphviz lays out the drawing; the package pygraphviz contains it.

Dimensions: B batch, H query heads, G kv heads, S new queries, T cached tokens, D head size, J latent heads, R width.
"""

from __future__ import annotations

import html
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import appearing
from fhopt.inspection.optional import need
from fhopt.plan.display import tiers
from fhopt.plan.latent_plan import LatentPlan, PlanOrPath, as_plan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import SitePlan

# Fill and line color by role of a node, unless a style sheet overrides them (the report's does for dark pages).
COLOURS = {
    "io": ("#f4f4f5", "#71717a"),
    "weight": ("#e0e7ff", "#4f46e5"),
    "rotation": ("#fef3c7", "#b45309"),
    "latent": ("#ccfbf1", "#0f766e"),
    "cache": ("#ffe4e6", "#be123c"),
    "attention": ("#ede9fe", "#7c3aed"),
}
PAIRINGS = {"half": "half-split"}  # names of RoPE layouts in drawings; others by their own name
FONT = "Helvetica,Arial,sans-serif"
_GRAPH = dict(rankdir="TB", bgcolor="transparent", nodesep="0.28", ranksep="0.32", margin="0.05", fontname=FONT)
_NODE = dict(shape="box", style="filled,rounded", fontname=FONT, fontsize="12", margin="0.14,0.07", height="0.3")
_EDGE = dict(fontname=FONT, fontsize="10", arrowsize="0.6", color="#71717a", fontcolor="#52525b")


@dataclass(frozen=True)
class Diagram:
    """A diagram: nodes (id -> role, lines of text) and arrows (from, to, label)."""

    nodes: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)

    def node(self, name: str, role: str, *lines: str) -> None:
        """Add a node."""
        self.nodes[name] = (role, tuple(line for line in lines if line))

    def edge(self, source: str, target: str, text: str = "") -> None:
        """Add an arrow."""
        self.edges.append((source, target, text))

    @property
    def svg(self) -> str:
        """The diagram as SVG. Raises FhoptError if pygraphviz is not installed."""
        return laid_out(self._agraph())

    def _agraph(self) -> Any:
        graph = need("pygraphviz", "a drawing").AGraph(directed=True, strict=False, **_GRAPH)
        graph.node_attr.update(_NODE)
        graph.edge_attr.update(_EDGE)
        for name, (role, lines) in self.nodes.items():
            fill, line = COLOURS[role]
            label = "\\n".join(escape_label(text) for text in lines)
            graph.add_node(name, label=label, fillcolor=fill, color=line, **{"class": role})
        for number, (source, target, text) in enumerate(self.edges):
            graph.add_edge(source, target, key=str(number), label=f" {escape_label(text)} ")
        return graph


@dataclass(frozen=True)
class Drawing:
    """A site as SVG: `before`, and `after` if there is a plan for it."""

    name: str
    before: str
    after: str | None = None

    @property
    def svg(self) -> str:
        """The site with the plan; without a plan, the exact site."""
        return self.after or self.before

    def save(self, path: str | Path) -> Path:
        """Write the SVG. Raises FhoptError."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise FhoptError(f"{path} is not an SVG file name; expected one that ends in .svg. Rename it.")
        try:
            with appearing(path) as staging:
                staging.write_text(self.svg, encoding="utf-8")
        except OSError as error:
            raise FhoptError(f"cannot write {path}: {error.strerror}. Choose another location.") from error
        return path

    def _repr_html_(self) -> str:
        parts = [("exact", self.before)] + ([("with the plan", self.after)] if self.after else [])
        shown = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in parts)
        return f"<b>{html.escape(self.name)}</b>{shown}"


def draw(site: AttentionSite | SitePlan, plan: PlanOrPath | None = None) -> Drawing:
    """Draw a site, or the plan of one. Raises FhoptError if `plan` (a plan or its path) has no such site."""
    plan = None if plan is None else as_plan(plan)
    if isinstance(site, AttentionSite) and plan is not None:
        site = plan.site(site.name)
    if isinstance(site, SitePlan):
        return Drawing(site.site.name, before(site.site).svg, after(site, plan).svg)
    return Drawing(site.name, before(site).svg)


# --------------------------------------------------------------------------------------------------- diagrams of a site


def before(site: AttentionSite) -> Diagram:
    """Draw the site with exact keys and values."""
    drawn = _projected(site)
    drawn.node("cache", "cache", "KV cache", f"{2 * site.exact_numbers_per_token:,} bytes/token in 16 bits")
    drawn.edge(_last(drawn, "k"), "cache", f"k [B, {site.kv_heads}, S, {site.key_dim}]")
    drawn.edge("v", "cache", f"v [B, {site.kv_heads}, S, {site.value_dim}]")
    drawn.node("core", "attention", "attention", *_core_facts(site))
    drawn.edge(_last(drawn, "q"), "core", f"q [B, {site.heads}, S, {site.key_dim}]")
    drawn.edge("cache", "core", f"K, V [B, {site.kv_heads}, T, {_dims(site.key_dim, site.value_dim)}]")
    _output(drawn, site, "core")
    return drawn


def after(site_plan: SitePlan, plan: LatentPlan | None = None) -> Diagram:
    """Draw the site with its plan."""
    site, drawn = site_plan.site, _projected(site_plan.site)
    drawn.node("ek", "latent", "encode keys", _matrix(site_plan.key.encode))
    drawn.edge(_last(drawn, "k"), "ek", f"k [B, {site.kv_heads}, S, {site.key_dim}]")
    value_encoder = "ek" if site_plan.is_shared else "ev"
    if not site_plan.is_shared:
        drawn.node("ev", "latent", "encode values", _matrix(site_plan.value.encode))
    drawn.edge("v", value_encoder, f"v [B, {site.kv_heads}, S, {site.value_dim}]")
    drawn.node(
        "cache", "cache", f"KV cache of latents ({site_plan.layout})", *_stored(site_plan), *_window(site_plan, plan)
    )
    drawn.edge("ek", "cache", f"z_K [B, {site_plan.key.groups}, S, {site_plan.key.width}]")
    if not site_plan.is_shared:
        drawn.edge("ev", "cache", f"z_V [B, {site_plan.value.groups}, S, {site_plan.value.width}]")
    drawn.node("absorb", "latent", "absorb", f"D_K^T {_matrix(site_plan.key.decode)}")
    drawn.edge(_last(drawn, "q"), "absorb", f"q [B, {site.heads}, S, {site.key_dim}]")
    drawn.node("core", "attention", "latent attention", *_core_facts(site))
    drawn.edge("absorb", "core", f"q~ [B, {site.heads}, S, {site_plan.key.width}]")
    drawn.edge(
        "cache", "core", f"Z [B, {site_plan.key.groups}, T, {_dims(site_plan.key.width, site_plan.value.width)}]"
    )
    drawn.node("dv", "latent", "decode", f"D_V {_matrix(site_plan.value.decode)}")
    drawn.edge("core", "dv", f"o~ [B, {site.heads}, S, {site_plan.value.width}]")
    _output(drawn, site, "dv")
    return drawn


def _projected(site: AttentionSite) -> Diagram:
    """Draw input, projections, and everything between projections and core attention."""
    drawn = Diagram()
    is_cross = site.kind == "cross"
    drawn.node("x", "io", "hidden states")
    if is_cross:
        drawn.node("source", "io", "encoder output")
    for role, heads, dim in (
        ("q", site.heads, site.key_dim), ("k", site.kv_heads, site.key_dim), ("v", site.kv_heads, site.value_dim),
    ):  # fmt: skip
        drawn.node(role, "weight", _projection(site, role), f"{heads} x {dim}")
        drawn.edge("source" if is_cross and role != "q" else "x", role)
    if site.rope is not None or site.key_norm:
        what = [*(["norm"] if site.key_norm else []), *(["RoPE"] if site.rope is not None else [])]
        turned = (
            f"{site.rope.rotary_dim} of {site.key_dim}, {PAIRINGS.get(site.rope.pairing, site.rope.pairing)}"
            if site.rope is not None
            else ""
        )
        for role in ("q", "k"):
            drawn.node(f"{role}_turned", "rotation", " and ".join(what), turned)
            drawn.edge(role, f"{role}_turned")
    return drawn


def _last(drawn: Diagram, role: str) -> str:
    return f"{role}_turned" if f"{role}_turned" in drawn.nodes else role


def _output(drawn: Diagram, site: AttentionSite, source: str) -> None:
    drawn.node("o", "weight", _projection(site, "o"))
    drawn.edge(source, "o", f"o [B, {site.heads}, S, {site.value_dim}]")
    drawn.node("y", "io", "output")
    drawn.edge("o", "y")


def _projection(site: AttentionSite, role: str) -> str:
    """Return the last component of the path of the projection module."""
    names = site.projections.get(role, ())
    modules = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[2] or name for name in names)
    return " + ".join(modules) or role


def _core_facts(site: AttentionSite) -> list[str]:
    window = f" of {site.window}" if site.window else ""
    facts = [
        f"{site.heads} query heads, {site.kv_heads} kv heads",
        f"scale {site.scale:.4g}",
        f"mask: {site.mask}{window}",
    ]
    facts += [f"softcap {site.softcap:g}"] if site.softcap else []
    return facts + (["attention sinks"] if site.sinks else [])


def _stored(plan: SitePlan) -> list[str]:
    sides = [("keys and values", plan.key)] if plan.is_shared else [("keys", plan.key), ("values", plan.value)]
    return [f"{name}: {tiers(side)}" for name, side in sides] + [f"{plan.token_bytes():,} bytes/token"]


def _window(site: SitePlan, plan: LatentPlan | None) -> list[str]:
    if plan is None:
        return []
    sinks, recent = site.site.exact_tokens(plan.sinks, plan.recent)
    kept = [f"{sinks} attention sinks; residual window of {recent} in {plan.window_bits} bits"] if recent else []
    kept += [f"keys relative to segments of {site.segment} tokens"] if site.segment else []
    share = plan.page_share(site)
    read = f"reads {plan.page_read(site):.0%} of the pages, at most {share:.0%}"
    return kept + ([read] if share < 1 else [])


def _matrix(tensor: Any) -> str:
    return "[" + ", ".join(str(int(n)) for n in tensor.shape) + "]"


def _dims(key: int, value: int) -> str:
    return str(key) if key == value else f"{key} | {value}"


# --------------------------------------------------------------------------------------------------- SVG


def escape_label(text: str) -> str:
    """Escape a text for Graphviz, which interprets entities and backslashes in labels, and HTML between < and >."""
    return html.escape(text, quote=False).replace("\\", "\\\\")


def laid_out(agraph: Any) -> str:
    """Lay out a pygraphviz graph with Graphviz, and return it as SVG."""
    with without_font_warnings():
        return clean_svg(agraph.draw(format="svg", prog="dot").decode())


@contextmanager
def without_font_warnings() -> Iterator[None]:
    """Suppress Fontconfig's warnings on standard error: pygraphviz bundles a version older than the system's files.

    They are written from C, so the file descriptor is redirected; other output is written afterwards.
    """
    with _aside, tempfile.TemporaryFile() as written:
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not line.startswith(b"Fontconfig "):
                    os.write(2, line)


_aside = threading.Lock()  # one thread at a time


def clean_svg(svg: str) -> str:
    """Return only the SVG element, sized by its box, without ids, which would collide on a page of many drawings."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>[^<]*</title>\n?", "", svg)  # ids of nodes, which browsers would show as tooltips
    svg = re.sub(r' id="[^"]*"', "", svg)
    return re.sub(r'<svg width="(\d+)pt" height="\d+pt"', r'<svg style="max-width: \1pt" width="100%"', svg, count=1)
