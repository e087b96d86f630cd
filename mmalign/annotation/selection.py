"""Which pairs to judge next: the most uncertain ones, beside a random slice that no vote has a say in.

What holds, and what does not:

- A pair is of the slice by a hash of its id and the project alone, so the slice is a simple random sample of the pairs, of a
  share `random_share`, and the same whatever is voted.
- Pairs of the slice are never asked for by `tally.select`. They come by the store's random draws, a share `random_share` of
  what is handed out, in the order of the project. That order knows no votes: which of them are judged first is the same
  whatever is voted. Random draws meet other pairs too, so the slice gets random_share^2 of the votes at first, and more as the
  pairs that were asked for are used up.
- Votes that `Store.want` or priorities set by hand brought to a pair of the slice are marked active, and are left out.
- Numbers of the slice speak of the pairs that were added, as the people who came judge them. What people skip, and who stays,
  is their choice there as elsewhere.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Votes that the sources' own record counts for in what is expected of a pair.
PRIOR_VOTES = 2.0


def draw_of(item: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the item, whoever asks and whenever."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{item}".encode(), digest_size=7).digest(), "big") / 2**56


def in_random_slice(item: str, *, random_share: float, seed: int) -> bool:
    """Whether an item is of the slice that is judged whatever the votes say; statistics of this slice are unbiased."""
    return draw_of(item, seed) < random_share


def priorities(
    votes: Iterable[tuple[str, float]],
    pairs: Mapping[str, Sequence[str]],
    *,
    waiting: Collection[str] | None = None,
    random_share: float = 0.2,
    seed: int = 0,
) -> dict[str, float]:
    """For each pair that waits a number in (0, 1], highest first: the uncertain ones, with the random slice strewn in.

    uncertainty = 4 p (1 - p) / (1 + n),  p = (wins of b + PRIOR_VOTES q) / (n + PRIOR_VOTES)

    where n votes were cast on the pair and q = P(source b beats source a) by all votes, .5 where sources are unknown. So a
    pair is asked for again where its first votes split, and first where the two models are close. Of every stretch of the
    order a share `random_share` is of the random slice: pairs chosen by a hash of (seed, id) alone, in the order of that hash.
    The votes they get are those of a uniform sample of the pairs, which is what reported statistics should rest on.

    Args:
        votes: (pair, share of the win of its second candidate: 1, 0.5 or 0), skips left out.
        pairs: pair -> the sources of its candidates, or ().
        waiting: the pairs that still want votes; None: all.
        random_share: 0 to 1. 0.2 keeps one vote of five for the statistics; with 1 nothing is selected.
        seed: of the random slice; it must not change while a project runs.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= random_share <= 1:
        raise ValueError(f"priorities: got random_share {random_share}, want 0 to 1")
    cast: dict[str, list[float]] = {}
    for pair, share in votes:
        cast.setdefault(pair, []).append(share)
    strengths = _strengths(cast, pairs)

    def uncertainty(pair: str) -> float:
        sources, own = pairs[pair], cast.get(pair, [])
        gap = strengths.get(sources[1], 0.0) - strengths.get(sources[0], 0.0) if len(sources) == 2 else 0.0
        expected = 1 / (1 + math.exp(-gap))
        p = (sum(own) + PRIOR_VOTES * expected) / (len(own) + PRIOR_VOTES)
        return 4 * p * (1 - p) / (1 + len(own))

    draws = {pair: draw_of(pair, seed) for pair in (pairs if waiting is None else waiting)}
    strewn = sorted((pair for pair in draws if draws[pair] < random_share), key=lambda pair: draws[pair])
    chosen = [pair for pair in draws if draws[pair] >= random_share]
    chosen.sort(key=lambda pair: (-uncertainty(pair), draws[pair]))
    due = [((place + 0.5) / random_share, pair) for place, pair in enumerate(strewn)]
    due += [((place + 0.5) / (1 - random_share), pair) for place, pair in enumerate(chosen)]
    return {pair: 1 - place / len(draws) for place, (_, pair) in enumerate(sorted(due))}


def _strengths(cast: Mapping[str, Sequence[float]], pairs: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Bradley-Terry strengths of the sources of the pairs, from the votes on pairs whose sources are known."""
    names = sorted({source for sources in pairs.values() if len(sources) == 2 for source in sources})
    if len(names) < 2:
        return {}
    import choix

    places = {name: place for place, name in enumerate(names)}
    won = 0.1 * (1 - np.eye(len(names)))
    for pair, shares in cast.items():
        sources: Any = pairs.get(pair, ())
        if len(sources) == 2 and sources[0] != sources[1]:
            a, b = (places[name] for name in sources)
            won[b, a] += sum(shares)
            won[a, b] += len(shares) - sum(shares)
    found = choix.ilsr_pairwise_dense(won, max_iter=1000)
    return dict(zip(names, map(float, found), strict=True))
