"""Sampling options: refused values, and the generation configuration."""

from __future__ import annotations

import pytest
from character_tokenizer import characters
from small_models import tiny_llama

from fhopt.errors import FhoptError
from fhopt.hf.sampling import MAX_NEW_TOKENS, Sampling


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0), "max_new_tokens 0 is invalid"),
        (Sampling(temperature=-1), "temperature -1"),
        (Sampling(temperature=float("nan")), "temperature nan"),
        (Sampling(top_p=0), "top-p 0"),
        (Sampling(top_p=1.5), "top-p 1.5"),
        (Sampling(seed=-1), "seed -1"),
        (Sampling(100), "the model has 100 positions"),
    ],
)
def test_invalid_numbers_are_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        sampling.check(100)


def test_new_tokens_are_limited_by_the_request_or_by_the_model() -> None:
    assert Sampling(5).room(95, 100) == 5 and Sampling().room(95, 100) == 5
    assert Sampling().room(95, None) == MAX_NEW_TOKENS and Sampling(900).room(95, None) == 900
    for sampling, prompt in ((Sampling(6), 95), (Sampling(), 100)):
        with pytest.raises(FhoptError, match="exceed the model"):
            sampling.room(prompt, 100)
    with pytest.raises(FhoptError, match="has no tokens"):
        Sampling().room(0, 100)


def test_the_options_choose_greedy_decoding_or_sampling() -> None:
    model, tokenizer = tiny_llama(), characters()
    greedy = Sampling().configuration(model, tokenizer, 7)
    assert not greedy.do_sample and greedy.max_new_tokens == 7 and greedy.eos_token_id is None
    model.generation_config.eos_token_id, tokenizer.eos_token = [3, 4], "c"
    drawn = Sampling(temperature=0.7, top_p=0.9).configuration(model, tokenizer, 7)
    assert drawn.do_sample and (drawn.temperature, drawn.top_p, drawn.top_k) == (0.7, 0.9, 0)
    assert drawn.eos_token_id == [3, 4, tokenizer.eos_token_id] and drawn.pad_token_id == 3
