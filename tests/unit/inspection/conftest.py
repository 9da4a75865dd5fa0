"""Fixtures of several files: snapshots of a small model with a plan, and graph files with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample_reports
from small_models import FittedModel

from fhopt.inspection.facts import Inspection, site_facts
from fhopt.inspection.graph_files import write_graphs
from fhopt.inspection.snapshots import Snapshots
from fhopt.models.sites import find_sites
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan


@pytest.fixture(scope="module")
def snapshots(llama: FittedModel) -> tuple[Snapshots, LatentPlan]:
    taken, plan = Snapshots(keep_networks=True), llama.plan(4)
    with taken.taking():
        pipeline.optimize(find_sites(sample_reports.loaded(llama)), plan)
    return taken, plan


@pytest.fixture(scope="module")
def written(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshots, Inspection]:
    """Graph files for Model Explorer, and what is in them."""
    seen, plan, loaded = Snapshots(keep_networks=True), llama.plan(4), sample_reports.loaded(llama)
    with seen.taking():
        outcome = find_sites(loaded)
        found = site_facts(loaded, outcome, plan)
        pipeline.optimize(outcome, plan)
    path = tmp_path_factory.mktemp("explorer") / "tiny.fhopt"
    names = [p.name for p in write_graphs(seen, path, found, "normalize")]
    assert names == ["tiny.fhopt", "tiny.bytes.json", "tiny.bits.json", "tiny.nats.json"]
    return path, seen, found
