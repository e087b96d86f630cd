"""What a model has said of rows, on disk as it says it, so that an interrupted run goes on."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.records import Comparison, Judgement, append_judgements, read_judgements


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Verdicts of one judge with one set of settings. Rows are known by what is said in them, not by their ids.

    Args:
        journal: JSONL of judgements; None remembers nothing.
        judge: its name.
        settings: what its verdicts depend on, plain values.
    """

    journal: Path | None
    judge: str
    settings: dict[str, Any]

    def known(self) -> dict[str, dict[str, Any]]:
        """Key of a row -> the details of its verdict, its scores among them.

        Raises:
            UserError: a line of the journal is no verdict.
        """
        if self.journal is None or not self.journal.exists():
            return {}
        every = (one for verdicts in read_judgements(self.journal).values() for one in verdicts)
        return _by_key(one for one in every if one.judge == self.judge and one.details.get("settings") == self.settings)

    def add(
        self, rows: Sequence[Comparison], scores: Sequence[tuple[float, ...]], details: Sequence[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Append verdicts, and return them as `known` does."""
        new = [
            Judgement(
                comparison=row.id,
                judge=self.judge,
                scores=values,
                details={**more, "content": key_of(row), "settings": self.settings},
            )
            for row, values, more in zip(rows, scores, details, strict=True)
        ]
        if self.journal is not None:
            append_judgements(self.journal, new)
        return _by_key(new)


def _by_key(verdicts: Iterable[Judgement]) -> dict[str, dict[str, Any]]:
    return {str(one.details["content"]): {**one.details, "scores": one.scores} for one in verdicts}


def key_of(row: Comparison) -> str:
    """A key of all that is said in a row, images left out."""
    contents = (row.prompt, *(row.prompts or ()), *row.candidates)
    said: list[Any] = [
        [c.text, [(m.role, m.text, m.name, m.tool_calls, m.extra) for m in c.messages], c.tools] for c in contents
    ]
    said += [c.template_kwargs for c in contents if c.template_kwargs]
    return hashlib.sha256(json.dumps([len(row.candidates), row.prefix, said], sort_keys=True).encode()).hexdigest()[:16]
