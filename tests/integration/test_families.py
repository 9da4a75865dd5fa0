"""`fhopt.apply` on every decoder of the zoo: the same tokens from full-width latents, in dynamic and static caches."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from model_zoo import has_transformers
from model_zoo import huggingface as zoo
from needs import covering, sampled

import fhopt
from fhopt.attention import latent_tensor
from fhopt.attention.latent_tensor import LatentTensor
from fhopt.cache.layer_map import LATENT_LAYERS
from fhopt.fitting import fit_plan
from fhopt.models import model_facts
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan

MODELS = {m.name: m for m in (*zoo.DECODERS, *zoo.ENCODER_DECODERS) if m.reason is None}
NOT_STATIC = ("falcon_alibi", "mpt")  # these also fail with transformers' own static cache
PROMPT, NEW = 20, 20


@cache
def prepared(name: str) -> tuple[Any, dict[str, torch.Tensor], LatentPlan]:
    """Return a model, a prompt with one padded sequence, and a lossless plan that quantizes often."""
    torch.manual_seed(0)
    row = MODELS[name]
    model: Any = zoo._make(row, row.implementations[-1])
    given = row.inputs()
    sites = pipeline.find_attentions(capture(model, (), given | {"use_cache": False}).program).sites
    plan = fit_plan.exact_plan(sites.values(), recent=4, block=4)
    if "input_features" in given:
        return model, {"input_features": given["input_features"]}, plan
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, slice(-5, None) if model.config.is_encoder_decoder else slice(5)] = 0
    return model, {"input_ids": torch.randint(3, zoo.VOCABULARY, (2, PROMPT)), "attention_mask": mask}, plan


def generate(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    fixed: dict[str, Any] = dict(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return model.generate(**prompt, **(fixed | options))


@contextmanager
def nothing_rebuilt() -> Iterator[None]:
    """Fail if the model runs an operation that needs full-length keys and values."""
    latent_tensor._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* has no latent implementation", category=RuntimeWarning)
        yield


def layers_of(cache: Any) -> list[Any]:
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if hasattr(cache, "is_updated") else (cache,)
    return [layer for part in parts for layer in part.layers]


@pytest.mark.parametrize(("name", "kind"), sampled(itertools.product(MODELS, ["growing", "static"]), 9))
def test_a_family_generates_the_same_from_latents(name: str, kind: str) -> None:
    if kind == "static" and name in NOT_STATIC:
        pytest.skip("transformers' own static cache fails with this model")
    model, prompt, plan = prepared(name)
    options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    if name == "whisper":  # its `generate` splits the returned caches into sequences, and has no logits
        options |= {"return_dict_in_generate": False, "output_logits": False}
    expected = generate(model, prompt, **options)
    fhopt.apply(model, plan)
    try:
        with nothing_rebuilt():
            found = generate(model, prompt, **options)
    finally:
        fhopt.unapply(model)
    if name == "whisper":
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    layers = layers_of(found.get("cache", found.get("past_key_values")))
    latent = [layer for layer in layers if isinstance(layer, LATENT_LAYERS)]
    sliding = [layer for layer in layers if layer.is_sliding]
    assert len(latent) + len(sliding) == len(layers) and (latent or name == "mistral")
    assert all(int(layer.quantized_tokens) > 0 for layer in latent)
    assert not any(isinstance(x, LatentTensor) for layer in latent for x in layer.tensors)


@pytest.mark.slow
def test_the_zoo_has_models_with_each_implementation_of_attention() -> None:
    own = {name for name in MODELS if not model_facts.uses_interface(_attention(prepared(name)))}
    gptj = set() if has_transformers(5, 24) else {"gptj"}
    falcon = set() if has_transformers(5, 25) else {"falcon", "falcon_new", "falcon_alibi"}
    assert own == {"bloom", "mpt"} | gptj | falcon


def _attention(ready: tuple[Any, Any, LatentPlan]) -> torch.nn.Module:
    model, _, plan = ready
    module: torch.nn.Module = model.get_submodule(plan.sites[-1].site.name)
    return module


HYBRIDS: dict[str, dict[str, Any]] = {
    "Lfm2": dict(layer_types=["conv", "full_attention"], num_key_value_heads=2, block_auto_adjust_ff_dim=False),
    "Qwen3Next": dict(
        layer_types=["linear_attention", "full_attention"], num_key_value_heads=2, head_dim=16, linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ),
}  # fmt: skip


@covering(1, name=list(HYBRIDS), kind=["growing", "static"])
def test_layers_of_linear_attention_are_not_changed(name: str, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(**zoo.TEXT | HYBRIDS[name])
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    prompt = {"input_ids": torch.randint(3, zoo.VOCABULARY, (2, PROMPT))}
    sites = pipeline.find_attentions(capture(model, (), prompt | {"use_cache": False}).program).sites
    options: dict[str, Any] = {"cache_implementation": "static"} if kind == "static" else {}
    expected = generate(model, prompt, **options)
    kept = [s for s in sites.values() if s.name.endswith("self_attn")]
    fhopt.apply(model, fit_plan.exact_plan(kept, recent=4, block=4))
    found = generate(model, prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    layers = layers_of(found.get("cache", found.get("past_key_values")))
    assert [isinstance(layer, LATENT_LAYERS) for layer in layers] == [False, True]


def test_submodels_keep_their_attention_and_get_it_back() -> None:
    row = next(m for m in zoo.ENCODERS if m.name == "llava")
    torch.manual_seed(0)
    model: Any = zoo._make(row, "eager")
    given = row.inputs()
    path, ids = "model.language_model", {"input_ids": given["input_ids"], "use_cache": False}
    sites = pipeline.find_attentions(capture(model.get_submodule(path), (), ids).program).sites
    kept = [replace(s, name=f"{path}.{s.name}") for s in sites.values()]
    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        fhopt.apply(model, fit_plan.exact_plan(kept, recent=4, block=4))
        text, vision = model.config.text_config, model.config.vision_config
        assert (text._attn_implementation, vision._attn_implementation) == ("fhopt", "eager")
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=1e-4)
        fhopt.unapply(model)
        assert (text._attn_implementation, vision._attn_implementation) == ("eager", "eager")


@pytest.mark.parametrize("name", sampled(["bloom", "mpt", "falcon"], 3))
def test_static_caches_without_a_quantized_block_support_explicit_attention(name: str) -> None:
    from fhopt.hf.apply import latent_cache

    model, prompt, _ = prepared(name)
    sites = pipeline.find_attentions(capture(model, (), prompt | {"use_cache": False}).program).sites
    ids = prompt["input_ids"][:1]
    fhopt.apply(model, fit_plan.exact_plan(sites.values()))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = latent_cache(model)
        found = torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in ids.split(5, 1)], 1)
    fhopt.unapply(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
