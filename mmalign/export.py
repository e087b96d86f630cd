"""`mmalign export`: the judgements of an annotation project as a data set that can be trained on, with its card."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mmalign.annotation.dashboard import save
from mmalign.annotation.export import Exported, Settings, export
from mmalign.annotation.projects import Project
from mmalign.annotation.store import Store
from mmalign.annotation.tally import dashboard_of
from mmalign.config import command_line
from mmalign.errors import UserError
from mmalign.records.verdicts import Pairs


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `mmalign export` reads, and what it writes.

    Args:
        store: the database of `mmalign annotate`: the path of its SQLite file, or a postgresql:// URL.
        project: its name; needed where the database has several.
        output: folder: new, empty, or with replace of an earlier export.
        format: comparisons (all candidates with pooled ranks and prob), trl (prompt, chosen, rejected), unpaired (for KTO),
            ranked, pick_a_pic, hpdv2, csv, or judgements: every vote with every revision.
        container: parquet, jsonl with its media beside it, or datasets (a folder of `datasets.load_from_disk`).
        prob: give the share of the votes as a soft label; losses that know none take no notice.
        pairs: which pairs a list of three candidates or more becomes.
        min_votes: items with fewer verdicts are left out and counted.
        min_agreement: items whose most frequent verdict has a smaller share of the votes are left out and counted.
        without: people whose votes are left out. Leave nobody out for disagreeing alone.
        names: tell people's names in judgements, in place of numbers.
        dashboard: also write agreement, biases and rankings as tables and plots, into output/dashboard.
        replace: an earlier export in output goes.
    """

    store: str = field(metadata={"positional": True})
    project: str | None = None
    output: str
    format: Literal["comparisons", "trl", "unpaired", "ranked", "pick_a_pic", "hpdv2", "csv", "judgements"] = "trl"
    container: Literal["parquet", "jsonl", "datasets"] | None = None
    prob: bool = True
    pairs: Pairs = "best_worst"
    min_votes: int = 1
    min_agreement: float = 0.0
    without: tuple[str, ...] = ()
    names: bool = False
    dashboard: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that leave everything or nothing out."""
        if self.min_votes < 1:
            raise ValueError(f"min_votes: got {self.min_votes}, want 1 or more.")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement: got {self.min_agreement}, want a share from 0 to 1.")


def main(config: ExportConfig) -> Exported:
    """Write the folder, and say how many rows it has and what was left out.

    Raises:
        UserError: no such database or project, nothing judged, a folder of something else.
    """
    if "://" not in config.store and not Path(config.store).expanduser().is_file():
        raise UserError(f"store: got {config.store}, want the database of `mmalign annotate`. Check the path.")
    store = Store.open(config.store)
    try:
        project = _project(store, config.project)
        names = Settings.__dataclass_fields__
        settings = Settings(**{name: value for name, value in asdict(config).items() if name in names})
        done = export(store, project.id, config.output, settings)
        if config.dashboard:
            save(dashboard_of(store, project.id), done.folder / "dashboard")
    finally:
        store.close()
    return done


def _project(store: Store, name: str | None) -> Project:
    projects = store.projects()
    found = [one for one in projects if name in (None, one.name)]
    if len(found) != 1:
        known = ", ".join(one.name for one in projects) or "there are none"
        got = "no name" if name is None else repr(name)
        raise UserError(f"project: got {got}, want one of the database: {known}.")
    return found[0]


if __name__ == "__main__":
    sys.exit(command_line(ExportConfig, main))
