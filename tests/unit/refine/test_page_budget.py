"""Page budgets of sites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_options import _plan, falling

from fhopt.errors import FhoptError
from fhopt.refine.page_budget import allocate_lifts
from fhopt.refine.page_probes import ALL, LIFTS, MASSES, Curves

pytestmark = pytest.mark.usefixtures("small_pieces")


# --------------------------------------------------------------------------------------------------- curves


def test_the_smallest_sufficient_mass_is_chosen() -> None:
    curves = Curves(by_mass=torch.linspace(1.2, 0, len(MASSES), dtype=torch.float64), count=2)
    for at in range(len(MASSES)):
        assert curves.mass_for(float(curves.by_mass[at]) / 2 + 1e-9) == at
    assert curves.mass_for(0.0) == len(MASSES) - 1


# --------------------------------------------------------------------------------------------------- budgets


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), share=st.sampled_from([1 / 16, 1 / 8, 1 / 3, 1.0]))
def test_budgets_stay_within_the_share_and_above_half_of_it(seed: int, share: float) -> None:
    plan = _plan()
    generator = torch.Generator().manual_seed(seed)
    costs = [1.0, 5.0]
    curves = {s.site.name: falling(c, 0.1, generator) for s, c in zip(plan.sites, costs, strict=True)}
    lifts = allocate_lifts(curves, plan.sites, share)
    size = {s.site.name: s.token_bytes() for s in plan.sites}
    used = sum(size[n] * curves[n].share(at) for n, at in lifts.items())
    assert used <= share * sum(size.values()) * (1 + 1e-6)
    larger = [curves[n].share(at + 1) - curves[n].share(at) for n, at in lifts.items() if at < ALL]
    assert used + min((size[n] * x for n, x in zip(size, larger, strict=False)), default=0) > share * sum(
        size.values()
    ) * (1 - 1e-6)  # nothing more fits
    for name, at in lifts.items():
        assert at == ALL or curves[name].share(at + 1) > share / 2


@pytest.mark.parametrize("where", ["text", "probe"])
def test_a_site_with_a_higher_cost_gets_more(where: str) -> None:
    plan = _plan()
    a, b = [s.site.name for s in plan.sites]
    generator = torch.Generator().manual_seed(0)
    same = falling(1.0, 0.1, generator)
    repeated = replace(same, read=torch.zeros(len(LIFTS)))  # reads of a probe do not count in budgets
    same = replace(same, repeated=repeated)
    dear = replace(same, cost=20.0) if where == "text" else replace(same, repeated=replace(repeated, cost=20.0))
    lifts = allocate_lifts({a: same, b: dear}, plan.sites, 1 / 4)
    assert lifts[b] > lifts[a]
    assert dear.loss(3) == pytest.approx(10.5 * float(same.squares[3])) and dear.loss(ALL) == 0


def test_unmeasured_sites_read_everything_and_leave_less_for_others() -> None:
    plan = _plan()
    a, b = [s.site.name for s in plan.sites]
    curves = {a: falling(1.0, 0.1, torch.Generator().manual_seed(0)), b: Curves()}
    assert allocate_lifts(curves, plan.sites, 0.9)[b] == ALL
    with pytest.raises(FhoptError, match="is too small; expected at least"):
        allocate_lifts(curves, plan.sites, 0.25)
