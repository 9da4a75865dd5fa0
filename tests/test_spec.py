"""Plans as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hand_plans import CODED, SITE, random_plan

from fhopt.errors import FhoptError
from fhopt.spec import LatentPlan, SidePlan, SitePlan


def test_tensors_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    eye = torch.eye(16).expand(2, 16, 16)
    basis = torch.randn(2, 16, 16)
    key, value = SidePlan(eye, basis, ()), SidePlan(basis[:, :, :8], basis[:, 8:], ())
    plan = LatentPlan((SitePlan(SITE, "head", key, value),), 4, 8, 8)
    loaded = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert loaded.digest() == plan.digest()
    for before, after in zip((key, value), (loaded.sites[0].key, loaded.sites[0].value), strict=True):
        assert torch.equal(before.encode, after.encode) and torch.equal(before.decode, after.decode)


@pytest.mark.parametrize("of_its_own", [True, False])
def test_the_empty_encoder_of_a_shared_latent_is_saved(of_its_own: bool, tmp_path: Path) -> None:
    plan = random_plan("input", CODED, window_bits=8)
    site = plan.sites[0]
    empty = torch.zeros(1, 16, 0, dtype=torch.float64) if of_its_own else site.key.encode[:, :, :0]
    plan = replace(plan, sites=(replace(site, value=replace(site.value, encode=empty)),))
    loaded = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert loaded.digest() == plan.digest() and loaded.window_bits == 8
    assert loaded.sites[0].is_shared and loaded.sites[0].value.encode.shape == (1, 16, 0)
    assert loaded.cache_bytes(1000) == plan.cache_bytes(1000)


def test_keys_and_values_of_one_latent_must_agree_on_it() -> None:
    site = random_plan("input", CODED).sites[0]
    other = replace(site, value=replace(site.value, tiers=()))
    with pytest.raises(FhoptError, match="share one latent head and its tiers"):
        LatentPlan((other,), 4, 8, 8)
    with pytest.raises(FhoptError, match="bases have shapes"):
        LatentPlan((replace(site, layout="head"),), 4, 8, 8)
    with pytest.raises(FhoptError, match="window_bits=4"):
        LatentPlan((site,), 4, 8, 8, window_bits=4)
