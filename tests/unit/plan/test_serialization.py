"""Saving plans in folders: complete, and without overwriting other files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hand_plans import CODED, SITE, in_segments, random_plan
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.files import write_folder
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SidePlan, SitePlan


def test_a_plan_is_restored_completely(fitted: FittedModel, tmp_path: Path) -> None:
    plan = fitted.plan(4).with_provenance(text="topics")
    again = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert again.digest() == plan.digest()
    assert [s.site for s in again.sites] == [s.site for s in plan.sites]
    assert again.provenance["text"] == "topics"


def test_segments_are_restored(tmp_path: Path) -> None:
    plan = in_segments(random_plan("head", CODED))
    single = replace(
        plan, sites=tuple(replace(s, key=_single(s.key), value=_single(s.value)) for s in plan.sites)
    )  # fmt: skip
    again = LatentPlan.load(single.save(tmp_path / "plan"))
    assert again.segment == 64 and again.digest() == single.digest()
    without = replace(single, sites=tuple(replace(s, segment=0) for s in single.sites))
    assert without.digest() != single.digest()


def _single(side: SidePlan) -> SidePlan:
    return SidePlan(side.encode.float(), side.decode.float(), side.tiers)


def test_a_folder_with_other_files_is_not_overwritten(llama: FittedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FhoptError, match="is not a plan"):
        llama.plan(4).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FhoptError, match="No space left"):
        write_folder(tmp_path / "plan", {"plan.json": b"{}"})
    assert os.listdir(tmp_path) == []


def test_tensors_that_share_memory_are_saved_separately(tmp_path: Path) -> None:
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
