"""Text generation that streams, measures latency, and stops at Ctrl-C with a partial result.

    done = generate_text(model, tokenizer, ids, Sampling(), write=print)

Uses transformers' `generate` on a KV cache that the caller gets back; latent if a plan is applied.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList, TextStreamer

from fhopt.cache.report import cache_bytes, exact_cache_bytes
from fhopt.hf.apply import latent_cache
from fhopt.hf.sampling import Sampling
from fhopt.models.model_facts import cache_argument, keeps_own_cache, positions_of


@dataclass(frozen=True)
class Generated:
    """Result and timing of one generation.

    prompt_tokens: the whole prompt; prefill_tokens: those not in the KV cache before. times: seconds from the call to
    each token. cache: the KV cache afterwards; None if it was left incomplete.
    """

    ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    prefill_tokens: int
    times: tuple[float, ...]
    cache: Any
    interruptions: int = 0

    @property
    def first_token_seconds(self) -> float | None:
        """Time to first token in seconds; None if there was no token."""
        return self.times[0] if self.times else None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second until the first token."""
        return self.prefill_tokens / self.times[0] if self.times else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None for fewer than two."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Return text, counts, rates and bytes as JSON values; unknown rates and bytes are null."""
        held = None if self.cache is None else cache_bytes(self.cache)
        exact = None if self.cache is None else exact_cache_bytes(self.cache)
        return {
            "text": self.text,
            "tokens": len(self.ids),
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens": self.prefill_tokens,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "time_to_first_token_s": self.first_token_seconds,
            "cache_bytes": held,
            "exact_cache_bytes": exact,
            "latent_energy": getattr(self.cache, "latent_energy", None),
            "ratio": exact / held if held and exact is not None else None,
            "interrupted": self.interruptions > 0,
        }


def new_streaming_cache(model: Any) -> Any:
    """Make an empty KV cache: latent if a plan is applied; None for a model that makes its own."""
    if hasattr(model, "_fhopt_applied"):
        return latent_cache(model)
    if keeps_own_cache(model):
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.inference_mode()
def generate_text(
    model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling, *, write: Callable[[str], None],
    cache: Any = None,
) -> Generated:  # fmt: skip
    """Generate after token ids, streaming text to `write`.

    cache: a KV cache that holds a prefix of `ids`; None: a new one. The first Ctrl-C after the first token ends
    generation at the next token. One during prefill, or a second one, ends it immediately and leaves the KV cache
    incomplete. Raises FhoptError if the prompt is empty or too long for the model.
    """
    configuration = sampling.configuration(model, tokenizer, sampling.room(len(ids), positions_of(model)))
    cache = new_streaming_cache(model) if cache is None else cache
    held = 0 if cache is None else int(cache.get_seq_length())
    stream, stop = _Stream(tokenizer, write), _Interruptions()
    options = {} if cache is None else {cache_argument(model): cache}
    inputs = torch.tensor([list(ids)], device=model.device)
    with stop.noted(stream):
        model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=configuration, streamer=stream,
            stopping_criteria=StoppingCriteriaList([stop]), **options,
        )  # fmt: skip
    text = tokenizer.decode(stream.ids, skip_special_tokens=True)
    whole = None if stop.broke_off else cache
    times = tuple(at - stream.start for at in stream.times)
    return Generated(tuple(stream.ids), text, len(ids), len(ids) - held, times, whole, stop.count)


class _Stream(TextStreamer):  # type: ignore[misc]
    """A streamer that forwards text and records the time of each token."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.ids, self.times = write, list[int](), list[float]()
        self.start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.ids.append(int(value.reshape(-1)[-1]))
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Forward text."""
        if text:
            self.write(text)


class _Interruptions:
    """A stopping criterion met after Ctrl-C."""

    def __init__(self) -> None:
        self.count, self.broke_off = 0, False

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), self.count > 0, device=input_ids.device)

    @contextmanager
    def noted(self, stream: _Stream) -> Iterator[None]:
        """Count Ctrl-C inside the context; one during prefill, or a second one, ends it immediately."""

        def note(number: int, frame: FrameType | None) -> None:
            self.count += 1
            if self.count > 1 or not stream.times:
                raise KeyboardInterrupt

        is_main = threading.current_thread() is threading.main_thread()  # other threads cannot handle signals
        before = signal.getsignal(signal.SIGINT)
        is_handled = is_main and before is not signal.SIG_IGN
        try:
            if is_handled:
                signal.signal(signal.SIGINT, note)
            yield
        except KeyboardInterrupt:
            self.broke_off, self.count = True, max(1, self.count)
            stream.end()
        finally:
            if is_handled:
                signal.signal(signal.SIGINT, before)
