"""How far raters agree, on plain tables of verdicts: raw agreement, Krippendorff, Cohen, Fleiss, leave-one-out majority."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from mmalign.annotation.shares import Estimate, Share, resampled, share_of

# item -> rater -> verdict. A rater who did not judge an item is absent from it.
Units = Mapping[str, Mapping[str, Any]]
Level = Literal["nominal", "ordinal", "interval"]


def overlapping(units: Units) -> dict[str, Mapping[str, Any]]:
    """The items that two raters or more judged, on which alone agreement can be seen."""
    return {item: verdicts for item, verdicts in units.items() if len(verdicts) > 1}


def raw_agreement(
    units: Units, *, items: Mapping[str, str] | None = None, num_resamples: int = 200, seed: int = 0
) -> Estimate | None:
    """Share of pairs of raters of one item who say the same; None where no item has two raters.

    A = sum over items of (pairs that agree) / sum over items of (pairs)

    Two independent raters who are right with probability p on a question of two answers agree with p^2 + (1 - p)^2: 63 % is
    consistent with raters who are right three times of four.

    Args:
        units: item -> rater -> verdict.
        items: unit -> its item, where several units are of one: they are drawn together.
        num_resamples, seed: of the bootstrap over items.
    """
    same, pairs, kept = [], [], overlapping(units)
    for verdicts in kept.values():
        counts = Counter(verdicts.values()).values()
        same.append(sum(n * (n - 1) // 2 for n in counts))
        pairs.append(len(verdicts) * (len(verdicts) - 1) // 2)
    if not pairs:
        return None
    agreeing, possible = np.array(same), np.array(pairs)
    return _estimate(
        lambda drawn: float(agreeing[drawn].sum() / possible[drawn].sum()),
        [(items or {}).get(unit, unit) for unit in kept],
        num_resamples=num_resamples,
        seed=seed,
    )


def alpha(
    units: Units,
    level: Level = "nominal",
    *,
    items: Mapping[str, str] | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> Estimate | None:
    """Krippendorff's alpha: 1 is agreement, 0 is chance, below 0 is worse than chance; None where it is undefined.

    alpha = 1 - D_observed / D_expected

    Any number of raters an item, missing verdicts allowed. It is undefined where no item has two raters, or where every
    verdict is the same. A healthy preference project can have an alpha of .25: three raters an item who are right three
    times of four give just that.

    Source: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, by the package krippendorff.

    Args:
        units: item -> rater -> verdict; numbers where the level is not nominal.
        level: nominal for choices; ordinal for strengths and ranks; interval.
        items: unit -> its item, where several units are of one: they are drawn together.
        num_resamples, seed: of the bootstrap over items.
    """
    judged = overlapping(units)
    domain = sorted({verdict for verdicts in judged.values() for verdict in verdicts.values()})
    if len(domain) < 2:
        return None
    places = {verdict: place for place, verdict in enumerate(domain)}
    counts = np.zeros((len(judged), len(domain)))
    for row, verdicts in enumerate(judged.values()):
        for verdict in verdicts.values():
            counts[row, places[verdict]] += 1
    values = list(range(len(domain))) if level == "nominal" else domain
    return _estimate(
        lambda drawn: _alpha_of(counts[drawn], values, level),
        [(items or {}).get(unit, unit) for unit in judged],
        num_resamples=num_resamples,
        seed=seed,
    )


def _alpha_of(counts: Any, values: list[Any], level: str) -> float | None:
    import krippendorff

    seen = counts.any(axis=0)
    if seen.sum() < 2:
        return None
    found = krippendorff.alpha(
        value_counts=counts[:, seen],
        value_domain=[value for value, there in zip(values, seen, strict=True) if there],
        level_of_measurement=level,
    )
    return float(found) if np.isfinite(found) else None


def _estimate(statistic: Any, items: Sequence[str], *, num_resamples: int, seed: int) -> Estimate | None:
    """A statistic of units, named by their items, with its bootstrap over items."""
    value = statistic(np.arange(len(items)))
    if value is None:
        return None
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item, []).append(place)
    of_item = [np.array(found) for found in places.values()]

    def of_items(drawn: Any) -> Any:
        return statistic(drawn if len(of_item) == len(items) else np.concatenate([of_item[item] for item in drawn]))

    ends = resampled(of_items, len(of_item), num_resamples=num_resamples, seed=seed)
    low, high = ends or (None, None)
    return Estimate(value=value, low=low, high=high, num_items=len(of_item))


def cohen(
    units: Units, *, weights: Literal["linear", "quadratic"] | None = None, least: int = 2
) -> dict[tuple[str, str], Estimate]:
    """Cohen's kappa of every two raters over the items that both judged; no interval.

    kappa = (p_observed - p_expected) / (1 - p_expected)

    Two raters who give one and the same verdict throughout have none and are left out.

    Source: Cohen (1960), by scikit-learn.

    Args:
        units: item -> rater -> verdict; whole numbers where weights are wanted.
        weights: none for choices; quadratic for strengths, as HelpSteer2 reports. They go by the difference of the numbers,
            levels that nobody chose included.
        least: shared items that a pair of raters must have.
    """
    from sklearn.metrics import cohen_kappa_score

    both: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for verdicts in units.values():
        for one, other in combinations(sorted(verdicts), 2):
            both.setdefault((one, other), []).append((verdicts[one], verdicts[other]))
    found = {}
    for raters, pairs in sorted(both.items()):
        labels = sorted({verdict for pair in pairs for verdict in pair})
        if len(pairs) < least or len(labels) < 2:
            continue
        if weights is not None:
            labels, pairs = list(range(int(labels[0]), int(labels[-1]) + 1)), [(int(a), int(b)) for a, b in pairs]
        first, second = zip(*pairs, strict=True)
        value = float(cohen_kappa_score(first, second, labels=labels, weights=weights))
        found[raters] = Estimate(value=value, low=None, high=None, num_items=len(pairs))
    return found


def fleiss(units: Units) -> float | None:
    """Fleiss' kappa; None where no item has two raters, or every verdict is the same.

    kappa = (P - P_e) / (1 - P_e),  P = mean over items of sum_j n_ij (n_ij - 1) / (n_i (n_i - 1)),  P_e = sum_j p_j^2

    Source: Fleiss (1971), Psychological Bulletin 76, where every item has as many raters; where their numbers n_i differ, the
    same formula with each item's own number. Raters need not be the same people from item to item.
    """
    judged = [Counter(verdicts.values()) for verdicts in overlapping(units).values()]
    total = sum((counts for counts in judged), Counter[Any]())
    if len(total) < 2:
        return None
    agreeing = [sum(n * (n - 1) for n in counts.values()) / (counts.total() * (counts.total() - 1)) for counts in judged]
    observed = sum(agreeing) / len(agreeing)
    expected = sum((n / total.total()) ** 2 for n in total.values())
    return (observed - expected) / (1 - expected)


def against_majority(units: Units) -> dict[str, Share]:
    """For each rater: how often the verdict is that of the majority of the others of the item.

    Items on which the others have no single most frequent verdict say nothing and do not count. A rater who agrees with nobody
    may still be right: never leave a person out on this number alone.

    Args:
        units: item -> rater -> verdict.
    """
    met, seen = Counter[str](), Counter[str]()
    for verdicts in overlapping(units).values():
        counts = Counter(verdicts.values())
        for rater, verdict in verdicts.items():
            others = counts - Counter([verdict])
            first, *rest = others.most_common(2)
            if rest and rest[0][1] == first[1]:
                continue
            seen[rater] += 1
            met[rater] += first[0] == verdict
    found = {rater: share_of(met[rater], seen[rater]) for rater in sorted(seen)}
    return {rater: share for rater, share in found.items() if share is not None}
