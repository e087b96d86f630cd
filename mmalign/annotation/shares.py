"""Shares and estimates with their intervals, as every table of the dashboard shows them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of independent trials, with Wilson's interval.

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

    Source: Wilson (1927), JASA 22, by scipy.

    Args:
        count: 0 to total.
        total: independent trials.
        confidence: of the interval; usual: 0.95.
    """
    from scipy.stats import binomtest

    if not total:
        return None
    interval = binomtest(count, total).proportion_ci(confidence_level=confidence, method="wilson")
    return Share(rate=count / total, low=float(interval.low), high=float(interval.high), count=count, total=total)


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
