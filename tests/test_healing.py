"""Healing: bases are trained, everything else of a plan stays, and an interruption changes nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_plans import shared_plan
from safetensors.torch import save_file
from small_models import FAR, VOCABULARY, Fitted, found, run, tiny_gpt2, tiny_llama, token_ids
from test_cli import call, save_tiny_model

from fhopt import fitting, healing, passes
from fhopt.errors import FhoptError
from fhopt.healing import HealOptions, Student, divergence, heal, train
from fhopt.models import LoadedModel, load_model
from fhopt.pipeline import Progress
from fhopt.spec import LatentPlan, SidePlan, Tier

CONTEXT, STEPS = 64, 12
OPTIONS = HealOptions(texts=("license",), tokens=STEPS * CONTEXT, context=CONTEXT, learning_rate=0.02, held_out=4)
CODED = (Tier(4, 8, 0.3352), Tier(2, 8, 0.9957))


class Letters:
    """A tokenizer that needs no file."""

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[1 + ord(c) % (VOCABULARY - 1) for c in text]])
        return type("Encoding", (), {"input_ids": ids})


def loaded(model: Any) -> LoadedModel:
    return LoadedModel("tiny", model.requires_grad_(False), Letters())


@pytest.fixture
def plan(llama: Fitted) -> LatentPlan:
    return llama.plan(8.0)


@pytest.fixture
def model() -> LoadedModel:
    return loaded(tiny_llama())


def student(model: LoadedModel, plan: LatentPlan) -> Student:
    return Student.of(model.capture(CONTEXT), plan)


class Interrupted(Exception):
    """What a user's Ctrl-C is to these tests."""


def stop_at(number: int) -> Progress:
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("heal", number):
            raise Interrupted

    return progress


# ---- what the student computes


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_student_computes_what_the_rewritten_graph_does(make: Callable[[], Any]) -> None:
    """One is in tiles, the other absorbed: the same numbers up to float32, unless a code falls on the other side."""
    ids = token_ids(1, 160)
    captured, _ = found(make(), 160)
    rewritten, outcome = found(make(), 160)
    plan = shared_plan(outcome, 16, CODED, **FAR)
    mine, exact = Student.of(captured, plan), run(rewritten, {"input_ids": ids})
    torch.testing.assert_close(mine(ids, exact=True), exact)
    passes.optimize(outcome, plan, training=True)
    wanted = run(rewritten, {"input_ids": ids})
    assert float((wanted - exact).abs().mean()) > 0.01  # the plan loses something
    assert float(((mine(ids) - wanted).abs() > 1e-3).float().mean()) < 0.02


def test_a_softcap_that_caps_nothing_changes_nothing() -> None:
    captured, outcome = found(tiny_gpt2(), 160)
    (bases, *_) = Student.of(captured, shared_plan(outcome, 16, CODED, **FAR)).bases.values()
    q, k, v = torch.randn(3, 1, 4, 160, 16).unbind()
    with torch.no_grad():
        tiled, capped = (
            healing.attend(bases, (4, 8), q, k, v, is_causal=True, scale=0.25, softcap=cap)  # type: ignore[arg-type]
            for cap in (0.0, 1e3)
        )
    torch.testing.assert_close(tiled, capped, rtol=1e-3, atol=1e-4)  # tanh(x / 1000) * 1000 in float32


def test_a_channel_moves_by_its_own_noise() -> None:
    """A channel of many bits is loud and exact: it moves by less of itself than one of few."""
    tiers = (Tier(8, 8, 0.06), Tier(2, 8, 1.0))
    side = SidePlan(torch.randn(1, 16, 8), torch.randn(2, 4, 16), tiers)
    for basis, axis in ((healing._encoder(side), 1), (healing._decoder(side), 2)):
        assert torch.equal(basis(), basis.start)
        with torch.no_grad():
            basis.change[0].copy_(torch.eye(16))
            share = (basis() / basis.start - 1).transpose(axis, 0).flatten(1).mean(1)
        wanted = torch.tensor([0.06, 1.0]).repeat_interleave(8) / math.sqrt(12)
        torch.testing.assert_close(share, wanted, rtol=1e-4, atol=1e-5)


def test_channels_that_read_nothing_in_common_do_not_mix() -> None:
    """So a plan of the layout identity stays one."""
    side = SidePlan(torch.eye(8)[None], torch.eye(8)[None], (Tier(4, 8, 0.3),))
    for basis in (healing._encoder(side), healing._decoder(side)):
        with torch.no_grad():
            basis.change[0].fill_(1.0)
            assert torch.equal(basis() != 0, basis.start != 0)


# ---- what training does


def test_the_loss_falls_and_the_plan_keeps_its_size(model: LoadedModel, plan: LatentPlan) -> None:
    healed = heal(model, plan, OPTIONS)
    told = healed.provenance["healing"]
    assert told["after"]["kl"] < told["before"]["kl"]
    assert (told["tokens"], told["texts"]) == (STEPS * CONTEXT, ["license"])
    assert told["healed_from"] == plan.digest() != healed.digest()
    assert healed.cache_bytes(4096) == plan.cache_bytes(4096)
    for old, new in zip(plan.sites, healed.sites, strict=True):
        assert (new.site, new.layout) == (old.site, old.layout)
        for a, b in ((old.key, new.key), (old.value, new.value)):
            assert a.tiers == b.tiers
            assert not torch.equal(a.encode, b.encode) and not torch.equal(a.decode, b.decode)


def test_nothing_but_bases_is_trained(model: LoadedModel, plan: LatentPlan) -> None:
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


def test_a_site_that_is_exact_is_left_alone(model: LoadedModel, plan: LatentPlan) -> None:
    _, outcome = found(model.language_model())
    exact = fitting.exact_plan(outcome.sites.values(), recent=plan.recent).sites[0]
    mixed = replace(plan, sites=(exact, *plan.sites[1:]))
    healed = heal(model, mixed, OPTIONS)
    assert torch.equal(healed.sites[0].key.encode, exact.key.encode)
    assert not torch.equal(healed.sites[1].key.encode, mixed.sites[1].key.encode)


def test_a_healed_plan_is_saved_and_read(model: LoadedModel, plan: LatentPlan, tmp_path: Path) -> None:
    healed = heal(model, plan.with_provenance(gate={"kl": 1.0}), OPTIONS)
    again = LatentPlan.load(healed.save(tmp_path / "plan"))
    assert again.digest() == healed.digest()
    assert "gate" not in again.provenance  # it was measured with other bases
    assert again.provenance["healing"]["before"]["kl"] == healed.provenance["healing"]["before"]["kl"]


def test_the_seed_orders_the_sequences(model: LoadedModel) -> None:
    a, b = (healing._texts(model, replace(OPTIONS, seed=seed)) for seed in (0, 1))
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert sorted(map(tuple, a[0].tolist())) == sorted(map(tuple, b[0].tolist()))


def test_the_loss_is_the_divergence_per_token() -> None:
    p, q = torch.randn(2, 1, 5, VOCABULARY, dtype=torch.float64).unbind()
    wanted = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q))).mean()
    torch.testing.assert_close(divergence(p, q).double(), wanted, rtol=1e-5, atol=1e-6)  # it is reckoned in float32


# ---- checkpoints


def interrupted(model: LoadedModel, plan: LatentPlan, folder: Path) -> HealOptions:
    """Options of a training that was interrupted with 4 steps in its checkpoint."""
    options = replace(OPTIONS, checkpoint=folder / "state")
    with pytest.raises(Interrupted):
        heal(model, plan, options, stop_at(6))
    return options


def test_an_interrupted_training_goes_on_and_gives_the_same_plan(
    model: LoadedModel, plan: LatentPlan, tmp_path: Path
) -> None:
    options = interrupted(model, plan, tmp_path)
    assert os.listdir(tmp_path) == ["state"]
    steps: list[int] = []
    again = heal(model, plan, options, lambda stage, done, total: steps.append(done) if stage == "heal" else None)
    assert steps == list(range(5, STEPS + 1))
    assert again.digest() == heal(model, plan, OPTIONS).digest()
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_another_training_is_refused(model: LoadedModel, plan: LatentPlan, tmp_path: Path) -> None:
    options = interrupted(model, plan, tmp_path)
    for other in (replace(options, seed=1), replace(options, learning_rate=0.03), replace(options, texts=("source",))):
        with pytest.raises(FhoptError, match=r"state is of another training .* Remove it"):
            heal(model, plan, other)
    with pytest.raises(FhoptError, match="of another training"):
        heal(model, replace(plan, recent=9), options)
    with pytest.raises(FhoptError, match="of another training"):
        heal(replace(model, name="other"), plan, options)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_key(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def _of_fewer_bases(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({"x": torch.zeros(1)}, file, about)


@pytest.mark.parametrize("damage", [_cut_short, _without_a_key, _of_fewer_bases])
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
        (dict(context=1), "expected sequences of at least 2 tokens"),
        (dict(held_out=0), "one to measure on"),
        (dict(learning_rate=0.0), "a learning rate of 0 is not possible"),
        (dict(learning_rate=float("nan")), "a learning rate of nan is not possible"),
        (dict(context=12), "has none beyond sinks and recent tokens of the plan; expected more than 12"),
        (dict(context=1024), "the model has 512 positions"),
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


def test_a_plan_that_loses_nothing_is_refused(model: LoadedModel) -> None:
    _, outcome = found(model.language_model())
    plan = fitting.exact_plan(outcome.sites.values(), recent=8)
    with pytest.raises(FhoptError, match="there is nothing to heal: every site of the plan is exact"):
        heal(model, plan, OPTIONS)


def test_a_plan_of_another_model_is_refused(model: LoadedModel, plan: LatentPlan) -> None:
    weights = dict(loaded(tiny_llama(num_key_value_heads=4)).language_model().named_parameters())
    other = fitting.fingerprint(weights, [s.site for s in plan.sites])
    with pytest.raises(FhoptError, match="fitted to another model than tiny"):
        heal(model, plan.with_provenance(fingerprint=other), OPTIONS)


def test_a_loss_that_does_not_fall_is_refused(model: LoadedModel, plan: LatentPlan) -> None:
    with pytest.raises(FhoptError, match=r"healing moved the loss from .* Lower the learning rate"):
        heal(model, plan, replace(OPTIONS, learning_rate=0.9))


def test_a_loss_that_is_not_finite_is_refused(model: LoadedModel, plan: LatentPlan) -> None:
    mine = student(model, plan)
    with torch.no_grad():
        next(iter(mine.parameters())).fill_(float("nan"))
    with pytest.raises(FhoptError, match="the loss became nan"):
        train(mine, token_ids(4, CONTEXT), OPTIONS, healing._Checkpoint(None, {}))


# ---- the command


@pytest.fixture
def folder(plan: LatentPlan, tmp_path: Path) -> Path:
    """A folder with `model` and `plan`."""
    save_tiny_model(tmp_path / "model")
    weights = dict(load_model(str(tmp_path / "model")).language_model().named_parameters())
    print_ = fitting.fingerprint(weights, [s.site for s in plan.sites])
    plan.with_provenance(fingerprint=print_).save(tmp_path / "plan")
    return tmp_path


SAMPLE = ("--data", "license", "--tokens", str(2 * STEPS * CONTEXT), "--context", str(CONTEXT), "--held-out", "4")


def test_the_command_writes_a_better_plan(folder: Path) -> None:
    arguments = ["heal", str(folder / "model"), "--plan", str(folder / "plan"), *SAMPLE, "-o", str(folder / "healed")]
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    told, healed = json.loads(result.stdout), LatentPlan.load(folder / "healed")
    assert told["digest"] == healed.digest() and told["plan_path"] == str(folder / "healed")
    assert told["healing"] == healed.provenance["healing"]
    assert told["healing"]["after"]["kl"] < told["healing"]["before"]["kl"]
    assert sorted(os.listdir(folder)) == ["healed", "model", "plan"]  # no checkpoint is left
    result = call(*arguments, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "nats per token" in result.stdout, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "64"), "expected at least 4"),
        (("--lr", "2"), "a learning rate of 2 is not possible"),
        (("--lr", "0.9"), "healing moved the loss"),
        (("--context", "12"), "expected more than 12"),
        (("--data", "absent.txt"), "cannot read absent.txt"),
        (("--plan", "absent"), "is not a plan"),
        (("-o", "{tmp}/model"), "holds other things"),
        (("-o", "{tmp}/plan/plan.json/below"), "Choose another folder"),
        (("--checkpoint", "{tmp}/plan/plan.json/state"), "Choose another folder"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    given = ["--plan", str(folder / "plan"), *SAMPLE, "-o", str(folder / "healed")]
    result = call("heal", str(folder / "model"), *given, *(o.format(tmp=folder) for o in options))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert {"model", "plan"} == set(os.listdir(folder))
