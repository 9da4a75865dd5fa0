"""Graphs saved to files."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
from seen_plans import STAGES, texts
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.files import GRAPHS, check_graph
from fhopt.inspection import graphs
from fhopt.inspection.facts import inspect_sites
from fhopt.inspection.graph_files import write_graphs
from fhopt.inspection.snapshots import Snapshots
from fhopt.plan.latent_plan import LatentPlan


@pytest.mark.parametrize("ending", GRAPHS)
def test_a_graph_file_contains_the_nodes_and_shapes_of_the_program(
    ending: str, snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path, llama: FittedModel
) -> None:
    pytest.importorskip("pygraphviz")
    taken, plan = snapshots
    name = plan.sites[1].site.name
    facts = inspect_sites("tiny", [p.site for p in plan.sites], plan)
    (path,) = write_graphs(taken, tmp_path / f"graph{ending}", facts, "normalize", name)
    wanted = graphs.site_graph(taken.after("normalize").network, name)
    readers = {
        ".json": lambda: nx.node_link_graph(json.loads(path.read_text()), edges="edges"),
        ".graphml": lambda: nx.read_graphml(path),
        ".dot": lambda: nx.nx_agraph.read_dot(path),
    }
    if ending == ".svg":
        assert {"attention", "[1, 4, 16, 16]", name, "tiny, after normalize"} <= set(texts(path.read_text()))
        return
    read = readers[ending]()
    assert set(read.nodes) == set(wanted.nodes) and len(read.edges) == len(wanted.edges)
    if ending != ".dot":
        assert {n: d["shape"] for n, d in read.nodes(data=True)} == dict(wanted.nodes(data="shape"))
        assert sum(site == name for _, site in read.nodes(data="site")) == len(graphs.site_nodes(wanted, name))


def test_one_file_is_written_for_each_stage(snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path) -> None:
    taken, plan = snapshots
    facts = inspect_sites("tiny", [p.site for p in plan.sites], plan)
    written = write_graphs(taken, tmp_path / "g.json", facts, "all")
    assert [path.name for path in written] == [f"g.{i:02d}-{stage}.json" for i, stage in enumerate(STAGES)]


def test_unsupported_graph_files_are_refused(snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path) -> None:
    taken, _ = snapshots
    with pytest.raises(FhoptError, match="expected all, or one of input, decompose"):
        taken.after("dream")
    with pytest.raises(FhoptError, match="not a graph file"):
        check_graph(tmp_path / "graph.png")
    with pytest.raises(FhoptError, match="cannot be selected"):
        graphs.site_graph(taken.after("input").network, "elsewhere")
