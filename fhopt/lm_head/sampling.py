"""Sampling and probabilities of tokens from few computed logits, with a bound on the probability of the others.

    Z = sum over computed rows exp(l) + sum over the others exp(l)        the second sum is at most sum exp(upper bound)

The largest logits are certain (fhopt/lm_head/module.py). Probabilities are normalized over computed logits; `missing`
bounds the probability of all others. Where a hidden state cannot be searched, its whole batch goes to the dense head,
and `missing` is 0.

Letters: M hidden states, C their width, V vocabulary, N logits that were computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fhopt.codegen.cpu.lm_head import Candidates
from fhopt.errors import FhoptError
from fhopt.lm_head.module import RetrievalHead, can_search, candidates, dense

CERTAIN = 64  # number of the largest logits that are certain where sampling has no top-k


@dataclass(frozen=True)
class Sampled:
    """Sampled tokens.

    ids: int64 [M]. log_probabilities: float32 [M], among the tokens that could be drawn. missing: float32 [M], upper
    bound of the probability of all tokens without a computed logit, before top-k and top-p.
    """

    ids: Tensor
    log_probabilities: Tensor
    missing: Tensor


@dataclass(frozen=True)
class _ComputedLogits:
    """The computed logits of hidden states.

    logits: float32 [M, N], scaled and capped, largest first, padded by -inf. ids: int64 [M, N]. upper: float32 [M, V],
    upper bounds of the others, -inf for computed ones; None where all were computed.
    """

    logits: Tensor
    ids: Tensor
    upper: Tensor | None

    def others(self, temperature: float = 1.0) -> Tensor:
        """Bound the log of what the other logits add to the normalizer [M]."""
        if self.upper is None:
            return torch.full((len(self.ids),), -math.inf, device=self.ids.device)
        return (self.upper / temperature).logsumexp(-1)


@torch.no_grad()
def top_k(head: RetrievalHead, hidden: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Compute (logits, ids) [M, count] of the largest logits of hidden [M, C], equal ones in order of the vocabulary.

    They are certain, unless the head probes clusters. Logits are float32, scaled and capped.
    """
    computed = _compute(head, hidden, count, bounds=False)
    return computed.logits[:, :count], computed.ids[:, :count]


@torch.no_grad()
def sample(
    head: RetrievalHead,
    hidden: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampled:
    """Sample a token for each of hidden [M, C] from the normalized computed logits.

    With top_k (0: none) every token that could be drawn has a computed logit. top_p: draw from the fewest of the
    largest whose share of the remaining probability reaches it. Raises FhoptError for options out of range.
    """
    if not temperature > 0 or top_k < 0 or not 0 < top_p <= 1:
        raise FhoptError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a positive temperature, top_k of at "
            "least 0, and top_p above 0 and at most 1."
        )
    computed = _compute(head, hidden, top_k or CERTAIN, bounds=not top_k)
    logits = computed.logits[:, : top_k or None] / temperature
    others = computed.others(temperature) - logits.logsumexp(-1)  # the log of their odds, at most
    probabilities = logits.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # largest first: the first always stays
    kept = logits.masked_fill(outside, -math.inf).log_softmax(-1)
    drawn = torch.multinomial(kept.exp(), 1, generator=generator)
    return Sampled(computed.ids.gather(1, drawn).flatten(), kept.gather(1, drawn).flatten(), others.sigmoid())


@torch.no_grad()
def log_probabilities(
    head: RetrievalHead, hidden: Tensor, tokens: Tensor, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Bound log p(tokens[m]) over the whole vocabulary for hidden [M, C]: (lower, upper), [M] each.

    exact: read all rows for the normalizer, as the dense head does; then both are equal.
    """
    places = torch.arange(len(hidden), device=hidden.device)
    if exact or not can_search(hidden, head.weight):
        exactly = _scaled(head, dense(hidden, head.weight, head.bias)).log_softmax(-1)[places, tokens]
        return exactly, exactly
    computed = _compute(head, hidden, CERTAIN, bounds=True)
    rows, biases = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    own = _scaled(head, dense(hidden, rows, biases).diagonal())
    least = computed.logits.logsumexp(-1)
    most = torch.logaddexp(least, computed.others())
    return own - most, (own - least).clamp_max(0)


def _compute(head: RetrievalHead, hidden: Tensor, count: int, bounds: bool) -> _ComputedLogits:
    """Compute at least the `count` largest logits."""
    count = min(count, head.out_features)
    if can_search(hidden, head.weight) and head.is_fresh():
        budget = min(max(head.search.budget, 4 * count), head.out_features)
        search = head.search_with(keep=count, budget=budget, bounds=bounds)
        result = candidates(hidden, head.weight, head.bias, head.quantized, search)
        if bool((result.counts >= 0).all()):
            return _from_search(head, result)
    logits = _scaled(head, dense(hidden, head.weight, head.bias))
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    return _ComputedLogits(ordered.values, ordered.indices, None)


def _from_search(head: RetrievalHead, result: Candidates) -> _ComputedLogits:
    most = int(result.counts.max())
    absent = torch.arange(most, device=result.ids.device) >= result.counts.unsqueeze(1)  # [M, N]
    ids = result.ids[:, :most].long().masked_fill(absent, 0)
    logits = _scaled(head, result.values[:, :most]).masked_fill(absent, -math.inf)
    if result.bounds is None:
        return _ComputedLogits(logits, ids, None)
    upper = _scaled(head, result.bounds)
    for row, own, count in zip(upper, ids, result.counts.tolist(), strict=True):
        row[own[:count]] = -math.inf
    return _ComputedLogits(logits, ids, upper)


def _scaled(head: RetrievalHead, logits: Tensor) -> Tensor:
    """Scale and cap logits, float32."""
    site, scaled = head.head.site, logits.float() * head.head.site.scale
    return site.softcap * torch.tanh(scaled / site.softcap) if site.softcap else scaled


__all__ = ["Sampled", "log_probabilities", "sample", "top_k"]
