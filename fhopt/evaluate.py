"""What a plan costs and gives, measured on the model itself with its real cache.

Tokens are read in steps of the plan's block, aligned so that every query sees exactly what it would see when decoding
token by token: `recent` to `recent + block` exact tokens, the sinks, and latents of all others, or of the pages that it
chooses. The exact model is read in the same steps, its cache beside the plan's; only one step's logits of each are
held. Several processes may share the sequences (fhopt/gathering.py).

Intervals are percentiles of a bootstrap over blocks of 64 tokens, because tokens close to each other go wrong together
(blocks that do not overlap: Carlstein 1986, "The use of subseries values for estimating the variance of a general
statistic from a stationary sequence").
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fhopt.applying import apply, cache_argument, held_plan, unapply
from fhopt.errors import FhoptError
from fhopt.gathering import by_process, processes
from fhopt.spec import LatentPlan

FIRST_STEP, STEP = 196, 64  # of an exact cache alone: those of a plan with the usual sinks and window
BOOTSTRAP_TOKENS = 64
RESAMPLES = 2000
SEED = 0  # of the resampling: the same figures give the same interval
Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats per token, and its number of tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.nats)


@dataclass(frozen=True)
class Comparison:
    """The exact model against a plan on the same tokens.

    exact, plan: perplexity. kl: mean of KL(exact || plan) of the next-token distribution, in nats per token. The `_ci`
    are 95 % intervals (low, high), None when there are not two blocks of tokens to resample.
    """

    exact: float
    plan: float
    increase_percent: float
    increase_percent_ci: Interval | None
    kl: float
    kl_ci: Interval | None
    tokens: int


@dataclass(frozen=True)
class TokenCosts:
    """Per token, paired: negative log-likelihood with the exact cache and with the plan's, and KL(exact || plan).

    All in nats, [N, T - 1] for N sequences of T tokens, float64.
    """

    exact: Tensor
    plan: Tensor
    kl: Tensor

    def compare(self) -> Comparison:
        """Means over all tokens, and their intervals."""
        increase = self.plan - self.exact
        exact, interval = float(self.exact.mean()), _block_interval(increase)
        return Comparison(
            exact=math.exp(exact),
            plan=math.exp(float(self.plan.mean())),
            increase_percent=_percent(float(increase.mean())),
            increase_percent_ci=None if interval is None else (_percent(interval[0]), _percent(interval[1])),
            kl=float(self.kl.mean()),
            kl_ci=_block_interval(self.kl),
            tokens=self.exact.numel(),
        )


def _percent(nats: float) -> float:
    """Increase of perplexity, in percent, for an increase of the mean in nats."""
    return 100 * math.expm1(nats)


def _block_interval(x: Tensor) -> Interval | None:
    """Interval of the mean of x [N, T], resampled by blocks of tokens within a sequence."""
    blocks = [block for row in x for block in row.split(BOOTSTRAP_TOKENS)]
    return bootstrap_interval([float(b.sum()) for b in blocks], [len(b) for b in blocks])


def bootstrap_interval(sums: list[float], counts: list[int]) -> Interval | None:
    """95 % interval of sum(sums) / sum(counts), resampling the pairs; None for fewer than two pairs."""
    if len(sums) < 2:
        return None
    generator, total, count = np.random.default_rng(SEED), np.array(sums), np.array(counts)
    draws = (generator.integers(len(total), size=len(total)) for _ in range(RESAMPLES))
    means = [total[draw].sum() / count[draw].sum() for draw in draws]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def new_cache(model: Any, plan: LatentPlan | None, *, each_query: bool = True) -> Any:
    """An empty cache: of latents by `plan` (which must be applied to the model), or an exact one for any model.

    each_query: of the plan's pages each query reads those that it would choose alone (see `LatentCache`). The exact one
    is no `DynamicCache`, although it has its layers: a model with a plan would put latents into that.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    from fhopt.cache import LatentCache

    if plan is None:
        return Cache(layers=DynamicCache(config=model.config).layers)
    return LatentCache(held_plan(model, plan), model.config, absorb=True, each_query=each_query)


@contextmanager
def switched(model: Any, plan: LatentPlan | None) -> Iterator[None]:
    """`plan` applied to the model inside (None: no plan at all), and what was applied before again afterwards."""
    before = getattr(model, "_fhopt_applied", None)
    try:
        (unapply(model) if plan is None else apply(model, plan))
        yield
    finally:
        (unapply(model) if before is None else apply(model, before.given))


def positions_of(model: Any) -> int | None:
    """How many tokens the model can read; None where its configuration does not say."""
    found: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def check_length(model: Any, tokens: int) -> None:
    """Raise FhoptError when `tokens` are more than the model has positions."""
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise FhoptError(
            f"{tokens} tokens are to be read at once; the model has {positions} positions. Read fewer: --context or "
            "--lengths."
        )


def step_bounds(tokens: int, plan: LatentPlan | None) -> list[tuple[int, int]]:
    """(start, stop) of each step over `tokens` tokens: a step ends where the plan seals a block."""
    first, step = (plan.sinks + plan.window, plan.block) if plan is not None else (FIRST_STEP, STEP)
    cuts = [0, *range(first, tokens, step), tokens]
    return list(itertools.pairwise(cuts))


def read_steps(
    model: Any, ids: Tensor, caches: list[Any], plan: LatentPlan | None, first: int = 0
) -> Iterator[tuple[int, list[Tensor]]]:
    """Read token ids [B, T] into all `caches` side by side, in the steps of `plan`.

    Yields, for each step with tokens from position `first` on, the position of the first of its logits and the logits
    [B, S, V] with each cache.
    """
    name = cache_argument(model)
    can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
    for start, stop in step_bounds(ids.shape[1], plan):
        at = min(max(start, first), stop - 1)
        options = {"use_cache": True} | ({"logits_to_keep": stop - at} if can_skip else {})
        chunk = ids[:, start:stop].to(model.device)
        logits = [model(chunk, **{name: cache}, **options).logits[:, at - stop :] for cache in caches]
        if stop > first:
            yield at, logits


@torch.inference_mode()
def score(
    model: Any, ids: Tensor, plan: LatentPlan | None, progress: Callable[[int], None] = lambda n: None,
    *, shared: bool = False,
) -> Score:  # fmt: skip
    """Likelihood of token ids [N, T] under the model with the cache of `plan` (None: an exact cache).

    shared: each process reads its share, and all know the result; all must call it, with a whole model each.
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
def token_costs(
    model: Any, ids: Tensor, plan: LatentPlan, progress: Callable[[int], None] = lambda n: None,
    *, shared: bool = False,
) -> TokenCosts:  # fmt: skip
    """What each of token ids [N, T] costs with the exact cache and with the plan's, in one pass.

    Applies the plan, and leaves the model as it was. shared as in `score`. Raises FhoptError when the plan is not for
    this model.
    """

    def measure(sequence: Tensor) -> Tensor:
        caches = [new_cache(model, None), new_cache(model, plan)]
        steps = read_steps(model, sequence[None, :-1], caches, plan)
        parts = [paired(exact[0], coded[0], sequence[at + 1 :]) for at, (exact, coded) in steps]
        progress(processes()[1] if shared else 1)
        return torch.cat(parts, -1)  # [3, T-1]

    with switched(model, plan):
        return TokenCosts(*torch.stack(_each(ids, measure, shared), 1))


def paired(exact: Tensor, coded: Tensor, following: Tensor) -> Tensor:
    """[3, S] from logits [S, V] of both and the tokens that follow: cost of the exact model, of the plan, KL.

    float64: the difference of two close distributions is small beside what float32 rounds off.
    """
    p, q = exact.double().log_softmax(-1), coded.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0).cpu()  # below zero by rounding only
    return torch.stack([_costs(p, following), _costs(q, following), kl])


def _costs(log_p: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihood [S] from log-probabilities [S, V] and at least S tokens that follow."""
    target = following[: len(log_p), None].to(log_p.device)
    return -log_p.gather(-1, target)[:, 0].cpu()


@torch.inference_mode()
def cached_bytes(model: Any, ids: Tensor, plan: LatentPlan | None) -> tuple[Any, int]:
    """(the cache after reading ids [T] and one more step, its bytes)."""
    from fhopt.cache import tensor_bytes

    cache, name = new_cache(model, plan), cache_argument(model)
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
    """Greedy answer of a chat model to `question` after `context`."""
    messages = [{"role": "user", "content": f"{context}{question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(model.device), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
