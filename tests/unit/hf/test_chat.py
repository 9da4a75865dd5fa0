"""Conversations on one KV cache."""

from __future__ import annotations

from typing import Any

import pytest
from character_tokenizer import characters
from small_models import FittedModel, tiny_llama
from text_models import FORGETFUL, TEMPLATE
from tokenizers import decoders

from fhopt.errors import FhoptError
from fhopt.hf.apply import apply, unapply
from fhopt.hf.chat import Chat, chat_tokens
from fhopt.hf.sampling import Sampling
from fhopt.hf.streaming import generate_text


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = characters()
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.chat_template = template
    return made


def chat(model: Any, template: str | None = TEMPLATE, tokens: int = 6, system: str = "") -> Chat:
    return Chat(model, tokenizer(template), Sampling(tokens), "model", system)


def anew(conversation: Chat) -> tuple[int, ...]:
    """Return the last answer after a prefill of the whole conversation."""
    ids = chat_tokens(conversation.tokenizer, conversation.messages[:-1], "model")
    done = generate_text(conversation.model, conversation.tokenizer, ids, conversation.sampling, write=print)
    return done.ids


def test_a_turn_prefills_only_new_tokens() -> None:
    talk = chat(tiny_llama(), system="be brief")
    first = talk.ask("hello", print)
    assert first.prefill_tokens == first.prompt_tokens
    second = talk.ask("and then", print)
    last_of_answer = 1
    assert second.prefill_tokens == last_of_answer + len("\n<u>and then\n<a>")
    assert second.ids == anew(talk) and [m["role"][0] for m in talk.messages] == list("suaua")


def test_a_template_that_changes_earlier_turns_is_supported() -> None:
    talk = chat(tiny_llama(), FORGETFUL)
    talk.ask("hello", print)
    second = talk.ask("and then", print)
    assert second.prefill_tokens == len("u>and then\n<a>") and second.ids == anew(talk)


def test_everything_is_prefilled_again_if_the_cache_cannot_be_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = chat(tiny_llama(), FORGETFUL)
    talk.ask("hello", print)

    def crop(tokens: int) -> None:
        raise RuntimeError("the window is full")

    monkeypatch.setattr(talk.cache, "crop", crop)
    second = talk.ask("and then", print)
    assert second.prefill_tokens == second.prompt_tokens and second.ids == anew(talk)


def test_latents_are_reused_from_turn_to_turn(llama: FittedModel) -> None:
    apply(llama.model, llama.plan(4))
    try:
        talk = chat(llama.model, tokens=30)
        for _ in range(3):
            done = talk.ask("hello", print)
        assert done.prefill_tokens < done.prompt_tokens / 2 and done.as_json()["ratio"] > 2
        assert len(talk.held) == talk.cache.get_seq_length()
    finally:
        unapply(llama.model)


def test_reset_removes_all_but_the_system_message() -> None:
    talk = chat(tiny_llama(), system="be brief")
    first = talk.ask("hello", print)
    talk.reset()
    assert talk.held == [] and talk.last is None and len(talk.messages) == 1
    assert talk.ask("hello", print).ids == first.ids


def test_a_turn_without_room_changes_nothing() -> None:
    talk = chat(tiny_llama())
    talk.ask("hello", print)
    held, messages = list(talk.held), list(talk.messages)
    with pytest.raises(FhoptError, match=r"exceed the model.*/reset"):
        talk.ask("x" * 600, print)
    assert talk.held == held and talk.messages == messages and talk.cache.get_seq_length() == len(held)


def test_a_model_without_a_template_names_an_alternative() -> None:
    with pytest.raises(FhoptError, match=r"has no chat template, .*fhopt generate model --raw"):
        chat(tiny_llama(), None).ask("hello", print)


def test_a_template_that_refuses_is_named() -> None:
    refusing = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(FhoptError, match=r"rejects this conversation \(System role not supported\).*--system"):
        chat(tiny_llama(), refusing).ask("hello", print)
