"""Intervals of measured losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhopt.evaluation.statistics import TokenCosts, bootstrap_interval


def correlated(tokens: int, generator: torch.Generator) -> Tensor:
    """[1, tokens] of mean 0; neighbours correlate by 0.8."""
    noise, out, last = torch.randn(tokens, generator=generator, dtype=torch.float64), [], 0.0
    for x in noise.tolist():
        last = 0.8 * last + x
        out.append(last)
    return torch.tensor([out], dtype=torch.float64)


def test_the_figures_are_those_of_the_definition() -> None:
    exact = torch.full((2, 100), 1.0, dtype=torch.float64)
    found = TokenCosts(exact, exact + 0.01, exact * 0.5).compare()
    assert found.exact == pytest.approx(2.718281828) and found.increase_percent == pytest.approx(1.005016708)
    assert found.increase_percent_ci == pytest.approx((1.005016708, 1.005016708))  # each block says the same
    assert found.kl == 0.5 and found.kl_ci == (0.5, 0.5) and found.tokens == 200


def test_intervals_cover_the_truth_although_neighbours_correlate() -> None:
    """95 % promised; 64-token blocks and percentiles of 32 blocks keep a little less. Single tokens keep 50 %."""
    generator, covered, trials = torch.Generator().manual_seed(7), 0, 100
    for _ in range(trials):
        change = 0.01 + 0.02 * correlated(2048, generator)
        interval = TokenCosts(torch.zeros_like(change), change, change).compare().kl_ci
        assert interval is not None
        covered += interval[0] <= 0.01 <= interval[1]
    assert covered >= 0.86 * trials


def test_intervals_are_the_same_every_time_and_absent_for_one_block() -> None:
    sums, counts = [1.0, 5.0, 2.0, 4.0], [2, 2, 2, 1]
    first = bootstrap_interval(sums, counts)
    assert first == bootstrap_interval(sums, counts) and first is not None and first[0] < 12 / 7 < first[1]
    assert bootstrap_interval([1.0], [2]) is None
    x = torch.ones(1, 64, dtype=torch.float64)
    assert TokenCosts(x, x, x).compare().increase_percent_ci is None
