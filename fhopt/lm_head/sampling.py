"""Tokens and their probabilities from few logits, with what the others can amount to.

    Z = sum over computed rows exp(l) + sum over the others exp(l)        the second sum is at most sum exp(upper bound)

The largest logits are certain (fhopt/lm_head/module.py). Probabilities are renormalised over what was computed;
`missing` bounds the probability of everything else. Where a hidden state cannot be searched, all of its batch go to the
dense head, and nothing is missing.

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

CERTAIN = 64  # largest logits that are certain where sampling names no number


@dataclass(frozen=True)
class Sampled:
    """ids: int64 [M]. log_probabilities: float32 [M], of these among what could be drawn. missing: float32 [M], the
    most that all rows that were not computed can have of the probability, before top-k and top-p; 0: none is missing.
    """

    ids: Tensor
    log_probabilities: Tensor
    missing: Tensor


@dataclass(frozen=True)
class _Few:
    """logits: float32 [M, N], scaled and capped, largest first, -inf behind them; ids: int64 [M, N]. upper: float32
    [M, V], bounds of the others, -inf for what was computed; None where all were."""

    logits: Tensor
    ids: Tensor
    upper: Tensor | None

    def others(self, temperature: float = 1.0) -> Tensor:
        """Log of the most that the others can add to the normaliser [M]."""
        if self.upper is None:
            return torch.full((len(self.ids),), -math.inf, device=self.ids.device)
        return (self.upper / temperature).logsumexp(-1)


@torch.no_grad()
def top_k(head: RetrievalHead, hidden: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(logits, ids) [M, count] of the largest logits of hidden [M, C], equal ones in the order of the vocabulary.

    They are certain, unless the head probes clusters. Logits are float32, scaled and capped.
    """
    found = _few(head, hidden, count, bounds=False)
    return found.logits[:, :count], found.ids[:, :count]


@torch.no_grad()
def sample(
    head: RetrievalHead,
    hidden: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampled:
    """A token for each of hidden [M, C], drawn from the logits that were computed, renormalised.

    With top_k (0: none) nothing is missing that could be drawn. top_p: the fewest of the largest whose share of what is
    left reaches it. Raises FhoptError for options that mean nothing.
    """
    if not temperature > 0 or top_k < 0 or not 0 < top_p <= 1:
        raise FhoptError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected a positive temperature, top_k of at "
            "least 0, and top_p above 0 and at most 1."
        )
    found = _few(head, hidden, top_k or CERTAIN, bounds=not top_k)
    logits = found.logits[:, : top_k or None] / temperature
    others = found.others(temperature) - logits.logsumexp(-1)  # the log of their odds, at most
    probabilities = logits.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # largest first: the first always stays
    kept = logits.masked_fill(outside, -math.inf).log_softmax(-1)
    drawn = torch.multinomial(kept.exp(), 1, generator=generator)
    return Sampled(found.ids.gather(1, drawn).flatten(), kept.gather(1, drawn).flatten(), others.sigmoid())


@torch.no_grad()
def log_probabilities(
    head: RetrievalHead, hidden: Tensor, tokens: Tensor, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds [M] of log p(tokens[m]) among the whole vocabulary, for hidden [M, C].

    exact: read all rows for the normaliser, as the dense head does; then both are the same.
    """
    places = torch.arange(len(hidden), device=hidden.device)
    if exact or not can_search(hidden, head.weight):
        found = _finished(head, dense(hidden, head.weight, head.bias)).log_softmax(-1)[places, tokens]
        return found, found
    few = _few(head, hidden, CERTAIN, bounds=True)
    rows, biases = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    own = _finished(head, dense(hidden, rows, biases).diagonal())
    least = few.logits.logsumexp(-1)
    most = torch.logaddexp(least, few.others())
    return own - most, (own - least).clamp_max(0)


def _few(head: RetrievalHead, hidden: Tensor, count: int, bounds: bool) -> _Few:
    """At least the `count` largest logits."""
    count = min(count, head.out_features)
    if can_search(hidden, head.weight) and head.is_fresh():
        budget = min(max(head.search.budget, 4 * count), head.out_features)
        wanted = head.wanted(keep=count, budget=budget, bounds=bounds)
        found = candidates(hidden, head.weight, head.bias, head.coded, wanted)
        if bool((found.counts >= 0).all()):
            return _searched(head, found)
    logits = _finished(head, dense(hidden, head.weight, head.bias))
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    return _Few(ordered.values, ordered.indices, None)


def _searched(head: RetrievalHead, found: Candidates) -> _Few:
    most = int(found.counts.max())
    absent = torch.arange(most, device=found.ids.device) >= found.counts.unsqueeze(1)  # [M, N]
    ids = found.ids[:, :most].long().masked_fill(absent, 0)
    logits = _finished(head, found.values[:, :most]).masked_fill(absent, -math.inf)
    if found.bounds is None:
        return _Few(logits, ids, None)
    upper = _finished(head, found.bounds)
    for row, own, count in zip(upper, ids, found.counts.tolist(), strict=True):
        row[own[:count]] = -math.inf
    return _Few(logits, ids, upper)


def _finished(head: RetrievalHead, logits: Tensor) -> Tensor:
    """Scaled and capped, float32."""
    site, scaled = head.head.site, logits.float() * head.head.site.scale
    return site.softcap * torch.tanh(scaled / site.softcap) if site.softcap else scaled


__all__ = ["Sampled", "log_probabilities", "sample", "top_k"]
