"""Perplexity and KL divergence of a plan, measured on the model itself with its real KV cache.

Tokens are processed in steps of the plan's block, aligned so that every query sees what it would see in token-by-token
decoding: the attention sinks, a recent window of `recent` to `recent + block` tokens, and latents of all other tokens,
or of the pages that it selects. The exact model runs in the same steps on its own KV cache, so only one step's logits
of each are in memory. Several processes may share the sequences (fhopt/parallel/collectives.py).

Intervals are percentiles of a bootstrap over blocks of 64 tokens, because errors of neighboring tokens are correlated
(nonoverlapping blocks: Carlstein 1986, "The use of subseries values for estimating the variance of a general statistic
from a stationary sequence").
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fhopt.evaluation.statistics import Score, TokenCosts
from fhopt.hardware.float_products import with_fast_products
from fhopt.hf.apply import apply, held_plan, unapply
from fhopt.models.model_facts import cache_argument
from fhopt.parallel.collectives import by_process, processes
from fhopt.plan.cache_size import recorded_layers, sliding_windows
from fhopt.plan.latent_plan import LatentPlan

FIRST_STEP, STEP = 336, 64  # tokens, without a plan: those of a plan with the default sinks and window


def new_cache(model: Any, plan: LatentPlan | None, *, each_query: bool = True) -> Any:
    """Create an empty KV cache: latents for `plan`, which must be applied to the model, or full precision for any.

    each_query: each query selects its own pages, as if decoded separately (see `LatentCache`). The full-precision cache
    is a `Cache` with the layers of a `DynamicCache`, because a model with a plan would put latents into a
    `DynamicCache`.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    from fhopt.cache.latent_cache import LatentCache

    if plan is None:
        return Cache(layers=DynamicCache(config=model.config).layers)
    cache = LatentCache(held_plan(model, plan), model.config, absorb=True, each_query=each_query)
    cache.warns = False  # suppress out-of-distribution warnings: evaluation measures that effect
    return cache


@contextmanager
def switched(model: Any, plan: LatentPlan | None) -> Iterator[None]:
    """Apply `plan` inside the context (None: no plan), and restore the previous plan afterwards."""
    before = getattr(model, "_fhopt_applied", None)
    try:
        (unapply(model) if plan is None else apply(model, plan))
        yield
    finally:
        (unapply(model) if before is None else apply(model, before.whole_plan, *before.fast))


def step_bounds(tokens: int, plan: LatentPlan | None) -> list[tuple[int, int]]:
    """Return (start, stop) of each step over `tokens` tokens: steps end where a layer of the plan quantizes a block."""
    if plan is None:
        ends = set(range(FIRST_STEP, tokens, STEP))
    else:
        slides = sliding_windows([p.site for p in plan.sites], recorded_layers(plan))
        windows = {plan.window.within(sliding) for sliding in (*slides.values(), 0)}
        ends = {end for window in windows for end in range(window.first_length, tokens, window.block)}
    return list(itertools.pairwise(sorted({0, *ends, tokens})))


def read_steps(
    model: Any, ids: Tensor, caches: list[Any], plan: LatentPlan | None, first: int = 0
) -> Iterator[tuple[int, list[Tensor]]]:
    """Process token ids [B, T] into each of `caches`, in the steps of `plan`.

    Yields, for each step with tokens from position `first` on, the position of its first logits and the logits [B, S,
    V] with each cache.
    """
    name = cache_argument(model)
    can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
    for start, stop in step_bounds(ids.shape[1], plan):
        at = min(max(start, first), stop - 1)
        options = {"use_cache": True} | ({"logits_to_keep": stop - at} if can_skip else {})
        tokens = ids[:, start:stop].to(model.device)
        logits = [model(tokens, **{name: cache}, **options).logits[:, at - stop :] for cache in caches]
        if stop > first:
            yield at, logits


def decode_options(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments for calls that append tokens to `cache` and return only the last logits."""
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return options


@torch.inference_mode()
@with_fast_products
def score(
    model: Any, ids: Tensor, plan: LatentPlan | None, progress: Callable[[int], None] = lambda n: None,
    *, shared: bool = False,
) -> Score:  # fmt: skip
    """Measure the likelihood of token ids [N, T] with the KV cache of `plan` (None: full precision).

    shared: each process handles its share, and all get the result; all must call it, each with a whole model.
    """

    def measure(sequence: Tensor) -> Tensor:
        steps = read_steps(model, sequence[None, :-1], [new_cache(model, plan)], plan)
        parts = [_costs(logits[0].double().log_softmax(-1), sequence[at + 1 :]) for at, (logits,) in steps]
        progress(processes()[1] if shared else 1)
        return torch.stack([part.sum() for part in parts]).sum()

    count = ids[:, 1:].numel()
    return Score(float(torch.stack(_each(ids, measure, shared)).sum()) / count, count)


def _each(ids: Tensor, measure: Callable[[Tensor], Tensor], shared: bool) -> list[Tensor]:
    return by_process(list(ids), measure) if shared else [measure(sequence) for sequence in ids]


@torch.inference_mode()
@with_fast_products
def token_costs(
    model: Any, ids: Tensor, plan: LatentPlan, progress: Callable[[int], None] = lambda n: None,
    *, shared: bool = False,
) -> TokenCosts:  # fmt: skip
    """Measure per-token costs of token ids [N, T] with the full-precision KV cache and with the plan's, in one pass.

    Applies the plan, and restores the model afterwards. shared: each process handles its share, and all get the result;
    all must call it, each with a whole model. Raises FhoptError if the plan is not for this model.
    """

    def measure(sequence: Tensor) -> Tensor:
        caches = [new_cache(model, None), new_cache(model, plan)]
        steps = read_steps(model, sequence[None, :-1], caches, plan)
        parts = [paired(exact[0], planned[0], sequence[at + 1 :]) for at, (exact, planned) in steps]
        progress(processes()[1] if shared else 1)
        return torch.cat(parts, -1)  # [3, T-1]

    with switched(model, plan):
        return TokenCosts(*torch.stack(_each(ids, measure, shared), 1))


def paired(exact: Tensor, planned: Tensor, following: Tensor) -> Tensor:
    """Return costs of the exact model and of the plan, and the KL, [3, S], from logits [S, V] and the next tokens.

    In float64: the difference of two close distributions is small compared with float32 rounding errors.
    """
    p, q = exact.double().log_softmax(-1), planned.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0).cpu()  # negative only by rounding
    return torch.stack([_costs(p, following), _costs(q, following), kl])


def _costs(log_p: Tensor, following: Tensor) -> Tensor:
    """Return the negative log-likelihood [S] from log-probabilities [S, V] and at least S next tokens."""
    target = following[: len(log_p), None].to(log_p.device)
    return -log_p.gather(-1, target)[:, 0].cpu()
