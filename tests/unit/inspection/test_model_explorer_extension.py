"""The Model Explorer extension."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fhopt.errors import FhoptError
from fhopt.inspection import graphs
from fhopt.inspection.facts import Inspection
from fhopt.inspection.model_explorer import convert, namespace
from fhopt.inspection.snapshots import Snapshots


def test_the_adapter_gives_each_stage_as_a_graph_with_sites_as_groups(
    written: tuple[Path, Snapshots, Inspection],
) -> None:
    pytest.importorskip("model_explorer", reason="Model Explorer is not installed: pip install 'fhopt[explorer]'")
    from model_explorer import Adapter, graph_builder, node_data_builder

    from fhopt.inspection.model_explorer_extension import FhoptAdapter

    path, seen, found = written
    assert issubclass(FhoptAdapter, Adapter) and FhoptAdapter.metadata.fileExts == ["fhopt"]
    (collection,) = FhoptAdapter().convert(str(path), {})["graphCollections"]
    assert isinstance(collection, graph_builder.GraphCollection)
    for graph, stage in zip(collection.graphs, seen.stages, strict=True):
        network = seen.after(stage).network
        assert {node.id for node in graph.nodes} == set(network.nodes)
        assert sum(len(node.incomingEdges) for node in graph.nodes) == len(network.edges)
        for site in found.sites:
            group, inside = namespace(site.site.name), graphs.site_nodes(network, site.site.name)
            shown = {n.id for n in graph.nodes if n.namespace == group or n.namespace.startswith(f"{group}/")}
            assert shown and shown <= inside
            assert site.plan is not None and graph.groupNodeAttributes[group]["layout"] == site.plan.layout
    data: Any = json.loads(path.with_name("tiny.bytes.json").read_text())
    for one in data.values():
        results = {node: node_data_builder.NodeDataResult(**value) for node, value in one["results"].items()}
        gradient = [node_data_builder.GradientItem(**item) for item in one["gradient"]]
        node_data_builder.GraphNodeData(results=results, name=one["name"], gradient=gradient)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("model_explorer", reason="Model Explorer is not installed: pip install 'fhopt[explorer]'")
    (tmp_path / "a.fhopt").write_text("{}")
    with pytest.raises(FhoptError, match=r"is no \.fhopt file"):
        convert(tmp_path / "a.fhopt")
