"""Timing of decode steps with an exact KV cache and with latents, in turns."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from fhopt.evaluation.perplexity import new_cache
from fhopt.hf.apply import apply, unapply, waiting
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan


@torch.inference_mode()
def cached_bytes(model: Any, ids: Tensor, plan: LatentPlan | None) -> tuple[Any, int]:
    """Read token ids [T] into a new KV cache; returns (the cache, its bytes)."""
    from fhopt.cache.report import tensor_bytes

    cache, name = new_cache(model, plan), cache_argument(model)
    model(ids[None].to(model.device), **{name: cache}, use_cache=True, logits_to_keep=1)
    held = cache.nbytes if plan is not None else sum(tensor_bytes(layer) for layer in cache.layers)
    return cache, held


@torch.inference_mode()
def decode_speed(model: Any, plan: LatentPlan, ids: Tensor, steps: int = 12, rounds: int = 4) -> dict[str, Any]:
    """Measure tokens per second behind token ids [T], exact KV cache against latents: medians of interleaved rounds.

    The plan is applied and removed in each round. Returns {"exact", "plan"}, and under "bytes" the size of each cache.
    """
    caches: dict[str, Any] = {}
    held: dict[str, int] = {}
    times: dict[str, list[float]] = {"exact": [], "plan": []}
    for name, used in rounds * [("exact", None), ("plan", plan)]:
        (apply(model, plan) if used is not None else unapply(model))
        with waiting():
            if name not in caches:
                caches[name], held[name] = cached_bytes(model, ids, used)
                _timed_steps(model, caches[name], 2)
            times[name] += _timed_steps(model, caches[name], steps)
    unapply(model)
    speed = {name: 1 / statistics.median(t) for name, t in times.items()}
    return {**speed, "bytes": held}


def _timed_steps(model: Any, cache: Any, steps: int) -> list[float]:
    """Time `steps` decode steps, in seconds each; their tokens are cropped from the cache again."""
    name, out = cache_argument(model), []
    token = torch.tensor([[1]], device=model.device)
    for _ in range(steps):
        start = time.perf_counter()
        model(token, **{name: cache}, use_cache=True)
        out.append(time.perf_counter() - start)
    cache.crop(-steps)
    return out


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, context: str = "", new_tokens: int = 32) -> str:
    """Generate the greedy answer of a chat model to `question` after `context`."""
    messages = [{"role": "user", "content": f"{context}{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
