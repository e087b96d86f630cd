"""Results by task: for a scorer whose prompts fall into kinds, the mean of each kind before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.statistics import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class TaskChange:
    """One judge's scores of the prompts of one task.

    Args:
        name: the task.
        num_pairs: of images.
        mean_before, mean_after: in units of the score; for a check that passes or fails, the share that passes.
        difference_low, difference_high: 95 % bootstrap interval of the mean paired difference.
    """

    name: str
    num_pairs: int
    mean_before: float
    mean_after: float
    difference_low: float
    difference_high: float


def task_changes(tasks: Sequence[str], before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> tuple[TaskChange, ...]:
    """The scores of each task by themselves, tasks in the order in which they first appear.

    Args:
        tasks: of each pair.
        before, after: the scores of each pair.
    """
    changes = []
    for name in dict.fromkeys(tasks):
        chosen = torch.tensor([task == name for task in tasks])
        old, new = before[chosen], after[chosen]
        low, high = bootstrap_interval(new - old)
        changes.append(
            TaskChange(
                name=name,
                num_pairs=len(old),
                mean_before=float(old.mean()),
                mean_after=float(new.mean()),
                difference_low=low,
                difference_high=high,
            )
        )
    return tuple(changes)


def mean_over_tasks(tasks: Sequence[TaskChange]) -> tuple[float, float]:
    """Before and after, each task counting alike however many prompts it has."""
    count = len(tasks)
    return sum(task.mean_before for task in tasks) / count, sum(task.mean_after for task in tasks) / count


def plain_tasks(tasks: Sequence[TaskChange]) -> dict[str, Any]:
    """For results.json; nothing where there are no tasks."""
    if not tasks:
        return {}
    before, after = mean_over_tasks(tasks)
    named = {task.name: {name: value for name, value in vars(task).items() if name != "name"} for task in tasks}
    return {"tasks": named, "mean_over_tasks_before": before, "mean_over_tasks_after": after}


def task_lines(judges: Mapping[str, Sequence[TaskChange]]) -> list[str]:
    """For the terminal: a line for each task of each judge that has tasks, and their mean."""
    lines = []
    for judge, tasks in judges.items():
        if not tasks:
            continue
        wide = max(len(task.name) for task in tasks)
        before, after = mean_over_tasks(tasks)
        lines += ["", f"{judge} by task, before and after; mean over tasks {before:.3f} -> {after:.3f}"]
        lines += [
            f"  {task.name.ljust(wide)}   {task.mean_before:.3f} -> {task.mean_after:.3f}   "
            f"({task.difference_low:+.3f} to {task.difference_high:+.3f}; {task.num_pairs} pairs)"
            for task in tasks
        ]
    return lines


def task_table(judges: Mapping[str, Sequence[TaskChange]]) -> str:
    """For the page: a table for each judge that has tasks."""
    parts = []
    for judge, tasks in judges.items():
        if not tasks:
            continue
        means = mean_over_tasks(tasks)
        rows = "".join(
            f"<tr><td>{escape(task.name.replace('_', ' '))}</td><td>{task.num_pairs}</td><td>{task.mean_before:.3f}</td>"
            f"<td>{task.mean_after:.3f}</td><td>{_signed(task.mean_after - task.mean_before)}"
            f"<br><small>{_signed(task.difference_low)} to {_signed(task.difference_high)}</small></td></tr>"
            for task in tasks
        )
        parts.append(
            f"<h2>{escape(judge)} by task</h2>\n"
            f'<p class="soft">Mean over tasks {means[0]:.3f} before, {means[1]:.3f} after; each task counts alike.</p>\n'
            '<div class="wide"><table><thead><tr><th></th><th>pairs</th><th>before</th><th>after</th><th>difference</th>'
            f"</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "\n".join(parts)


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return "0" if float(text) == 0 else text.replace("-", "−")  # noqa: RUF001
