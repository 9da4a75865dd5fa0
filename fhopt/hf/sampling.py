"""Sampling options of `fhopt generate` and `fhopt chat`: token choice and output length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fhopt.errors import FhoptError

MAX_NEW_TOKENS = 256  # default, if the model has room


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise nucleus sampling with `top_p`.

    max_new_tokens: None for MAX_NEW_TOKENS, capped by the model's remaining positions.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self, positions: int | None = None) -> None:
        """Raise FhoptError for invalid values. positions: of the model, if known."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise FhoptError(f"max_new_tokens {self.max_new_tokens} is invalid; expected 1 or greater.")
        if not 0 <= self.temperature < float("inf"):
            raise FhoptError(f"temperature {self.temperature:g} is invalid; expected 0 (greedy) or greater.")
        if not 0 < self.top_p <= 1:
            raise FhoptError(f"top-p {self.top_p:g} is invalid; expected a value above 0 and at most 1 (all tokens).")
        if not 0 <= self.seed < 2**63:
            raise FhoptError(f"seed {self.seed} is invalid; expected 0 to 2^63 - 1.")
        if positions is not None and (self.max_new_tokens or 0) >= positions:
            raise FhoptError(
                f"{self.max_new_tokens} new tokens leave no room for a prompt: the model has {positions} "
                "positions. Lower --max-new-tokens."
            )

    def room(self, prompt: int, positions: int | None) -> int:
        """Return how many tokens to generate after `prompt` tokens. Raises FhoptError if empty or too long."""
        if not prompt:
            raise FhoptError("the prompt has no tokens; expected text. Pass a longer prompt.")
        least = 1 if self.max_new_tokens is None else self.max_new_tokens
        if positions is not None and prompt + least > positions:
            raise FhoptError(
                f"{prompt} prompt tokens and {least} new tokens exceed the model's {positions} positions. "
                "Shorten the prompt or lower --max-new-tokens; in a chat, use /reset."
            )
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return MAX_NEW_TOKENS if positions is None else min(MAX_NEW_TOKENS, positions - prompt)

    def configuration(self, model: Any, tokenizer: Any, new_tokens: int) -> Any:
        """Return the `GenerationConfig` of one call; the model's own applies to all other options."""
        from transformers import GenerationConfig

        ends = _end_tokens(model, tokenizer)
        how: dict[str, Any] = {"do_sample": self.temperature > 0, "num_beams": 1, "num_return_sequences": 1}
        if self.temperature > 0:
            how |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        else:
            how |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults; greedy ignores them
        ending = {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
        return GenerationConfig(max_new_tokens=new_tokens, **how, **ending)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-sequence tokens of the model and the tokenizer."""
    own = model.generation_config.eos_token_id
    both = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(end) for end in both if end is not None))
