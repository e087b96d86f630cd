"""`mmalign select`: the rows that are worth training on, by filters one after the other.

`mmalign rank` with `select` picks candidates, expert images; this picks rows.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

from mmalign.config import Choice, Table, command_line
from mmalign.curation import FILTERS
from mmalign.curation.edits import noted
from mmalign.row_files import Curated, check_any, check_output, read_rows, source_of, write_rows


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """What `mmalign select` reads, which filters rows must pass, and where those that do go.

    Args:
        path: comparisons in one of our own formats; or data.
        data: an importer with its settings.
        filters: one or more, in this order: each sees what those before it left.
        output: .parquet, .jsonl, .tar or a folder. A report stands beside it.
        dry_run: count only.
    """

    path: str | None = field(default=None, metadata={"positional": True})
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = None
    filters: tuple[Annotated[Choice, Table(FILTERS)], ...]
    output: str
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not self.filters:
            raise ValueError(f"filters: got none, want at least one of {', '.join(FILTERS)}.")


def main(config: SelectConfig) -> Curated:
    """Keep the rows that pass every filter, as they are, with the filters named in their provenance.

    Raises:
        UserError: no usable row, a judge that nobody is, no row that passes, an output that would destroy other data.
    """
    output, report = check_output(config.output, [source_of(config.path, config.data)], "select")
    rows = read_rows(config.path, config.data)
    left = list(range(len(rows.outlines)))
    dropped: Counter[str] = Counter()
    for one in config.filters:
        reasons = one.build([rows.outlines[number] for number in left])
        dropped.update(reason for reason in reasons if reason is not None)
        left = [number for number, reason in zip(left, reasons, strict=True) if reason is None]
    check_any(len(left), dropped, rows.faults)
    result = Curated(
        made="kept",
        files={output: len(left)},
        report=report,
        num_rows=len(rows.outlines),
        dropped=dropped,
        faults=rows.faults,
        dry_run=config.dry_run,
    )
    if not config.dry_run:
        names = [one.name for one in config.filters]
        whole = (rows.whole(number) for number in left)
        write_rows(result, {output: (noted(row, {"select": names, "from": row.where}) for row in whole)}, config)
    return result


if __name__ == "__main__":
    sys.exit(command_line(SelectConfig, main))
