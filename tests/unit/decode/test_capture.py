"""Capture of a decode step as one fx graph, and what cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, filled, prepared
from latent_caches import coded, plans
from needs import needs_compiler
from small_models import cached, tiny_llama, token_ids

import fhopt
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.capture import CapturedStep, capture_step, is_attention
from fhopt.decode.programs import DecodePrograms, decode_programs

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def plan() -> fhopt.LatentPlan:
    return coded(plans(tiny_llama, 8))


@pytest.fixture
def llama(plan: fhopt.LatentPlan) -> Any:
    return prepared(tiny_llama(), plan)


def captured(model: Any, **more: Any) -> CapturedStep:
    """Capture a step of one token after a prompt."""
    cache = filled(model, token_ids(1, PROMPT))
    attentions = frozenset(id(layer.self_attn) for layer in model.model.layers)
    kwargs = {"input_ids": token_ids(1, 1), **cached(cache), **more}
    with torch.no_grad():
        return capture_step(model, type(model).forward.__get__(model), (), kwargs, attentions, cache)


def test_the_graph_has_arguments_weights_attention_and_logits(llama: Any) -> None:
    step = captured(llama)
    placeholders = step.graph.find_nodes(op="placeholder")
    assert [n.meta["path"] for n in placeholders if "path" in n.meta] == [("input_ids",)]
    weights = {id(n.meta["weight"].tensor) for n in placeholders if "weight" in n.meta}
    assert weights >= set(map(id, llama.parameters()))
    attentions = [node for node in step.graph.nodes if is_attention(node)]
    assert [node.meta["attention"].layer for node in attentions] == [0, 1]
    assert [tuple(x.meta["val"].shape) for x in attentions[0].args[1:4]] == [
        (1, 4, 1, 16),
        (1, 2, 1, 16),
        (1, 2, 1, 16),
    ]
    kind, parts = step.output
    assert kind.__name__ == "CausalLMOutputWithPast" and tuple(parts["logits"].meta["val"].shape) == (1, 1, 97)


def test_the_cache_is_unchanged(llama: Any) -> None:
    cache = filled(llama, token_ids(1, PROMPT))
    before = cache.get_seq_length()
    attentions = frozenset(id(layer.self_attn) for layer in llama.model.layers)
    with torch.no_grad():
        call = {"input_ids": token_ids(1, 1), **cached(cache)}
        capture_step(llama, type(llama).forward.__get__(llama), (), call, attentions, cache)
    assert cache.get_seq_length() == before == PROMPT


def test_positions_follow_the_length(llama: Any) -> None:
    """The positions of the new token are the length; no number in the graph is that of the captured call."""
    step = captured(llama)
    assert step.length.users
    assert not any(PROMPT in node.args for node in step.graph.nodes)


def test_a_mask_of_the_caller_is_an_argument(llama: Any) -> None:
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long)
    mask[0, :3] = 0
    paths = [
        n.meta["path"]
        for n in captured(llama, attention_mask=mask).graph.find_nodes(op="placeholder")
        if "path" in n.meta
    ]
    assert ("attention_mask",) in paths


def _branches_on_tokens(model: Any) -> None:
    part, run = model.model.layers[0], type(model.model.layers[0]).forward

    class Branches(type(part)):  # type: ignore[misc]
        __module__ = type(part).__module__  # programs run only modules of known packages

        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            x = run(self, hidden_states, **kwargs)
            return x if bool(x.sum() > 0) else -x

    part.__class__ = Branches


def _scales_by_length(model: Any) -> None:
    part, run = model.model, type(model.model).forward

    class Scales(type(part)):  # type: ignore[misc]
        __module__ = type(part).__module__  # programs run only modules of known packages

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs["cache"] if kwargs.get("cache") is not None else kwargs["past_key_values"]
            out = run(self, *args, **kwargs)
            out.last_hidden_state = out.last_hidden_state * (cache.get_seq_length() * 2)
            return out

    part.__class__ = Scales


def _reads_the_cache(model: Any) -> None:
    part, run = model.model.layers[0].self_attn, type(model.model.layers[0].self_attn).forward

    class Reads(type(part)):  # type: ignore[misc]
        __module__ = type(part).__module__  # programs run only modules of known packages

        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            name = "cache" if kwargs.get("cache") is not None else "past_key_values"
            update = kwargs[name].update

            def watched(*args: Any, **more: Any) -> Any:
                keys, values = update(*args, **more)
                return keys, values * (1 + 0 * values.mean())

            kwargs[name].update = watched
            try:
                return run(self, hidden_states, **kwargs)
            finally:
                del kwargs[name].update

    part.__class__ = Reads


def _writes_to_a_buffer(model: Any) -> None:
    model.model.seen = torch.nn.Buffer(torch.zeros(1))
    part, run = model.model, type(model.model).forward

    class Counts(type(part)):  # type: ignore[misc]
        __module__ = type(part).__module__  # programs run only modules of known packages

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.seen.add_(1)
            return run(self, *args, **kwargs)

    part.__class__ = Counts


def _fills_memory_natively(model: Any) -> None:
    part, run = model.model.layers[0].mlp, type(model.model.layers[0].mlp).forward

    class Fills(type(part)):  # type: ignore[misc]
        __module__ = type(part).__module__  # programs run only modules of known packages

        def forward(self, x: Any) -> Any:
            made = torch.empty(x.shape)
            made.numpy()[...] = 2 * run(self, x).numpy()
            return made

    part.__class__ = Fills


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_branches_on_tokens, "depends on values of tokens"),
        (_scales_by_length, "computes with the cache length"),
        (_reads_the_cache, "cached keys or values outside attention"),
        (_writes_to_a_buffer, "writes to an argument, a weight or a constant"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_runs(
    plan: fhopt.LatentPlan, change: Callable[[Any], None], reason: str
) -> None:
    ids, outputs = token_ids(1, PROMPT), []
    for programs in (False, True):
        model = prepared(tiny_llama(), plan, programs)
        change(model)
        if programs:
            with pytest.raises(UnsupportedError, match=reason):
                captured(model)
        cache = filled(model, ids)
        with torch.no_grad():
            outputs.append(model(torch.tensor([[5]]), **cached(cache)).logits)
    assert torch.equal(*outputs) and not _state(model).has_program and reason in _state(model).reason


def _state(model: Any) -> DecodePrograms:
    state = decode_programs(model)
    assert state is not None
    return state
