"""The dashboard: everything that is said about the votes of a project, as plain data, tables and plots; no page."""

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.annotation.agreement import against_majority, alpha, cohen, fleiss, raw_agreement
from mmalign.annotation.ballots import Ballot, by_rater, choices, counts_of, grades, is_check, items_of, judged, plain
from mmalign.annotation.before_after import AFTER, BEFORE, blind_win_rate
from mmalign.annotation.bias import Repeats, gold_accuracy, left_rate, longer_rate, place_rates, repeats
from mmalign.annotation.charts import bars, points
from mmalign.annotation.pooling import pool
from mmalign.annotation.ranking import Skill, Standing, bradley_terry, skills
from mmalign.annotation.shares import Estimate, Share

if TYPE_CHECKING:
    from mmalign.statistics import WinRate

Row = dict[str, Any]
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are full-width forms


@dataclass(frozen=True, kw_only=True)
class Rater:
    """What is said of one person; nobody should be left out on one of these numbers alone.

    Args:
        votes, skips: cast, repeats and items of known answer included.
        seconds: median from seeing to voting.
        majority: agreement with the majority of the others.
        gold: items of known answer that were answered so.
        repeats: how items that came back were judged.
        left: how often the left candidate won.
    """

    votes: int
    skips: int
    seconds: float | None
    majority: Share | None
    gold: Share | None
    repeats: Repeats | None
    left: Share | None


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """Everything that is said about the votes of a project.

    Args:
        num_items: in the project, those of known answer left out; None where that was not told.
        num_judged: with a vote that is no skip.
        num_overlapping: with votes of two people or more.
        num_votes: latest revisions, repeats, skips and items of known answer included.
        num_checks: of these, repeats and items of known answer: they tell of people, and count in nothing else but `raters`.
        counts: votes by choice, skips too, without those.
        raw, alpha_nominal, fleiss, cohen: agreement on the choice.
        grade, alpha_ordinal: agreement on strengths, ranks or preferences, as the grade says.
        left, places, longer: shares that tell a bias of side, of place in a list, of length.
        raters: by name.
        standings, skills: sources from best to worst.
        blind: win rate of what was made after training over what was made before, where that is what was judged.
        dropped: judged items that give no preference, by reason.
        on_random: the same on the random slice, where items were also chosen by their votes: report these numbers then.
    """

    num_items: int | None
    num_judged: int
    num_overlapping: int
    num_votes: int
    num_checks: int
    counts: Counter[str]
    raw: Estimate | None
    alpha_nominal: Estimate | None
    grade: str
    alpha_ordinal: Estimate | None
    fleiss: float | None
    cohen: dict[tuple[str, str], Estimate]
    left: Share | None
    places: dict[int, list[Share]]
    longer: Share | None
    raters: dict[str, Rater]
    standings: list[Standing]
    skills: list[Skill]
    blind: "WinRate | None"
    dropped: Counter[str]
    on_random: "Dashboard | None" = None

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(plain(self), indent=2, ensure_ascii=False)

    def tables(self) -> dict[str, list[Row]]:
        """The tables of the page by name: choices, agreement, bias, raters, ranking, kappas, dropped; rows of plain values."""
        return {
            "choices": [{"choice": name, "votes": count} for name, count in self.counts.most_common()],
            "agreement": _agreement(self),
            "bias": [{"bias": name, **_share(share)} for name, share in _biases(self)],
            "raters": [_rater(name, rater) for name, rater in self.raters.items()],
            "ranking": [_standing(one, self.skills) for one in self.standings],
            "kappas": [
                {"rater": one, "other": other, "kappa": kappa.value, "items": kappa.num_items}
                for (one, other), kappa in self.cohen.items()
            ],
            "dropped": [{"reason": reason, "items": count} for reason, count in self.dropped.most_common()],
        }

    def plots(self) -> dict[str, str]:
        """The plots of the page by name, as SVG; only those that there are data for."""
        found = {"choices": bars([(name, count) for name, count in self.counts.most_common()], title="Votes by choice")}
        measures = [(row["measure"], row["value"], row["low"], row["high"]) for row in _agreement(self)]
        if measures:
            least = min(0.0, *(low if low is not None else value for _, value, low, _ in measures))
            found["agreement"] = points(measures, title="Agreement", low=max(-1.0, least), high=1.0, reference=0.0)
        biases = [(name, share.rate, share.low, share.high) for name, share in _biases(self) if name in ("left", "longer")]
        if biases:
            found["bias"] = points(biases, title="Bias", low=0.0, high=1.0, reference=0.5, percent=True)
        met = [(name, one.majority) for name, one in self.raters.items()]
        people = [(name, share.rate, share.low, share.high) for name, share in met if share is not None]
        if people:
            title = "Agreement with the majority of the others"
            found["raters"] = points(people, title=title, low=0.0, high=1.0, percent=True)
        if self.blind is not None:
            rate = self.blind
            row = ("after training", rate.rate, rate.low, rate.high)
            found["blind"] = points(
                [row], title="Preferred over before training", low=0.0, high=1.0, reference=0.5, percent=True
            )
        if self.standings:
            ends = [one.high if one.high is not None else one.strength for one in self.standings]
            starts = [one.low if one.low is not None else one.strength for one in self.standings]
            rows = [(one.source, one.strength, one.low, one.high) for one in self.standings]
            found["ranking"] = points(
                rows, title="Strength of each source (Bradley-Terry, nats)", low=min(starts), high=max(ends), reference=0.0
            )
        return found


def dashboard(ballots: Sequence[Ballot], *, num_items: int | None = None, num_resamples: int = 200, seed: int = 0) -> Dashboard:
    """Say everything about the votes of a project.

    Args:
        ballots: latest revisions, in the order they were cast.
        num_items: of the project, to tell progress.
        num_resamples, seed: of the bootstrap intervals.
    """
    whole = _dashboard(ballots, num_items=num_items, num_resamples=num_resamples, seed=seed)
    if not any(one.active for one in ballots):
        return whole
    strewn = [one for one in ballots if one.strewn]
    part = _dashboard(strewn, num_items=None, num_resamples=num_resamples, seed=seed)
    return Dashboard(**{**vars(whole), "on_random": part})


def _dashboard(ballots: Sequence[Ballot], *, num_items: int | None, num_resamples: int, seed: int) -> Dashboard:
    units, (grade, graded) = choices(ballots), grades(ballots)
    drawn: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    kept = judged(ballots)
    raters_of: dict[str, set[str]] = {}
    for one in kept:
        raters_of.setdefault(one.item, set()).add(one.rater)
    verdicts = pool(ballots)
    return Dashboard(
        num_items=num_items,
        num_judged=len(raters_of),
        num_overlapping=sum(len(people) > 1 for people in raters_of.values()),
        num_votes=len(ballots),
        num_checks=sum(map(is_check, ballots)),
        counts=counts_of(ballots),
        raw=raw_agreement(units, items=items_of(units), **drawn),
        alpha_nominal=alpha(units, items=items_of(units), **drawn),
        grade=grade,
        alpha_ordinal=alpha(graded, "ordinal", items=items_of(graded), **drawn),
        fleiss=fleiss(units),
        cohen=cohen(units),
        left=left_rate(ballots),
        places=place_rates(ballots),
        longer=longer_rate(ballots),
        raters=_raters(ballots, against_majority(units)),
        standings=bradley_terry(ballots, **drawn),
        skills=skills(ballots),
        blind=_blind(ballots),
        dropped=Counter(one.dropped for one in verdicts.values() if one.dropped is not None),
    )


def _blind(ballots: Sequence[Ballot]) -> "WinRate | None":
    if not any(sorted(one.sources) == [AFTER, BEFORE] for one in ballots):
        return None  # without loading what tells a win rate
    return blind_win_rate(ballots)


def _raters(ballots: Sequence[Ballot], majorities: dict[str, Share]) -> dict[str, Rater]:
    gold, again = gold_accuracy(ballots), repeats(ballots)
    found = {}
    for name, own in by_rater(ballots).items():
        seconds = [one.seconds for one in own if one.seconds is not None]
        found[name] = Rater(
            votes=len(own),
            skips=sum(one.choice == "skip" for one in own),
            seconds=statistics.median(seconds) if seconds else None,
            majority=majorities.get(name),
            gold=gold.get(name),
            repeats=again.get(name),
            left=left_rate(own),
        )
    return found


def _agreement(whole: Dashboard) -> list[Row]:
    measured = {
        "raw agreement": whole.raw,
        "Krippendorff alpha, nominal": whole.alpha_nominal,
        f"alpha, ordinal ({whole.grade})": whole.alpha_ordinal,
    }
    rows = [
        {"measure": name, "value": one.value, "low": one.low, "high": one.high, "items": one.num_items}
        for name, one in measured.items()
        if one is not None
    ]
    if whole.fleiss is not None:
        rows.append(
            {"measure": "Fleiss kappa", "value": whole.fleiss, "low": None, "high": None, "items": whole.num_overlapping}
        )
    return rows


def _biases(whole: Dashboard) -> list[tuple[str, Share]]:
    named = [("left", whole.left), ("longer", whole.longer)]
    found = [(name, share) for name, share in named if share is not None]
    return found + [
        (f"place {place} of {k}", share) for k, shares in whole.places.items() for place, share in enumerate(shares, 1)
    ]


def _share(share: Share | None, prefix: str = "") -> Row:
    names = ("rate", "low", "high", "count", "total")
    return {prefix + name: None if share is None else getattr(share, name) for name in names}


def _rater(name: str, rater: Rater) -> Row:
    row: Row = {"rater": name, "votes": rater.votes, "skips": rater.skips, "median seconds": rater.seconds}
    shares = {
        "majority": rater.majority,
        "gold": rater.gold,
        "repeated": None if rater.repeats is None else rater.repeats.same,
        "left": rater.left,
    }
    for what, share in shares.items():
        row |= {what: None if share is None else share.rate, f"{what} of": None if share is None else share.total}
    return row


def _standing(one: Standing, rated: Sequence[Skill]) -> Row:
    skill = next((skill for skill in rated if skill.source == one.source), None)
    return {
        "source": one.source,
        "strength": one.strength,
        "low": one.low,
        "high": one.high,
        "win rate": one.rate,
        "comparisons": one.num_comparisons,
        "ranks": f"{one.best_rank}-{one.worst_rank}",
        "openskill": None if skill is None else skill.mu,
        "openskill sigma": None if skill is None else skill.sigma,
    }


def save(whole: Dashboard, folder: str | Path) -> Path:
    """Write dashboard.json, each table as CSV and each plot as SVG, and return the folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = {"dashboard.json": whole.to_json() + "\n"}
    files |= {f"{name}.csv": as_csv(rows) for name, rows in whole.tables().items()}
    files |= {f"{name}.svg": image for name, image in whole.plots().items()}
    for name, words in files.items():
        (target / name).write_text(words, encoding="utf-8", errors="replace")
    return target


def as_csv(rows: Sequence[Row]) -> str:
    """Rows of plain values as CSV; a text or name that a spreadsheet would run as a formula is given a quote in front."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writerow({name: _safe(name) for name in rows[0]})
        writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULAS else value
