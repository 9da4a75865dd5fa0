"""Caches on disk: a loaded cache continues exactly, and only with its own model and plan."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import MODES, generate
from hand_plans import shared_plan
from needs import covering
from small_models import FittedModel, cached, found, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor

import fhopt
from fhopt.errors import FhoptError
from fhopt.files import read_tensors
from fhopt.fitting import fit_plan
from fhopt.hf.apply import latent_cache
from fhopt.hf.prompt_cache import KEY
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan


def filled(model: Any, ids: Tensor, **options: Any) -> Any:
    cache = latent_cache(model, **options)
    with torch.no_grad():
        for part in ids.split(21, 1):
            model(part, **cached(cache))
    return cache


def states(cache: Any) -> list[dict[str, Any]]:
    return [layer.state() for layer in cache.layers]


def same(a: Any, b: Any) -> bool:
    """Whether nested states have equal tensors."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@covering(
    2, kind=["coded", "full width", "one latent"], window_bits=[16, 8],
    options={"growing": {}, "static": {"max_cache_len": 130}},
)  # fmt: skip
def test_a_saved_prefix_continues_as_if_it_had_stayed_in_memory(
    kind: str, window_bits: int, options: dict[str, Any], llama: FittedModel, tmp_path: Path
) -> None:
    model = tiny_gpt2() if kind == "one latent" else llama.model
    plan = (
        shared_plan(found(model, 96)[1], width=64, window_bits=window_bits)
        if kind == "one latent"
        else llama.plan(4 if kind == "coded" else 1, window_bits=window_bits)
        if kind == "coded"
        else llama.plan(1)
    )
    fhopt.apply(model, plan)
    ids = token_ids(2, 60)
    stayed = filled(model, ids, **options)
    path = fhopt.save_cache(model, stayed, tmp_path / "prefix.safetensors")
    loaded = fhopt.load_cache(model, path)
    assert same(states(loaded), states(stayed)) and type(loaded) is type(stayed)
    assert loaded.nbytes <= stayed.nbytes
    longer = torch.cat([ids, token_ids(2, 9)], 1)
    expected = generate(model, MODES["greedy"], longer, **cached(stayed))
    output = generate(model, MODES["greedy"], longer, **cached(loaded))
    fhopt.unapply(model)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert same(states(loaded), states(stayed))


def test_a_file_is_as_small_as_the_cache_without_spare_capacity(llama: FittedModel, tmp_path: Path) -> None:
    fhopt.apply(llama.model, llama.plan(4))
    cache = filled(llama.model, token_ids(1, 400))
    size = fhopt.save_cache(llama.model, cache, tmp_path / "prefix.safetensors").stat().st_size
    fhopt.unapply(llama.model)
    assert size < llama.plan(4).cache_bytes(400, itemsize=4) + 6000  # names, shapes, model and plan


@pytest.mark.parametrize(("options", "counters"), [({}, set()), ({"max_cache_len": 130}, {"cumulative_length"})])
def test_names_in_a_file_never_change(
    options: dict[str, Any], counters: set[str], llama: FittedModel, tmp_path: Path
) -> None:
    fhopt.apply(llama.model, llama.plan(4, window_bits=8))
    cache = filled(llama.model, token_ids(1, 60), **options)
    path = fhopt.save_cache(llama.model, cache, tmp_path / "prefix.safetensors")
    fhopt.unapply(llama.model)
    assert cache.layers[0].state().keys() == {"parts", "blank", "sealed"} | counters
    sizes = {"open_keys": 3, "open_values": 3, "key_rows": 2, "value_rows": 2}
    parts = {f"self.0.parts.{name}.{i}" for name, count in sizes.items() for i in range(count)}
    about, tensors = read_tensors(path, KEY)
    assert {name for name in tensors if name.startswith("self.0.parts")} == parts
    assert about["layers"]["self.0"]["class"] == ("StaticLatentLayer" if options else "LatentLayer")


def test_layers_that_stayed_exact_are_saved_too(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=128, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = Gemma3ForCausalLM(config).eval(), token_ids(2, 40)
    fhopt.apply(model, fit_plan.exact_plan(found(model, 24)[1].sites.values(), recent=8, block=8))
    for options in ({}, {"max_cache_len": 90}):
        stayed = filled(model, ids, **options)
        loaded = fhopt.load_cache(model, fhopt.save_cache(model, stayed, tmp_path / "prefix.safetensors"))
        longer = torch.cat([ids, token_ids(2, 5)], 1)
        expected, output = (generate(model, MODES["greedy"], longer, **cached(c)) for c in (stayed, loaded))
        assert torch.equal(output.sequences, expected.sequences)
        for a, b in zip(output.logits, expected.logits, strict=True):  # a view and a copy are summed in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_cache_of_an_encoder_decoder_saves_both_parts(tmp_path: Path) -> None:
    from model_zoo import huggingface as zoo

    torch.manual_seed(0)
    model: Any = zoo._make(next(m for m in zoo.ENCODER_DECODERS if m.name == "bart"), "sdpa")
    ids, decoded = torch.randint(3, 97, (1, 30)), torch.randint(3, 97, (1, 25))
    inputs = {"input_ids": ids, "decoder_input_ids": decoded, "use_cache": False}
    outcome = pipeline.find_attentions(capture(model, (), inputs).program)
    fhopt.apply(model, fit_plan.exact_plan(outcome.sites.values(), recent=4, block=4))
    with torch.no_grad():
        read = model.get_encoder()(ids)
        expected = model(encoder_outputs=read, decoder_input_ids=decoded, use_cache=False).logits[:, 20:]
        cache = latent_cache(model)
        model(encoder_outputs=read, decoder_input_ids=decoded[:, :20], **cached(cache))
        loaded = fhopt.load_cache(model, fhopt.save_cache(model, cache, tmp_path / "both.safetensors"))
        output = model(encoder_outputs=read, decoder_input_ids=decoded[:, 20:], **cached(loaded)).logits
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def saved(llama: FittedModel, tmp_path: Path) -> Any:
    fhopt.apply(llama.model, llama.plan(4))
    path = fhopt.save_cache(llama.model, filled(llama.model, token_ids(1, 60)), tmp_path / "prefix.safetensors")
    yield path
    fhopt.unapply(llama.model)


def test_a_cache_is_loaded_only_for_its_plan_model_and_dtype(llama: FittedModel, saved: Path) -> None:
    fhopt.apply(llama.model, llama.plan(4, window_bits=16))
    with pytest.raises(FhoptError, match=r"belongs to another plan: .*Apply the plan"):
        fhopt.load_cache(llama.model, saved)
    fhopt.unapply(llama.model)
    with pytest.raises(FhoptError, match="no plan is applied"):
        fhopt.load_cache(llama.model, saved)
    half = fhopt.apply(copy.deepcopy(llama.model).to(torch.bfloat16), llama.plan(4))
    with pytest.raises(FhoptError, match="belongs to another dtype"):
        fhopt.load_cache(half, saved)
    torch.manual_seed(5)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.neg_()
    fhopt.apply(other, llama.plan(4))
    with pytest.raises(FhoptError, match=r"belongs to another model: .*Load the model"):
        fhopt.load_cache(other, saved)


def test_damaged_and_other_files_are_refused_in_one_sentence(llama: FittedModel, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama.model
    with pytest.raises(FhoptError, match="cannot read"):
        fhopt.load_cache(model, tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(FhoptError, match=r"is damaged.*Fill the cache again"):
        fhopt.load_cache(model, other)
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(FhoptError, match="is not an fhopt cache"):
        fhopt.load_cache(model, other)
    about, tensors = described(saved), load_file(saved)
    save_file(tensors, other, {"fhopt_cache": json.dumps(about | {"version": 99})})
    with pytest.raises(FhoptError, match="version 99"):
        fhopt.load_cache(model, other)
    name = next(n for n in tensors if "key_rows" in n)
    save_file(tensors | {name: tensors[name][:, :, 1:].contiguous()}, other, {"fhopt_cache": json.dumps(about)})
    with pytest.raises(FhoptError, match="is damaged"):
        fhopt.load_cache(model, other)
    del tensors[name]
    save_file(tensors, other, {"fhopt_cache": json.dumps(about)})
    with pytest.raises(FhoptError, match="is damaged"):
        fhopt.load_cache(model, other)


def described(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["fhopt_cache"])
    return found


def test_invalid_saves_are_refused_and_leave_no_file(llama: FittedModel, tmp_path: Path) -> None:
    from transformers import DynamicCache

    model, path = llama.model, tmp_path / "prefix.safetensors"
    with pytest.raises(FhoptError, match="no plan is applied"):
        fhopt.save_cache(model, DynamicCache(), path)
    fhopt.apply(model, llama.plan(4))
    for cache in (latent_cache(model), DynamicCache(config=model.config)):
        with pytest.raises(FhoptError, match="has no latents"):
            fhopt.save_cache(model, cache, path)
    cache = filled(model, token_ids(1, 40))
    with pytest.raises(FhoptError, match="cannot write"):
        fhopt.save_cache(model, cache, tmp_path / "absent" / "prefix.safetensors")
    plan: LatentPlan = llama.plan(4, window_bits=16)
    fhopt.apply(model, plan)
    with pytest.raises(FhoptError, match="another plan"):
        fhopt.save_cache(model, cache, path)
    fhopt.unapply(model)
    assert list(tmp_path.iterdir()) == []
