"""Data methods: small functions that choose, relabel and pair what models are trained on; a table for each of three verbs."""

from collections.abc import Callable

from mmalign.curation.filters import FILTERS
from mmalign.curation.judge import language_model
from mmalign.curation.judging import PairJudge
from mmalign.curation.pairings import PAIRINGS
from mmalign.curation.relabels import RELABELS

__all__ = ["FILTERS", "JUDGES", "PAIRINGS", "RELABELS", "PairJudge", "language_model"]

JUDGES: dict[str, Callable[..., PairJudge]] = {"language_model": language_model}
