"""What a plan costs and gives, measured on the model itself with its real cache.

Perplexity is taken in steps of the plan's block, aligned so that every query sees exactly what it would see when
decoding token by token: `recent` to `recent + block` exact tokens, the sinks, and latents of all others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.applying import _cache_argument, apply, unapply
from fhopt.spec import LatentPlan


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per token, and its number of tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(torch.tensor(self.nats).exp())


def new_cache(model: Any, plan: LatentPlan | None) -> Any:
    """An empty cache: of latents by `plan`, or an ordinary one. The model must have the plan applied."""
    from transformers import DynamicCache

    from fhopt.cache import LatentCache

    return DynamicCache(config=model.config) if plan is None else LatentCache(plan, model.config, absorb=True)


@torch.inference_mode()
def score(model: Any, ids: Tensor, plan: LatentPlan | None, progress: Callable[[int], None] = lambda n: None) -> Score:
    """Likelihood of token ids [N, T] under the model with the cache of `plan` (None: an ordinary cache)."""
    total, count = 0.0, 0
    for sequence in ids:
        for log_p, target in _steps(model, sequence, plan):
            total -= float(log_p.gather(-1, target.unsqueeze(-1)).sum())
            count += target.numel()
        progress(1)
    return Score(total / count, count)


def _steps(model: Any, sequence: Tensor, plan: LatentPlan | None) -> Any:
    """(log-probabilities [S, V], next tokens [S]) of each step over one sequence."""
    first, step = (plan.sinks + plan.window, plan.block) if plan is not None else (132, 64)
    cache, name = new_cache(model, plan), _cache_argument(model)
    start = 0
    while start < len(sequence) - 1:
        stop = min(start + (first if start == 0 else step), len(sequence) - 1)
        logits = model(sequence[None, start:stop].to(model.device), **{name: cache}, use_cache=True).logits[0]
        yield logits.float().log_softmax(-1).cpu(), sequence[start + 1 : stop + 1]
        start = stop


@torch.inference_mode()
def cached_bytes(model: Any, ids: Tensor, plan: LatentPlan | None) -> tuple[Any, int]:
    """(the cache after reading ids [T] and one more step, its bytes)."""
    from fhopt.cache import tensor_bytes

    cache, name = new_cache(model, plan), _cache_argument(model)
    model(ids[None].to(model.device), **{name: cache}, use_cache=True, logits_to_keep=1)
    held = cache.nbytes if plan is not None else sum(tensor_bytes(layer) for layer in cache.layers)
    return cache, held


@torch.inference_mode()
def decode_speed(model: Any, plan: LatentPlan, ids: Tensor, steps: int = 12, rounds: int = 4) -> dict[str, Any]:
    """Tokens per second behind the tokens ids [T], exact cache against latents; medians, interleaved.

    The plan is applied and taken back for each round; returns {"exact", "plan"} and the bytes each cache held.
    """
    caches: dict[str, Any] = {}
    held: dict[str, int] = {}
    times: dict[str, list[float]] = {"exact": [], "plan": []}
    for _ in range(rounds):
        for name, used in (("exact", None), ("plan", plan)):
            (apply(model, plan) if used is not None else unapply(model))
            if name not in caches:
                caches[name], held[name] = cached_bytes(model, ids, used)
                _timed_steps(model, caches[name], 2)
            times[name] += _timed_steps(model, caches[name], steps)
    unapply(model)
    speed = {name: 1 / statistics.median(t) for name, t in times.items()}
    return {**speed, "bytes": held}


def _timed_steps(model: Any, cache: Any, steps: int) -> list[float]:
    """Seconds of each of `steps` single-token steps; the tokens are taken off again."""
    name, out = _cache_argument(model), []
    token = torch.tensor([[1]], device=model.device)
    for _ in range(steps):
        start = time.perf_counter()
        model(token, **{name: cache}, use_cache=True)
        out.append(time.perf_counter() - start)
    cache.crop(-steps)
    return out


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, context: str = "", new_tokens: int = 32) -> str:
    """Greedy answer of a chat model to `question` after `context`."""
    messages = [{"role": "user", "content": f"{context}{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
