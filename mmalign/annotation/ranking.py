"""Which source is best: Bradley-Terry over all votes with bootstrap intervals, and openskill's ratings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.annotation.ballots import Ballot, judged, wins

# Wins and losses that every source is given, shared among all others: Jeffreys' prior where there are two. So one that always
# won, and sources that no chain of comparisons joins, have strengths.
PRIOR = 0.5
SURE = 0.975
LEAST = 1e-3  # of a drawn weight of the prior: differences of more than ln(1000 wins) nats are not told apart


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One source in a ranking.

    Args:
        source: who made the candidates.
        strength: in nats; the difference of two is the log-odds that one beats the other. The mean of all is 0.
        low, high: ends of the interval of it; None where no resample was drawn.
        rate: share of its comparisons that it won, a tie counting half.
        num_comparisons: with other sources.
        best_rank, worst_rank: 1 + the sources that are stronger in SURE of the resamples; the number of all less those that
            are weaker in as many.
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

    A tie, and both bad, are half a win for each. A ranking of k counts as its k (k - 1) / 2 pairs. The interval is that of the
    Bayesian bootstrap: items, not votes, get weights of the exponential distribution, since the votes on one item are no
    independent evidence, and wins of the prior those of a gamma distribution. So for two sources with one vote an item it is
    that of a beta posterior: one vote proves little, a source that always won is known to be better but not by how much, and
    sources that were never compared, even by way of others, have intervals that overlap.

    Source: Bradley and Terry (1952), fitted by choix (I-LSR, Maystre and Grossglauser 2015) with a prior of PRIOR wins; Rubin
    (1981), The Bayesian Bootstrap, Annals of Statistics 9.

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
    prior = np.full(whole.shape, PRIOR / (len(names) - 1))
    strengths = _strengths(whole, prior)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_resamples):
        weighted = _table(matches, random.exponential(size=num_items), len(names))
        drawn.append(_strengths(weighted, np.maximum(random.gamma(prior), LEAST)))
    sampled = np.array(drawn or [strengths])
    low, high = np.quantile(sampled, [1 - SURE, SURE], axis=0)
    beaten_by = (sampled[:, None, :] > sampled[:, :, None]).mean(axis=0) >= SURE
    won, compared = whole.sum(axis=1), (whole + whole.T).sum(axis=1)
    return [
        Standing(
            source=names[i],
            strength=float(strengths[i]),
            low=float(low[i]) if drawn else None,
            high=float(high[i]) if drawn else None,
            rate=float(won[i] / compared[i]),
            num_comparisons=round(compared[i]),
            best_rank=1 + int(beaten_by[i].sum()),
            worst_rank=len(names) - int(beaten_by[:, i].sum()),
        )
        for i in np.argsort(-strengths, kind="stable")
    ]


def _matches(won: dict[str, list[tuple[str, str, float]]]) -> tuple[Any, list[str]]:
    """One row a comparison (place of its item, source, other source, share of the win), and the names of the sources."""
    names = sorted({name for pairs in won.values() for one, other, _ in pairs for name in (one, other)})
    places = {name: place for place, name in enumerate(names)}
    rows = [(n, places[i], places[j], share) for n, pairs in enumerate(won.values()) for i, j, share in pairs]
    return np.array(rows, dtype=float).reshape(-1, 4), names


def _table(matches: Any, weights: Any, k: int) -> Any:
    """Wins of source i over source j, each item counted with its weight."""
    item, one, other = matches[:, :3].astype(int).T
    weight, share = weights[item], matches[:, 3]
    won = np.bincount(one * k + other, weight * share, k * k) + np.bincount(other * k + one, weight * (1 - share), k * k)
    return won.reshape(k, k)


def _strengths(won: Any, prior: Any) -> Any:
    import choix

    found = choix.ilsr_pairwise_dense(won + prior * (1 - np.eye(len(won))), max_iter=1000)
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
