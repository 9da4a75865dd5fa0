"""Classification of masks by their values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hand_plans import SITE
from torch import Tensor

from fhopt.passes.recognize.masks import mask_kind, windowed
from fhopt.plan.cache_size import CacheLayer

T = 12
PAST = torch.arange(T)[:, None] - torch.arange(T)[None, :]
CAUSAL = PAST >= 0
PACKS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
TOGETHER = PACKS[:, None] == PACKS[None, :]


def added(allowed: Tensor, least: float = -math.inf) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, least)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(1, 1, T, T, dtype=torch.bool), ("none", 0)),
        (CAUSAL, ("causal", 0)),
        (added(CAUSAL), ("causal", 0)),
        (added(CAUSAL, torch.finfo(torch.float32).min)[None, None], ("causal", 0)),
        (torch.cat((torch.ones(T, 5, dtype=torch.bool), CAUSAL), 1), ("causal", 0)),  # after five cached tokens
        (CAUSAL & (PAST < 4), ("sliding", 4)),
        (added(CAUSAL & (PAST < 4), -1e9), ("sliding", 4)),
        ((torch.arange(T) < 9).expand(2, 1, T, T), ("padding", 0)),
        (TOGETHER, ("block", 0)),
        (TOGETHER & CAUSAL, ("causal block", 0)),
        (CAUSAL & (torch.arange(T) > 2), ("bool", 0)),  # causal and padded on the left
        (torch.zeros(1, 1, T, T, dtype=torch.bool), ("bool", 0)),  # nothing is visible
        (CAUSAL[-1:], ("none", 0)),  # one query attends to everything
        ((torch.arange(T) < 9)[None], ("bool", 0)),  # one query shows no pattern
    ],
)
def test_patterns_are_distinguished(mask: Tensor, expected: tuple[str, int]) -> None:
    assert mask_kind(mask) == expected


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (-0.5 * PAST.float(), "alibi"),
        (torch.arange(T).expand(T, T) * torch.tensor([0.5, 0.25])[:, None, None], "alibi"),  # slopes of two heads
        (-0.5 * PAST.abs().float(), "relative"),
        (PAST.clamp(-3, 3).float().sin(), "relative"),
        (torch.randn(T, T), "additive"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_biases_are_distinguished_with_and_without_a_triangle(bias: Tensor, expected: str, causal: bool) -> None:
    kind, window = mask_kind(bias + added(CAUSAL) if causal else bias)
    wanted = "alibi" if causal and torch.equal(bias, -0.5 * PAST.abs().float()) else expected  # the same there
    assert (kind, window) == (wanted, 0)


@pytest.mark.parametrize(
    ("mask", "layer", "expected"),
    [
        ("causal", CacheLayer("layers.0", "sliding", 8, is_full=False), ("sliding", 8)),
        ("sliding", CacheLayer("layers.0", "sliding", 8, is_full=False), ("sliding", 8)),
        ("causal block", CacheLayer("layers.0", "chunked", 8, is_full=False), ("chunked", 8)),
        ("alibi", CacheLayer("layers.0", "sliding", 8, is_full=False), ("alibi", 8)),  # the bias is recognized anyway
        ("causal", CacheLayer("layers.0"), ("causal", 0)),
        ("causal", CacheLayer("layers.1", "sliding", 8, is_full=False), ("causal", 0)),
    ],
)
def test_the_cache_layer_decides_what_a_short_graph_cannot_show(
    mask: str, layer: CacheLayer, expected: tuple[str, int]
) -> None:
    site = windowed(replace(SITE, mask=mask), [layer])
    assert (site.mask, site.window) == expected
