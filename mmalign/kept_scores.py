"""What judges have said in an evaluation that is under way: one that was killed goes on where it was."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
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
    """`finite_scores` with a memory on disk, of groups of images: the same judge, settings, prompts and pixels score once."""

    def __init__(self, journal: Path, settings: Mapping[str, Any]) -> None:
        """Read what a killed run has left.

        Args:
            journal: the file; it is written from the first scores on.
            settings: of each judge, by its name, as JSON values: other settings are another judge.
        """
        self.journal, self.settings = journal, settings
        gather_parts(journal)
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        self.known: dict[str, list[float]] = {entry["group"]: entry["scores"] for entry in map(json.loads, lines)}
        if self.known:
            logger.info("%s: %d groups of images are judged already", journal, len(self.known))

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

    def forget(self) -> None:
        """Remove the file: the evaluation is done, and the next one judges anew."""
        self.journal.unlink(missing_ok=True)

    def _group(self, name: str, prompts: Sequence[str], images: Sequence[Image]) -> str:
        digest = hashlib.sha256(json.dumps([name, self.settings.get(name), list(prompts)], sort_keys=True).encode())
        for image in images:
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest()
