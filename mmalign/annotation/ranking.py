"""Which source is best: Bradley-Terry over all votes with bootstrap intervals, and openskill's ratings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.annotation.ballots import Ballot, judged, wins

# Wins that every source is given over every other one, so that one that always won, or was never compared, has a strength.
PRIOR = 0.1


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One source in a ranking.

    Args:
        source: who made the candidates.
        strength: in nats; the difference of two is the log-odds that one beats the other. The mean of all is 0.
        low, high: ends of the bootstrap interval of it, None where no resample had one.
        rate: share of its comparisons that it won, a tie counting half.
        num_comparisons: with other sources.
        best_rank, worst_rank: 1 + the sources whose interval lies wholly above; the number of those not wholly below.
    """

    source: str
    strength: float
    low: float | None
    high: float | None
    rate: float
    num_comparisons: int
    best_rank: int
    worst_rank: int


def bradley_terry(ballots: Iterable[Ballot], *, num_resamples: int = 200, seed: int = 0) -> list[Standing]:
    """Sources from best to worst, under P(i beats j) = 1 / (1 + exp(s_j - s_i)); empty where there are not two.

    A tie, and both bad, are half a win for each. A ranking of k counts as its k (k - 1) / 2 pairs. The bootstrap draws items,
    not votes: the votes on one item are no independent evidence.

    Source: Bradley and Terry (1952), fitted by choix (I-LSR, Maystre and Grossglauser 2015) with a prior of PRIOR wins.

    Args:
        ballots: repeats and items of known answer do not count.
        num_resamples, seed: of the bootstrap.
    """
    won_by_item = wins(ballots)
    matches, names = _matches(won_by_item)
    if len(names) < 2:
        return []
    num_items = len(won_by_item)
    whole = _table(matches, np.ones(num_items), len(names))
    strengths = _strengths(whole)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_resamples):
        times = np.bincount(random.integers(0, num_items, num_items), minlength=num_items)
        drawn.append(_strengths(_table(matches, times, len(names))))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else (strengths, strengths)
    won, compared = whole.sum(axis=1), (whole + whole.T).sum(axis=1)
    return [
        Standing(
            source=names[i],
            strength=float(strengths[i]),
            low=float(low[i]) if drawn else None,
            high=float(high[i]) if drawn else None,
            rate=float(won[i] / compared[i]),
            num_comparisons=round(compared[i]),
            best_rank=1 + int((low > high[i]).sum()),
            worst_rank=len(names) - int((high < low[i]).sum()),
        )
        for i in np.argsort(-strengths, kind="stable")
    ]


def _matches(won: dict[str, list[tuple[str, str, float]]]) -> tuple[Any, list[str]]:
    """One row a comparison (place of its item, source, other source, share of the win), and the names of the sources."""
    names = sorted({name for pairs in won.values() for one, other, _ in pairs for name in (one, other)})
    places = {name: place for place, name in enumerate(names)}
    rows = [(n, places[i], places[j], share) for n, pairs in enumerate(won.values()) for i, j, share in pairs]
    return np.array(rows, dtype=float).reshape(-1, 4), names


def _table(matches: Any, times: Any, k: int) -> Any:
    """Wins of source i over source j, each item counted so many times."""
    item, one, other = matches[:, :3].astype(int).T
    weight, share = times[item], matches[:, 3]
    won = np.bincount(one * k + other, weight * share, k * k) + np.bincount(other * k + one, weight * (1 - share), k * k)
    return won.reshape(k, k)


def _strengths(won: Any) -> Any:
    import choix

    found = choix.ilsr_pairwise_dense(won + PRIOR * (1 - np.eye(len(won))), max_iter=1000)
    return found - found.mean()


@dataclass(frozen=True, kw_only=True)
class Skill:
    """One source's rating by openskill.

    Args:
        source: who made the candidates.
        mu, sigma: what is believed of its skill: mean and standard deviation; all begin at 25 and 25 / 3.
        ordinal: mu - 3 sigma, which sorts cautiously.
    """

    source: str
    mu: float
    sigma: float
    ordinal: float


def skills(ballots: Sequence[Ballot], *, seed: int = 0) -> list[Skill]:
    """Sources from best to worst by a Plackett-Luce rating that learns vote by vote.

    It takes whole rankings, and later votes weigh more than earlier ones: the votes are shuffled, so that no streak of the day
    decides. Where several candidates of one vote are of one source, the vote does not count.

    Source: Weng and Lin (2011), JMLR 12, by openskill.

    Args:
        ballots: repeats and items of known answer do not count.
        seed: of the order.
    """
    from openskill.models import PlackettLuce

    model = PlackettLuce()
    ratings: dict[str, Any] = {}
    votes = judged(ballots)
    for place in np.random.default_rng(seed).permutation(len(votes)):
        one = votes[place]
        if len(set(one.sources)) < 2 or len(set(one.sources)) < len(one.sources):
            continue
        for name in one.sources:
            ratings.setdefault(name, model.rating(name=name))
        rated = model.rate([[ratings[name]] for name in one.sources], ranks=list(one.ranks or ()))
        ratings.update({name: team[0] for name, team in zip(one.sources, rated, strict=True)})
    found = [Skill(source=n, mu=float(r.mu), sigma=float(r.sigma), ordinal=float(r.ordinal())) for n, r in ratings.items()]
    return sorted(found, key=lambda skill: (-skill.ordinal, skill.source))
