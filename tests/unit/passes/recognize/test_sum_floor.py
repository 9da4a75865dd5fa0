"""Sums of exponentials with a lower bound: exact if a maximum was subtracted before, else not rewritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled_twice import compiled_twice, explanations
from needs import covering
from torch import Tensor
from torch.nn import functional as F

T, D = 9, 8
ROUNDING = 1e-4  # scores of -140 are off by 2e-5 in float32, in eager mode too; how much differs between processors


def shifted(s: Tensor) -> Tensor:
    return (s - s.amax(-1, keepdim=True)).exp()


def shifted_by_max(s: Tensor) -> Tensor:
    return (s - s.max(-1, keepdim=True)[0].detach()).exp()


def plain(s: Tensor) -> Tensor:
    return s.exp()


def shifted_by_mean(s: Tensor) -> Tensor:
    return (s - s.mean(-1, keepdim=True) - 40).exp()


def masked(s: Tensor) -> Tensor:
    return shifted(s).masked_fill(s > 0, 0.0)


def normalized(e: Tensor) -> Tensor:
    return F.normalize(e, p=1, dim=-1)


def clamped(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True).clamp_min(1e-9)


def clamped_by_name(e: Tensor) -> Tensor:
    return e / torch.clamp(e.sum(-1, keepdim=True), min=1e-9)


def added(e: Tensor) -> Tensor:
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def added_first(e: Tensor) -> Tensor:
    return e / (1e-9 + e.sum(-1, keepdim=True))


def clamped_at_two(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True).clamp(min=2.0)


def clamped_on_both_sides(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True).clamp(1e-9, 2.0)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, T, D), torch.randn(2, 4, T, D), torch.randn(2, 4, T, D)


def attention(powers: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(powers(q @ k.mT * 0.3)) @ v

    return run


def of_small_scores() -> tuple[Tensor, Tensor, Tensor]:
    """Scores of -60 to -140, whose exponentials are all below any floor."""
    q, k, v = tensors()
    return q.abs() * 4 + 5, -k.abs() - 4, v


@covering(
    1, weights={f.__name__: f for f in (normalized, clamped, clamped_by_name, added, added_first)},
    powers={f.__name__: f for f in (shifted, shifted_by_max)},
)  # fmt: skip
def test_a_floor_below_the_largest_exponential_is_never_reached(
    powers: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Tensor]
) -> None:
    sites = compiled_twice(attention(powers, weights), tensors(), of_small_scores(), tolerance=ROUNDING)
    assert [site.how for site in sites] == ["torch", "torch"]


@pytest.mark.parametrize(
    ("powers", "weights"),
    [
        *((powers, weights) for powers in (plain, shifted_by_mean) for weights in (normalized, clamped, added)),
        (masked, clamped), (shifted, clamped_at_two), (shifted, clamped_on_both_sides),
    ],
)  # fmt: skip
def test_a_floor_reached_by_small_scores_is_not_rewritten(
    powers: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Tensor]
) -> None:
    reasons = explanations(compiled_twice(attention(powers, weights), tensors(), of_small_scores()))
    assert len(reasons) == 2 and all("bounds the sum of the exponentials from below" in reason for reason in reasons)
