"""The KV cache: construction from models and plans, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation import MODES, cache_of, generate
from hand_plans import CODED, random_plan
from latent_caches import gpt2_with_biases, logits, shared
from small_models import FittedModel, cached, found, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import score
from fhopt.fitting import fit_plan
from fhopt.plan.latent_plan import LatentPlan


def test_a_plan_may_be_the_path_of_one(tmp_path: Path) -> None:
    plan = random_plan("head", CODED)
    cache = LatentCache(plan.save(tmp_path / "plan"))
    assert cache.plan.digest() == plan.digest()
    for wrong in (None, {"plan": 1}, 3):
        with pytest.raises(FhoptError, match="expected a LatentPlan or the path of one"):
            LatentCache(wrong)  # type: ignore[arg-type]


def test_a_lossy_plan_stays_close_and_full_width_costs_nothing(llama: FittedModel) -> None:
    ids = token_ids(16, 80)  # random: with so few, a KL of 0.07 changes the mean by 0.01 either way
    exact = score(llama.model, ids, None).nats
    for ratio, bound in ((1, 1e-5), (4, 0.05)):
        plan = llama.plan(ratio)
        fhopt.apply(llama.model, plan)
        assert abs(score(llama.model, ids, plan).nats - exact) < bound
        fhopt.unapply(llama.model)


# ---- one latent for keys and values


@pytest.mark.parametrize("absorb", [True, False])
def test_keys_and_values_from_one_latent_survive_a_crop(absorb: bool) -> None:
    model, ids = gpt2_with_biases(), token_ids(1, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    plan = shared()
    if absorb:
        fhopt.apply(model, plan)
    cache = LatentCache(plan, model.config, absorb=absorb)
    logits(model, cache, torch.cat([ids[:, :33], token_ids(1, 20)], 1), [40])
    assert cache.layers[0].quantized == 40
    cache.crop(-20)  # after token 33, inside a quantized block
    assert cache.layers[0].quantized == 24 and cache.get_seq_length() == 33
    behind = logits(model, cache, ids[:, 33:], [10])
    torch.testing.assert_close(behind, expected[:, 33:], rtol=1e-4, atol=1e-4)


# ---- wrong use


def test_tokens_that_do_not_fit_are_refused_and_the_cache_stays(llama: FittedModel) -> None:
    layer = LatentLayer(llama.plan(4), llama.plan(4).sites[0], absorb=False)
    layer.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
    state = [t.clone() for t in layer.tensors]
    wrong = {
        "keys and values have": torch.randn(1, 3, 1, 16),
        "batch size 2": torch.randn(2, 2, 1, 16),
        "torch.bfloat16": torch.randn(1, 2, 1, 16, dtype=torch.bfloat16),
    }
    for message, tokens in wrong.items():
        with pytest.raises(FhoptError, match=message):
            layer.update(tokens, tokens)
    with pytest.raises(FhoptError, match="crop"):
        layer.crop(-31)
    assert all(torch.equal(a, b) for a, b in zip(layer.tensors, state, strict=True))


def test_layers_that_neither_plan_nor_cache_know_are_refused_and_the_cache_stays_empty(llama: FittedModel) -> None:
    cache = LatentCache(replace(llama.plan(4), sites=llama.plan(4).sites[:1]))
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(
                FhoptError, match=r"caches layer 1, .* only 1 layers.*LatentCache\(plan, model.config\)"
            ):
                llama.model(token_ids(1, 40), **cached(cache))
            assert cache.get_seq_length() == 0 and cache.nbytes == 0
        cache = LatentCache(cache.plan, llama.model.config)
        llama.model(token_ids(1, 40), **cached(cache))
    assert [row["kind"] for row in cache.report()] == ["band", "exact"]


def test_a_cache_with_the_plan_of_another_model_is_refused(llama: FittedModel, gpt2: FittedModel) -> None:
    fhopt.apply(llama.model, llama.plan(4))
    cache = LatentCache(gpt2.plan(4))
    with torch.no_grad(), pytest.raises(FhoptError, match="plan for another model"):
        llama.model(token_ids(1, 40), **cached(cache))
    fhopt.unapply(llama.model)
    with torch.no_grad(), pytest.raises(FhoptError, match="Use a plan that was fitted for this model"):
        llama.model(token_ids(1, 40), **cached(cache))
    assert cache.get_seq_length() == 0


def test_a_cache_continues_in_its_first_dtype(llama: FittedModel) -> None:
    cache = LatentCache(llama.plan(4))
    with torch.no_grad():
        llama.model(token_ids(1, 60), **cached(cache))
        state = [t.clone() for layer in cache.layers for t in layer.tensors]
        with pytest.raises(FhoptError, match=r"torch.bfloat16 with batch size 1; expected torch.float32"):
            copy.deepcopy(llama.model).to(torch.bfloat16)(token_ids(1, 1), **cached(cache))
        with pytest.raises(FhoptError, match="with batch size 2"):
            llama.model(token_ids(2, 1), **cached(cache))
    assert all(map(torch.equal, state, [t for layer in cache.layers for t in layer.tensors]))


@pytest.mark.parametrize("layout", ["head", "input"])
def test_layers_of_a_model_that_is_spread_over_devices_stay_where_their_tokens_are(layout: str) -> None:
    """`meta` represents the second device: its tensors have no data but know their device."""
    plan = random_plan(layout, CODED)
    twin = replace(plan.sites[0], site=replace(plan.sites[0].site, name="layers.1"))
    cache = LatentCache(replace(plan, sites=(plan.sites[0], twin)))
    for count in (30, 1, 5):
        for layer, device in enumerate(("cpu", "meta")):
            key, value = (torch.zeros(1, 2, count, size, device=device) for size in (16, 8))
            keys, values = cache.update(key, value, layer)
            assert {keys.device.type, values.device.type} == {device}
    assert [{t.device.type for t in layer.tensors} for layer in cache.layers] == [{"cpu"}, {"meta"}]


def test_a_copy_of_a_cache_is_independent_and_shares_the_bases(llama: FittedModel) -> None:
    """transformers' documentation reuses a prompt by copy.deepcopy."""
    cache, ids = LatentCache(llama.plan(4)), token_ids(1, 60)
    with torch.no_grad():
        llama.model(ids, **cached(cache))
        other = copy.deepcopy(cache)
        expected = llama.model(ids[:, :5], **cached(other)).logits
        assert cache.get_seq_length() == 60 and other.get_seq_length() == 65
        assert torch.equal(llama.model(ids[:, :5], **cached(cache)).logits, expected)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert a.key_bases is b.key_bases and a.plan is b.plan


# ---- found in a review


def test_a_dropped_cache_is_freed_at_once(llama: FittedModel) -> None:
    import gc
    import weakref

    fhopt.apply(llama.model, llama.plan(4))
    cache = LatentCache(llama.plan(4))
    with torch.no_grad():
        llama.model(token_ids(1, 60), **cached(cache))
    layer = weakref.ref(cache.layers[0])
    fhopt.unapply(llama.model)
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


def test_sliding_layers_stay_unchanged_and_padding_stays_finite_with_softcap() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=128, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    sites = found(model, 24)[1].sites
    assert {s.softcap for s in sites.values()} == {50.0}
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    expected = generate(model, MODES["greedy"], ids, attention_mask=mask)
    fhopt.apply(model, fit_plan.exact_plan(sites.values(), recent=8, block=8))
    output = generate(model, MODES["greedy"], ids, attention_mask=mask)
    kinds = [isinstance(layer, LatentLayer) for layer in cache_of(output).layers]
    assert kinds == [not s for s in LatentCache(model._fhopt_applied.plan, config).is_sliding]
    assert kinds.count(True) == 1
    assert torch.equal(output.sequences, expected.sequences)


# ---- out-of-distribution text


def layer_keys(plan: LatentPlan, keys: Tensor, values: Tensor) -> LatentCache:
    cache = LatentCache(plan, absorb=False)
    for layer in range(len(plan.sites)):
        cache.update(keys, values, layer)
    return cache


def test_latents_have_the_calibration_energy_on_such_text_and_more_on_other(llama: FittedModel) -> None:
    plan = llama.plan(4)
    cache = LatentCache(plan)
    fhopt.apply(llama.model, plan)
    logits(llama.model, cache, token_ids(2, 480), [200, 400])  # as in calibration: random tokens
    usual = cache.latent_energy
    fhopt.unapply(llama.model)
    assert usual is not None and 0.6 < usual < 1.2
    keys, values = (torch.randn(1, 2, 480, 16) for _ in range(2))
    quiet, loud = (layer_keys(plan, keys, factor * values).latent_energy for factor in (1, 3))
    assert quiet is not None and loud == pytest.approx(9 * quiet, rel=1e-3)


def test_energy_is_unknown_for_few_tokens_unquantized_latents_and_after_a_reset(llama: FittedModel) -> None:
    plan, many = llama.plan(4), torch.randn(1, 2, 480, 16)
    assert layer_keys(plan, many[:, :, :200], many[:, :, :200]).latent_energy is None
    cache = layer_keys(plan, many, many)
    assert cache.latent_energy is not None
    copied = copy.deepcopy(cache)
    cache.reset()
    assert cache.latent_energy is None and copied.latent_energy is not None
    assert LatentCache(random_plan("head", ())).latent_energy is None


def test_it_warns_once_of_out_of_distribution_text(llama: FittedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhopt.system._warned", set())
    plan, many = llama.plan(4), torch.randn(1, 2, 480, 16)
    with pytest.warns(RuntimeWarning, match=r"out of distribution for this plan.*x the calibration level"):
        layer_keys(plan, many, 50 * many)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_keys(plan, many, 50 * many)
        layer_keys(plan, many, 1e-3 * many)
        layer_keys(replace(plan, provenance={}), many, 50 * many)
