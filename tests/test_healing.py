"""Healing: decoders are solved for, everything else of a plan stays, and an interruption changes nothing."""

from __future__ import annotations

import functools
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
from small_models import FAR, VOCABULARY, Fitted, found, tiny_gpt2, tiny_llama, token_ids
from test_cli import call, save_tiny_model
from torch import Tensor

from fhopt import fitting, healing
from fhopt.errors import FhoptError
from fhopt.healing import Equations, HealOptions, Reader, heal, read
from fhopt.models import LoadedModel, load_model
from fhopt.pipeline import Progress
from fhopt.spec import LatentPlan, SitePlan, Tier

pytestmark = pytest.mark.usefixtures("without_compiling")
CONTEXT, COUNT = 64, 12
OPTIONS = HealOptions(texts=("license",), tokens=COUNT * CONTEXT, context=CONTEXT, held_out=4)
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


class Interrupted(Exception):
    """What a user's Ctrl-C is to these tests."""


def stop_at(number: int) -> Progress:
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("heal", number):
            raise Interrupted

    return progress


# ---- the equations


@functools.cache
def site_plan(make: Callable[[], Any] = tiny_llama) -> SitePlan:
    """Two heads of queries to a kv head in the llama; one latent for keys and values in the gpt2."""
    _, outcome = found(make(), CONTEXT)
    return shared_plan(outcome, 16, CODED, **FAR).sites[0]


def inputs(plan: SitePlan, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in float64 of two sequences."""
    site, generator = plan.site, torch.Generator().manual_seed(0)
    shapes = ((site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim))
    q, k, v = (torch.randn(2, n, tokens, d, generator=generator, dtype=torch.float64) for n, d in shapes)
    return q, k, v


def taken(plan: SitePlan, q: Tensor, k: Tensor, v: Tensor, exact: tuple[int, int], **options: Any) -> Equations:
    equations = Equations()
    healing.take_down(equations, plan, exact, q, k, v, scale=0.5, **options)
    return equations


def rows_of(plan: SitePlan, q: Tensor, k: Tensor, v: Tensor, exact: tuple[int, int]) -> dict[str, list[list[Any]]]:
    """One query at a time: (weight, latent, number that it stands for) of every kv head, keys and values."""
    (z_k, _), (z_v, _) = healing._coded(plan, k, v)
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    keys: list[list[Any]] = [[] for _ in range(groups)]
    values: list[list[Any]] = [[] for _ in range(groups)]
    for b in range(len(q)):
        for h in range(q.shape[1]):
            g = h // repeats
            for s in range(q.shape[2]):
                p = (0.5 * k[b, g, : s + 1] @ q[b, h, s]).softmax(0)
                far = [t for t in range(s + 1) if t >= exact[0] and s - t >= exact[1]]
                keys[g] += [(float(p[t]), z_k[b, g, t], k[b, g, t]) for t in far]
                if far:
                    sums = [sum(p[t] * x[b, g, t] for t in far) for x in (z_v, v)]
                    values[g].append((1.0, *sums))
    return {"key": keys, "value": values}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_solution_is_the_weighted_least_squares(make: Callable[[], Any]) -> None:
    """Against `lstsq` on rows that are written out one query at a time; the ridge is rows of its own."""
    plan, exact, ridge = site_plan(make), (2, 3), 0.1
    q, k, v = inputs(plan, 24)
    equations, rows = taken(plan, q, k, v, exact, is_causal=True), rows_of(plan, q, k, v, exact)
    for name, side in (("key", plan.key), ("value", plan.value)):
        mine = equations.solution(f"{plan.site.name}.{name}", side.decode.double(), ridge)
        for decode, mine_g, rows_g in zip(side.decode.double(), mine, rows[name], strict=True):
            root = torch.tensor([w for w, _, _ in rows_g]).double().sqrt()[:, None]
            z, x = (torch.stack([row[i] for row in rows_g]) * root for i in (1, 2))
            drawn = (ridge * z.square().sum(0).mean()).sqrt() * torch.eye(z.shape[1], dtype=torch.float64)
            wanted = torch.linalg.lstsq(torch.cat([z, drawn]), torch.cat([x, drawn @ decode.T])).solution.T
            torch.testing.assert_close(mine_g, wanted, rtol=1e-6, atol=1e-8)  # conditions of normal equations


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    whole = taken(plan, q, k, v, (2, 3), is_causal=True)
    monkeypatch.setattr(healing, "QUERIES", 5)
    tiled = taken(plan, q, k, v, (2, 3), is_causal=True)
    for mine, wanted in ((tiled.error, whole.error), (tiled.moment, whole.moment)):
        torch.testing.assert_close(mine, wanted)


def test_a_mask_hides_tokens() -> None:
    """What no query sees is as good as absent, and a query that sees nothing adds nothing."""
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[:, 20:] = mask[20:] = False
    shown = taken(plan, q, k, v, (2, 3), mask=mask)
    cut = taken(plan, q[:, :, :20], k[:, :, :20], v[:, :, :20], (2, 3), is_causal=True)
    for mine, wanted in ((shown.error, cut.error), (shown.moment, cut.moment)):
        torch.testing.assert_close(mine, wanted)


def test_a_softcap_that_caps_nothing_changes_nothing() -> None:
    plan = site_plan()
    q, k, v = inputs(plan, 24)
    plain, capped = (taken(plan, q, k, v, (2, 3), is_causal=True, softcap=cap) for cap in (0.0, 1e6))
    torch.testing.assert_close(capped.error, plain.error)
    tight = taken(plan, q, k, v, (2, 3), is_causal=True, softcap=0.5)
    assert not torch.allclose(tight.error[f"{plan.site.name}.key"], plain.error[f"{plan.site.name}.key"])


def test_tokens_that_stay_exact_add_nothing() -> None:
    plan = site_plan()
    equations = taken(plan, *inputs(plan, 24), (2, 24), is_causal=True)
    assert all(not x.any() for x in (*equations.error.values(), *equations.moment.values()))
    decode = plan.key.decode
    assert torch.equal(equations.solution(f"{plan.site.name}.key", decode, 0.1), decode)


def test_a_strong_ridge_keeps_the_decoders() -> None:
    plan = site_plan()
    equations = taken(plan, *inputs(plan, 24), (2, 3), is_causal=True)
    name, decode = f"{plan.site.name}.value", plan.value.decode
    moves = [float((equations.solution(name, decode, ridge) - decode).abs().max()) for ridge in (0.01, 1.0, 1e9)]
    assert moves[0] > moves[1] > 0 and moves[2] < 1e-6


def test_channels_that_reach_nothing_in_common_stay_apart() -> None:
    """So a plan of the layout identity stays one."""
    equations, decode = Equations(), torch.block_diag(torch.ones(2, 2), torch.eye(2))[None]
    equations.add("x", torch.randn(1, 50, 4), torch.randn(1, 50, 4))
    changed = equations.solution("x", decode, 0.1)
    assert torch.equal(changed != 0, decode != 0) and not torch.equal(changed, decode)
    one = Equations()
    one.error["x"], one.moment["x"] = equations.error["x"][:, 3:, 3:], equations.moment["x"][:, 3:, 3:]
    mean = equations.moment["x"].diagonal(dim1=1, dim2=2).mean() / one.moment["x"].mean()
    torch.testing.assert_close(changed[:, 3:, 3:], one.solution("x", decode[:, 3:, 3:], 0.1 * float(mean)))


def test_equations_of_a_text_are_those_of_its_sequences(model: LoadedModel, plan: LatentPlan) -> None:
    reader, ids = Reader.of(model.capture(CONTEXT), plan), token_ids(4, CONTEXT)
    saved = healing._Checkpoint(None, {})
    whole, backwards = read(reader, ids, saved), read(reader, ids.flip(0), saved)
    for name in whole.error:
        torch.testing.assert_close(backwards.error[name], whole.error[name])
    assert set(whole.error) == {f"{p.site.name}.{side}" for p in plan.sites for side in ("key", "value")}


# ---- what healing does


def test_the_loss_falls_and_the_plan_keeps_its_size(model: LoadedModel, plan: LatentPlan) -> None:
    healed = heal(model, plan, OPTIONS)
    told = healed.provenance["healing"]
    assert told["after"]["kl"] < told["before"]["kl"]
    assert (told["tokens"], told["texts"]) == (COUNT * CONTEXT, ["license"])
    assert told["healed_from"] == plan.digest() != healed.digest()
    assert healed.cache_bytes(4096) == plan.cache_bytes(4096)
    for old, new in zip(plan.sites, healed.sites, strict=True):
        assert (new.site, new.layout) == (old.site, old.layout)
        for a, b in ((old.key, new.key), (old.value, new.value)):
            assert a.tiers == b.tiers
            assert torch.equal(a.encode, b.encode) and not torch.equal(a.decode, b.decode)


def test_nothing_of_the_model_changes(model: LoadedModel, plan: LatentPlan) -> None:
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
    assert torch.equal(healed.sites[0].key.decode, exact.key.decode)
    assert not torch.equal(healed.sites[1].key.decode, mixed.sites[1].key.decode)


def test_a_healed_plan_is_saved_and_read(model: LoadedModel, plan: LatentPlan, tmp_path: Path) -> None:
    healed = heal(model, plan.with_provenance(gate={"kl": 1.0}), OPTIONS)
    again = LatentPlan.load(healed.save(tmp_path / "plan"))
    assert again.digest() == healed.digest()
    assert "gate" not in again.provenance  # it was measured with other decoders
    assert again.provenance["healing"]["before"]["kl"] == healed.provenance["healing"]["before"]["kl"]


# ---- checkpoints


def interrupted(model: LoadedModel, plan: LatentPlan, folder: Path) -> HealOptions:
    """Options of a healing that was interrupted with 4 sequences in its checkpoint."""
    options = replace(OPTIONS, checkpoint=folder / "state")
    with pytest.raises(Interrupted):
        heal(model, plan, options, stop_at(6))
    return options


def test_an_interrupted_healing_goes_on_and_gives_the_same_plan(
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
        with pytest.raises(FhoptError, match=r"state is of another healing .* Remove it"):
            heal(model, plan, other)
    with pytest.raises(FhoptError, match="of another healing"):
        heal(model, replace(plan, recent=9), options)
    with pytest.raises(FhoptError, match="of another healing"):
        heal(replace(model, name="other"), plan, options)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_key(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def _of_fewer_sites(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    save_file({"x": torch.zeros(1)}, file, about)


@pytest.mark.parametrize("damage", [_cut_short, _without_a_key, _of_fewer_sites])
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
        (dict(ridge=0.0), "a ridge of 0 is not possible"),
        (dict(ridge=float("nan")), "a ridge of nan is not possible"),
        (dict(ridge=math.inf), "a ridge of inf is not possible"),
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


def test_a_loss_that_does_not_fall_is_refused(
    model: LoadedModel, plan: LatentPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "solved", lambda plan, *_: plan)
    with pytest.raises(FhoptError, match=r"healing moved the loss from .* raise the ridge"):
        heal(model, plan, OPTIONS)


def test_keys_that_are_not_finite_are_refused(model: LoadedModel, plan: LatentPlan) -> None:
    with torch.no_grad():
        next(model.language_model().parameters()).fill_(float("nan"))
    reader = Reader.of(model.capture(CONTEXT), plan)
    with pytest.raises(FhoptError, match="are not finite on this text"):
        read(reader, token_ids(4, CONTEXT), healing._Checkpoint(None, {}))


# ---- the command


@pytest.fixture
def folder(plan: LatentPlan, tmp_path: Path) -> Path:
    """A folder with `model` and `plan`."""
    save_tiny_model(tmp_path / "model")
    weights = dict(load_model(str(tmp_path / "model")).language_model().named_parameters())
    print_ = fitting.fingerprint(weights, [s.site for s in plan.sites])
    plan.with_provenance(fingerprint=print_).save(tmp_path / "plan")
    return tmp_path


SAMPLE = ("--data", "license", "--tokens", str(2 * COUNT * CONTEXT), "--context", str(CONTEXT), "--held-out", "4")


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
        (("--ridge", "0"), "a ridge of 0 is not possible"),
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
