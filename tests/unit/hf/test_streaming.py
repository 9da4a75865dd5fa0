"""Streaming generation: its text, its statistics, and the cache after Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from character_tokenizer import characters
from small_models import FittedModel, tiny_llama

from fhopt.cache.report import cache_bytes, exact_cache_bytes
from fhopt.hf.apply import apply, unapply
from fhopt.hf.sampling import Sampling
from fhopt.hf.streaming import generate_text, new_streaming_cache

IDS = list(range(1, 40))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return characters()  # its text has spaces between characters, after each of which a streamer emits


@pytest.fixture
def interruptible() -> Any:
    """Make Ctrl-C an exception, even if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop_after(pieces: int, count: int = 1) -> Callable[[str], None]:
    """Return a writer that sends Ctrl-C, `count` times, at a piece of text."""
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == pieces:
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)

    return write


def test_the_text_equals_that_of_generate_and_comes_in_pieces(tokenizer: Any) -> None:
    model, pieces = tiny_llama(), list[str]()
    done = generate_text(model, tokenizer, IDS, Sampling(20), write=pieces.append)
    expected = model.generate(torch.tensor([IDS]), max_new_tokens=20, do_sample=False)[0, len(IDS) :].tolist()
    assert list(done.ids) == expected and "".join(pieces) == done.text and len(pieces) > 1
    assert done.prompt_tokens == done.prefill_tokens == len(IDS) and len(done.times) == 20
    assert list(done.times) == sorted(done.times) and done.prefill_rate and done.decode_rate


def test_bytes_are_those_of_the_cache(tokenizer: Any, llama: FittedModel) -> None:
    done = generate_text(llama.model, tokenizer, IDS, Sampling(2), write=print)
    figures = done.as_json()
    assert figures["cache_bytes"] == figures["exact_cache_bytes"] == 2 * 2 * 2 * 16 * 4 * (len(IDS) + 1)
    apply(llama.model, llama.plan(4))
    try:
        latent = generate_text(llama.model, tokenizer, IDS, Sampling(2), write=print)
    finally:
        unapply(llama.model)
    assert exact_cache_bytes(latent.cache) == figures["exact_cache_bytes"] > 2 * cache_bytes(latent.cache)
    assert latent.as_json()["ratio"] > 2


def test_only_new_tokens_are_prefilled_into_a_cache_with_tokens(tokenizer: Any) -> None:
    model = tiny_llama()
    first = generate_text(model, tokenizer, IDS, Sampling(5), write=print)
    ids = [*IDS, *first.ids, 7, 8]
    more = generate_text(model, tokenizer, ids, Sampling(5), write=print, cache=first.cache)
    anew = generate_text(model, tokenizer, ids, Sampling(5), write=print)
    assert more.prefill_tokens == 3 and more.prompt_tokens == len(ids) and more.ids == anew.ids


def test_without_generated_tokens_nothing_is_measured() -> None:
    from fhopt.hf.streaming import Generated

    done = Generated((), "", 3, 3, (), None, 1)
    assert done.first_token_seconds is done.prefill_rate is done.decode_rate is None
    assert done.as_json()["ratio"] is None and done.as_json()["interrupted"]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_after_the_next_token_and_leaves_a_consistent_cache(tokenizer: Any) -> None:
    done = generate_text(tiny_llama(), tokenizer, IDS, Sampling(200), write=stop_after(3))
    assert done.interruptions == 1 and 0 < len(done.ids) < 50
    assert done.cache.get_seq_length() == len(IDS) + len(done.ids) - 1


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_twice_ends_at_once(tokenizer: Any) -> None:
    done = generate_text(tiny_llama(), tokenizer, IDS, Sampling(200), write=stop_after(3, count=2))
    assert done.interruptions == 2 and done.cache is None and done.ids
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_prefill_ends_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = generate_text(model, tokenizer, IDS, Sampling(200), write=print)
    assert done.interruptions == 1 and done.ids == () and done.cache is None


def test_other_threads_generate_without_handling_signals(tokenizer: Any) -> None:
    found = []
    model = tiny_llama()
    run = threading.Thread(target=lambda: found.append(generate_text(model, tokenizer, IDS, Sampling(3), write=print)))
    run.start()
    run.join()
    assert len(found[0].ids) == 3


def test_a_model_with_a_plan_gets_latents(llama: FittedModel) -> None:
    assert type(new_streaming_cache(llama.model)).__name__ == "DynamicCache"
    apply(llama.model, llama.plan(4))
    try:
        assert type(new_streaming_cache(llama.model)).__name__ == "LatentCache"
    finally:
        unapply(llama.model)
