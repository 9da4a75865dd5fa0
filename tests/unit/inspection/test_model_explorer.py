"""Files for Google's Model Explorer, loaded by its own data classes if it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample_reports
from small_models import FittedModel

from fhopt.inspection.facts import Inspection, site_facts
from fhopt.inspection.graph_files import write_graphs
from fhopt.inspection.model_explorer import namespace
from fhopt.inspection.snapshots import Snapshots
from fhopt.models.sites import find_sites
from fhopt.passes import pipeline


@pytest.fixture(scope="module")
def written(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshots, Inspection]:
    seen, plan, loaded = Snapshots(keep_networks=True), llama.plan(4), sample_reports.loaded(llama)
    with seen.taking():
        outcome = find_sites(loaded)
        found = site_facts(loaded, outcome, plan)
        pipeline.optimize(outcome, plan)
    path = tmp_path_factory.mktemp("explorer") / "tiny.fhopt"
    names = [p.name for p in write_graphs(seen, path, found, "normalize")]
    assert names == ["tiny.fhopt", "tiny.bytes.json", "tiny.bits.json", "tiny.nats.json"]
    return path, seen, found


def test_node_data_are_those_of_the_sites(written: tuple[Path, Snapshots, Inspection]) -> None:
    path, seen, found = written
    wanted = {
        "bytes": [site.plan.bytes for site in found.sites if site.plan],
        "nats": [site.plan.expected_nats for site in found.sites if site.plan],
    }
    for kind, values in wanted.items():
        data = json.loads(path.with_name(f"tiny.{kind}.json").read_text())
        assert list(data) == [f"{i:02d} {stage}" for i, stage in enumerate(seen.stages)]
        assert [result["value"] for result in data["06 absorb"]["results"].values()] == values
    bits = json.loads(path.with_name("tiny.bits.json").read_text())["06 absorb"]["results"]
    tiers = [pair for side in found.sites[0].plan.sides for pair in side.tiers] if found.sites[0].plan else []
    mean = sum(b * w for b, w in tiers) / sum(w for _, w in tiers)
    assert next(iter(bits.values()))["value"] == pytest.approx(mean)


def test_groups_nest_like_modules() -> None:
    assert namespace("model.layers.0.self_attn#2") == "model/layers/0/self_attn"
    assert namespace("a/b.c") == "a_b/c"
