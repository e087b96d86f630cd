"""The report of an evaluation: what was found, as a table, as one HTML page and as a grid of images."""

from mmalign.report.alarm import RULE, OverOptimisation
from mmalign.report.drift import training_drift
from mmalign.report.findings import Checkpoint, Curve, Evaluation, PairFit, ScorerChange, TrainingDrift, scorer_change
from mmalign.report.grid import before_after_grid, checkpoint_grid, chosen_places
from mmalign.report.page import report_page
from mmalign.report.tasks import TaskChange, task_changes

__all__ = [
    "RULE",
    "Checkpoint",
    "Curve",
    "Evaluation",
    "OverOptimisation",
    "PairFit",
    "ScorerChange",
    "TaskChange",
    "TrainingDrift",
    "before_after_grid",
    "checkpoint_grid",
    "chosen_places",
    "report_page",
    "scorer_change",
    "task_changes",
    "training_drift",
]
