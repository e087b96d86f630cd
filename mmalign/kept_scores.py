"""What judges have said in an evaluation that is under way: one that was killed goes on where it was."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.config import check_folder
from mmalign.records.journal import gather_parts
from mmalign.scorers import Scorer, TextScorer, finite_scores

logger = logging.getLogger(__name__)


class KeptScores:
    """`finite_scores` with a memory on disk, of groups of images: the same judge, settings, prompts and pixels score once.

    A context: the file outlives a kill and an interrupt alone. After an error, which may be the judge's, the next evaluation
    judges anew, as it does after one that is done.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Read what a killed run has left.

        Args:
            output: what the evaluation writes in the end; the file `OUTPUT.scores.jsonl` beside it is written from the first
                scores on.
            settings: of each judge, by its name, as JSON values: other settings are another judge; see `identity`.
        """
        place = Path(os.path.abspath(output))
        self.journal = journal = place.parent / f"{place.name}.scores.jsonl"
        self.settings = settings
        gather_parts(journal)
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        self.known: dict[str, list[float]] = {entry["group"]: entry["scores"] for entry in map(json.loads, lines)}
        if self.known:
            logger.warning(
                "%s: %d groups of images are judged already, in an evaluation that was stopped. Delete the file to judge anew.",
                journal,
                len(self.known),
            )

    def __enter__(self) -> "KeptScores":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove the file, unless the evaluation is stopped from outside."""
        if kind is None or issubclass(kind, Exception):
            self.journal.unlink(missing_ok=True)

    def __call__(
        self, scorer: Scorer | TextScorer, prompts: Sequence[str], images: Sequence[Image], places: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """The scores of a group, on disk before they are returned; arguments as of `finite_scores`."""
        group = self._group(scorer.name, prompts, images)
        if group not in self.known:
            self.known[group] = finite_scores(scorer, prompts, images, places).double().tolist()
            check_folder(self.journal.parent)
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            with open(self.journal, "a", encoding="utf-8") as file:
                file.write(json.dumps({"group": group, "scores": self.known[group]}) + "\n")
        return torch.tensor(self.known[group], dtype=torch.float64)

    def _group(self, name: str, prompts: Sequence[str], images: Sequence[Image]) -> str:
        digest = hashlib.sha256(json.dumps([name, self.settings.get(name), list(prompts)], sort_keys=True).encode())
        for image in images:
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()


def identity(judge: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and size and time of change of the files behind them: what is mended at the same place is another judge.

    The files are the modules of the judge and of the addresses in its settings, and the files, or folders of files, that its
    settings name. Contents are not read: a setting may name gigabytes.

    Args:
        judge: as built, without a label.
        settings: of the judge, as JSON values.
    """
    texts = list(_texts(settings))
    names = {type(judge).__module__, *(text.partition(":")[0] for text in texts if ":" in text)}
    modules = (getattr(sys.modules.get(name), "__file__", None) for name in sorted(names))
    places = [*filter(None, modules), *(os.path.expanduser(text) for text in texts)]
    return {**settings, "files": {place: list(_stamps(place)) for place in places if os.path.exists(place)}}


def _texts(value: Any) -> Iterator[str]:
    """The texts among JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _stamps(place: str) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of what lies in a folder."""
    inside = sorted(os.listdir(place)) if os.path.isdir(place) and os.access(place, os.R_OK) else [""]
    for name in inside:
        path = os.path.join(place, name) if name else place
        if os.path.exists(path):  # not so a link into nothing
            found = os.stat(path)
            yield name, found.st_size, found.st_mtime_ns
