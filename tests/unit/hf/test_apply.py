"""Applying a plan to a model, and removing it."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FittedModel, cached, tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.hf.apply import _layer_index, latent_cache
from fhopt.plan.fingerprint import fingerprint

applying = importlib.import_module("fhopt.hf.apply")  # `fhopt.hf.apply` as an attribute is the function

# ---- wrong use


def test_unapply_undoes_everything_that_apply_changed(llama: FittedModel) -> None:
    fhopt.apply(llama.model, llama.plan(1))
    cache = latent_cache(llama.model, max_cache_len=64)
    layer = cache.layers[0]
    with torch.no_grad():
        llama.model(token_ids(1, 40), **cached(cache))
        assert layer.reader.active
        llama.model.set_attn_implementation("sdpa")
        llama.model(token_ids(1, 1), **cached(cache))
        assert not layer.reader.active
    fhopt.unapply(llama.model)
    assert llama.model.config._attn_implementation == "sdpa" and not layer.reader.active


def test_a_plan_for_another_model_is_refused(llama: FittedModel) -> None:
    with pytest.raises(FhoptError, match="does not have"):
        fhopt.apply(tiny_gpt2(), llama.plan(4))
    with pytest.raises(FhoptError, match="not a transformers model"):
        fhopt.apply(torch.nn.Linear(2, 2), llama.plan(4))
    with pytest.raises(FhoptError, match="expected a layer below 1"):
        LatentCache(llama.plan(4), tiny_llama(num_hidden_layers=1).config)


def test_models_without_a_cache_of_transformers_are_refused(llama: FittedModel) -> None:
    """A plan would have no effect: XLNet stores `mems`, and GPT processes the whole text at each step."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, XLNetConfig, XLNetLMHeadModel

    own = XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(FhoptError, match="XLNetLMHeadModel uses its own kind of cache"):
        fhopt.apply(own, llama.plan(4))
    none = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(FhoptError, match="OpenAIGPTLMHeadModel uses no KV cache"):
        fhopt.apply(none, llama.plan(4))


def test_a_shared_module_that_knows_no_layer_has_the_one_of_its_name() -> None:
    shared, own = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, index in ((shared, -1), (own, 3)):
        module.layer_idx = index  # type: ignore[assignment]
    found = [_layer_index(module, 1) for module in (shared, own, torch.nn.Linear(1, 1))]
    assert found == [1, 3, 1]


# ---- found in a review


def test_a_cache_passed_by_the_caller_is_filled_not_replaced(llama: FittedModel) -> None:
    from transformers import DynamicCache

    ids = token_ids(1, 41)
    with torch.no_grad():
        expected = llama.model(ids, use_cache=False).logits[:, -1]
        fhopt.apply(llama.model, llama.plan(1))
        cache = DynamicCache(config=llama.model.config)
        llama.model(ids[:, :40], **cached(cache))
        assert cache.get_seq_length() == 40 and isinstance(cache.layers[0], LatentLayer)
        found = llama.model(ids[:, 40:], **cached(cache)).logits[:, -1]
        old = LatentCache(llama.plan(1), llama.model.config)
        llama.model(ids, past_key_values=old)
    fhopt.unapply(llama.model)
    assert old.get_seq_length() == 41
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- other caches

LATENT, STATIC = "LatentLayer", "StaticLatentLayer"


@contextmanager
def applied(llama: FittedModel) -> Iterator[Any]:
    """The model of `llama` with a 4x plan, which is removed afterwards."""
    try:
        yield fhopt.apply(llama.model, llama.plan(4))
    finally:
        fhopt.unapply(llama.model)
        llama.model.set_attn_implementation("sdpa")


def layers_after(model: Any, **options: Any) -> tuple[set[str], list[str]]:
    """Generate; return the classes of the cache's layers, and fhopt's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.generate(
            token_ids(1, 40), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **options
        )
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return {type(layer).__name__ for layer in output.past_key_values.layers}, messages


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, LATENT),
        ("dynamic", LATENT),
        ("hybrid", LATENT),  # transformers makes a dynamic cache
        ("static", STATIC),
        ("sliding_window", STATIC),
        ("hybrid_chunked", STATIC),
    ],
)
def test_every_ordinary_cache_that_generate_makes_gets_latent_layers(
    llama: FittedModel, name: str | None, expected: str
) -> None:
    with applied(llama) as model:
        assert layers_after(model, cache_implementation=name) == ({expected}, [])


def test_the_cache_implementation_of_the_models_generation_config_is_used(
    llama: FittedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with applied(llama) as model:
        monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
        assert layers_after(model) == ({STATIC}, [])


@pytest.mark.parametrize(("name", "expected"), [("offloaded", LATENT), ("offloaded_static", STATIC)])
def test_an_offloaded_cache_gets_latent_layers(
    llama: FittedModel, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no streams, so this checks only the classes of the layers."""
    from transformers import DynamicCache, StaticCache

    monkeypatch.setattr("torch.Stream", lambda: None)
    kind: Any = DynamicCache if name == "offloaded" else lambda **o: StaticCache(max_cache_len=64, **o)
    with applied(llama) as model:
        cache = kind(config=model.config, offloading=True)
        applying._convert(cache, model._fhopt_applied)
        assert {type(layer).__name__ for layer in cache.layers} == {expected} and cache.offloading


def test_a_quantized_cache_is_used_without_the_plan_and_warns_once(llama: FittedModel) -> None:
    from transformers import QuantizedCache

    with applied(llama) as model:
        quantized = QuantizedCache("fp8", model.config)
        found, messages = layers_after(model, cache=quantized)
        assert found == {"Fp8QuantizedLayer"} and len(messages) == 1
        assert (
            "a cache of class QuantizedCache bypasses the applied plan" in messages[0]
            and "fhopt.unapply(model)" in messages[0]
        )
        assert layers_after(model, cache=QuantizedCache("fp8", model.config)) == ({"Fp8QuantizedLayer"}, [])
        fhopt.apply(model, llama.plan(4))
        assert len(layers_after(model, cache=QuantizedCache("fp8", model.config))[1]) == 1


def test_caches_of_other_classes_are_used_without_the_plan_with_a_warning(llama: FittedModel) -> None:
    from transformers import DynamicCache

    class Own(DynamicCache):  # type: ignore[misc]
        """A cache that may update its layers in any way."""

    class Paged:
        """A cache without layers, as in continuous batching."""

    with applied(llama) as model:
        found, messages = layers_after(model, cache=Own(config=model.config))
        assert found == {"DynamicLayer"} and "a cache of class Own bypasses" in messages[0]
        with pytest.warns(RuntimeWarning, match="class Paged bypasses the applied plan"):
            applying._use_latents(model, (), {"input_ids": token_ids(1, 8), "cache": Paged()})


def test_a_cache_of_custom_layers_is_used_unchanged(llama: FittedModel) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    with applied(llama) as model:
        exact = Cache(layers=DynamicCache(config=model.config).layers)
        assert layers_after(model, cache=exact) == ({"DynamicLayer"}, [])


# --------------------------------------------------------------------------------------------------- other attention


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_an_attention_set_after_the_plan_attends_to_latents_and_warns(llama: FittedModel, name: str) -> None:
    with applied(llama) as model:
        model.set_attn_implementation(name)
        found, messages = layers_after(model)
        assert found == {LATENT} and f"attention '{name}' was set after a plan was applied" in messages[0]
        assert not [message for message in layers_after(model)[1] if "was set after" in message]
        model.set_attn_implementation("fhopt")
        fhopt.apply(model, llama.plan(4))
        assert layers_after(model) == ({LATENT}, [])


def test_an_attention_assigned_to_the_configuration_also_warns(llama: FittedModel) -> None:
    with applied(llama) as model:
        model.config._attn_implementation = "sdpa"
        with pytest.warns(RuntimeWarning, match="'sdpa' was set after a plan was applied"):
            model(token_ids(1, 8))


def test_attention_without_support_for_latents_is_refused(llama: FittedModel) -> None:
    with applied(llama) as model:
        model.set_attn_implementation("flex_attention")
        with pytest.raises(FhoptError, match="'flex_attention' does not support latents"):
            model(token_ids(1, 8))


# --------------------------------------------------------------------------------------------------- after `apply`


def test_a_plan_may_be_the_path_of_one(llama: FittedModel, tmp_path: Path) -> None:
    path = llama.plan(4).save(tmp_path / "plan")
    for given in (path, str(path)):
        fhopt.apply(llama.model, given)
        assert applying.applied_plan(llama.model).digest() == llama.plan(4).digest()
        fhopt.unapply(llama.model)
    for wrong in (None, {"plan": 1}, 3):
        with pytest.raises(FhoptError, match=f"plan is a {type(wrong).__name__}; expected a LatentPlan or the path"):
            fhopt.apply(llama.model, wrong)  # type: ignore[arg-type]
    assert not hasattr(llama.model, "_fhopt_applied")


def test_weights_of_another_model_loaded_under_a_plan_warn(llama: FittedModel) -> None:
    model = tiny_llama()
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = llama.plan(4).with_provenance(fingerprint=fingerprint(own, [s.site for s in llama.plan(4).sites]))
    fhopt.apply(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(own)
    negated = {name: -weight for name, weight in own.items()}
    with pytest.warns(RuntimeWarning, match="weights were loaded while a plan was applied: the plan was not fitted to"):
        copy.deepcopy(model).load_state_dict(negated)
    fhopt.unapply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(negated)


def test_the_wrapper_of_a_compiled_model_accepts_a_plan(llama: FittedModel) -> None:
    compiled: Any = torch.compile(llama.model, backend="eager")
    assert fhopt.apply(compiled, llama.plan(4)) is compiled
    assert layers_after(compiled) == layers_after(llama.model) == ({LATENT}, [])
    assert fhopt.unapply(compiled) is compiled
    assert not hasattr(llama.model, "_fhopt_applied") and layers_after(llama.model) == ({"DynamicLayer"}, [])
