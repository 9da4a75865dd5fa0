"""Prefill into the caches of other methods, in the steps of the quality benchmark."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from small_models import cached
from torch import Tensor

from benchmarks.quality.methods.quantized_caches import Baseline, Schedule

SCHEDULE = Schedule(sinks=4, recent=32, block=32)


@torch.no_grad()
def read(model: Any, baseline: Baseline, ids: Tensor, schedule: Schedule = SCHEDULE) -> tuple[Tensor, Any]:
    """Return (logits, cache) after prefilling `ids` in chunks that end where a block is quantized."""
    cache = baseline.new_cache(model)
    cuts = [0, *range(schedule.first_step, ids.shape[1], schedule.block), ids.shape[1]]
    with baseline.reading(model):
        parts = [
            model(ids[:, start:stop], **cached(cache), use_cache=True).logits
            for start, stop in itertools.pairwise(cuts)
        ]
    return torch.cat(parts, 1), cache


@torch.no_grad()
def exact_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Mean squared error over mean square."""
    return float((found - expected).square().mean() / expected.square().mean())


def keys_with_outliers(heads: int = 2, tokens: int = 64, size: int = 64) -> Tensor:
    """[1,G,N,D]: normal values, with two channels twenty times as large, like outlier channels of real keys."""
    x = torch.randn(1, heads, tokens, size)
    x[..., 3] = 20 + torch.randn(1, heads, tokens)
    x[..., 17] *= 20
    return x
