"""Interleaved timing of decode steps with the full-precision KV cache and with latents."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fhopt.cache.report import exact_cache_bytes
from fhopt.evaluation.perplexity import decode_options, new_cache
from fhopt.evaluation.prefilled import PIECE, prefilled
from fhopt.hf.apply import apply, unapply
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan

ANSWER_TOKENS = 32


@torch.inference_mode()
def decode_speed(
    model: Any, plan: LatentPlan, ids: Tensor, contexts: Sequence[int] = (), steps: int = 12, rounds: int = 4
) -> dict[str, Any]:
    """Measure decode tok/s after token ids [T], full-precision KV cache versus latents: medians of interleaved rounds.

    The exact model prefills the tokens once, and the plan's cache is filled from its keys and values. The plan is
    applied and removed in each round. contexts: lengths of prefixes to measure as well. Returns {"exact", "plan"} for
    all tokens, under "contexts" the same by length, and under "bytes" the size of each cache for all tokens.
    """
    lengths = sorted({*contexts, len(ids)})
    caches: dict[tuple[str, int], Any] = {}
    unapply(model)
    whole = _read(model, ids)
    apply(model, plan)
    for length in lengths:
        caches["plan", length] = prefilled(model, plan, whole, length)
        caches["plan", length].activate_past_recording()  # so that steps can be cropped
    for length in lengths:
        caches["exact", length] = copy.deepcopy(whole) if length < len(ids) else whole
        caches["exact", length].crop(length - len(ids))
    latent = caches["plan", len(ids)]
    held = {"exact": exact_cache_bytes(latent), "plan": latent.nbytes}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
    for turn in range(rounds):
        for name, used in (("exact", None), ("plan", plan)):
            (apply(model, plan) if used is not None else unapply(model))
            for length in lengths:
                if turn == 0:
                    _timed_steps(model, caches[name, length], 2)
                times[name, length] += _timed_steps(model, caches[name, length], steps)
    unapply(model)
    speeds = {n: {name: 1 / statistics.median(times[name, n]) for name in ("exact", "plan")} for n in lengths}
    return {**speeds[len(ids)], "contexts": speeds, "bytes": held}


def _read(model: Any, ids: Tensor) -> Any:
    """Prefill token ids [T] in pieces into a new full-precision KV cache whose layers all store all tokens."""
    cache = new_cache(model, None)
    cache.activate_past_recording()
    for piece in ids[None].to(model.device).split(PIECE, 1):
        model(piece, **decode_options(model, cache))
    return cache


def _timed_steps(model: Any, cache: Any, steps: int) -> list[float]:
    """Time `steps` decode steps, in seconds each, then crop their tokens from the cache."""
    name, out = cache_argument(model), []
    token = torch.tensor([[1]], device=model.device)
    for _ in range(steps):
        start = time.perf_counter()
        model(token, **{name: cache}, use_cache=True)
        out.append(time.perf_counter() - start)
    cache.crop(-steps)
    return out


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str, context: str = "") -> str:
    """Generate a chat model's greedy answer to `question` after `context`."""
    messages = [{"role": "user", "content": f"{context}{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
