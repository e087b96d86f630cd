"""Shares and estimates with their intervals, as every table of the dashboard shows them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of trials, with Wilson's interval of as many independent ones as they are worth.

    Args:
        rate: count / total.
        low, high: ends of the interval.
        count, total: what it is the share of.
    """

    rate: float
    low: float
    high: float
    count: int
    total: int

    def __str__(self) -> str:
        """Rate and interval in per cent, then the counts."""
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.count} of {self.total})"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number computed from items, with the percentile bootstrap interval over items.

    Args:
        value: of all items.
        low, high: ends of the interval; None where no resample had a value.
        num_items: items it was computed from.
    """

    value: float
    low: float | None
    high: float | None
    num_items: int

    def __str__(self) -> str:
        """Value, interval, items."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{ends} ({self.num_items} items)"


def share_of(count: int, total: int, *, confidence: float = 0.95) -> Share | None:
    """The share count / total with Wilson's interval; None of nothing.

    Args:
        count: 0 to total.
        total: independent trials.
        confidence: of the interval; usual: 0.95.
    """
    if not total:
        return None
    low, high = wilson(count / total, total, confidence=confidence)
    return Share(rate=count / total, low=low, high=high, count=count, total=total)


def wilson(rate: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, which never leaves [0, 1].

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson (1927), JASA 22.

    Args:
        rate: p.
        trials: n, above 0; an effective number need not be whole.
        confidence: of the interval; usual: 0.95.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, half = rate + z * z / (2 * trials), z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def share_by_group(outcomes: Sequence[tuple[str, bool]], *, confidence: float = 0.95) -> Share | None:
    """The share of outcomes that are true, where those of one group are no independent trials; None of nothing.

    p = sum_i y_i / n,  v = sum_i (y_i - m_i p)^2 / n^2,  deff = max(1, v n / (p (1 - p)))

    of groups i with y_i true ones of m_i. The interval is Wilson's with n / deff trials, so with one outcome a group that of n.
    Where all outcomes are alike nothing is known of deff, and groups count as trials.

    Source: Rao and Scott (1992), Biometrics 48, the effective sample size of clustered binary data.

    Args:
        outcomes: (group, whether it is true).
        confidence: of the interval; usual: 0.95.
    """
    if not outcomes:
        return None
    true, sizes = Counter[str](), Counter[str]()
    for group, outcome in outcomes:
        sizes[group] += 1
        true[group] += outcome
    count, total = sum(true.values()), len(outcomes)
    rate, effective = count / total, float(len(sizes))
    if 0 < count < total:
        variance = sum((true[group] - size * rate) ** 2 for group, size in sizes.items()) / total**2
        effective = total / max(1.0, variance * total / (rate * (1 - rate)))
    low, high = wilson(rate, effective, confidence=confidence)
    return Share(rate=rate, low=low, high=high, count=count, total=total)


def resampled(
    statistic: Callable[[Any], float | None], num_items: int, *, num_resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a statistic of items, which are drawn again with replacement, votes and all.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.

    Args:
        statistic: the places of the drawn items -> its value, None where that is undefined; such draws are passed over.
        num_items: items to draw from.
        num_resamples: draws; 200 are enough for a plot, 1000 for a paper.
        seed: the same seed gives the same interval.
        confidence: share of repetitions whose interval covers the truth.
    """
    random = np.random.default_rng(seed)
    drawn = (statistic(random.integers(0, num_items, num_items)) for _ in range(num_resamples))
    values = [value for value in drawn if value is not None]
    if not values:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
