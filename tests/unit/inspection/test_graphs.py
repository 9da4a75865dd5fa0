"""Nodes of a site in the graphs of every stage."""

from __future__ import annotations

from seen_plans import STAGES

from fhopt.inspection import graphs
from fhopt.inspection.snapshots import Snapshots
from fhopt.plan.latent_plan import LatentPlan


def test_the_nodes_of_a_site_are_those_between_its_projections_in_every_stage(
    snapshots: tuple[Snapshots, LatentPlan],
) -> None:
    taken, plan = snapshots
    first, second = (plan.sites[i].site.name for i in (0, 1))
    for stage in STAGES:
        graph = taken.after(stage).network
        inside = graphs.site_nodes(graph, first)
        assert inside and not inside & graphs.site_nodes(graph, second)
        assert sum(graph.nodes[n]["op"] == "linear" for n in inside) == 4
    ops = {graph.nodes[n]["op"] for n in graphs.site_nodes(taken.after("absorb").network, first)}
    assert "latent_attention" in ops
