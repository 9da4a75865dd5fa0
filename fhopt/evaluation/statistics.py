"""Statistics of measurements: perplexity, KL, bootstrap confidence intervals, paired tests of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

BOOTSTRAP_TOKENS = 64
RESAMPLES = 2000
SEED = 0  # of the resampling: equal data give equal intervals
Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats/token, and the number of tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean."""
        return math.exp(self.nats)


@dataclass(frozen=True)
class Comparison:
    """The exact model compared with a plan on the same tokens.

    exact, plan: perplexity. kl: mean of KL(exact || plan) of the next-token distribution, in nats/token. `_ci`: 95%
    intervals (low, high), None for fewer than two blocks of tokens.
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
    """Paired costs per token: negative log-likelihood with the full-precision cache and with the plan's, and KL.

    kl: KL(exact || plan). All in nats, [N, T - 1] for N sequences of T tokens, float64.
    """

    exact: Tensor
    plan: Tensor
    kl: Tensor

    def compare(self) -> Comparison:
        """Average over all tokens, with intervals."""
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
    """Return the perplexity increase in percent for an increase of the mean in nats."""
    return 100 * math.expm1(nats)


def _block_interval(x: Tensor) -> Interval | None:
    """Return the interval of the mean of x [N, T], resampled by blocks of tokens within a sequence."""
    blocks = [block for row in x for block in row.split(BOOTSTRAP_TOKENS)]
    return bootstrap_interval([float(b.sum()) for b in blocks], [len(b) for b in blocks])


def bootstrap_interval(sums: list[float], counts: list[int]) -> Interval | None:
    """Return the 95% interval of sum(sums) / sum(counts), resampling the pairs; None for fewer than two pairs."""
    if len(sums) < 2:
        return None
    generator, total, count = np.random.default_rng(SEED), np.array(sums), np.array(counts)
    draws = (generator.integers(len(total), size=len(total)) for _ in range(RESAMPLES))
    means = [total[draw].sum() / count[draw].sum() for draw in draws]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(exact: Sequence[bool], other: Sequence[bool]) -> float:
    """Return the two-sided p-value that one of two methods is correct more often, on the same questions.

    Only questions that exactly one of them answers correctly count; if both are equally good, each wins half of these.
    Exact, by the binomial distribution; 1.0 if there is no such question. McNemar 1947, "Note on the sampling error of
    the difference between correlated proportions or percentages". Raises ValueError if the lengths differ.
    """
    alone = [a for a, b in zip(exact, other, strict=True) if a != b]
    n, fewer = len(alone), min(sum(map(bool, alone)), len(alone) - sum(map(bool, alone)))
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired_rate_interval(exact: Sequence[bool], other: Sequence[bool]) -> Interval | None:
    """Return the 95% interval of the rate of `other` minus that of `exact`, paired, in percentage points.

    None for fewer than two questions. Raises ValueError if the lengths differ.
    """
    changes = [100.0 * (int(b) - int(a)) for a, b in zip(exact, other, strict=True)]
    return bootstrap_interval(changes, [1] * len(changes))
