"""How much a model's answers owe to the image, from log-probabilities and answers with and without it: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.metrics.refusals import REFUSALS, refuses
from mmalign.statistics import bootstrap, wilson

# --- one number ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A mean over `number` cases with its 95 % interval; of no case there is none."""

    value: float | None
    low: float | None
    high: float | None
    number: int


def mean_of(values: Float[Tensor, " n"]) -> Measure:
    """The mean, with its bootstrap interval."""
    return _measure(values, bootstrap)


def share_of(outcomes: Float[Tensor, " n"]) -> Measure:
    """The share of outcomes, each 1, 0 or one half, with Wilson's interval."""
    return _measure(outcomes, wilson)


def _measure(values: Tensor, interval: Callable[[Tensor], tuple[float, float]]) -> Measure:
    if not len(values):
        return Measure(value=None, low=None, high=None, number=0)
    low, high = interval(values)
    return Measure(value=float(values.double().mean()), low=low, high=high, number=len(values))


# --- a number a row -----------------------------------------------------------------------------------------------------


def blind_gap(shown: Float[Tensor, " n"], absent: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What the image adds to an answer's log-probability: log pi(w | x, v) - log pi(w | x).

    About 0 for a model that answers from the text alone, whatever the image shows.

    Args:
        shown, absent: summed log-probabilities of the chosen answers in nats, with the prompt's images and without them.
    """
    return shown - absent


def per_token(sums: Float[Tensor, " n"], tokens: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sums over an answer's tokens as means over them: of log-probabilities, and of divergences.

    image sensitivity = 1/T sum_t KL(pi(. | x, v, w_<t) || pi(. | x, w_<t)),  over the whole vocabulary

    Args:
        sums: over the scored tokens of each answer, in nats.
        tokens: how many they are.
    """
    return sums / tokens


def unchanged(answers: Sequence[str], others: Sequence[str]) -> Float[Tensor, " n"]:
    """1 where a greedy answer stays the same, word for word, when the image is taken away or exchanged; else 0."""
    return torch.tensor([float(a.strip() == b.strip()) for a, b in zip(answers, others, strict=True)], dtype=torch.float64)


def declined(answers: Sequence[str], phrases: Sequence[str] = REFUSALS) -> Float[Tensor, " n"]:
    """1 where an answer declines by keywords (`metrics.refusals`), else 0."""
    return torch.tensor([float(refuses(answer, phrases)) for answer in answers], dtype=torch.float64)


def in_order(chosen: Float[Tensor, " n"], others: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1 where the chosen answer has more (reward, or log-probability) than the other one, one half where as much, else 0."""
    return (chosen > others).double() + 0.5 * (chosen == others).double()


# --- what was measured of a row -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """Summed log-probabilities of a row's answers under one model, in nats.

    Args:
        chosen, rejected, blind: with the prompt's images.
        absent: of the chosen one without them; None: nothing is asked beside them.
        divergence: sum over its tokens of KL(pi(. | x, v) || pi(. | x)); None as `absent`.
    """

    chosen: float
    rejected: tuple[float, ...] = ()
    blind: tuple[float, ...] = ()
    absent: float | None = None
    divergence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's greedy answers to a row's prompt.

    Args:
        own: with its images.
        tokens, ended: of it; whether it came to an end by itself.
        dropped: without images; None: nothing is asked beside them.
        swapped: with another row's; None: there is no other.
        safe: with safe images in place of its own; None: it needs none, or there are none.
    """

    own: str
    tokens: int
    ended: bool
    dropped: str | None = None
    swapped: str | None = None
    safe: str | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one model makes of a row: log-probabilities where there is a chosen answer, answers where they were asked for."""

    fit: Likelihoods | None = None
    said: Answers | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row under the base and under the tuned model.

    Args:
        base, tuned: what they make of it.
        lengths: scored tokens of the chosen answer, of rejected and of blind ones.
        declines: whether the chosen answer declines by keywords; None: there is none.
    """

    base: Side
    tuned: Side
    lengths: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())
    declines: bool | None = None


# --- what was measured of all -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measure of both models.

    Args:
        name: of the measure; `unit` is share, or what it is in.
        base, tuned: of each model; None: it is not defined for it, as rewards are not for the base.
        change: mean of tuned less base over the same cases.
        why: what is missing where there was nothing to measure.
    """

    name: str
    unit: str
    base: Measure | None
    tuned: Measure | None
    change: Measure | None
    why: str = ""

    @property
    def measured(self) -> bool:
        """Whether there was a case."""
        return self.tuned is not None and self.tuned.number > 0


Values = Callable[[Side, Case], Iterable[float] | None]  # of a row under one model; None: nothing to measure

NO_BLIND = "no row has a blind answer, as mmalign blind makes them"
NO_REJECTED = "no row has a rejected answer beside one that is best"
NO_CHOSEN = "no row has one best answer and words beside its images"


def sight_lines(cases: Sequence[Case], phrases: Sequence[str] = REFUSALS) -> list[Line]:
    """Every measure, in the order of a table.

    Args:
        cases: rows under both models.
        phrases: what a refusal is told by.
    """
    most = max((len(case.lengths[1]) for case in cases), default=0)
    lines = [
        _line(cases, "blind_gap", "nats", lambda s, c: _gap(s), NO_CHOSEN),
        _line(cases, "blind_gap_per_token", "nats", lambda s, c: _over_tokens(_gap(s), c), NO_CHOSEN),
        _line(cases, "image_sensitivity", "nats", lambda s, c: _over_tokens(_divergence(s), c), NO_CHOSEN),
        *_ranked(cases, "rejected", lambda fit: fit.rejected, NO_REJECTED),
        *_ranked(cases, "blind", lambda fit: fit.blind, NO_BLIND),
    ]
    for number in range(most if most > 1 else 0):
        lines += _rewarded(cases, f"rejected_{number + 1}", _nth(number), NO_REJECTED)
    return [*lines, *_of_answers(cases, phrases)]


def data_lines(cases: Sequence[Case]) -> dict[str, Measure]:
    """Tokens of the chosen answers of the data, of rejected and of blind ones."""
    names = ("chosen", "rejected", "blind")
    found = {f"length/{name}": [float(n) for case in cases for n in case.lengths[i]] for i, name in enumerate(names)}
    return {name: mean_of(torch.tensor(values, dtype=torch.float64)) for name, values in found.items()}


def _of_answers(cases: Sequence[Case], phrases: Sequence[str]) -> list[Line]:
    none = "no answers were asked for: max_new_tokens is 0"
    no_safe = "no row whose chosen answer declines, or no safe image of another"

    def told(value: str | None) -> list[float] | None:
        return None if value is None else declined([value], phrases).tolist()

    def same(said: Answers, other: str | None) -> list[float] | None:
        return None if other is None else unchanged([said.own], [other]).tolist()

    def of(read: Callable[[Answers, Case], list[float] | None]) -> Values:
        return lambda side, case: None if side.said is None else read(side.said, case)

    asked = any(case.tuned.said is not None for case in cases)
    rows: list[tuple[str, str, Callable[[Answers, Case], list[float] | None], str]] = [
        ("blind_agreement/dropped", "share", lambda a, c: same(a, a.dropped), "no prompt has words beside its images"),
        ("blind_agreement/swapped", "share", lambda a, c: same(a, a.swapped), "no row has an image that another one has not"),
        ("refusal_rate", "share", lambda a, c: told(a.own), ""),
        (
            "refusal_rate/chosen_declines",
            "share",
            lambda a, c: told(a.own) if c.declines else None,
            "no chosen answer declines",
        ),
        (
            "over_refusal_rate/chosen_answers",
            "share",
            lambda a, c: told(a.own) if c.declines is False else None,
            "every chosen answer declines",
        ),
        ("over_refusal_rate/safe_swap", "share", lambda a, c: told(a.safe), no_safe),
        ("answer_length", "tokens", lambda a, c: [float(a.tokens)], ""),
        ("answers_cut", "share", lambda a, c: [float(not a.ended)], ""),
    ]
    return [_line(cases, name, unit, of(read), why if asked else none) for name, unit, read, why in rows]


def _ranked(cases: Sequence[Case], name: str, others: Callable[[Likelihoods], Sequence[float]], why: str) -> list[Line]:
    """Order by log-probability under each model, then accuracy and margin of the tuned one's rewards."""

    def order(side: Side, case: Case) -> Iterable[float] | None:
        if side.fit is None:
            return None
        values = torch.tensor(others(side.fit), dtype=torch.float64)
        found: list[float] = in_order(torch.full_like(values, side.fit.chosen), values).tolist()
        return found

    return [_line(cases, f"ranking/accuracy_{name}", "share", order, why), *_rewarded(cases, name, others, why)]


def _rewarded(cases: Sequence[Case], name: str, others: Callable[[Likelihoods], Sequence[float]], why: str) -> list[Line]:
    """Accuracy and margin of the rewards log pi - log ref of (chosen, other)."""
    margins: list[float] = []
    for case in cases:
        if case.base.fit is not None and case.tuned.fit is not None:
            chosen = case.tuned.fit.chosen - case.base.fit.chosen
            pairs = zip(others(case.tuned.fit), others(case.base.fit), strict=True)
            margins += [chosen - (tuned - base) for tuned, base in pairs]
    values = torch.tensor(margins, dtype=torch.float64)
    right = share_of(in_order(values, torch.zeros_like(values)))
    kinds = (("accuracies", "share", right), ("margins", "nats", mean_of(values)))
    return [
        Line(name=f"rewards/{kind}_{name}", unit=unit, base=None, tuned=found, change=None, why=why)
        for kind, unit, found in kinds
    ]


def _line(cases: Sequence[Case], name: str, unit: str, values: Values, why: str) -> Line:
    """A measure of both models and its change, over the rows that both have."""
    both: list[tuple[list[float], list[float]]] = []
    for case in cases:
        base, tuned = values(case.base, case), values(case.tuned, case)
        if base is not None and tuned is not None:
            both.append((list(base), list(tuned)))
    of = share_of if unit == "share" else mean_of
    sides = [torch.tensor([value for pair in both for value in pair[n]], dtype=torch.float64) for n in (0, 1)]
    return Line(name=name, unit=unit, base=of(sides[0]), tuned=of(sides[1]), change=mean_of(sides[1] - sides[0]), why=why)


def _gap(side: Side) -> list[float] | None:
    if side.fit is None or side.fit.absent is None:
        return None
    shown, absent = (torch.tensor([value], dtype=torch.float64) for value in (side.fit.chosen, side.fit.absent))
    found: list[float] = blind_gap(shown, absent).tolist()
    return found


def _divergence(side: Side) -> list[float] | None:
    return None if side.fit is None or side.fit.divergence is None else [side.fit.divergence]


def _over_tokens(sums: list[float] | None, case: Case) -> list[float] | None:
    if sums is None:
        return None
    found: list[float] = per_token(
        torch.tensor(sums, dtype=torch.float64), torch.tensor([float(case.lengths[0][0])], dtype=torch.float64)
    ).tolist()
    return found


def _nth(number: int) -> Callable[[Likelihoods], Sequence[float]]:
    return lambda fit: fit.rejected[number : number + 1]


# --- how it is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SightFindings:
    """What the exam `sight` found.

    Args:
        lines: every measure of both models.
        data: what the answers of the data are.
        num_rows: rows measured.
        left_out: rows that were not, by reason.
        notes: on what was measured, in sentences.
    """

    lines: tuple[Line, ...]
    data: dict[str, Measure]
    num_rows: int
    left_out: dict[str, int]
    notes: tuple[str, ...] = ()

    def results(self) -> dict[str, Any]:
        """Plain numbers; what there was nothing to measure for is null, with why."""
        return {
            "num_rows": self.num_rows,
            "left_out": self.left_out,
            "notes": list(self.notes),
            "data": {name: _plain(one) for name, one in self.data.items()},
            "measures": {
                line.name: {
                    "unit": line.unit,
                    "base": _plain(line.base),
                    "tuned": _plain(line.tuned),
                    "change": _plain(line.change),
                    **({} if line.measured else {"why": line.why}),
                }
                for line in self.lines
            },
        }

    def told(self) -> list[str]:
        """The table, what was not measured, and the data."""
        head = [("", "base", "tuned", "change", "number")]
        rows = [
            (_title(line), *(_shown(one, line.unit) for one in (line.base, line.tuned, line.change)), str(line.tuned.number))
            for line in self.lines
            if line.tuned is not None and line.measured
        ]
        wide = [max(len(row[n]) for row in (*head, *rows)) for n in range(5)]
        table = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in (*head, *rows)]
        lengths = ", ".join(
            f"{name.removeprefix('length/')} {one.value:.1f} ({one.number})"
            for name, one in self.data.items()
            if one.value is not None
        )
        return [
            f"{self.num_rows} rows with images",
            *(f"  {number} left out: {reason}" for reason, number in self.left_out.items()),
            *(line.rstrip() for line in table),
            *([f"  tokens of the answers of the data: {lengths}"] if lengths else []),
            *(f"  not measured: {line.name} ({line.why})" for line in self.lines if not line.measured),
            *(f"  {note}" for note in self.notes),
        ]


def _title(line: Line) -> str:
    return line.name if line.unit == "share" else f"{line.name}, {line.unit}"


def _shown(one: Measure | None, unit: str) -> str:
    if one is None or one.value is None or one.low is None or one.high is None:
        return "-"
    if unit == "share":
        return f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]"
    return f"{one.value:.4g} [{one.low:.4g}, {one.high:.4g}]"


def _plain(one: Measure | None) -> dict[str, float | int | None] | None:
    return None if one is None else {"value": one.value, "low": one.low, "high": one.high, "number": one.number}
