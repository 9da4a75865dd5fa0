"""Sites that share kernel shapes: sizes, losses, and clusters."""

from __future__ import annotations

import itertools
import random

import pytest
from fitting_by_hand import wide

from fhopt.errors import FhoptError
from fhopt.fitting import allocation, kernel_shapes
from fhopt.fitting.allocation import DISTORTION, Allocation, allocate_sides, side_of
from fhopt.fitting.choices import BITS, Grain, grain_of
from fhopt.fitting.kernel_shapes import SiteChunks, share_shapes
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SCALE_BYTES, TIER_QUANTUM

ANY, GPU = grain_of(BITS, None), grain_of(BITS, "h100")
Sites = dict[str, SiteChunks]


def spectrum(falls: float, level: float, grain: Grain, chunks: int = 16) -> dict[int, list[float]]:
    """Costs of chunks whose variances fall geometrically, shuffled after the first, which always has bits."""
    rest = [level * falls**-i for i in range(1, chunks)]
    random.Random(0).shuffle(rest)
    variances = [level, *rest]
    return {b: [v * DISTORTION[b] for v in variances] for b in (0, *grain.levels)}


def models(count: int, grain: Grain, groups: int = 1) -> Sites:
    """Sites of two families, with steep and flat spectra, each slightly different."""
    return {
        f"layers.{n}": SiteChunks(
            (spectrum(1.2 + n % 2 + n / 100, 1 + n / 50, grain), spectrum(1.1 + n % 2, 2.0, grain)), (groups, groups)
        )
        for n in range(count)
    }


def free(sites: Sites, budget: int, grain: Grain) -> Allocation:
    sides = {(n, i): side_of(s.nats[i], s.groups[i], grain) for n, s in sites.items() for i in range(len(s.nats))}
    return allocate_sides(sides, budget, fill=True)


def bits_used(found: Allocation, sites: Sites) -> int:
    return sum(
        sum(found.bits[n, i]) * TIER_QUANTUM * groups + 8 * SCALE_BYTES * groups
        for n, s in sites.items()
        for i, groups in enumerate(s.groups)
    )


def nats(found: Allocation, sites: Sites) -> float:
    """Return the cost of each chunk's bits, without the padding chunks of a last plane."""
    return sum(
        s.nats[i][b][chunk]
        for n, s in sites.items()
        for i in range(len(s.nats))
        for chunk, b in enumerate(found.bits[n, i][: len(s.nats[i][0])])
    )


def shapes(found: Allocation, sites: Sites) -> set[tuple[tuple[int, ...], ...]]:
    return {tuple(tuple(sorted(found.bits[n, i])) for i in range(len(s.nats))) for n, s in sites.items()}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("grain", [ANY, GPU])
def test_sites_have_a_limited_number_of_shapes_within_the_budget(grain: Grain, most: int, groups: int) -> None:
    sites = models(9, grain, groups)
    budget = 9 * 2 * (16 * TIER_QUANTUM * 3 + 16) * groups
    alone = free(sites, budget, grain)
    found = share_shapes(sites, alone, budget, grain, most)
    assert len(shapes(found, sites)) <= most <= len(shapes(alone, sites))
    assert 0.95 * budget < bits_used(found, sites) <= budget
    assert found.nats == pytest.approx(nats(found, sites))
    assert found.nats >= alone.nats * (1 - 1e-9)


def test_more_shapes_reduce_the_loss() -> None:
    sites = models(12, ANY)
    budget = 12 * 2 * (16 * TIER_QUANTUM * 3 + 16)
    alone = free(sites, budget, ANY)
    losses = [share_shapes(sites, alone, budget, ANY, most).nats for most in (1, 2, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.5 * losses[0]  # two families
    assert losses[1] < 1.1 * alone.nats


def test_two_families_are_separated() -> None:
    sites = models(8, ANY)
    budget = 8 * 2 * (16 * TIER_QUANTUM * 3 + 16)
    found = share_shapes(sites, free(sites, budget, ANY), budget, ANY, 2)
    sorts = [shapes(found, {n: sites[n] for n in list(sites)[family::2]}) for family in (0, 1)]
    assert len(sorts[0]) == len(sorts[1]) == 1 and sorts[0] != sorts[1]


def test_two_sites_of_one_shape_are_optimal() -> None:
    """Compare with all shapes of two sites of three chunks each, at the bits used."""
    grain = Grain((1, 2, 4), 0)
    sites = {
        name: SiteChunks(({b: [v * DISTORTION[b] for v in values] for b in (0, 1, 2, 4)},), (1,))
        for name, values in (("a", (9.0, 1.0, 3.0)), ("b", (2.0, 8.0, 1.0)))
    }
    budget = 2 * (8 * 7 + 16)
    found = share_shapes(sites, free(sites, budget - 16, grain), budget, grain, 1)
    ranked = [sorted(s.nats[0][0], reverse=True) for s in sites.values()]
    possible = [
        sum(values[k] * DISTORTION[b] for values in ranked for k, b in enumerate(shape))
        for shape in itertools.product((0, 1, 2, 4), repeat=3)
        if sum(shape) == sum(found.bits["a", 0])
    ]
    assert found.nats == pytest.approx(min(possible))


def test_nothing_changes_if_there_are_few_shapes_anyway() -> None:
    one = models(1, ANY)["layers.0"]
    sites = {f"layers.{n}": one for n in range(5)}
    budget = 5 * 2 * (16 * TIER_QUANTUM * 3 + 16)
    alone = free(sites, budget, ANY)
    alike = Allocation({(n, i): alone.bits["layers.0", i] for n, i in alone.bits}, alone.nats, alone.price)
    assert share_shapes(sites, alike, budget, ANY, 1) is alike


def test_sites_of_other_sizes_have_separate_shapes() -> None:
    sites = models(6, ANY)
    sites |= {
        f"wide.{n}": SiteChunks((spectrum(1.3 + n / 9, 1.0, ANY, 24), spectrum(1.2, 2.0, ANY, 24)), (1, 1))
        for n in range(3)
    }
    sites["capped"] = SiteChunks(sites["layers.0"].nats, (1, 1), alike=True)
    budget = 10 * 2 * (16 * TIER_QUANTUM * 3 + 16)
    found = share_shapes(sites, free(sites, budget, ANY), budget, ANY, 4)
    assert len(shapes(found, {n: s for n, s in sites.items() if n.startswith("wide")})) == 1
    assert bits_used(found, sites) <= budget


def test_a_budget_below_the_least_is_refused() -> None:
    sites = models(4, ANY)
    alone = free(sites, 4 * 2 * (16 * TIER_QUANTUM * 3 + 16), ANY)
    with pytest.raises(FhoptError, match="expected at least"):
        share_shapes(sites, alone, 100, ANY, 1)


def test_the_clusters_are_those_of_the_module() -> None:
    """No cluster is empty, and every site is in one."""
    sites = models(7, ANY)
    alone = free(sites, 7 * 2 * (16 * TIER_QUANTUM * 3 + 16), ANY)
    clusters = kernel_shapes._clusters(list(sites), sites, alone.price, ANY, 5, 0.0)
    assert all(clusters) and sorted(itertools.chain(*clusters)) == sorted(sites) and len(clusters) <= 5
    assert allocation.ROUNDS > 0


def kernels_of(plan: LatentPlan) -> int:
    return len({tuple((side.tiers, side.width) for side in (site.key, site.value)) for site in plan.sites})


@pytest.mark.parametrize("device", [None, "h100", "cpu"])
def test_a_plan_reports_the_loss_of_sharing_shapes(device: str | None) -> None:
    alone = wide(1, 256, 4.0, device, kernel_shapes=2)
    assert kernels_of(alone) == 2 and "kernel_shapes" not in alone.provenance
    shared = wide(1, 256, 4.0, device, kernel_shapes=1)
    said = shared.provenance["kernel_shapes"]
    assert kernels_of(shared) == 1 and said["most"] == 1
    assert said["predicted_nats_without"] == alone.provenance["predicted_nats"] < shared.provenance["predicted_nats"]
    assert shared.ratio(100_000) > 3.9 and alone.ratio(100_000) > 3.9
