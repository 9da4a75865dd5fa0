"""Encoder-decoders generate the same from latents of both caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_decoders import SOURCE, fitted, ids, model_of, plan_of
from generation import cache_of
from needs import sampled
from torch import Tensor

import fhopt
from fhopt.cache.cross_layer import CrossLatentLayer
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.cache.latent_cache import LatentEncoderDecoderCache, encoder_decoder_cache
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.errors import FhoptError
from fhopt.hf.apply import latent_cache
from fhopt.models.capture import capture
from fhopt.models.model_facts import cache_argument
from fhopt.passes import pipeline

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam search": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "static beam search": {"cache_implementation": "static", "num_beams": 3},
}


def generate(model: Any, prompt: Tensor, mode: str, **options: Any) -> Any:
    torch.manual_seed(0)
    fixed: dict[str, Any] = dict(
        max_new_tokens=20, min_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    mask = torch.ones_like(prompt)
    mask[0, -7:] = 0
    return model.generate(prompt, attention_mask=mask, **(fixed | MODES[mode] | options))


@pytest.mark.slow
def test_a_call_that_makes_its_own_cache_is_one_graph_if_dynamo_can_trace_it() -> None:
    """It copies the configuration, which Dynamo traces since torch 2.13; older versions refuse with a workaround."""
    inputs = {"input_ids": ids(1, 30), "decoder_input_ids": ids(1, 25)}
    expected = pipeline.find_attentions(capture(model_of("bart"), (), {**inputs, "use_cache": False}).program)
    assert len(expected.sites) > 2
    if torch.__version__ < "2.13":
        with pytest.raises(FhoptError, match=r"has \d+ graph breaks; expected one graph.* use_cache=False"):
            capture(model_of("bart"), (), inputs)
    else:
        assert (
            pipeline.find_attentions(capture(model_of("bart"), (), inputs).program).sites.keys()
            == expected.sites.keys()
        )


@pytest.mark.parametrize("mode", sampled(MODES, 2))
@pytest.mark.parametrize(("name", "layout"), [("t5", "input"), ("bart", "identity")])
def test_every_mode_generates_the_same(name: str, layout: str, mode: str) -> None:
    model, prompt = model_of(name), ids(1 if mode == "prompt lookup" else 2, SOURCE)
    expected = generate(model, prompt, mode)
    fhopt.apply(model, plan_of(name, layout))
    try:
        found = generate(model, prompt, mode)
    finally:
        fhopt.unapply(model)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    held = cache_of(found)
    own = StaticLatentLayer if mode.startswith("static") else LatentLayer
    assert all(isinstance(layer, own) for layer in held.self_attention_cache.layers)
    assert all(isinstance(layer, CrossLatentLayer) for layer in held.cross_attention_cache.layers)
    assert {layer.site.layout for layer in held.cross_attention_cache.layers} == {layout}


def test_a_compiled_decoder_uses_cross_latents_in_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    model, prompt, decoded = model_of("bart"), ids(2, SOURCE), ids(2, 30)
    fhopt.apply(model, plan_of("bart", "identity"))
    torch._dynamo.reset()
    counter, name = CompileCounter(), cache_argument(model)
    step: Any = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        read = model.get_encoder()(prompt)
        expected = model(encoder_outputs=read, decoder_input_ids=decoded, use_cache=False).logits
        held = latent_cache(model, max_cache_len=40)
        model(encoder_outputs=read, decoder_input_ids=decoded[:, :10], **{name: held})
        for i in range(10, 30):
            found = step(encoder_outputs=read, decoder_input_ids=decoded[:, i : i + 1], **{name: held}).logits
            torch.testing.assert_close(found[:, 0], expected[:, i], rtol=1e-4, atol=1e-4)
    fhopt.unapply(model)
    assert counter.frame_count == 1


def test_a_model_with_a_plan_makes_both_caches_by_itself() -> None:
    model = model_of("t5")
    fhopt.apply(model, plan_of("t5", "identity"))
    with torch.no_grad():
        out = model(input_ids=ids(1, SOURCE), decoder_input_ids=ids(1, 12), use_cache=True)
    fhopt.unapply(model)
    held = cache_of(out)
    assert isinstance(held, LatentEncoderDecoderCache)
    assert held.get_seq_length() == 12 and held.cross_attention_cache.get_seq_length() == SOURCE
    rows = held.report()
    assert [(r["part"], r["layer"]) for r in rows] == [("self", 0), ("self", 1), ("cross", 0), ("cross", 1)]
    assert (
        held.nbytes
        == sum(r["bytes"] for r in rows)
        == held.self_attention_cache.nbytes
        + sum(t.nbytes for layer in held.cross_attention_cache.layers for t in layer.tensors)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_fitted_plan_stores_the_encoder_in_its_bytes_and_stays_close(name: str) -> None:
    model, plan, name_of_cache = model_of(name), fitted(name, 4), cache_argument(model_of(name))
    prompt, decoded = ids(2, 200), ids(2, 40)
    with torch.no_grad():
        read = model.get_encoder()(prompt)
        exact = model(encoder_outputs=read, decoder_input_ids=decoded, use_cache=False).logits
        fhopt.apply(model, plan)
        held = latent_cache(model)
        found = torch.cat(
            [
                model(encoder_outputs=read, decoder_input_ids=x, **{name_of_cache: held}).logits
                for x in decoded.split(8, 1)
            ],
            1,
        )
    fhopt.unapply(model)
    assert torch.equal(found[:, :8].argmax(-1), exact[:, :8].argmax(-1))  # the first call uses exact encoder tokens
    p, q = exact.log_softmax(-1), found.log_softmax(-1)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.05  # nats
    cross = [p for p in plan.sites if p.site.kind == "cross"]
    bytes_held = sum(r["bytes"] for r in held.report() if r["part"] == "cross")
    assert bytes_held == 2 * 200 * sum(p.token_bytes(4) for p in cross)
    assert bytes_held < 2 * 200 * sum(p.site.exact_numbers_per_token * 4 for p in cross) / 4


def test_an_assistant_may_crop_while_the_encoder_stays() -> None:
    held = encoder_decoder_cache(plan_of("bart", "identity"), model_of("bart").config)
    for part, tokens in ((held.self_attention_cache, 20), (held.cross_attention_cache, SOURCE)):
        for i in range(2):
            part.update(torch.randn(2, 4, tokens, 16), torch.randn(2, 4, tokens, 16), i)
    held.crop(-5)
    assert held.get_seq_length() == 15 and held.cross_attention_cache.get_seq_length() == SOURCE
    held.batch_repeat_interleave(3)
    held.batch_select_indices(torch.tensor([0, 5, 2]))
    held.reorder_cache(torch.tensor([2, 1, 0]))
    keys = held.cross_attention_cache.layers[0].keys
    assert keys is not None and keys.shape == (3, 4, SOURCE, 16)
    held.reset()
    assert held.get_seq_length() == 0 and held.nbytes == 0
