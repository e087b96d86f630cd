"""What a run reports about preferences, under TRL's names in every modality, and how numbers of many batches become one."""

from mmalign.metrics.logbook import forget_after, peak_memory
from mmalign.metrics.preferences import preference_metrics
from mmalign.metrics.ranking import (
    flip_threshold,
    idealised_margin,
    idealised_ranking_accuracy,
    k3,
    ranking_accuracy,
)
from mmalign.metrics.sums import Sums, add, averages, table

__all__ = [
    "Sums",
    "add",
    "averages",
    "flip_threshold",
    "forget_after",
    "idealised_margin",
    "idealised_ranking_accuracy",
    "k3",
    "peak_memory",
    "preference_metrics",
    "ranking_accuracy",
    "table",
]
