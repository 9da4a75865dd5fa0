"""Commands that analyze a model: inspect, explain, report."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import networkx as nx
import pytest
from command_models import call


def test_inspect_gives_sites_and_misses_as_json(importable: str) -> None:
    result = call("inspect", importable, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [s["name"] for s in found["sites"]] == ["attention"]
    assert found["sites"][0]["projections"]["k"] == ["attention.k.weight"]
    assert len(found["missed"]) == 1 and "over the projection by gate.weight" in found["missed"][0]["reason"]
    assert found["missed"][0]["reached"] == "softmax"


def test_explain_names_the_source_line(importable: str) -> None:
    result = call("explain", importable)
    assert result.exit_code == 0
    assert "1 sites found, 1 candidates not rewritten" in result.stdout
    assert ": q [" in result.stdout
    assert "command_models.py:" in result.stdout


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(
        "from torch import nn, zeros\ndef make(): return nn.Linear(2, 2), (zeros(1, 2),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    result = call("explain", "mine_here:make", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"missed": [], "sites_found": 0, "certificates": {}}


def test_every_graph_of_a_model_with_graph_breaks_is_analyzed(importable: str) -> None:
    result = call("explain", importable.replace("encoder", "broken"), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sites_found"] == 2 and len(found["missed"]) == 2


def test_a_report_is_one_file_without_links(importable: str, tmp_path: Path) -> None:
    result = call("report", importable, "-o", str(tmp_path / "report.html"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    outside = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert "attention" in page and not re.search("src=|<link|https?:", outside)
    assert os.listdir(tmp_path) == ["report.html"]


def test_inspect_describes_one_site_and_writes_its_graph(importable: str, tmp_path: Path) -> None:
    (site,) = json.loads(call("inspect", importable, "--json").stdout)["sites"]
    result = call("inspect", importable, "--site", site["name"], "--graph", str(tmp_path / "g.json"))
    assert result.exit_code == 0, result.output
    assert site["formulas"]["bytes"].replace("⋅", "") in result.output.replace("⋅", "")
    graph = nx.node_link_graph(json.loads((tmp_path / "g.json").read_text()), edges="edges")
    assert "attention" in {op for _, op in graph.nodes(data="op")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stage", "input"), "--stage requires --graph"),
        (("--graph", "graph.png"), "not a graph file"),
        (("--site", "nowhere"), "site 'nowhere' does not exist"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_inspect_refuses_what_it_cannot_show(options: tuple[str, ...], message: str, importable: str) -> None:
    result = call("inspect", importable, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
