"""Export: the judgements of a project as a folder with its card, whole or absent, in the format that was asked for."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.annotation.ballots import Ballot, by_item, dense
from mmalign.annotation.card import Facts, card
from mmalign.annotation.dashboard import as_csv, dashboard
from mmalign.annotation.formats import FORMATS, Format, Judged, no_images_alone
from mmalign.annotation.judgements import CHANGED, write_judgements
from mmalign.annotation.pooling import NO_VOTES, Pooled, pool, with_verdict
from mmalign.annotation.projects import Project
from mmalign.annotation.store import Store
from mmalign.annotation.tables import CONTAINERS, readable_row
from mmalign.annotation.tally import ballots_of
from mmalign.errors import UserError
from mmalign.records import Comparison, write
from mmalign.records.verdicts import Pairs
from mmalign.records.writing import store_media

CARD = "README.md"
MARK = ".export.json"  # hidden, so that `datasets` takes it for no data


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is exported, and as what.

    Args:
        format: a name of FORMATS.
        container: parquet, jsonl or datasets; None: the format's first.
        prob: give the share of the votes as a soft label where the format has pairs.
        pairs: which pairs a list of candidates becomes.
        min_votes: items with fewer verdicts are left out, skips not counted.
        min_agreement: items whose most frequent verdict has a smaller share are left out.
        without: people whose votes are left out. Leave nobody out for disagreeing alone.
        names: tell people's names in judgements, in place of their numbers.
        replace: a folder of an earlier export may go.
    """

    format: str = "trl"
    container: str | None = None
    prob: bool = True
    pairs: Pairs = "best_worst"
    min_votes: int = 1
    min_agreement: float = 0.0
    without: tuple[str, ...] = ()
    names: bool = False
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        folder: with its card, README.md.
        path: what the importer reads: the folder, or its JSONL file.
        num_rows: of the data file.
        dropped: items that are not in it, by reason.
        importer: what `mmalign train` reads it with; None: it is not for training.
    """

    folder: Path
    path: Path
    format: str
    num_rows: int
    dropped: Counter[str]
    importer: str | None

    def __str__(self) -> str:
        """Counts, reasons, and what comes next."""
        lines = [f"{self.folder}: {self.num_rows} rows ({self.format})"]
        if self.dropped:
            lines.append(f"  items left out: {_reasons(self.dropped)}")
        if self.importer:
            lines.append(f"next: mmalign train ... data.importer.name={self.importer} data.importer.path={self.path}")
        return "\n".join(lines)


@dataclass(kw_only=True)
class _Work:
    """One export under way."""

    store: Store
    project: Project
    settings: Settings
    format: Format
    container: str
    ballots: list[Ballot]
    people: dict[str, str]
    dropped: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_item = by_item(self.ballots)
        self.verdicts = pool(self.ballots)

    def judged(self, media: bool) -> Iterator[Judged]:
        """Items that people gave a verdict on, in the order of the data; what is left out here is counted anew."""
        self.dropped.clear()
        for item in self.store.items(self.project.id, media=media):
            if item.role != "ordinary":
                self.dropped[f"{item.role} item, whose answer was known"] += 1
                continue
            verdict = self.verdicts.get(str(item.id))
            if verdict is None or (reason := self._unwanted(verdict)) is not None:
                self.dropped[NO_VOTES if verdict is None else str(reason)] += 1
                continue
            if not item.is_intact():
                self.dropped[CHANGED] += 1
                continue
            yield Judged(
                row=readable_row(item.comparison),
                verdict=verdict,
                ballots=[one for one in self.by_item[str(item.id)] if not one.repeat],
                prob=self.settings.prob,
                pairs=self.settings.pairs,
            )

    def _unwanted(self, verdict: Pooled) -> str | None:
        if verdict.num_votes < self.settings.min_votes:
            return NO_VOTES if not verdict.num_votes else f"fewer than {self.settings.min_votes} votes"
        if (verdict.agreement or 0.0) < self.settings.min_agreement:
            return f"agreement below {self.settings.min_agreement:g}"
        return None

    def rows(self, media: bool) -> Iterator[dict[str, Any]]:
        """Rows of the format."""
        assert self.format.rows is not None
        for judged in self.judged(media):
            outcome = self.format.rows(judged)
            if isinstance(outcome, str):
                self.dropped[outcome] += 1
            else:
                self.columns |= {name for row in outcome for name, value in row.items() if value is not None}
                yield from outcome


def export(store: Store, project: int, folder: str | Path, settings: Settings) -> Exported:
    """Write a folder with the judgements of a project and its card; it is whole or absent.

    Args:
        store: with the project.
        project: its number.
        folder: a new or empty one, or, with `replace`, one that an earlier export wrote.
        settings: what, and as what.

    Raises:
        UserError: no such format for this kind of project, nobody of that name, nothing judged, a folder of something else.
    """
    target = Path(folder).expanduser()
    known = store.project(project)
    format, container = _checked(settings, known.kind)
    _check_folder(target, settings.replace)
    ballots = ballots_of(store, project)
    people = _people(store, project)
    unknown = [name for name in settings.without if name not in people]
    if unknown:
        raise UserError(f"without: got {unknown[0]!r}, want people who voted: {', '.join(people) or 'there are none'}.")
    kept = [one for one in ballots if one.rater not in settings.without]
    work = _Work(
        store=store,
        project=known,
        settings=settings,
        format=format,
        container=container,
        ballots=kept,
        people=people,
    )
    partial = target.absolute().with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        num_rows = _write(work, partial)
        if not num_rows:
            raise UserError(
                f"export: got no row ({_reasons(work.dropped) or 'no votes'}), want at least one. Judge more items."
            )
        _describe(work, partial, target, num_rows)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(
        folder=target,
        path=_read_path(work, target),
        format=settings.format,
        num_rows=num_rows,
        dropped=work.dropped,
        importer=format.importer,
    )


def _read_path(work: _Work, folder: Path) -> Path:
    """What an importer is told to read; rows of JSONL need not have one schema, so it reads the file line by line."""
    return folder / "train.jsonl" if work.container == "jsonl" else folder


def _checked(settings: Settings, kind: str) -> tuple[Format, str]:
    if settings.format not in FORMATS:
        raise UserError(f"format: got {settings.format!r}, want one of {', '.join(FORMATS)}.")
    format = FORMATS[settings.format]
    if kind not in format.kinds:
        fit = [name for name, one in FORMATS.items() if kind in one.kinds]
        raise UserError(f"format: got {settings.format} for a project of kind {kind}, want one of {', '.join(fit)}.")
    container = settings.container or format.containers[0]
    if container not in format.containers:
        raise UserError(
            f"container: got {container!r}, want {' or '.join(format.containers)} for the format {settings.format}."
        )
    return format, container


def _check_folder(target: Path, replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"output: got the file {target}, want a folder. Name another one.")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MARK).is_file():
            raise UserError(f"output: got {target}, which holds something else than an export, want a new folder.")
        if not replace:
            raise UserError(f"output: got {target}, which an earlier export wrote. Set replace, or name another folder.")


def _people(store: Store, project: int) -> dict[str, str]:
    """A number for each person, in the order of their first votes."""
    names = dict.fromkeys(vote.annotator for vote in store.each_vote(project, latest=False))
    return {name: f"person-{n}" for n, name in enumerate(names, 1)}


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())


def _write(work: _Work, folder: Path) -> int:
    """Write the data into the folder; return the number of rows."""
    name = work.settings.format
    if name == "comparisons":
        return _write_comparisons(work, folder)
    if name == "hpdv2":
        return _write_hpdv2(work, folder)
    if name == "judgements":
        if not work.people:
            return 0
        called = {name: name if work.settings.names else number for name, number in work.people.items()}
        kept = {name: told for name, told in called.items() if name not in work.settings.without}
        return write_judgements(work.store, work.project, folder, kept, suffix=work.container)
    if name == "csv":
        rows = list(work.rows(False))
        names = list(dict.fromkeys(key for row in rows for key in row))
        table = as_csv([{key: row.get(key) for key in names} for row in rows])
        (folder / "items.csv").write_text(table, encoding="utf-8", errors="replace")
        return len(rows)
    counted = work.format.counted(work.rows) if work.format.counted else work.rows
    return CONTAINERS[work.container](counted, folder, "train") if any(True for _ in work.rows(False)) else 0


def _write_comparisons(work: _Work, folder: Path) -> int:
    counted = 0

    def rows() -> Iterator[Comparison]:
        nonlocal counted
        for judged in work.judged(True):
            if judged.verdict.ranks is None:
                work.dropped[str(judged.verdict.dropped)] += 1
                continue
            counted += 1
            row = with_verdict(judged.row, judged.verdict)
            if not work.settings.prob:
                row = replace(row, prob=None)
            note = {"annotation": judged.facts}
            origins = row.provenance or ({},) * len(row.candidates)
            yield replace(row, provenance=tuple({**origin, **note} for origin in origins))

    if work.container == "datasets":
        write(rows(), folder, format="arrow", replace=True)
    else:
        write(rows(), folder / f"train.{work.container}")
    return counted


def _write_hpdv2(work: _Work, folder: Path) -> int:
    """train.json with its images in train/: human_preference of pairs, rank of lists, and each person's own."""
    entries = []
    for judged in work.judged(True):
        verdict, row = judged.verdict, judged.row
        if problem := (None if verdict.ranks is not None else verdict.dropped) or no_images_alone(judged):
            work.dropped[problem] += 1
            continue
        assert verdict.ranks is not None  # else it was dropped
        paths = [store_media(content.images[0], folder / "train") for content in row.candidates]
        own = [
            {"user_hash": work.people[one.rater], "rank": [rank - 1 for rank in dense(one.ranks)]}
            for one in judged.ballots
            if one.ranks is not None and one.choice != "both_bad"
        ]
        entry: dict[str, Any] = {"id": row.id, "prompt": row.prompt.text, "raw_annotations": own, **judged.facts}
        if len(paths) == 2:
            first, second = verdict.ranks
            entry |= {"file_path": paths, "human_preference": [int(first <= second), int(second <= first)]}
        else:
            levels = sorted(set(verdict.ranks))
            entry |= {"image_path": paths, "rank": [levels.index(rank) for rank in verdict.ranks]}
        entries.append(entry)
    (folder / "train.json").write_text(
        json.dumps(entries, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace"
    )
    return len(entries)


def _describe(work: _Work, folder: Path, target: Path, num_rows: int) -> None:
    """Write the card, and beside it what the export was told to do."""
    num_items = work.store.progress(work.project.id).items
    settings = asdict(work.settings)
    facts = Facts(
        title=work.project.name,
        kind=work.project.kind,
        format=work.settings.format,
        told=work.format.told,
        num_rows=num_rows,
        dropped=work.dropped,
        importer=work.format.importer,
        path=str(_read_path(work, Path(target.name))),
        excluded=len(work.settings.without),
        guideline_version=work.store.guideline(work.project.id).version,
        columns=frozenset(work.columns),
    )
    whole = dashboard(work.ballots, num_items=num_items, seed=work.project.id)
    (folder / CARD).write_text(card(facts, whole, work.project.protocol), encoding="utf-8", errors="replace")
    told = {"settings": {**settings, "without": len(work.settings.without)}, "rows": num_rows, "dropped": dict(work.dropped)}
    (folder / MARK).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
