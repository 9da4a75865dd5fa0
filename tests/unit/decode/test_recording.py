"""Recording of a step under a dispatch mode: values, weights and their holders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, filled, prepared
from latent_caches import coded, plans
from needs import needs_compiler
from small_models import cached, tiny_llama, token_ids

from fhopt.attention.recorded import recorded
from fhopt.codegen.programs.errors import UnsupportedError
from fhopt.decode.recording import HeldWeight, StepRecording, record_step

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def llama() -> Any:
    return prepared(tiny_llama(), coded(plans(tiny_llama, 8)))


def recording(model: Any, offset: int = 0) -> StepRecording:
    call = {"input_ids": token_ids(1, 1), **cached(filled(model, token_ids(1, PROMPT)))}
    with torch.no_grad():
        return record_step(model, type(model).forward.__get__(model), (), call, offset)


def test_weights_are_named_by_the_dictionary_that_holds_them(llama: Any) -> None:
    weights = [x.source for x in recording(llama).values if isinstance(x.source, HeldWeight)]
    assert weights
    for weight in weights:
        assert weight.holder[weight.name] is weight.tensor and weight.address == weight.tensor.data_ptr()


def test_two_recordings_differ_only_in_lengths(llama: Any) -> None:
    one, two = recording(llama), recording(llama, 5)
    assert [op.target for op in one.ops] == [op.target for op in two.ops]
    assert [op.target for op in one.ops].count("attention") == 2
    numbers = [(x, y) for a, b in zip(one.ops, two.ops, strict=True) for x, y in zip(a.args, b.args, strict=True)]
    assert {y - x for x, y in numbers if isinstance(x, int) and x != y} == {5}


def test_attention_is_restored_after_a_failure(llama: Any) -> None:
    def fails(**_: Any) -> None:
        raise ValueError("no")

    call = {"input_ids": token_ids(1, 1), **cached(filled(llama, token_ids(1, PROMPT)))}
    with pytest.raises(ValueError, match="no"):
        record_step(llama, fails, (), call, 0)
    assert recorded.attention is None


def test_the_random_state_is_unchanged(llama: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    call = {
        "input_ids": torch.ones(1, 1, dtype=torch.long),
        **cached(filled(llama, torch.ones(1, 9, dtype=torch.long))),
    }

    def forward(**kwargs: Any) -> Any:
        torch.rand(3)
        return type(llama).forward(llama, **kwargs)

    with torch.no_grad():
        record_step(llama, forward, (), call, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_without_a_cache_or_with_two_is_refused(llama: Any) -> None:
    forward = type(llama).forward.__get__(llama)
    one, two = filled(llama, token_ids(1, 9)), filled(llama, token_ids(1, 9))
    for kwargs in ({}, {**cached(one), "other": two}):
        with pytest.raises(UnsupportedError, match=r"a step with [02] caches"):
            record_step(llama, forward, (), {"input_ids": token_ids(1, 1), **kwargs}, 0)
