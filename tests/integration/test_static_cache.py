"""Static caches in compiled models and in generate."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation import MODES, cache_of, generate
from needs import sampled
from small_models import FittedModel, cached, token_ids
from torch import Tensor

import fhopt
from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.hf.apply import latent_cache

# ---- compiled


@pytest.mark.parametrize(
    ("name", "ratio", "absorbs"),  # pairwise combinations
    sampled([("llama", 1, True), ("llama", 4, False), ("gpt2", 1, False), ("gpt2", 4, True)], 3),
)
def test_every_step_of_a_compiled_model_runs_one_graph(
    name: str, ratio: float, absorbs: bool, request: pytest.FixtureRequest
) -> None:
    from torch._dynamo.testing import CompileCounter

    fitted: FittedModel = request.getfixturevalue(name)
    model, ids = fitted.model, token_ids(2, 70)
    fhopt.apply(model, fitted.plan(ratio, window_bits=16), decode_program=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    step: Any = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        eager, compiled = (latent_cache(model, max_cache_len=80, absorb=absorbs) for _ in range(2))
        model(ids[:, :20], **cached(eager))
        model(ids[:, :20], **cached(compiled))
        addresses = [t.data_ptr() for layer in compiled.layers for t in layer.tensors]
        for i in range(20, 70):
            expected = model(ids[:, i : i + 1], **cached(eager)).logits
            found = step(input_ids=ids[:, i : i + 1], **cached(compiled), use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)  # sums in another order
    fhopt.unapply(model)
    assert counter.frame_count == 1
    assert [t.data_ptr() for layer in compiled.layers for t in layer.tensors] == addresses


@pytest.mark.parametrize("absorbs", sampled([True, False], 2))
def test_a_compiled_step_rotates_queries_for_every_segment(llama: FittedModel, absorbs: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    plan, ids = llama.plan(4, window_bits=16), token_ids(2, 170)
    plan = replace(plan, sites=tuple(replace(s, segment=64) for s in plan.sites))
    model = llama.model
    fhopt.apply(model, plan)
    torch._dynamo.reset()
    counter = CompileCounter()
    step: Any = torch.compile(model.forward, backend=counter, fullgraph=True)
    with torch.no_grad():
        grown, compiled = latent_cache(model, absorb=absorbs), latent_cache(model, max_cache_len=180, absorb=absorbs)
        for cache in (grown, compiled):
            model(ids[:, :150], **cached(cache))
        for i in range(150, 170):
            expected = model(ids[:, i : i + 1], **cached(grown)).logits
            found = step(input_ids=ids[:, i : i + 1], **cached(compiled), use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    fhopt.unapply(model)
    assert counter.frame_count == 1 and grown.layers[0].quantized > 2 * 64


@pytest.mark.slow
def test_the_sizes_of_another_plan_are_compiled_as_static(llama: FittedModel) -> None:
    """Dynamo makes sizes dynamic once they change, and dynamic sizes have no kernels."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    plans = [llama.plan(2), llama.plan(8)]
    assert plans[0].sites[1].key.width != plans[1].sites[1].key.width
    for plan in plans:
        model = copy.deepcopy(llama.model)
        fhopt.apply(model, plan)
        with torch.no_grad():
            cache = latent_cache(model, max_cache_len=80)
            model(token_ids(1, 60), past_key_values=cache)
            step: Any = torch.compile(model.forward, backend=keep, fullgraph=True)
            step(token_ids(1, 1), past_key_values=cache)
    assert len(graphs) == 2
    for node in graphs[1].graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        assert not isinstance(value, Tensor) or all(str(size).isdecimal() for size in value.shape), node.name


def test_generate_compiles_its_steps(llama: FittedModel) -> None:
    from transformers import CompileConfig

    model, ids = llama.model, token_ids(2, 40)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers does so by default only on GPUs
    expected = generate(model, MODES["greedy"], ids)
    fhopt.apply(model, llama.plan(1))
    torch._dynamo.reset()
    found = generate(model, MODES["static"], ids, compile_config=config)
    fhopt.unapply(model)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(isinstance(layer, StaticLatentLayer) for layer in cache_of(found).layers)


def test_a_compiled_graph_refuses_more_tokens_than_fit_and_changes_nothing(llama: FittedModel) -> None:
    model, ids = llama.model, token_ids(1, 31)
    fhopt.apply(model, llama.plan(4))
    torch._dynamo.reset()
    step: Any = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    cache = latent_cache(model, max_cache_len=30)
    with torch.no_grad():
        model(ids[:, :28], **cached(cache))
        for i in (28, 29):
            step(input_ids=ids[:, i : i + 1], **cached(cache), use_cache=True)
        state = [t.clone() for layer in cache.layers for t in layer.tensors]
        with pytest.raises(RuntimeError, match="a static cache of 30 tokens has no room for 1 more"):
            step(input_ids=ids[:, 30:], **cached(cache), use_cache=True)
    fhopt.unapply(model)
    assert int(cache.get_seq_length()) == 30
    assert all(map(torch.equal, state, [t for layer in cache.layers for t in layer.tensors]))


# ---- use


def test_memory_may_be_reserved_ahead_so_that_the_first_call_compiles_too(llama: FittedModel) -> None:
    model, ids = llama.model, token_ids(2, 40)
    fhopt.apply(model, llama.plan(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = latent_cache(model, max_cache_len=64)
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0 and cache.nbytes > 0
        torch._dynamo.reset()
        step: Any = torch.compile(model.forward, backend="eager", fullgraph=True)
        found = torch.cat(
            [step(input_ids=part, **cached(cache), use_cache=True).logits for part in ids.split(10, 1)], 1
        )
    fhopt.unapply(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
