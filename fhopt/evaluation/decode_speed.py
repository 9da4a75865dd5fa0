"""Timing of decode steps with an exact KV cache and with latents, in turns."""

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
from fhopt.hf.apply import apply, unapply, waiting
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import LatentPlan

ANSWER_TOKENS = 32


@torch.inference_mode()
def decode_speed(
    model: Any, plan: LatentPlan, ids: Tensor, contexts: Sequence[int] = (), steps: int = 12, rounds: int = 4
) -> dict[str, Any]:
    """Measure tokens per second behind token ids [T], exact KV cache against latents: medians of interleaved rounds.

    The tokens are read once, by the exact model; the plan's cache is given its keys and values, and is applied and
    removed in each round. contexts: lengths of shorter beginnings to measure, too. Returns {"exact", "plan"} for all
    tokens, under "contexts" the same by length, and under "bytes" the size of each cache of all tokens.
    """
    lengths = sorted({*contexts, len(ids)})
    caches: dict[tuple[str, int], Any] = {}
    unapply(model)
    whole = _read(model, ids)
    apply(model, plan)
    for length in lengths:
        caches["plan", length] = prefilled(model, plan, whole, length)
        caches["plan", length].activate_past_recording()  # steps are taken back
    for length in lengths:
        caches["exact", length] = copy.deepcopy(whole) if length < len(ids) else whole
        caches["exact", length].crop(length - len(ids))
    latent = caches["plan", len(ids)]
    held = {"exact": exact_cache_bytes(latent), "plan": latent.nbytes}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in caches}
    for turn in range(rounds):
        for name, used in (("exact", None), ("plan", plan)):
            (apply(model, plan) if used is not None else unapply(model))
            with waiting():
                for length in lengths:
                    if turn == 0:
                        _timed_steps(model, caches[name, length], 2)
                    times[name, length] += _timed_steps(model, caches[name, length], steps)
    unapply(model)
    speeds = {n: {name: 1 / statistics.median(times[name, n]) for name in ("exact", "plan")} for n in lengths}
    return {**speeds[len(ids)], "contexts": speeds, "bytes": held}


def _read(model: Any, ids: Tensor) -> Any:
    """Read token ids [T] into a new exact KV cache, some at a time; all its layers hold all tokens."""
    cache = new_cache(model, None)
    cache.activate_past_recording()
    for piece in ids[None].to(model.device).split(PIECE, 1):
        model(piece, **decode_options(model, cache))
    return cache


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
def answer(model: Any, tokenizer: Any, question: str, context: str = "") -> str:
    """Generate the greedy answer of a chat model to `question` after `context`."""
    messages = [{"role": "user", "content": f"{context}{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
