"""Snapshots of a graph after every pass."""

from __future__ import annotations

import sample_reports
from seen_plans import STAGES
from small_models import FittedModel

from fhopt.inspection.snapshots import Snapshots
from fhopt.models.sites import find_sites
from fhopt.plan.latent_plan import LatentPlan


def test_a_snapshot_is_taken_after_every_pass_and_none_outside(
    snapshots: tuple[Snapshots, LatentPlan], llama: FittedModel
) -> None:
    taken, _ = snapshots
    assert taken.stages == STAGES and len(taken.taken) == len(STAGES)
    find_sites(sample_reports.loaded(llama))
    assert len(taken.taken) == len(STAGES)


def test_changes_turn_one_text_into_the_other_and_count_repeats_over_layers(
    snapshots: tuple[Snapshots, LatentPlan],
) -> None:
    taken, _ = snapshots
    changes = {stage.stage: stage for stage in taken.changes()}
    normalize = changes["normalize"]
    assert normalize.nodes[0] - normalize.removed + normalize.added == normalize.nodes[1]
    (twice,) = (c for c in normalize.changes if any("fhopt.attention" in line for line in c.lines))
    assert twice.times == 2  # one for each layer
    assert changes["find_attention"].changes == ()
