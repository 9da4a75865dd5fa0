"""Prefill and decode throughput by context and batch, full-precision KV cache versus plans.

    for case in measure(model, {"exact": None, "plan": plan}, options): ...

A measurement fills a new KV cache up to the context: it prefills a prompt of random tokens in one call, then generates
the last `decode` tokens greedily, one call each. Rounds are interleaved: every cache is measured once before any is
measured again, so that temporary slowdowns of the machine affect all of them. Medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fhopt.cache.report import cache_bytes, exact_cache_bytes
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import decode_options, new_cache, switched
from fhopt.evaluation.step_parts import StepParts, step_clock
from fhopt.evaluation.throughput_options import CONTEXTS, ThroughputOptions
from fhopt.hf.apply import prepare
from fhopt.plan.latent_plan import LatentPlan
from fhopt.progress import Progress, silent

WARM_STEPS = 2  # untimed decode steps before a measurement, in which kernels are compiled and programs captured
WARM_TOKENS = 16


@dataclass(frozen=True)
class Throughput:
    """Medians for one context, batch and KV cache; rates count the tokens of all sequences of the batch.

    prefill_rate, decode_rate: tokens per second. first_token_seconds: of the prefill. cache_bytes: of the full KV
    cache. exact_cache_bytes: of full-precision keys and values in the model's dtype. parts: of a decode step in the
    round with the median decode time (the lower median); None: unknown. layers_counted: number of layers per step that
    `parts` covers.
    """

    context: int
    batch: int
    cache: str
    prefill_rate: float
    decode_rate: float
    first_token_seconds: float
    cache_bytes: int
    exact_cache_bytes: int
    parts: StepParts | None = None
    layers_counted: float = 0.0


def measure_throughput(
    model: Any, caches: Mapping[str, LatentPlan | None], options: ThroughputOptions, progress: Progress = silent
) -> Iterator[list[Throughput]]:
    """Measure each context and batch; yields a result for each of `caches` (name: plan; None: full precision).

    Restores the model's plan afterwards. Raises FhoptError if a plan is not for this model, or the device has too
    little memory.
    """
    contexts = options.contexts or CONTEXTS
    cases = [(context, batch) for batch in options.batches for context in contexts]
    steps = 2 * options.decode  # progress counts prefill as much as all decode steps
    total, done = len(cases) * options.rounds * len(caches) * steps, 0

    def report(step: int) -> None:
        progress("bench", done + step, total)

    report(0)
    _warm_up(model, caches, max(contexts))
    for context, batch in cases:
        ids = _random_tokens(model, batch, context - options.decode, options.seed)
        found: dict[str, list[_Round]] = {name: [] for name in caches}
        for _ in range(options.rounds):
            for name, plan in caches.items():
                with switched(model, plan), _enough_memory(context, batch):
                    _decode_few(model, plan, ids[:, :WARM_TOKENS])
                    found[name].append(_measure_once(model, plan, ids, options.decode, report))
                done += steps
                report(0)
        yield [_medians(context, batch, name, rounds) for name, rounds in found.items()]


@dataclass(frozen=True)
class _Round:
    prefill_tokens: int
    decode_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    exact_bytes: int
    parts: StepParts | None
    layers: float


@contextmanager
def _enough_memory(context: int, batch: int) -> Iterator[None]:
    """Raise FhoptError instead of torch's error if the GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FhoptError(
            f"a context of {context} tokens at batch size {batch} does not fit into device memory. Lower "
            "--contexts or --batches, or use --dtype bfloat16."
        ) from error


def _warm_up(model: Any, caches: Mapping[str, LatentPlan | None], longest: int) -> None:
    """Run each cache once, on enough tokens to quantize some, so that no measurement compiles kernels."""
    for plan in caches.values():
        needed = 64 if plan is None else plan.window.first_length + plan.block
        ids = _random_tokens(model, 1, max(1, min(needed, longest - WARM_STEPS)), 0)
        with switched(model, plan):
            prepare(model)
            _measure_once(model, plan, ids, WARM_STEPS, lambda step: None)


def _random_tokens(model: Any, batch: int, tokens: int, seed: int) -> Tensor:
    """Return token ids [B, T], the same for the same seed."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


@torch.inference_mode()
def _measure_once(
    model: Any, plan: LatentPlan | None, ids: Tensor, decode: int, report: Callable[[int], None]
) -> _Round:
    """Prefill token ids [B, T] and generate `decode` tokens after them."""
    cache = new_cache(model, plan, each_query=False)
    options = decode_options(model, cache)
    token, prefill = _timed_call(model, ids, options)
    report(decode)
    with step_clock() as clock:
        for step in range(decode):
            token, took = _timed_call(model, token, options)
            clock.note(took)
            report(decode + step + 1)
    (batch, tokens), sizes = ids.shape, (cache_bytes(cache), exact_cache_bytes(cache))
    return _Round(batch * tokens, batch * decode, prefill, clock.seconds, *sizes, clock.parts(), clock.layers())


@torch.inference_mode()
def _decode_few(model: Any, plan: LatentPlan | None, ids: Tensor) -> None:
    """Prefill token ids [B, T] and run `WARM_STEPS` decode steps: a program is captured once per plan and batch."""
    options = decode_options(model, new_cache(model, plan, each_query=False))
    token, _ = _timed_call(model, ids, options)
    for _ in range(WARM_STEPS):
        token, _ = _timed_call(model, token, options)


def _timed_call(model: Any, ids: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Run the model on token ids [B, S]; returns (next tokens [B, 1], seconds until they are on the CPU)."""
    start = time.perf_counter()
    token = model(ids, **options).logits[:, -1:].argmax(-1)
    token.cpu()  # waits for the device, as sampling does
    return token, time.perf_counter() - start


def _medians(context: int, batch: int, name: str, rounds: list[_Round]) -> Throughput:
    middle = sorted(rounds, key=lambda r: r.decode_seconds)[(len(rounds) - 1) // 2]
    return Throughput(
        context, batch, name,
        prefill_rate=statistics.median(r.prefill_tokens / r.prefill_seconds for r in rounds),
        decode_rate=statistics.median(r.decode_tokens / r.decode_seconds for r in rounds),
        first_token_seconds=statistics.median(r.prefill_seconds for r in rounds),
        cache_bytes=rounds[0].cache_bytes,
        exact_cache_bytes=rounds[0].exact_bytes,
        parts=middle.parts,
        layers_counted=middle.layers,
    )  # fmt: skip
