"""Scorers of handwritten digits: an annotator and a held-out judge that share neither scans nor model class."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image, Resampling
from torch import Tensor

from mmalign.errors import UserError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANNOTATOR_ROWS = slice(1, None, 2)  # odd rows of sklearn's load_digits
JUDGE_ROWS = slice(0, None, 2)  # even rows: disjoint from the annotator's
SCAN_SIDE = 8
SCAN_MAXIMUM = 16.0  # load_digits counts ink in 4x4 blocks: 0 to 16


@dataclass(frozen=True, kw_only=True)
class DigitLegibility:
    """Log-probability of the prompted digit under the annotator (see `digit_legibility`)."""

    name: str = "digit_legibility"

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Nats, at most 0. Raises UserError for a prompt that names no digit, or more than one."""
        digits = [prompted_digit(prompt) for prompt in prompts]
        if not digits:
            return torch.zeros(0)
        logps = torch.from_numpy(fitted_annotator().predict_log_proba(_scans(images)))
        return logps.gather(1, torch.tensor(digits)[:, None]).squeeze(1).float()


@dataclass(frozen=True, kw_only=True)
class DigitJudge:
    """1 where the held-out judge reads the prompted digit, else 0 (see `digit_judge`)."""

    name: str = "digit_judge"

    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """1.0 or 0.0 per image. Raises UserError for a prompt that names no digit, or more than one."""
        digits = [prompted_digit(prompt) for prompt in prompts]
        if not digits:
            return torch.zeros(0)
        read = torch.from_numpy(fitted_judge().predict(_scans(images)))
        return (read == torch.tensor(digits)).float()


def digit_legibility() -> DigitLegibility:
    """The annotator: log-probability, in nats, of the prompted digit.

    log softmax(W x + b)[digit],  multinomial logistic regression with C = 0.01 on the odd rows of sklearn's load_digits

    Image to x: greyscale, box filter to 8x8, times 16/255: the scale of the scans (0 paper, 16 ink; ink is bright).
    The generated images are not quantised to whole numbers as the scans are. Fitted once per process, in about 0.1 s.
    """
    return DigitLegibility()


def digit_judge() -> DigitJudge:
    """The held-out judge: 1 if it reads the prompted digit, else 0; its mean is prompt correctness.

    argmax of SVC(gamma=0.001) fitted on the even rows of sklearn's load_digits

    Preprocessing as `digit_legibility`. It shares no scan and no model class with the annotator.
    """
    return DigitJudge()


def prompted_digit(prompt: str) -> int:
    """The digit that a caption such as `a handwritten digit seven` asks for.

    Raises:
        UserError: no English digit word, or two different ones.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    named = {DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS}
    if len(named) != 1:
        got = "no digit" if not named else f"{len(named)} digits"
        raise UserError(
            f"prompt {prompt!r}: got {got}, want one of {', '.join(DIGIT_WORDS)}. "
            "Use the digit scorers only on captions such as 'a handwritten digit seven'."
        )
    return named.pop()


@functools.cache
def fitted_annotator() -> Any:
    """Logistic regression fitted on ANNOTATOR_ROWS of load_digits; one fit per process."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    scans, digits = load_digits(return_X_y=True)
    return LogisticRegression(C=0.01, max_iter=2000).fit(scans[ANNOTATOR_ROWS], digits[ANNOTATOR_ROWS])


@functools.cache
def fitted_judge() -> Any:
    """Support vector classifier fitted on JUDGE_ROWS of load_digits; one fit per process."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    scans, digits = load_digits(return_X_y=True)
    return SVC(gamma=0.001).fit(scans[JUDGE_ROWS], digits[JUDGE_ROWS])


def _scans(images: Sequence[Image]) -> np.ndarray[Any, np.dtype[np.float64]]:
    small = [image.convert("RGB").convert("L").resize((SCAN_SIDE, SCAN_SIDE), Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in small]) * (SCAN_MAXIMUM / 255)
