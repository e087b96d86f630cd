"""Exams of models that see, marked without a judge: answers in files beside a benchmark's own files, in its published form."""

from collections.abc import Callable

from mmalign.exams.choices import multiple_choice
from mmalign.exams.objects import chair
from mmalign.exams.refusing import vlguard
from mmalign.exams.yes_no import amber, pope

__all__ = ["EXAMS", "amber", "chair", "multiple_choice", "pope", "vlguard"]

EXAMS: dict[str, Callable[..., dict[str, float]]] = {
    "pope": pope,
    "amber": amber,
    "chair": chair,
    "vlguard": vlguard,
    "multiple_choice": multiple_choice,
}
