"""Judgements without loss: every revision of every vote, every item as it was added, and what was asked, as files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmalign.annotation.projects import Project
from mmalign.annotation.store import Store
from mmalign.annotation.tables import readable_row, write_jsonl, write_parquet
from mmalign.annotation.votes import Vote
from mmalign.records import Comparison, write

CHANGED = "an image that is gone, or was changed since it was added"


def write_judgements(store: Store, project: Project, folder: Path, people: Mapping[str, str], *, suffix: str) -> int:
    """Write judgements.*, items.* and project.json into a folder; return the number of votes.

    Items bear their number in the store as id, which votes call `item`; the id that a row has in the data is the votes' `id`.
    Items whose files are gone or changed are named in project.json alone; their votes stay.

    Args:
        people: name of each person whose votes are told -> what to call them.
        suffix: parquet or jsonl.
    """

    def rows(media: bool) -> Iterator[dict[str, Any]]:
        for vote in store.each_vote(project.id, latest=False):
            if vote.annotator in people:
                yield judgement_row(vote, people[vote.annotator])

    count = (write_jsonl if suffix == "jsonl" else write_parquet)(rows, folder, "judgements")
    roles: dict[str, dict[str, Any]] = {}

    def items() -> Iterator[Comparison]:
        for item in store.items(project.id):
            told = {"id": item.comparison.id, "role": item.role, "answer": item.answer, "want": item.want}
            roles[str(item.id)] = told | ({} if (intact := item.is_intact()) else {"left_out": CHANGED})
            if intact:
                yield readable_row(replace(item.comparison, id=str(item.id)))

    write(items(), folder / f"items.{suffix}")
    versions = [asdict(store.guideline(project.id, n + 1)) for n in range(store.guideline(project.id).version)]
    told = {
        "name": project.name,
        "kind": project.kind,
        "protocol": json.loads(project.protocol.to_json()),
        "guidelines": versions,
        "items": roles,
    }
    (folder / "project.json").write_text(
        json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace"
    )
    return count


def judgement_row(vote: Vote, annotator: str) -> dict[str, Any]:
    """Return all of a vote as one row: the verdict in the order of the data, the same as it was shown, and how it came about.

    Args:
        vote: any revision.
        annotator: what to call the person.
    """
    row: dict[str, Any] = {"annotator": annotator, "id": vote.comparison}
    for name in ("choice", "strength", "ranks", "aspects", "flags"):
        row[name] = _listed(getattr(vote.verdict, name))
        row[f"shown_{name}"] = _listed(getattr(vote.shown, name))
    kept = ("item", "assignment", "revision", "is_latest", "kind", "repeats", "late", "surplus", "dwell_ms")
    times = ("leased_at", "displayed_at", "submitted_at", "guideline_version", "app_version")
    rest = {name: getattr(vote, name) for name in (*kept, *times)}
    return {**row, "rationale": vote.verdict.rationale, "order": list(vote.order), "answer": vote.answer, **rest}


def _listed(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return {name: _listed(one) for name, one in value.items()} if hasattr(value, "items") else value
