"""Healing: the loss falls, the size stays, and an interrupted run resumes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import shared_plan
from healed_plans import CODED, CONTEXT, COUNT, loaded
from interruptions import DAMAGES, Interrupted, stop_at
from needs import sampled
from small_models import FAR, found, tiny_gpt2, tiny_llama, token_ids

from fhopt.calibration.checkpoint import Checkpoint
from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan import fingerprint
from fhopt.plan.latent_plan import LatentPlan
from fhopt.refine.decoder_equations import CapturedModel
from fhopt.refine.heal import HEALING, heal, read
from fhopt.refine.options import HealOptions

pytestmark = pytest.mark.usefixtures("without_compiling")
OPTIONS = HealOptions(texts=("license",), tokens=COUNT * CONTEXT, context=CONTEXT, held_out=4)


# ---- what healing does


def test_the_loss_falls_and_the_plan_keeps_its_size(model: LoadedModel, plan: LatentPlan) -> None:
    measured: dict[str, Any] = {"texts": {}, "tasks": {}}
    healed = heal(model, plan.with_provenance(quality=measured, note="kept"), OPTIONS)
    assert "quality" not in healed.provenance and healed.provenance["note"] == "kept"
    record = healed.provenance["healing"]
    assert record["after"]["kl"] < record["before"]["kl"]
    assert (record["tokens"], record["texts"]) == (COUNT * CONTEXT, ["license"])
    assert record["healed_from"] == plan.digest() != healed.digest()
    assert healed.cache_bytes(4096) == plan.cache_bytes(4096)
    for old, new in zip(plan.sites, healed.sites, strict=True):
        assert (new.site, new.layout) == (old.site, old.layout)
        for a, b in ((old.key, new.key), (old.value, new.value)):
            assert a.tiers == b.tiers
            assert torch.equal(a.encode, b.encode) and not torch.equal(a.decode, b.decode)


def test_the_model_is_not_changed(model: LoadedModel, plan: LatentPlan) -> None:
    network = model.language_model().requires_grad_(True)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    kept = plan.digest()
    heal(model, plan, OPTIONS)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert plan.digest() == kept


def test_one_latent_for_keys_and_values_heals_too() -> None:
    model = loaded(tiny_gpt2())
    _, outcome = found(model.language_model(), CONTEXT)
    plan = shared_plan(outcome, 16, CODED, **FAR)
    healed = heal(model, plan, OPTIONS)
    assert healed.provenance["healing"]["after"]["kl"] < healed.provenance["healing"]["before"]["kl"]
    for old, new in zip(plan.sites, healed.sites, strict=True):
        assert new.is_shared and new.value.encode.shape == old.value.encode.shape
        assert not torch.equal(old.value.decode, new.value.decode)


def test_an_exact_site_is_not_changed(model: LoadedModel, plan: LatentPlan) -> None:
    _, outcome = found(model.language_model())
    exact = fit_plan.exact_plan(outcome.sites.values(), recent=plan.recent).sites[0]
    mixed = replace(plan, sites=(exact, *plan.sites[1:]))
    healed = heal(model, mixed, replace(OPTIONS, tokens=4 * OPTIONS.tokens))  # a single site has less to gain
    assert torch.equal(healed.sites[0].key.decode, exact.key.decode)
    assert not torch.equal(healed.sites[1].key.decode, mixed.sites[1].key.decode)


@pytest.mark.slow
def test_a_healed_plan_is_saved_and_loaded(model: LoadedModel, plan: LatentPlan, tmp_path: Path) -> None:
    healed = heal(model, plan.with_provenance(gate={"kl": 1.0}), OPTIONS)
    again = LatentPlan.load(healed.save(tmp_path / "plan"))
    assert again.digest() == healed.digest()
    assert "gate" not in again.provenance  # it was measured with other decoders
    assert again.provenance["healing"]["before"]["kl"] == healed.provenance["healing"]["before"]["kl"]


# ---- checkpoints


def interrupted(model: LoadedModel, plan: LatentPlan, folder: Path) -> HealOptions:
    """Return options of a healing interrupted with 4 sequences in its checkpoint."""
    options = replace(OPTIONS, checkpoint=folder / "state")
    with pytest.raises(Interrupted):
        heal(model, plan, options, stop_at("heal", 6))
    return options


@pytest.mark.slow
def test_an_interrupted_healing_resumes_and_gives_the_same_plan(
    model: LoadedModel, plan: LatentPlan, tmp_path: Path
) -> None:
    options = interrupted(model, plan, tmp_path)
    assert os.listdir(tmp_path) == ["state"]
    steps: list[int] = []
    again = heal(model, plan, options, lambda stage, done, total: steps.append(done) if stage == "heal" else None)
    assert steps == list(range(5, COUNT + 1))
    assert again.digest() == heal(model, plan, OPTIONS).digest()
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_another_healing_is_refused(model: LoadedModel, plan: LatentPlan, tmp_path: Path) -> None:
    options = interrupted(model, plan, tmp_path)
    for other in (replace(options, tokens=8 * CONTEXT), replace(options, texts=("source",))):
        with pytest.raises(FhoptError, match=r"state belongs to another healing .* Remove it"):
            heal(model, plan, other)
    with pytest.raises(FhoptError, match="to another healing"):
        heal(model, replace(plan, recent=9), options)
    with pytest.raises(FhoptError, match="to another healing"):
        heal(replace(model, name="other"), plan, options)


@pytest.mark.parametrize("damage", sampled(DAMAGES, 3))
def test_a_damaged_checkpoint_is_refused(
    model: LoadedModel, plan: LatentPlan, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    options = interrupted(model, plan, tmp_path)
    damage(tmp_path / "state")
    with pytest.raises(FhoptError, match=r"state is damaged .* Remove it"):
        heal(model, plan, options)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens=3 * CONTEXT), "tokens make 3 sequences of 64; expected at least 4"),
        (dict(tokens=-1), "tokens make 0 sequences"),
        (dict(context=1), "expected a context of at least 2"),
        (dict(held_out=0), "held_out of at least 1"),
        (dict(ridge=0.0), "ridge 0 is invalid"),
        (dict(ridge=float("nan")), "ridge nan is invalid"),
        (dict(ridge=math.inf), "ridge inf is invalid"),
        (dict(context=12), "is covered by the plan's sinks and residual window; expected more than 12"),
        (dict(context=1024), "expected at most 512, the model's limit"),
        (dict(tokens=10**7), "expected at least"),  # more than the text has
        (dict(texts=("absent.txt",)), "cannot read absent.txt"),
    ],
)
def test_options_that_cannot_work_are_refused(
    model: LoadedModel, plan: LatentPlan, options: dict[str, Any], message: str
) -> None:
    tokens = {"tokens": 8 * options.get("context", CONTEXT)} | options
    with pytest.raises(FhoptError, match=message):
        heal(model, plan, replace(OPTIONS, **tokens))


def test_a_plan_without_loss_is_refused(model: LoadedModel) -> None:
    _, outcome = found(model.language_model())
    plan = fit_plan.exact_plan(outcome.sites.values(), recent=8)
    with pytest.raises(FhoptError, match="there is nothing to heal: every site of the plan is unquantized"):
        heal(model, plan, OPTIONS)


def test_a_plan_of_another_model_is_refused(model: LoadedModel, plan: LatentPlan) -> None:
    weights = dict(loaded(tiny_llama(num_key_value_heads=4)).language_model().named_parameters())
    other = fingerprint.fingerprint(weights, [s.site for s in plan.sites])
    with pytest.raises(FhoptError, match="the plan was not fitted to tiny"):
        heal(model, plan.with_provenance(fingerprint=other), OPTIONS)


def test_a_loss_that_does_not_fall_is_refused(
    model: LoadedModel, plan: LatentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhopt.refine.heal.solved", lambda plan, *_: plan)
    with pytest.raises(FhoptError, match=r"healing changed the held-out KL from .* raise --ridge"):
        heal(model, plan, OPTIONS)


def test_keys_that_are_not_finite_are_refused(model: LoadedModel, plan: LatentPlan) -> None:
    with torch.no_grad():
        next(model.language_model().parameters()).fill_(float("nan"))
    reader = CapturedModel.of(model.capture(CONTEXT), plan)
    with pytest.raises(FhoptError, match="are not finite on this text"):
        read(reader, token_ids(4, CONTEXT), Checkpoint(None, {}, HEALING))
