"""The report of an evaluation: what was found, as a table, as one HTML page and as a grid of images."""

from mmalign.report.findings import Curve, Evaluation, PairFit, ScorerChange, TrainingDrift
from mmalign.report.grid import before_after_grid, chosen_places
from mmalign.report.page import report_page
from mmalign.report.tasks import TaskChange, task_changes

__all__ = [
    "Curve",
    "Evaluation",
    "PairFit",
    "ScorerChange",
    "TaskChange",
    "TrainingDrift",
    "before_after_grid",
    "chosen_places",
    "report_page",
    "task_changes",
]
