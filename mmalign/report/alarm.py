"""The over-optimisation alarm: a scorer that is trained towards rises while judges that took no part fall."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.report.findings import Evaluation, ScorerChange

RULE = (
    "at least one scorer rose and at least one held-out judge fell, each with the 95 % interval of its mean paired difference "
    "wholly on that side of 0, and no held-out judge rose so"
)


@dataclass(frozen=True, kw_only=True)
class OverOptimisation:
    """What the alarm found.

    Args:
        found: whether RULE holds for the images after training.
        risen, fallen: scorers that rose, held-out judges that fell, by RULE.
        since: first checkpoint from which on RULE holds to the end; None without such a one.
        best: step at which the mean of the first held-out judge was highest, 0 is before training; None without checkpoints.
    """

    found: bool
    risen: tuple[str, ...]
    fallen: tuple[str, ...]
    since: int | None = None
    best: int | None = None

    def results(self) -> dict[str, Any]:
        """Plain values for results.json, the rule among them."""
        return {**vars(self), "risen": list(self.risen), "fallen": list(self.fallen), "rule": RULE}

    def __str__(self) -> str:
        """The alarm in one or two sentences."""
        since = "" if self.since is None else f" since checkpoint {self.since}"
        remedy = "Stop earlier, raise beta, or lower the learning rate."
        if self.best is not None:
            remedy = f"The first held-out judge was highest at step {self.best}. {remedy}"
        return (
            f"OVER-OPTIMISATION{since}: {', '.join(self.risen)} rose while {', '.join(self.fallen)}, held out, fell: training "
            f"exploits the scorer. {remedy}"
        )


def over_optimisation(evaluation: "Evaluation") -> OverOptimisation | None:
    """Apply RULE to the images after training and to every checkpoint; None where no judge was held out."""
    judge = evaluation.held_out
    if judge is None:
        return None
    risen, fallen, found = _verdict(evaluation.scorers)
    since = None
    for one in reversed(evaluation.checkpoints if found else ()):
        if not _verdict(one.scorers)[2]:
            break
        since = one.step
    best = None
    if evaluation.checkpoints:
        means = {0: judge.mean_before}
        means |= {
            one.step: change.mean_after for one in evaluation.checkpoints for change in one.scorers if change.name == judge.name
        }
        if evaluation.last_step is not None:
            means[evaluation.last_step] = judge.mean_after
        best = max(means, key=lambda step: (means[step], -step))
    return OverOptimisation(found=found, risen=risen, fallen=fallen, since=since, best=best)


def _verdict(scorers: Sequence["ScorerChange"]) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    risen = tuple(one.name for one in scorers if not one.held_out and one.difference_low > 0)
    fallen = tuple(one.name for one in scorers if one.held_out and one.difference_high < 0)
    held_out_rose = any(one.held_out and one.difference_low > 0 for one in scorers)
    return risen, fallen, bool(risen and fallen and not held_out_rose)
