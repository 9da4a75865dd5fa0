"""Caches that evict the lowest-scoring tokens of each head, for a cache of the same bytes as a plan's.

    [ sinks | retained tokens | recent window ]  --a block leaves the window-->  scores of the retained tokens and of
    the block, from the queries that the layer has processed  ->  the best of each kv head stay, in full precision

With s, r and b as in quantized_caches.py, T tokens of L layers with G heads of D channels take, if a share p is
retained,

    L G 4 D (round(p quantized(T)) + T - quantized(T)) bytes

SnapKV (arXiv 2404.14469) selects once, after the prompt; Expected Attention (arXiv 2510.00636) also during decoding.
Here the selection is repeated for each block, as text is processed in steps, and an evicted token is gone. Settings
are the defaults of kvpress (NVIDIA), which cannot be installed with this project: its release 0.5.5 needs transformers
below 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from benchmarks.quality.methods.quantized_caches import CacheShape, Schedule
from benchmarks.quality.methods.rotary_embedding import Rotary, watched

OBSERVED = 64  # queries of SnapKV's window
POOLED = 5  # tokens over which SnapKV's scores are averaged
FUTURE = 512  # positions that Expected Attention looks ahead
LAYER = "evicting_layer"  # attribute of the keys that a layer returns: the layer


class Scorer(Protocol):
    """A layer's statistics of the queries it has processed, and token scores from them."""

    def observe(self, query: Tensor, start: int) -> None:
        """Record queries [B,H,S,D], the first of which is at position `start`."""

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return the scores [B,G,T] of the tokens of keys and values [B,G,T,D]; higher is better."""


class SnapKV:
    """Scores tokens by the attention of the last 64 queries, averaged over neighbors and queries (SnapKV, 4)."""

    def __init__(self, rotary: Rotary, schedule: Schedule) -> None:
        self.count = min(OBSERVED, schedule.recent)  # the last tokens of the cache, in order
        self.queries: Tensor | None = None

    def observe(self, query: Tensor, start: int) -> None:
        """Store the last queries [B,H,S,D]."""
        known = query if self.queries is None else torch.cat([self.queries, query], 2)
        self.queries = known[:, :, -self.count :]

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return mean weights [B,G,T] of the observed queries, over the query heads of a kv head."""
        assert self.queries is not None
        query = self.queries.unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, W, D]
        weights = query @ keys.unsqueeze(2).mT * scale
        future = torch.ones(weights.shape[-2:], dtype=torch.bool, device=keys.device)
        future = future.triu(keys.shape[2] - weights.shape[-2] + 1)
        mean = weights.masked_fill(future, -torch.inf).softmax(-1).mean((2, 3))  # [B, G, T]
        return torch.nn.functional.avg_pool1d(mean, POOLED, 1, POOLED // 2, count_include_pad=False)


class ExpectedAttention:
    """Scores tokens by the expected attention of future queries, times the norm of the value.

    With mean m and covariance C of the queries before RoPE, rotated by the mean of the next 512 rotations, a key k has
    the expected weight exp(k m scale + k C k scale^2 / 2) (Expected Attention, section 3).
    """

    def __init__(self, rotary: Rotary, schedule: Schedule) -> None:
        self.rotary, self.sinks = rotary, schedule.sinks
        self.count, self.end = 0, 0
        self.first: Any = 0
        self.second: Any = 0

    def observe(self, query: Tensor, start: int) -> None:
        """Add queries [B,H,S,D] after the sinks to the sums."""
        self.end = start + query.shape[2]
        skipped = max(0, self.sinks - start)
        positions = torch.arange(start + skipped, self.end)
        rows = self.rotary.undo(query[:, :, skipped:], positions).float()
        self.count += len(positions)
        self.first = self.first + rows.sum(2)
        self.second = self.second + rows.mT @ rows

    def scores(self, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return expected weights [B,G,T] times norms of values, for sinks as for any token."""
        mean = self.first / self.count  # [B, H, D]
        covariance = self.second / self.count - mean[..., :, None] * mean[..., None, :]
        turn = self._mean_rotation(mean)
        mean, covariance = mean @ turn, turn.mT @ covariance @ turn
        heads = keys.float().repeat_interleave(mean.shape[1] // keys.shape[1], 1)  # [B, H, T, D]
        spread = ((heads @ covariance) * heads).sum(-1)
        expected = (heads @ mean[..., None])[..., 0] * scale + spread * scale**2 / 2
        weights = expected[..., self.sinks :].softmax(-1)
        weights = torch.nn.functional.pad(weights, (self.sinks, 0))
        return weights.unflatten(1, (keys.shape[1], -1)).mean(2) * values.float().norm(dim=-1)

    def _mean_rotation(self, like: Tensor) -> Tensor:
        """Return the transpose [D, D] of the mean rotation of the next positions."""
        unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        positions = torch.arange(self.end, self.end + FUTURE)
        return self.rotary.redo(unit[:, None].expand(-1, FUTURE, -1), positions).mean(1)


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer of sinks, the best tokens and the recent window, in full precision."""

    def __init__(self, scorer: Scorer, schedule: Schedule, share: float) -> None:
        super().__init__()
        self.keys: Any
        self.values: Any
        self.scorer, self.schedule, self.share = scorer, schedule, share
        self.seen = 0  # tokens
        self.passed = 0  # tokens that have left the window, including evicted ones

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k, v [B,G,S,D]; the returned keys refer to the layer, so that `attended` gets the queries."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[2]
        setattr(keys, LAYER, self)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens the layer has processed: the next one's position."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens to mask and the first one's position, as if the stored ones were the newest."""
        held = self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0
        return held + query_length, self.seen - held

    def attended(self, query: Tensor, scale: float) -> None:
        """Record queries [B,H,S,D] that attended to the layer; evict tokens if a block has left the window."""
        self.scorer.observe(query, self.seen - query.shape[2])
        until = self.schedule.quantized(self.seen)
        if until > self.passed:
            window = self.seen - self.schedule.sinks - until
            self._evict(self.keys.shape[2] - window, round(self.share * until), scale)
            self.passed = until

    def _evict(self, stop: int, count: int, scale: float) -> None:
        """Retain `count` of the tokens between the sinks and `stop`."""
        start = self.schedule.sinks
        scores = self.scorer.scores(self.keys, self.values, scale)[..., start:stop]
        best = scores.topk(min(count, stop - start), -1).indices.sort(-1).values + start  # [B, G, count]
        index = best[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.keys, self.values = (
            torch.cat([x[:, :, :start], x.gather(2, index), x[:, :, stop:]], 2) for x in (self.keys, self.values)
        )


def _tell_layer(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    layer = getattr(key, LAYER, None)
    if layer is not None:
        layer.attended(query, scale)


@dataclass(frozen=True)
class Eviction:
    """Retention of a share of the tokens between a plan's attention sinks and recent window, by score."""

    family: str
    scorer: Callable[[Rotary, Schedule], Scorer]
    schedule: Schedule
    share: float
    ratio: float

    @property
    def name(self) -> str:
        """Family and the plan's ratio."""
        return f"{self.family}-{self.ratio:g}x"

    def new_cache(self, model: Any) -> Any:
        """Return an empty cache; the model must run with it inside `reading`."""
        rotary = Rotary.of(model)
        layers = range(CacheShape.of(model).layers)
        return Cache(
            layers=[EvictingLayer(self.scorer(rotary, self.schedule), self.schedule, self.share) for _ in layers]
        )

    def reading(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which layers of the cache receive the queries of the model."""
        return watched(model, _tell_layer)

    def cache_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Return the bytes of the stored tokens, in full precision."""
        passed = self.schedule.quantized(tokens)
        return (round(self.share * passed) + tokens - passed) * shape.exact_token_bytes


def share_for(bytes_held: int, shape: CacheShape, schedule: Schedule, tokens: int) -> float | None:
    """Return the smallest share whose cache is not smaller than `bytes_held`, at `tokens` tokens.

    None if sinks and recent window are already larger.
    """
    passed = schedule.quantized(tokens)
    kept = math.ceil(bytes_held / shape.exact_token_bytes) - (tokens - passed)
    return kept / passed if 0 < kept <= passed else None
