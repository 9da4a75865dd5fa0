"""Confidence intervals of measured KL, and paired answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fhopt.evaluation.statistics import TokenCosts, bootstrap_interval, mcnemar, paired_rate_interval


def correlated(tokens: int, generator: torch.Generator) -> Tensor:
    """[1, tokens] of mean 0; neighbors correlate by 0.8."""
    noise, out, last = torch.randn(tokens, generator=generator, dtype=torch.float64), [], 0.0
    for x in noise.tolist():
        last = 0.8 * last + x
        out.append(last)
    return torch.tensor([out], dtype=torch.float64)


def test_the_statistics_follow_their_definitions() -> None:
    exact = torch.full((2, 100), 1.0, dtype=torch.float64)
    found = TokenCosts(exact, exact + 0.01, exact * 0.5).compare()
    assert found.exact == pytest.approx(2.718281828) and found.increase_percent == pytest.approx(1.005016708)
    assert found.increase_percent_ci == pytest.approx((1.005016708, 1.005016708))  # equal in each block
    assert found.kl == 0.5 and found.kl_ci == (0.5, 0.5) and found.tokens == 200


def test_intervals_cover_the_truth_although_neighbors_correlate() -> None:
    """Nominally 95 %; 64-token blocks and percentiles of 32 blocks cover slightly less. Single tokens cover 50 %."""
    generator, covered, trials = torch.Generator().manual_seed(7), 0, 100
    for _ in range(trials):
        change = 0.01 + 0.02 * correlated(2048, generator)
        interval = TokenCosts(torch.zeros_like(change), change, change).compare().kl_ci
        assert interval is not None
        covered += interval[0] <= 0.01 <= interval[1]
    assert covered >= 0.86 * trials


def test_intervals_are_reproducible_and_absent_for_one_block() -> None:
    sums, counts = [1.0, 5.0, 2.0, 4.0], [2, 2, 2, 1]
    first = bootstrap_interval(sums, counts)
    assert first == bootstrap_interval(sums, counts) and first is not None and first[0] < 12 / 7 < first[1]
    assert bootstrap_interval([1.0], [2]) is None
    x = torch.ones(1, 64, dtype=torch.float64)
    assert TokenCosts(x, x, x).compare().increase_percent_ci is None


def answers(both: int, only_exact: int, only_other: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Answers to the same questions: whether the exact model is right, and whether the other is."""
    counts = {(True, True): both, (True, False): only_exact, (False, True): only_other, (False, False): neither}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


@pytest.mark.parametrize(
    ("only_exact", "only_other", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (5, 1, 2 * (1 + 6) / 2**6),
        (12, 3, 2 * (1 + 15 + 105 + 455) / 2**15),
        (
            150,
            86,
            3.715936e-05,
        ),  # approval ratings of a president in two surveys: Agresti 1990, "Categorical Data Analysis"
    ],
)
def test_mcnemar_is_the_binomial_test_of_the_answers_that_differ(
    only_exact: int, only_other: int, expected: float
) -> None:
    for same in (0, 30):  # questions with equal answers do not count
        exact, other = answers(same, only_exact, only_other, same)
        assert mcnemar(exact, other) == mcnemar(other, exact) == pytest.approx(expected, rel=1e-6)


def test_mcnemar_supports_many_answers_and_refuses_other_questions() -> None:
    assert 0 < mcnemar(*answers(0, 1200, 1000, 0)) < 1e-4 and mcnemar([], []) == 1.0
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True], [])


def test_the_interval_of_rates_is_that_of_the_pairs() -> None:
    exact, other = answers(60, 12, 8, 20)
    found = paired_rate_interval(exact, other)
    assert found is not None and found[0] < -4.0 < found[1]  # 72 % and 68 %
    assert found == pytest.approx((-4 - 8.73, -4 + 8.73), abs=1.5)  # 1.96 standard errors; bootstrap steps of one point
    assert paired_rate_interval(exact, exact) == (0.0, 0.0)
    assert paired_rate_interval([True], [False]) is None
