"""`mmalign exam`: mark a model that sees without a judge: POPE, AMBER, CHAIR, VLGuard, multiple choice, what images do."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mmalign.config import Choice, Table, check_folder, command_line, resolved
from mmalign.exams import EXAMS as OF_FILES
from mmalign.exams.sight import SightFindings
from mmalign.records.stamps import replace_file
from mmalign.sight import sight

EXAMS: dict[str, Callable[..., dict[str, float] | SightFindings]] = {**OF_FILES, "sight": sight}


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """Settings of `mmalign exam`."""

    exam: Annotated[Choice, Table(EXAMS)] = field(
        metadata={"help": "which one, with the files of its answers and questions; sight: with a run and held-out rows"}
    )
    output: Path | None = field(default=None, metadata={"help": "a JSON file for the marks; null: they are only told"})


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What an exam found, under the names of its measures; shares are 0 to 1."""

    exam: str
    found: dict[str, float] | SightFindings
    file: Path | None

    def __str__(self) -> str:
        """One measure a line; counts as they are, shares in per cent."""
        if isinstance(self.found, SightFindings):
            return "\n".join([self.exam, *self.found.told(), *([] if self.file is None else [str(self.file)])])
        wide = max(map(len, self.found))
        lines = [f"{self.exam}"]
        for name, value in self.found.items():
            told = f"{value:.0f}" if name.endswith("number") else f"{100 * value:.2f} %"
            lines.append(f"  {name.ljust(wide)}  {told}")
        return "\n".join([*lines, *([] if self.file is None else [str(self.file)])])


def main(config: ExamConfig) -> Marks:
    """Mark the answers of a file, or measure a run's model beside its base.

    Raises:
        UserError: files that cannot be read, or that do not go together; no such run.
    """
    if config.output is not None:
        check_folder(config.output.parent)
    found: dict[str, float] | SightFindings = config.exam.build()
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        told = {
            "exam": config.exam.name,
            "marks": found.results() if isinstance(found, SightFindings) else found,
            "config": resolved(config),
        }
        replace_file(config.output, (json.dumps(told, indent=2) + "\n").encode())
    return Marks(exam=config.exam.name, found=found, file=config.output)


if __name__ == "__main__":
    sys.exit(command_line(ExamConfig, main, prog="mmalign exam"))
