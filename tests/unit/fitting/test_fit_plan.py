"""Plans: layouts, sizes and predicted loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fitting_by_hand import MIXING, RATIOS, basis, nats, statistics
from small_models import TOKENS, FittedModel, found, numbered, run
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.fitting import fit_plan
from fhopt.fitting.allocation import UNBIASED
from fhopt.fitting.bases import Basis, CandidateBases, joint_basis
from fhopt.fitting.candidates import COMPETING, fit_bases
from fhopt.inspection import tables
from fhopt.ops import algebra
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan


def pair(side: Basis) -> tuple[Basis, ...]:
    return side, side


STEEP, FLAT = (1.0, 0.01, 1e-4, 1e-6), (1.0, 1.0, 1.0, 1.0)


# ---- layouts


def test_layouts_compete_and_the_worse_one_loses_at_each_site() -> None:
    table: CandidateBases = {
        "steep": {"band": pair(basis(1, *STEEP)), "identity": pair(basis(2, 0.5, 0.5))},
        "flat": {"band": pair(basis(1, *FLAT)), "identity": pair(basis(2, 1.0, 1e-3))},
    }
    for names in (("steep", "flat"), ("flat", "steep")):
        bases = {n: table[n] for n in names}
        plan = fit_plan.fit_ratio(statistics(*names), bases=bases, ratio=5, sinks=0, recent=1, block=1)
        assert {s.site.name: s.layout for s in plan.sites} == {"steep": "band", "flat": "identity"}


def test_plain_rounding_is_chosen_where_it_is_best(llama: FittedModel) -> None:
    """With costs of `band` a hundred times as large, no site uses it; the plan is plain rounding."""
    bases = {name: {w: layouts[w] for w in ("band", "identity")} for name, layouts in llama.bases.items()}
    dear = {
        key: replace(side, sums={n: 100 * c for n, c in side.sums.items()}) if key[1] == "band" else side
        for key, side in llama.costs.items()
    }
    plan = fit_plan.fit_ratio(llama.statistics, bases=bases, costs=dear, ratio=4, recent=8, block=8, tokens=TOKENS)
    assert {s.layout for s in plan.sites} == {"identity"}
    assert plan.digest() == llama.plan(4, "identity").digest()


def test_a_layout_that_does_not_fit_into_the_bytes_is_not_chosen() -> None:
    """One chunk of 1 bit and the scales take 48 bits with one latent head and 96 with two; 64 are available."""
    names = ("a", "b")
    bases: CandidateBases = {n: {"band": pair(basis(1, *FLAT)), "identity": pair(basis(2, 1e-9, 1e-9))} for n in names}
    plan = fit_plan.fit_ratio(statistics(*names), bases=bases, ratio=16, sinks=0, recent=1, block=1, tokens=100_000)
    assert {s.layout for s in plan.sites} == {"band"}


@pytest.mark.parametrize("ratio", RATIOS)
def test_competing_layouts_are_never_worse_than_a_single_one(fitted: FittedModel, ratio: float) -> None:
    layouts = ["band", "identity", *(["input"] if ratio > 2 and has_joint(fitted) else [])]
    assert nats(fitted.plan(ratio, "auto")) <= min(nats(fitted.plan(ratio, layout)) for layout in layouts)


def has_joint(fitted: FittedModel) -> bool:
    return all("input" in layouts for layouts in fitted.bases.values())


def test_the_chosen_layouts_are_recorded(fitted: FittedModel, tmp_path: Path) -> None:
    for layout in MIXING:
        plan = LatentPlan.load(fitted.plan(4, layout).save(tmp_path / layout))
        assert {s.layout for s in plan.sites} == {plan.provenance["layout"]} == {layout}
    plan = LatentPlan.load(fitted.plan(4, "auto").save(tmp_path / "auto"))
    assert plan.provenance["layout"] == "auto"
    assert {s.layout for s in plan.sites} <= {"input", *COMPETING}
    assert [row["layout"] for row in tables.describe(plan)] == [s.layout for s in plan.sites]


def test_transform_coding_predicts_less_loss_than_plain_rounding(fitted: FittedModel) -> None:
    for ratio in (3.0, 4.0):
        assert nats(fitted.plan(ratio)) < nats(fitted.plan(ratio, "identity"))


# ---- one latent for keys and values


def test_a_joint_latent_restores_keys_and_values_and_halves_the_cache(gpt2: FittedModel) -> None:
    plan = gpt2.plan(1, "input")
    assert 2 <= plan.ratio(10**6) < 2.1  # 63 elements instead of 128; the window is unquantized
    for fitted_site in plan.sites:
        rows = joint_basis(gpt2.statistics[fitted_site.site.name])
        assert fitted_site.is_shared and rows is not None
        z = torch.randn(2, 1, 5, len(rows))
        x = (z @ rows.float()).unflatten(-1, (4, 32)).squeeze(1).transpose(1, 2)  # [B, G, T, D+E]
        latent = algebra.encode(x, fitted_site.key.encode)
        both = [algebra.decode(latent, side.decode) for side in (fitted_site.key, fitted_site.value)]
        torch.testing.assert_close(torch.cat(both, -1), x, rtol=1e-4, atol=1e-5)  # float32 matmuls over 128 terms


@pytest.mark.parametrize("ratio", [4.0, 6.0])
def test_a_quantized_joint_latent_has_less_loss_than_two(gpt2: FittedModel, ratio: float) -> None:
    """Keys and values of GPT-2 both contain each dimension of their input; `auto` finds out."""
    plan = gpt2.plan(ratio, "input")
    assert ratio <= plan.ratio(TOKENS) < ratio * 1.05
    assert all(s.is_shared and s.key.tiers == s.value.tiers for s in plan.sites)
    assert nats(plan) < nats(gpt2.plan(ratio, "band"))
    assert gpt2.plan(ratio, "auto").digest() == plan.digest()


def test_an_unquantized_joint_latent_has_no_means(gpt2: FittedModel) -> None:
    with pytest.raises(FhoptError, match=r"needs the means of keys and values.*--mean-tokens 0"):
        fit_plan.fit_ratio(gpt2.statistics, ratio=2, layout="input", mean_tokens=4)


def test_full_width_needs_bases_of_full_width(gpt2: FittedModel) -> None:
    bases = fit_bases(gpt2.statistics, "input", context=TOKENS, tokens=TOKENS)
    with pytest.raises(FhoptError, match=r"only the layout input.*--layout identity"):
        fit_plan.fit_ratio(gpt2.statistics, ratio=1, bases=bases)


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_joint_latent_of_keys_that_rotate_is_refused(llama: FittedModel, ratio: float) -> None:
    with pytest.raises(FhoptError, match=r"layers\.0\.self_attn: .*its keys rotate.* Use another layout"):
        llama.plan(ratio, "input")


def test_a_joint_latent_as_wide_as_keys_and_values_is_refused(gpt2: FittedModel) -> None:
    full = {
        n: replace(s, key=replace(s.key, moment=s.key.moment + torch.eye(64, dtype=torch.float64)))
        for n, s in gpt2.statistics.items()
    }
    with pytest.raises(FhoptError, match="as wide as their input"):
        fit_plan.fit_ratio(full, ratio=1, layout="input")


# ---- predicted loss of a plan


@pytest.mark.parametrize("layout", ["auto", *[pytest.param(x, marks=pytest.mark.slow) for x in ("band", "identity")]])
@pytest.mark.parametrize("ratio", [2.5, 4.0])
def test_the_predicted_loss_agrees_with_the_measured_one(fitted: FittedModel, ratio: float, layout: str) -> None:
    """KL of the compressed graph against the exact one, on tokens outside the calibration set."""
    plan, batches = fitted.plan(ratio, layout), [batch for _, batch in numbered(4)]
    captured, outcome = found(fitted.model, 96)

    def outputs() -> Tensor:
        return torch.cat([run(captured, batch).log_softmax(-1) for batch in batches])

    with torch.no_grad():
        exact = outputs()
        pipeline.optimize(outcome, plan)
        coded = outputs()
    kl = float((exact.exp() * (exact - coded)).sum(-1).mean())
    # second order in errors that are not small, and 4 + 4 sequences to measure on
    assert nats(plan) / 1.7 < kl < nats(plan) * 1.7


def test_absorbed_queries_give_the_same_logits(fitted: FittedModel) -> None:
    fitted_site: SitePlan = fitted.plan(1).sites[0]
    heads, groups, dim = fitted_site.site.heads, fitted_site.site.kv_heads, fitted_site.site.key_dim
    q, k = torch.randn(1, heads, 3, dim), torch.randn(1, groups, 5, dim)
    direct = q @ k.repeat_interleave(heads // groups, 1).mT
    latent = _products(q, k, fitted_site)
    torch.testing.assert_close(latent, direct, rtol=1e-4, atol=1e-3)  # float32 bases with a spread of about 100


def _products(q: Tensor, k: Tensor, plan: SitePlan) -> Tensor:
    latents = algebra.encode(k, plan.key.encode).repeat_interleave(q.shape[1], 1)
    return algebra.absorb(q, plan.key.decode) @ latents.mT


# ---- files


def test_the_same_statistics_give_the_same_plan_byte_for_byte(llama: FittedModel, tmp_path: Path) -> None:
    files = [llama.plan(4).save(tmp_path / name) for name in "ab"]
    for name in ("plan.json", "plan.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


@pytest.mark.parametrize("ratio", [0, -3, 0.5, float("nan"), 5000])
def test_an_impossible_ratio_is_refused(llama: FittedModel, ratio: float) -> None:
    with pytest.raises(FhoptError, match="ratio"):
        llama.plan(ratio)


def test_a_ratio_that_leaves_no_bits_names_the_minimum(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match="expected at least"):
        llama.plan(60)


# ---- decoder gains


def test_decoders_of_values_are_unbiased_and_those_of_keys_unchanged(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = llama.plan(8)
    monkeypatch.setattr(fit_plan, "UNBIASED", {})
    plain = llama.plan(8)
    seen = set()
    for a, b in zip(scaled.sites, plain.sites, strict=True):
        assert torch.equal(a.key.decode, b.key.decode) and torch.equal(a.value.encode, b.value.encode)
        start = 0
        for tier in a.value.tiers:
            part = slice(start, start := start + tier.width)
            torch.testing.assert_close(
                a.value.decode[..., part], UNBIASED.get(tier.bits, 1) * b.value.decode[..., part]
            )
            seen.add(tier.bits)
    assert seen & set(UNBIASED)
