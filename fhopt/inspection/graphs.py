"""Graphs as files: the computation of a model, or of one site, before and after each pass.

    .json     node-link form of networkx        .graphml    for yEd, Gephi, Cytoscape
    .dot      Graphviz                          .svg        laid out by Graphviz

Nodes have op, role, shape, dtype, module and site; edges have the shape of the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networkx as nx
from torch import Tensor, fx

from fhopt.errors import FhoptError
from fhopt.files import appearing, check_graph
from fhopt.inspection.drawing import COLOURS, FONT, escape_label, laid_out
from fhopt.inspection.optional import need
from fhopt.passes.graph.nodes import fake, op_name, source_line
from fhopt.passes.graph.program import Program, module_path

MAX_DRAWN = 4000  # nodes; layout of more takes minutes
_OURS = {"attention": "attention", "latent_attention": "attention", "attend_latents": "attention"}
_PROJECTIONS = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "einsum", "conv1d", "baddbmm"})


def network(program: Program) -> nx.DiGraph:
    """Build the graph of a program. Node attributes: op, role, shape, dtype, module, source, order (in the program)."""
    graph: nx.DiGraph = nx.DiGraph()
    for order, node in enumerate(program.graph.nodes):
        value = fake(node)
        is_tensor = isinstance(value, Tensor)
        graph.add_node(
            node.name,
            op=op_name(node) or node.op,
            role=_role(node, program),
            shape=str(list(value.shape)) if is_tensor else "",
            dtype=str(value.dtype).removeprefix("torch.") if is_tensor else "",
            module=module_path(node),
            source=source_line(node),
            parameter=program.parameters.get(node.name, ""),
            order=order,
        )
        for source in node.all_input_nodes:
            graph.add_edge(source.name, node.name, shape=graph.nodes[source.name]["shape"])
    return graph


def _role(node: fx.Node, program: Program) -> str:
    """Return the role of a node, a key of drawing.COLOURS."""
    if program.is_parameter(node) or node.name in program.buffers:
        return "weight"
    if node.op in ("placeholder", "output"):
        return "latent" if node.name in program.bound else "io"
    name = op_name(node)
    if name in _OURS or "softmax" in name or name == "scaled_dot_product_attention":
        return "attention"
    if "fhopt" in str(node.target) or name in ("encode", "decode"):
        return "latent"
    return "weight" if name in _PROJECTIONS else "io"


def with_sites(graph: nx.DiGraph, names: Iterable[str]) -> nx.DiGraph:
    """Copy a graph with an attribute `site` on each node: the name of its site, or ""."""
    graph = graph.copy()
    nx.set_node_attributes(graph, "", "site")
    for name in names:
        for node in site_nodes(graph, name):
            graph.nodes[node]["site"] = name
    return graph


def site_nodes(graph: nx.DiGraph, name: str) -> set[str]:
    """Return the nodes of one site: those traced in its module, and those that passes inserted between them."""
    path = name.partition("#")[0]
    seeds = {n for n, module in graph.nodes(data="module") if module == path or module.startswith(f"{path}.")}
    if not seeds:
        return set()
    helper = graph.copy()
    helper.add_edges_from(("start of the site", node) for node in seeds)
    helper.add_edges_from((node, "end of the site") for node in seeds)
    before = nx.descendants(nx.subgraph_view(helper, filter_node=lambda n: n != "end of the site"), "start of the site")
    after = nx.ancestors(nx.subgraph_view(helper, filter_node=lambda n: n != "start of the site"), "end of the site")
    return before & after


def site_graph(graph: nx.DiGraph, name: str) -> nx.DiGraph:
    """Return one site with its inputs and outputs. Raises FhoptError if the graph contains no node of it."""
    inside = site_nodes(graph, name)
    if not inside:
        raise FhoptError(f"no node of this graph was traced in {name!r}, so its site cannot be selected. Drop --site.")
    around = {m for n in inside for m in (*graph.predecessors(n), *graph.successors(n))}
    return graph.subgraph(inside | around).copy()


def write_graph(graph: nx.DiGraph, path: Path, title: str) -> Path:
    """Write a graph in the format given by the suffix of `path`. Raises FhoptError."""
    check_graph(path)
    kind = path.suffix.lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as staging:
            if kind == ".json":
                staging.write_text(json.dumps({"title": title, **node_link(graph)}, indent=1) + "\n", encoding="utf-8")
            elif kind == ".graphml":
                nx.write_graphml(graph, staging)
            else:
                staging.write_text(_drawn(graph, title, kind), encoding="utf-8")
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a writable location.") from error
    return path


def node_link(graph: nx.DiGraph) -> dict[str, Any]:
    """Return the graph in the node-link form of networkx."""
    form: dict[str, Any] = nx.node_link_data(graph, edges="edges")
    return form


def _drawn(graph: nx.DiGraph, title: str, kind: str) -> str:
    if kind == ".svg" and len(graph) > MAX_DRAWN:
        raise FhoptError(
            f"the graph has {len(graph):,} nodes; expected at most {MAX_DRAWN:,} to draw. Pass --site NAME, "
            "or write a .dot, .graphml or .json file."
        )
    agraph = agraph_of(graph, title)
    return laid_out(agraph) + "\n" if kind == ".svg" else agraph.to_string()


def agraph_of(graph: nx.DiGraph, title: str) -> Any:
    """Build the graph for Graphviz, with sites as boxes around their nodes."""
    agraph = need("pygraphviz", "a drawing").AGraph(
        directed=True, label=escape_label(title), labelloc="t", fontname=FONT, nodesep="0.2", ranksep="0.3"
    )
    agraph.node_attr.update(shape="box", style="filled,rounded", fontname=FONT, fontsize="11", margin="0.1,0.05")
    agraph.edge_attr.update(fontname=FONT, fontsize="9", arrowsize="0.6", color="#71717a", fontcolor="#52525b")
    sites: dict[str, list[str]] = {}
    for node, about in graph.nodes(data=True):
        fill, line = COLOURS[about["role"]]
        label = escape_label(about["parameter"] or about["op"]) + (f"\\n{about['shape']}" if about["shape"] else "")
        agraph.add_node(node, label=label, fillcolor=fill, color=line, **{"class": about["role"]})
        sites.setdefault(about.get("site", ""), []).append(node)
    agraph.add_edges_from(graph.edges)
    for number, (site, nodes) in enumerate(sites.items()):
        if site:
            agraph.add_subgraph(
                nodes, name=f"cluster_{number}", label=escape_label(site), color="#a1a1aa", fontname=FONT
            )
    return agraph
