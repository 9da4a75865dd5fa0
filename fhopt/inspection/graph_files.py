"""Writing of graph files: dot, svg, graphml, json, and .fhopt for Model Explorer."""

from __future__ import annotations

from pathlib import Path

from fhopt.files import EXPLORER_GRAPH
from fhopt.inspection.facts import Inspection
from fhopt.inspection.graphs import site_graph, with_sites, write_graph
from fhopt.inspection.model_explorer import write_explorer
from fhopt.inspection.snapshots import ALL, Snapshots


def write_graphs(
    seen: Snapshots, path: Path, inspection: Inspection, stage: str, site: str | None = None
) -> list[Path]:
    """Write the graph after a pass to `path`; for the stage "all", one file per pass, with the pass in its name.

    A file for Model Explorer contains all stages. site: write only this site. Raises FhoptError.
    """
    if path.suffix.lower() == EXPLORER_GRAPH:
        return write_explorer([seen.after(name, site) for name in seen.stages], path, inspection)
    title, sites = inspection.model, [s.site.name for s in inspection.sites]
    stages = seen.stages if stage == ALL else (stage,)
    written = []
    for number, name in enumerate(stages):
        snapshot = seen.after(name, site)
        graph = with_sites(snapshot.network, [site] if site else sites)
        target = path.with_name(f"{path.stem}.{number:02d}-{name}{path.suffix}") if stage == ALL else path
        shown = site_graph(graph, site) if site else graph
        written.append(write_graph(shown, target, f"{title}, {f'after {name}' if name != 'input' else 'as captured'}"))
    return written
