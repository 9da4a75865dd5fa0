"""Files for Google's Model Explorer, loaded by its own data classes if it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fhopt.inspection.facts import Inspection
from fhopt.inspection.model_explorer import namespace
from fhopt.inspection.snapshots import Snapshots


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
