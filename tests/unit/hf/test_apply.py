"""A plan applied to a model and taken back."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from small_models import Fitted, cached, tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentCache
from fhopt.errors import FhoptError
from fhopt.hf.apply import _layer_index, latent_cache

applying = importlib.import_module("fhopt.hf.apply")  # `fhopt.hf.apply` as an attribute is the function

# ---- wrong use


def test_what_apply_made_active_unapply_takes_back(llama: Fitted) -> None:
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


def test_a_plan_for_another_model_is_refused(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="does not have"):
        fhopt.apply(tiny_gpt2(), llama.plan(4))
    with pytest.raises(FhoptError, match="not a transformers model"):
        fhopt.apply(torch.nn.Linear(2, 2), llama.plan(4))
    with pytest.raises(FhoptError, match="the model has 1"):
        LatentCache(llama.plan(4), tiny_llama(num_hidden_layers=1).config)


def test_models_without_a_cache_of_transformers_are_refused(llama: Fitted) -> None:
    """A plan would be applied and never read: XLNet keeps `mems`, and GPT reads the whole text at each step."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, XLNetConfig, XLNetLMHeadModel

    own = XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=16))
    with pytest.raises(FhoptError, match="XLNetLMHeadModel keeps a cache of its own"):
        fhopt.apply(own, llama.plan(4))
    none = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(FhoptError, match="OpenAIGPTLMHeadModel keeps no KV cache"):
        fhopt.apply(none, llama.plan(4))


def test_a_shared_module_that_knows_no_layer_has_the_one_of_its_name() -> None:
    shared, own = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, index in ((shared, -1), (own, 3)):
        module.layer_idx = index  # type: ignore[assignment]
    found = [_layer_index(module, 1) for module in (shared, own, torch.nn.Linear(1, 1))]
    assert found == [1, 3, 1]


# ---- what a review found


def test_a_cache_of_the_callers_own_is_filled_not_replaced(llama: Fitted) -> None:
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


# --------------------------------------------------------------------------------------------------- masks


def mask_of(**changed: Any) -> Any:
    """Ask for a mask as transformers does, for 20 tokens behind 12."""
    from transformers.masking_utils import causal_mask_function

    given = dict(batch_size=2, q_length=20, kv_length=32, q_offset=12, mask_function=causal_mask_function)
    return applying._mask(**given | changed)


@pytest.mark.parametrize("padding", [None, torch.ones(2, 32, dtype=torch.bool)])
def test_a_chunk_behind_a_cache_has_no_mask_that_only_says_causal(padding: torch.Tensor | None) -> None:
    assert mask_of(attention_mask=padding) is None


def test_a_mask_is_asked_for_by_position_too() -> None:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    found = inspect.signature(sdpa_mask).bind(2, 20, 32, 12).arguments
    assert found == dict(batch_size=2, q_length=20, kv_length=32, q_offset=12), "the order of its parameters"
    assert applying._mask(2, 20, 32, 12, mask_function=causal_mask_function) is None
    assert applying._mask(2, 20, 40, 12, mask_function=causal_mask_function).shape[-2:] == (20, 40)


@pytest.mark.parametrize("case", ["padding", "window", "function", "places", "not to be left out"])
def test_other_masks_are_those_of_transformers(case: str) -> None:
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    changed: dict[str, Any] = {
        "padding": {"attention_mask": torch.arange(32).expand(2, -1) > 3},
        "window": {"mask_function": sliding_window_causal_mask_function(8), "local_size": 8},
        "function": {"mask_function": lambda b, h, q, k: k <= q + 1},
        "places": {"kv_length": 40},
        "not to be left out": {"allow_is_causal_skip": False},
    }[case]
    given = dict(batch_size=2, q_length=20, kv_length=32, q_offset=12) | changed
    found = mask_of(**changed)
    assert found is not None
    if case not in ("places", "padding", "not to be left out"):
        assert torch.equal(found, sdpa_mask(**given))
    assert found.shape[-2:] == (20, given["kv_length"])
