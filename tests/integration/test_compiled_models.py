"""Whole models under torch.compile with a plan: eager results, tokens and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_models import captured_sites, forward, tiny_bert, with_backend, with_biases
from hand_plans import CODED, shared_plan
from needs import sampled
from small_models import FittedModel, cached, found, tiny_gpt2, tiny_llama, token_ids

import fhopt
from fhopt.backend.compile import last_outcome
from fhopt.cache.latent_cache import LatentCache


@pytest.mark.slow
def test_inductor_compiles_the_rewritten_graph_with_gradients(llama: FittedModel) -> None:
    check_full_width(llama, "freq")


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("layout", sampled(["freq", "identity"], 2))
def test_full_width_latents_are_lossless_when_compiled_and_train(fitted: FittedModel, layout: str) -> None:
    check_full_width(fitted, layout)


def check_full_width(fitted: FittedModel, layout: str) -> None:
    ids = token_ids(1, 40)
    compiled = with_backend(fitted.model, plan=fitted.plan(1, layout))
    expected, found = forward(fitted.model, ids), forward(compiled, ids)
    outcome = last_outcome()
    assert outcome is not None and len(outcome.compressed) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parameters = list(fitted.model.parameters())
    gradients = [torch.autograd.grad(x.square().mean(), parameters) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_lossy_plan_gives_the_same_with_and_without_gradients(llama: FittedModel) -> None:
    ids, plan = token_ids(1, 60), llama.plan(4)
    compiled = with_backend(llama.model, plan=plan)
    with torch.no_grad():
        absorbed = forward(compiled, ids)
    trained = forward(compiled, ids)
    torch.testing.assert_close(trained.detach(), absorbed, rtol=1e-3, atol=1e-3)
    assert float((absorbed - forward(llama.model, ids)).detach().abs().max()) > 1e-6
    gradient = torch.autograd.grad(trained.square().mean(), llama.model.model.layers[0].self_attn.k_proj.weight)[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_generation_with_a_latent_cache_gives_the_eager_tokens(llama: FittedModel) -> None:
    model = tiny_llama()
    model.load_state_dict(llama.model.state_dict())
    fhopt.apply(model, llama.plan(4))
    # A latent between two codes may round to the other one (3e-4 observed); a wrong bit gives 1e-2.
    assert_compiled_generation_is_eager(model, new_tokens=30, atol=1e-3)


def assert_compiled_generation_is_eager(model: Any, new_tokens: int, atol: float) -> None:
    """Compare greedy tokens and logits after 40 tokens, compiled without a graph break, with the eager model's."""
    from torch._dynamo.utils import counters

    ids = token_ids(1, 40)
    options: dict[str, Any] = dict(
        max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    eager = model.generate(ids, **options)
    model.compile(backend="flashhead")
    counters.clear()
    compiled = model.generate(ids, **options)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert torch.equal(compiled.sequences, eager.sequences)
    for a, b in zip(compiled.logits, eager.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=atol)


@pytest.mark.usefixtures("traced_only")
def test_dynamic_shapes_work_with_a_plan(llama: FittedModel) -> None:
    compiled = with_backend(llama.model, True, plan=llama.plan(1))
    with torch.no_grad():
        for tokens in (20, 33, 57):
            ids = token_ids(1, tokens)
            torch.testing.assert_close(forward(compiled, ids), forward(llama.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_cache_works_when_compiled_only_by_inductor(llama: FittedModel) -> None:
    """The ops are ordinary custom ops, and give correct results without fhopt's backend."""
    ids, plan = token_ids(1, 40), llama.plan(4)
    fhopt.apply(llama.model, plan)
    try:
        with torch.no_grad():
            results = []
            for function in (llama.model, torch.compile(llama.model, backend="aot_eager")):
                cache = LatentCache(plan, absorb=True)
                function(ids[:, :30], **cached(cache))
                results.append(function(ids[:, 30:31], **cached(cache)).logits)
    finally:
        fhopt.unapply(llama.model)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("with_plan", [False, True])
def test_one_graph_serves_every_length(llama: FittedModel, with_plan: bool) -> None:
    from torch._dynamo.utils import counters

    options = {"plan": llama.plan(1)} if with_plan else {}
    compiled = with_backend(llama.model, True, **options)
    counters.clear()
    with torch.no_grad():
        for tokens in (20, 33, 57, 41):
            forward(compiled, token_ids(1, tokens))
    assert counters["stats"]["unique_graphs"] == 1


# ---- one latent for keys and values


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_bert], 2))
def test_one_latent_for_keys_and_values_is_lossless_when_compiled_and_trains(make: Any) -> None:
    model, ids = with_biases(make()), token_ids(1, 40)
    plan = shared_plan(captured_sites(model)[1], 64)
    expected = model(input_ids=ids)[0]
    result = with_backend(model, plan=plan)(input_ids=ids, **({"use_cache": False} if make is tiny_gpt2 else {}))[0]
    outcome = last_outcome()
    assert outcome is not None and set(outcome.compressed.values()) == {"input"}
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(x.square().mean(), others(model)) for x in (result, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def others(model: Any) -> list[Any]:
    """Return parameters whose change keeps keys and values in the latent's span, to which their gradients are cut."""
    cut = ("ln_1", "c_attn", "LayerNorm", "key", "value")
    return [p for name, p in model.named_parameters() if not any(part in name for part in cut)]


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_one_quantized_latent_gives_the_same_with_and_without_gradients() -> None:
    model, ids = with_biases(tiny_gpt2()), token_ids(1, 60)
    plan = shared_plan(captured_sites(model)[1], 64, CODED * 4)
    compiled = with_backend(model, plan=plan)
    with torch.no_grad():
        absorbed = forward(compiled, ids)
    trained = forward(compiled, ids)
    torch.testing.assert_close(trained.detach(), absorbed, rtol=1e-3, atol=1e-3)  # q D and D z round differently
    gradient = torch.autograd.grad(trained.square().mean(), model.transformer.h[0].attn.c_attn.weight)[0]
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_generation_with_one_latent_and_a_quantized_window_gives_the_eager_tokens() -> None:
    model = with_biases(tiny_gpt2())
    fhopt.apply(model, shared_plan(found(model, 96)[1], 64, window_bits=8), decode_program=False)
    assert_compiled_generation_is_eager(model, new_tokens=12, atol=1e-3)


# --------------------------------------------------------------------------------------------------- whose weights


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_prompts_of_several_lengths_on_an_applied_plan_are_whole_graphs(llama: FittedModel) -> None:
    model = copy.deepcopy(llama.model)
    fhopt.apply(model, llama.plan(1))
    compiled: Any = torch.compile(model, backend="flashhead", options={"ratio": 1}, fullgraph=True)
    with torch.no_grad():
        for tokens in (30, 41, 57):
            ids = token_ids(1, tokens)
            found = compiled(input_ids=ids, use_cache=True).logits
            torch.testing.assert_close(found, forward(llama.model, ids), rtol=1e-4, atol=1e-4)
