"""Rows: Comparison, Judgement and what views make of them, as typed values."""

import difflib
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from mmalign.errors import UserError
from mmalign.records.media import Media


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is shown or said: a text, images, or both.

    A video is either one file of several frames (GIF, WebP, APNG, MP4, WebM), or several images: its frames in order.
    """

    text: str | None = None
    images: tuple[Media, ...] = ()

    def key(self) -> str:
        """Return a hash of the encoded images: that of the file itself where there is one."""
        keys = [media.key() for media in self.images]
        return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()

    def num_frames(self) -> int:
        """Return the number of frames: of the one file, or of images.

        Raises:
            UserError: the file is missing or damaged.
        """
        return self.images[0].num_frames() if len(self.images) == 1 else len(self.images)

    def frames(self, count: int | None = None) -> list[Image]:
        """Decode the first `count` frames, or all, as RGB.

        Raises:
            UserError: a file is missing or damaged, or the images are not of one size.
        """
        if len(self.images) == 1:
            return self.images[0].frames(count)
        frames = [media.open() for media in self.images[:count]]
        other = next((n for n, frame in enumerate(frames) if frame.size != frames[0].size), None)
        if other is not None:
            sizes = " and ".join(f"{width} x {height}" for width, height in (frames[0].size, frames[other].size))
            raise UserError(f"{self.images[other].place()}: got frames of {sizes} in one video, want one size. Resize them.")
        return frames


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt with k >= 2 candidates in the order they were made, and what is known about their order.

    Args:
        scores: judge name -> one score a candidate, higher is better, in the judge's own units.
        ranks: one rank a candidate; 1 is best, equal is a tie.
        prob: P(candidate 0 beats candidate 1), pairs only; 0.5 is a tie.
        weight: weight of the row in the loss. None is 1.
        margin: by how much the better one is better, in reward units. None is 0.
        provenance: one dict a candidate (model, seed, guidance_scale ...), or empty.
        where: file and row it came from, for messages. Not part of equality.
    """

    id: str
    prompt: Content
    candidates: tuple[Content, ...]
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ranks: tuple[float, ...] | None = None
    prob: float | None = None
    weight: float | None = None
    margin: float | None = None
    provenance: tuple[dict[str, Any], ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judge's verdict on one comparison; verdicts are appended, never changed. A scorer is a judge that gives scores.

    Args:
        comparison: id of the comparison.
        judge: who judged: a person's or a scorer's name.
        ranks: 1 is best, equal is a tie. Either ranks or scores.
        scores: one a candidate, higher is better.
        details: anything else worth keeping (seconds, shown order, version).
    """

    comparison: str
    judge: str
    ranks: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One complete thing a model can be asked the likelihood of."""

    prompt: Content
    completion: Content


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one loss term sees: k samples, best first, and side data under the names of the losses' data parameters."""

    id: str
    samples: tuple[Sample, ...]
    side: dict[str, float | tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A view's answer for a row that it does not use, with the reason: `tie`, `not judged by ...`."""

    reason: str


@dataclass(frozen=True)
class Fault:
    """One unusable row: where it is and what is wrong, in one sentence."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Return `where: problem`."""
        return f"{self.where}: {self.problem}"


def faults_of(value: Comparison, least: int = 2) -> list[str]:
    """Return what is wrong with a comparison, one sentence a fault; an empty list when nothing is.

    Args:
        least: candidates it must have; below 2 for single images and prompts alone, in which nothing is compared.
    """
    k = len(value.candidates)
    problems = []
    if not (value.prompt.text or "").strip() and not value.prompt.images:
        problems.append("got an empty prompt, want a text. Write one or remove the row.")
    if k < least:
        problems.append(
            f"got {k} candidate{'s' if k != 1 else ''}, want at least {least}. Add the missing one or remove the row."
        )
    for n, candidate in enumerate(value.candidates, 1):
        if candidate.text is None and not candidate.images:
            problems.append(f"candidate {n} has neither text nor image. Add one or remove the row.")
    numbers = {f"scores of {judge}": values for judge, values in value.scores.items()}
    if value.ranks is not None:
        numbers["ranks"] = value.ranks
    for name, values in numbers.items():
        if len(values) != k:
            problems.append(f"got {len(values)} {name} for {k} candidates, want one each.")
        elif not all(v is not None and math.isfinite(v) for v in values):
            problems.append(f"got {name} {tuple(values)}, want finite numbers. Judge the row again or remove it.")
    if value.provenance and len(value.provenance) != k:
        problems.append(f"got {len(value.provenance)} provenance entries for {k} candidates, want one each.")
    return problems + _fault_of_order(value, k) + _faults_of_side(value)


def _fault_of_order(value: Comparison, k: int) -> list[str]:
    if value.prob is None:
        return []
    if k != 2:
        return [f"got prob for {k} candidates; prob is P(candidate 1 beats candidate 2). Give ranks instead."]
    if not 0 <= value.prob <= 1:
        return [f"got prob {value.prob}, want a probability from 0 to 1 (0.5 for a tie). Correct the label."]
    if value.ranks is not None and len(value.ranks) == 2:
        by_ranks = (value.ranks[0] < value.ranks[1]) - (value.ranks[0] > value.ranks[1])
        by_prob = (value.prob > 0.5) - (value.prob < 0.5)
        if by_ranks != by_prob:
            return [f"prob {value.prob} and ranks {value.ranks} disagree. Keep the one that is right."]
    return []


def _faults_of_side(value: Comparison) -> list[str]:
    return [
        f"got {name} {number}, want a finite number that is not negative."
        for name, number in (("weight", value.weight), ("margin", value.margin))
        if number is not None and not (math.isfinite(number) and number >= 0)
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean x?` for the nearest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""
