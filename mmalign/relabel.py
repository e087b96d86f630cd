"""`mmalign relabel`: new labels for rows: by a vote of judges, a judge in both orders, two models' likelihoods, or a goal."""

import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

from mmalign.config import Choice, Table, command_line
from mmalign.curation import RELABELS
from mmalign.curation.edits import Relabelled, edited
from mmalign.records import Dropped
from mmalign.records.journal import gather_parts
from mmalign.row_files import Curated, check_any, check_output, read_rows, source_of, write_rows


@dataclass(frozen=True, kw_only=True)
class RelabelConfig:
    """What `mmalign relabel` reads, how it labels, and where the rows go.

    Args:
        path: comparisons in one of our own formats; or data.
        data: an importer with its settings.
        method: how rows are labelled.
        output: .parquet, .jsonl, .tar or a folder. A report stands beside it; a judge's verdicts are kept as they are given in
            `<output>.judgements.jsonl`, from which an interrupted run goes on.
        dry_run: count only; a judge is not asked but for what it has not said before, which then is kept.
    """

    path: str | None = field(default=None, metadata={"positional": True})
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = None
    method: Annotated[Choice, Table(RELABELS)]
    output: str
    dry_run: bool = False


def main(config: RelabelConfig) -> Curated:
    """Write the rows with the labels that a method gives them; those it gives none are left out and counted.

    Raises:
        UserError: no usable row, a judge that nobody is or that cannot judge, an output that would destroy other data.
    """
    output, report = check_output(config.output, [source_of(config.path, config.data)], "relabel")
    rows = read_rows(config.path, config.data)
    found: Relabelled = config.method.build(rows.outlines, **_journal(config, output))
    dropped = Counter(one.reason for one in found.outcomes if isinstance(one, Dropped))
    edits = [(n, edit) for n, one in enumerate(found.outcomes) if not isinstance(one, Dropped) for edit in one]
    check_any(len(edits), dropped, rows.faults)
    result = Curated(
        made="relabelled rows",
        files={output: len(edits)},
        report=report,
        num_rows=len(rows.outlines),
        dropped=dropped,
        faults=rows.faults,
        told=found.told,
        dry_run=config.dry_run,
    )
    if not config.dry_run:
        made = (edited(rows.whole(number), edit, config.method.name) for number, edit in edits)
        write_rows(result, {output: made}, config)
    return result


def _journal(config: RelabelConfig, output: Any) -> dict[str, Any]:
    """The journal of verdicts, for methods that name it among their data."""
    if "journal" not in inspect.signature(config.method.target).parameters:
        return {}
    journal = output.with_name(output.name + ".judgements.jsonl")
    journal.parent.mkdir(parents=True, exist_ok=True)
    gather_parts(journal)
    return {"journal": journal}


if __name__ == "__main__":
    sys.exit(command_line(RelabelConfig, main))
