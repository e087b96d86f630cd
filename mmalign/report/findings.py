"""What an evaluation found: its numbers for results.json, its warnings in plain sentences, its table for the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmalign.report.alarm import OverOptimisation, over_optimisation
from mmalign.report.lengths import TextChange
from mmalign.report.tasks import TaskChange, plain_tasks, task_lines
from mmalign.statistics import WinRate, bootstrap_interval, effect_size, first_and_last, win_rate

DIVERSITY_LOSS = 0.20  # a larger fall is told as a warning


@dataclass(frozen=True, kw_only=True)
class ScorerChange:
    """One judge's scores of the same prompts and seeds before and after.

    Args:
        name: the judge.
        held_out: it took no part in making the preferences, so its gain is evidence.
        win_rate: ties half; a tie is a difference of at most eps.
        eps: in units of the score.
        mean_before, mean_after: in units of the score.
        difference_low, difference_high: 95 % bootstrap interval of the mean paired difference.
        effect_size: mean paired difference over its standard deviation, None where undefined.
        tasks: the same by kind of prompt, for a judge that knows kinds.
    """

    name: str
    held_out: bool
    win_rate: WinRate
    eps: float
    mean_before: float
    mean_after: float
    difference_low: float
    difference_high: float
    effect_size: float | None
    tasks: tuple[TaskChange, ...] = ()


def scorer_change(
    name: str,
    old: Float[Tensor, " n"],
    new: Float[Tensor, " n"],
    *,
    eps: float,
    interval: str,
    held_out: bool,
    tasks: tuple[TaskChange, ...] = (),
) -> ScorerChange:
    """Compare one judge's scores; arguments as the fields of ScorerChange, `interval` a name in statistics.INTERVALS."""
    low, high = bootstrap_interval(new - old)
    return ScorerChange(
        name=name,
        held_out=held_out,
        win_rate=win_rate(old, new, eps=eps, interval=interval),
        eps=eps,
        mean_before=float(old.mean()),
        mean_after=float(new.mean()),
        difference_low=low,
        difference_high=high,
        effect_size=effect_size(old, new),
        tasks=tasks,
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's images of the same prompts and seeds, each judge's change counted from before training."""

    step: int
    scorers: tuple[ScorerChange, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity over the steps of training."""

    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def ends(self) -> tuple[float, float]:
        """Mean of the first and of the last tenth."""
        return first_and_last(self.values)


@dataclass(frozen=True, kw_only=True)
class TrainingDrift:
    """How training moved, from its metrics.

    Args:
        accuracy: share of training pairs whose implicit rewards are in order.
        chosen_error, rejected_error: denoising error above the reference's, mse - ref mse; preferring means that rejected
            rises above chosen, and both rising means that the model unlearns winners too.
    """

    accuracy: Curve | None = None
    chosen_error: Curve | None = None
    rejected_error: Curve | None = None

    @property
    def last_step(self) -> int | None:
        """The last step that was measured."""
        return max((int(curve.steps[-1]) for curve in self.named().values()), default=None)

    def named(self) -> dict[str, Curve]:
        """The curves there are, under the names of results.json."""
        curves = {
            "implicit_reward_accuracy": self.accuracy,
            "chosen_error_drift": self.chosen_error,
            "rejected_error_drift": self.rejected_error,
        }
        return {name: curve for name, curve in curves.items() if curve is not None}


@dataclass(frozen=True, kw_only=True)
class PairFit:
    """How the tuned model orders held-out preference pairs.

    Args:
        num_draws: (timestep, noise) draws that each pair was averaged over; 1 of language models, which need none.
        accuracy: share of pairs whose chosen image has the higher implicit reward, ties half, with its interval.
        chosen_drift, rejected_drift: mean error above the base model's.
        num_tied_labels: pairs that were left out because their label is a tie.
        error: what the error is, in words.
    """

    num_draws: int
    accuracy: WinRate
    chosen_drift: float
    rejected_drift: float
    num_tied_labels: int = 0
    error: str = "denoising error"

    def left_out(self) -> str:
        """Say how many pairs were left out, or nothing."""
        return f"{self.num_tied_labels} pairs whose label is a tie were left out" if self.num_tied_labels else ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Two sets of images or texts on the same prompts and seeds, compared.

    Args:
        num_pairs, num_prompts: how much was compared.
        interval: how the win rates' intervals were made, a name in statistics.INTERVALS.
        scorers: every judge, the one that decides first, held-out ones last.
        diversity_before, diversity_after: see statistics.diversity; None with one image a prompt.
        contrast_before, contrast_after: see statistics.pixel_std; None of texts.
        training: where a training run was given.
        pairs: where held-out pairs were given.
        checkpoints: in the order of their steps, where images of checkpoints were given.
        last_step: of the images after training, where it is known.
        texts: lengths and variety, where texts were compared.
    """

    num_pairs: int
    num_prompts: int
    interval: str
    scorers: tuple[ScorerChange, ...]
    diversity_before: float | None
    diversity_after: float | None
    contrast_before: float | None
    contrast_after: float | None
    training: TrainingDrift | None = None
    pairs: PairFit | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    last_step: int | None = None
    texts: TextChange | None = None

    @property
    def candidates(self) -> str:
        """What was compared, in a word."""
        return "images" if self.texts is None else "answers"

    @property
    def headline(self) -> ScorerChange:
        """The first scorer: its win rate is the result."""
        return self.scorers[0]

    @property
    def held_out(self) -> ScorerChange | None:
        """The first held-out judge: its mean is the fidelity."""
        return next((scorer for scorer in self.scorers if scorer.held_out), None)

    @property
    def diversity_change(self) -> float | None:
        """Relative: -0.2 is a fall by a fifth. None where there is no diversity to lose."""
        if not self.diversity_before or self.diversity_after is None:
            return None
        return self.diversity_after / self.diversity_before - 1

    @property
    def over_optimisation(self) -> OverOptimisation | None:
        """The alarm; None where no judge was held out."""
        return over_optimisation(self)

    def mean_curves(self) -> dict[str, Curve]:
        """Each judge's mean over the checkpoints, from before training to after it where its step is known."""
        curves = {}
        for place, judge in enumerate(self.scorers):
            steps = [0, *(one.step for one in self.checkpoints)]
            means = [judge.mean_before, *(one.scorers[place].mean_after for one in self.checkpoints)]
            if self.last_step is not None and self.last_step not in steps:
                steps, means = [*steps, self.last_step], [*means, judge.mean_after]
            curves[judge.name] = Curve(steps=tuple(map(float, steps)), values=tuple(means))
        return curves if self.checkpoints else {}

    def warnings(self) -> list[str]:
        """What a reader of the win rate must know, each a plain sentence or two."""
        alarm = self.over_optimisation
        found = [str(alarm)] if alarm is not None and alarm.found else []
        lost = self.diversity_change
        if lost is not None and lost < -DIVERSITY_LOSS:
            found.append(
                f"Diversity fell by {-100 * lost:.0f} %: images of one prompt have become more alike, which is how collapse "
                "begins. Lower the learning rate or train fewer steps."
            )
        for judge in self.scorers:
            if judge.held_out and judge.mean_after < judge.mean_before:
                found.append(
                    f"The held-out judge {judge.name} fell from {judge.mean_before:.3f} to {judge.mean_after:.3f}: "
                    f"whatever the other scorers say, the {self.candidates} did not get better in its eyes."
                )
        if self.held_out is None:
            found.append(
                "No held-out judge was given: a scorer that shaped the preferences cannot show that their gain is real."
            )
        rate = self.headline.win_rate
        if rate.high < 0.5:
            found.append(f"The {self.candidates} after training lose against those before in the eyes of {self.headline.name}.")
        if rate.low <= 0.5 <= rate.high:
            found.append(
                f"The interval of the win rate by {self.headline.name} contains 50 %: no difference is shown. "
                "Compare more prompts and seeds, or train longer."
            )
        if self.texts is not None:
            found += self.texts.warnings()
        if self.pairs is not None and min(self.pairs.chosen_drift, self.pairs.rejected_drift) > 0:
            guard = "Set adapter.winner_guard, lower" if self.texts is None else "Lower"
            found.append(
                f"On held-out pairs the {self.pairs.error} rose for chosen and rejected {self.candidates} alike: the model "
                f"unlearns both. {guard} the learning rate, or train fewer steps."
            )
        return found

    def results(self) -> dict[str, Any]:
        """Plain numbers for results.json; the top level holds what most readers want."""
        rate, judge = self.headline.win_rate, self.held_out
        return {
            "win_rate": rate.rate,
            "low": rate.low,
            "high": rate.high,
            "fidelity_before": None if judge is None else judge.mean_before,
            "fidelity_after": None if judge is None else judge.mean_after,
            "diversity_before": self.diversity_before,
            "diversity_after": self.diversity_after,
            "contrast_before": self.contrast_before,
            "contrast_after": self.contrast_after,
            **({} if self.texts is None else {"texts": self.texts.results()}),
            "num_pairs": self.num_pairs,
            "num_prompts": self.num_prompts,
            "interval": self.interval,
            "scorers": {scorer.name: _plain(scorer) for scorer in self.scorers},
            "over_optimisation": None if self.over_optimisation is None else self.over_optimisation.results(),
            "checkpoints": [
                {"step": one.step, "scorers": {scorer.name: _plain(scorer) for scorer in one.scorers}}
                for one in self.checkpoints
            ],
            "last_step": self.last_step,
            "training": None if self.training is None else _ends(self.training.named()),
            "held_out_pairs": None if self.pairs is None else _plain_pairs(self.pairs),
            "warnings": self.warnings(),
        }

    def __str__(self) -> str:
        """The table for the terminal: one row a scorer, then spread, training and warnings."""
        rows: list[tuple[str, ...]] = [("", "before", "after", "win rate", "95 % interval", "effect", "won / tied / lost")]
        rows += [_row(scorer) for scorer in self.scorers]
        if self.diversity_before is not None and self.diversity_after is not None:
            rows.append(("diversity", f"{self.diversity_before:.3f}", f"{self.diversity_after:.3f}", *[""] * 4))
        if self.contrast_before is not None and self.contrast_after is not None:
            rows.append(("contrast", f"{self.contrast_before:.3f}", f"{self.contrast_after:.3f}", *[""] * 4))
        rows += [(*row, *[""] * 4) for row in ([] if self.texts is None else self.texts.rows())]
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"{self.num_pairs} pairs from {self.num_prompts} prompts, the same prompts and seeds before and after", ""]
        for row in rows:
            cells = [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:], wide[1:], strict=True))]
            lines.append("   ".join(cells).rstrip())
        lines += [] if self.texts is None else self.texts.lines()
        lines += task_lines({scorer.name: scorer.tasks for scorer in self.scorers})
        for name, curve in self.mean_curves().items():
            points = ", ".join(f"{value:.3f} at {step:g}" for step, value in zip(curve.steps, curve.values, strict=True))
            lines += ["", f"{name} over the steps of training: {points}"]
        if self.training is not None:
            lines.append("")
            for name, (first, last) in _ends(self.training.named()).items():
                lines.append(f"{name.replace('_', ' ')}: {first:.4g} in the first tenth of training, {last:.4g} in the last")
        if self.pairs is not None:
            fit = self.pairs
            lines += [
                "",
                f"held-out pairs: implicit-reward accuracy {percent(fit.accuracy.rate)} "
                f"({100 * fit.accuracy.low:.1f} to {percent(fit.accuracy.high)}), "
                f"{fit.error} above the base {fit.chosen_drift:+.2e} chosen, {fit.rejected_drift:+.2e} rejected"
                + (f"; {fit.left_out()}" if fit.left_out() else ""),
            ]
        if self.warnings():
            lines += ["", *(f"Note: {warning}" for warning in self.warnings())]
        return "\n".join(lines)


def percent(share: float) -> str:
    """A share as `97.5 %`."""
    return f"{100 * share:.1f} %"


def _row(scorer: ScorerChange) -> tuple[str, ...]:
    rate = scorer.win_rate
    return (
        f"{scorer.name} (held out)" if scorer.held_out else scorer.name,
        f"{scorer.mean_before:.3f}",
        f"{scorer.mean_after:.3f}",
        percent(rate.rate),
        f"{100 * rate.low:.1f} to {percent(rate.high)}",
        "undefined" if scorer.effect_size is None else f"{scorer.effect_size:+.2f}",
        f"{rate.wins} / {rate.ties} / {rate.losses}",
    )


def _plain(scorer: ScorerChange) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(scorer).items() if name not in ("name", "win_rate", "tasks")},
        "win_rate": scorer.win_rate.rate,
        **{name: value for name, value in vars(scorer.win_rate).items() if name != "rate"},
        **plain_tasks(scorer.tasks),
    }


def _plain_pairs(fit: PairFit) -> dict[str, Any]:
    return {
        "implicit_reward_accuracy": fit.accuracy.rate,
        "low": fit.accuracy.low,
        "high": fit.accuracy.high,
        "chosen_error_drift": fit.chosen_drift,
        "rejected_error_drift": fit.rejected_drift,
        "num_pairs": fit.accuracy.wins + fit.accuracy.ties + fit.accuracy.losses,
        "num_tied_labels": fit.num_tied_labels,
        "num_draws": fit.num_draws,
        "error": fit.error,
    }


def _ends(curves: Mapping[str, Curve]) -> dict[str, tuple[float, float]]:
    return {name: curve.ends for name, curve in curves.items()}
