"""Files for Google's Model Explorer: the graphs of all passes, with sites as groups, and values per site.

    fhopt inspect MODEL --plan PLAN --graph model.fhopt
    model-explorer model.fhopt --extensions=fhopt.inspection.model_explorer_extension --node_data_paths=model.bytes.json

The file has one graph per pass, to be shown side by side. Node data in files next to it color the sites: bytes per
token, mean bits per channel, and expected KL. Only loading needs the extra `explorer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from fhopt.errors import FhoptError
from fhopt.files import EXPLORER_GRAPH, appearing, read_file
from fhopt.inspection.graphs import node_link, with_sites

if TYPE_CHECKING:
    from fhopt.inspection.facts import InspectedSite, Inspection
    from fhopt.inspection.snapshots import Snapshot


FORM = 1  # version of the file
GRAPH_BYTES = 1 << 30  # max size of a file to load
_GRADIENT = [{"stop": 0, "bgColor": "#ccfbf1"}, {"stop": 1, "bgColor": "#f43f5e"}]


def write_explorer(graphs: Iterable[Snapshot], path: Path, inspection: Inspection) -> list[Path]:
    """Write the file, and next to it bytes, bits and expected KL of sites. Raises FhoptError."""
    names = [site.site.name for site in inspection.sites]
    boxed = {f"{i:02d} {g.stage}": with_sites(g.network, names) for i, g in enumerate(graphs)}
    about = {site.site.name: _about(site) for site in inspection.sites}
    texts = {path: {"fhopt": FORM, "model": inspection.model, "sites": about, "graphs": _forms(boxed)}}
    for kind, values in _values(inspection).items():
        if values:
            texts[path.with_name(f"{path.stem}.{kind}.json")] = _data(kind, values, boxed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, value in texts.items():
            with appearing(target) as staging:
                staging.write_text(json.dumps(value), encoding="utf-8")
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a writable location.") from error
    return list(texts)


def _forms(graphs: Mapping[str, nx.DiGraph]) -> dict[str, Any]:
    return {name: node_link(graph) for name, graph in graphs.items()}


def _about(inspected: InspectedSite) -> dict[str, str]:
    """Return the facts shown for a selected group."""
    site = inspected.site
    facts = {
        "kind": site.kind,
        "H / G / D": f"{site.heads} / {site.kv_heads} / {site.key_dim}",
        "rotation": inspected.rope,
        "mask": inspected.mask,
        "bytes/token, full precision": f"{inspected.exact_bytes:,}",
    }
    if inspected.plan is not None:
        facts |= {"layout": inspected.plan.layout, "bytes per token": f"{inspected.plan.bytes:,}"}
        facts |= {side.side: side.words for side in inspected.plan.sides}
    return facts


def _values(inspection: Inspection) -> dict[str, dict[str, float]]:
    """Return the values of each site, by kind."""
    planned = {site.site.name: site.plan for site in inspection.sites if site.plan is not None}
    losses = {name: plan.expected_nats for name, plan in planned.items() if plan.expected_nats is not None}
    sizes = {site.site.name: float(site.plan.bytes if site.plan else site.exact_bytes) for site in inspection.sites}
    return {"bytes": sizes, "bits": {name: _mean_bits(plan.sides) for name, plan in planned.items()}, "nats": losses}


def _mean_bits(sides: Iterable[Any]) -> float:
    """Return the mean bits per channel; channels without bit groups have 16."""
    tiers = [pair for side in sides for pair in (side.tiers or ((16, side.width),))]
    return sum(bits * width for bits, width in tiers) / sum(width for _, width in tiers)


def _data(kind: str, values: Mapping[str, float], graphs: Mapping[str, nx.DiGraph]) -> dict[str, Any]:
    """Return node data: a site's value is attached to its last attention node."""
    collected = {}
    for graph_id, graph in graphs.items():
        attending = {about["site"]: node for node, about in graph.nodes(data=True) if about["role"] == "attention"}
        results = {attending[site]: {"value": value} for site, value in values.items() if site in attending}
        collected[graph_id] = {"name": kind, "results": results, "gradient": _GRADIENT}
    return collected


# --------------------------------------------------------------------------------------------------- reading


def convert(path: Path) -> dict[str, Any]:
    """Convert a file to Model Explorer's graphs. Raises FhoptError if fhopt did not write it."""
    from model_explorer import graph_builder as build

    try:
        held = json.loads(read_file(path, GRAPH_BYTES))
        graphs = [_graph(build, name, form, held["sites"]) for name, form in held["graphs"].items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FhoptError(
            f"{path} is not a {EXPLORER_GRAPH} file ({error}). Write one with: fhopt inspect MODEL --graph "
            f"NAME{EXPLORER_GRAPH}."
        ) from error
    return {"graphCollections": [build.GraphCollection(label=held["model"], graphs=graphs, graphSorting="name_asc")]}


def _graph(build: Any, name: str, form: Mapping[str, Any], sites: Mapping[str, Mapping[str, str]]) -> Any:
    graph = nx.node_link_graph(form, edges="edges")
    nodes = [_node(build, graph, node, about) for node, about in graph.nodes(data=True)]
    attributes = {namespace(site): dict(about) for site, about in sites.items()}
    return build.Graph(id=name, nodes=nodes, groupNodeAttributes=attributes)


def _node(build: Any, graph: nx.DiGraph, name: str, about: Mapping[str, Any]) -> Any:
    shown = {key: about[key] for key in ("shape", "dtype", "role", "source", "parameter") if about[key]}
    output = build.MetadataItem(id="0", attrs=[build.KeyValue(key="tensor_shape", value=about["shape"])])
    return build.GraphNode(
        id=name,
        label=about["parameter"] or about["op"],
        namespace=namespace(about["module"] or about["site"]),
        attrs=[build.KeyValue(key=key, value=str(value)) for key, value in shown.items()],
        incomingEdges=[build.IncomingEdge(sourceNodeId=source) for source in graph.predecessors(name)],
        outputsMetadata=[output] if about["shape"] else [],
    )


def namespace(module: str) -> str:
    """Return a module's path in Model Explorer's group notation."""
    return module.partition("#")[0].replace("/", "_").replace(".", "/")
