"""A conversation on one KV cache: each turn prefills only its new tokens.

    turn 1   [ system, question 1 ]                        prefill;  answer 1 generated
    turn 2   [ system, question 1, answer 1 | question 2 ]  prefill after the bar;  answer 2 generated

The chat template renders the whole conversation in each turn. If the result starts with the cached tokens, they are
reused. If the template changes the past (for example, drops an earlier answer's reasoning), the KV cache is cropped to
the common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fhopt.errors import FhoptError
from fhopt.hf.sampling import Sampling
from fhopt.hf.streaming import Generated, generate_text
from fhopt.models.model_facts import positions_of
from fhopt.models.model_name import no_chat_template

Message = Mapping[str, str]


def chat_tokens(tokenizer: Any, messages: Sequence[Message], name: str) -> list[int]:
    """Return the token ids of a conversation rendered by the chat template, up to the start of the answer.

    Raises FhoptError if the tokenizer has no template, or the template rejects the conversation.
    """
    check_template(tokenizer, name)
    try:
        made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates raise arbitrary exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FhoptError(
            f"the chat template of {name} rejects this conversation ({reason}). Drop --system, or use fhopt "
            "generate --raw."
        ) from error
    return [int(token) for token in made["input_ids"]]


def check_template(tokenizer: Any, name: str) -> None:
    """Raise FhoptError if a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise no_chat_template(name)


class Chat:
    """A conversation of one user with a model.

    messages: the history. held: the cached tokens. last: the last answer; None before the first.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, name: str, system: str = "") -> None:
        self.model, self.tokenizer, self.sampling, self.name = model, tokenizer, sampling, name
        self.system = system
        self.cache: Any = None
        self.held: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.last: Generated | None = None
        self._forget_cache()

    def ask(self, text: str, write: Callable[[str], None]) -> Generated:
        """Answer `text`, streaming the answer to `write`.

        A turn that is interrupted before its first token leaves no trace. Raises FhoptError, with no change of state,
        if the conversation does not fit the template or the model's positions.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = chat_tokens(self.tokenizer, messages, self.name)
        self.sampling.room(len(ids), positions_of(self.model))
        self._crop(min(_common(self.held, ids), max(0, len(ids) - 1)))
        done = generate_text(self.model, self.tokenizer, ids, self.sampling, write=write, cache=self.cache)
        self._hold(done, ids)
        if done.ids:
            self.messages = [*messages, {"role": "assistant", "content": done.text}]
        self.last = done
        return done

    def _crop(self, tokens: int) -> None:
        """Crop the KV cache to the first `tokens` tokens; drop it if it cannot be cropped."""
        dropped = len(self.held) - tokens
        if self.cache is None or not dropped:
            return
        try:
            self.cache.crop(-dropped)
            self.held = self.held[:tokens]
        except (RuntimeError, ValueError, NotImplementedError, FhoptError):  # such as a sliding window that is full
            self._forget_cache()
        if not tokens:
            self._forget_cache()

    def _hold(self, done: Generated, ids: list[int]) -> None:
        """Record which tokens the KV cache holds after an answer: all but the last, which was not prefilled."""
        if done.cache is None:
            return self._forget_cache()
        self.cache = done.cache
        self.held = [*ids, *done.ids][: int(self.cache.get_seq_length())]
        return None

    def _forget_cache(self) -> None:
        self.cache, self.held = None, []


def _common(held: Sequence[int], ids: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
