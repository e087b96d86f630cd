"""`mmalign pairs`: lists of candidates become pairs, in stages from easy to hard; or two models' answers do."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mmalign.config import Choice, Table, command_line
from mmalign.curation import PAIRINGS
from mmalign.curation.edits import noted, order_labels
from mmalign.curation.pairings import Pair, paired
from mmalign.curation.predictions import predictions
from mmalign.curation.two_models import delta_pairs
from mmalign.errors import UserError
from mmalign.records import Comparison, Dropped
from mmalign.row_files import Curated, Rows, check_any, check_output, check_place, read_rows, source_of, write_rows

STAGE = "{stage}"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Answers of two models to the same prompts: tables (JSONL, JSON, Parquet, CSV) with a prompt and an answer a row.

    Args:
        chosen: the stronger model's, or fresh answers that saw a user's feedback (DRIFT).
        rejected: the weaker model's, or the answers that users disliked.
        prompt: column of the prompt: a text or a list of messages.
        answer: column of the answer; none: the first of completion, response, output, answer.
    """

    chosen: str
    rejected: str
    prompt: str = "prompt"
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """What `mmalign pairs` reads, how it makes pairs, and where they go.

    Args:
        path: comparisons in one of our own formats; or
        data: an importer with its settings; or
        predictions: two models' answers, for which no judge is needed (delta learning).
        method: how candidates of a row become pairs.
        output: .parquet, .jsonl, .tar or a folder; with `{stage}` in it one file a stage: `pairs-{stage}.parquet`.
        dry_run: count only.
    """

    path: str | None = field(default=None, metadata={"positional": True})
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = None
    predictions: Predictions | None = None
    method: Annotated[Choice, Table(PAIRINGS)] | None = None
    output: str
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if self.predictions is None and self.method is None:
            raise ValueError(f"method: got none, want one of {', '.join(PAIRINGS)}; or set predictions.")
        if self.predictions is not None and (self.method is not None or self.path is not None or self.data is not None):
            raise ValueError("predictions: got path, data or method too, which are for lists of candidates. Remove them.")
        if self.predictions is not None and STAGE in self.output:
            raise ValueError("output: got {stage}, but pairs of two models have no stages. Name one file.")


def main(config: PairsConfig) -> Curated:
    """Make pairs, the better candidate first, with scores and provenance; the stage stands in the provenance.

    Raises:
        UserError: no usable row, a judge that nobody is, no pair, an output that would destroy other data.
    """
    if config.predictions is not None:
        return _of_two_models(config, config.predictions)
    assert config.method is not None  # checked with the config
    sources = [source_of(config.path, config.data)]
    _, report = check_output(config.output.replace(STAGE, "1"), sources, "pairs")
    rows = read_rows(config.path, config.data)
    outcomes: Sequence[tuple[Pair, ...] | Dropped] = config.method.build(rows.outlines)
    dropped = Counter(one.reason for one in outcomes if isinstance(one, Dropped))
    found = [(n, pair) for n, one in enumerate(outcomes) if not isinstance(one, Dropped) for pair in one]
    check_any(len(found), dropped, rows.faults)
    files = _by_file(config.output, found, config.method.name)
    for path in files:
        check_place(path, sources, replace=report.exists())
    result = Curated(
        made="pairs",
        files={path: len(some) for path, some in files.items()},
        report=report,
        num_rows=len(rows.outlines),
        dropped=dropped,
        faults=rows.faults,
        told=_stages([pair for _, pair in found]),
        dry_run=config.dry_run,
    )
    if not config.dry_run:
        write_rows(result, {path: _whole(rows, some, config.method.name) for path, some in files.items()}, config)
    return result


def _whole(rows: Rows, found: Sequence[tuple[int, Pair]], method: str) -> Iterable[Comparison]:
    return (paired(rows.whole(number), pair, method) for number, pair in found)


def _by_file(output: str, found: Sequence[tuple[int, Pair]], method: str) -> dict[Path, list[tuple[int, Pair]]]:
    """The pairs of each file: all in one, easy ones first, or one file a stage."""
    ordered = sorted(found, key=lambda one: one[1].stage or 0)
    if STAGE not in output:
        return {Path(output).expanduser(): ordered}
    files: dict[Path, list[tuple[int, Pair]]] = {}
    for number, pair in ordered:
        if pair.stage is None:
            raise UserError(f"output: got {{stage}}, but {method} has no stages. Name one file, or method curriculum.")
        files.setdefault(Path(output.replace(STAGE, str(pair.stage))).expanduser(), []).append((number, pair))
    return files


def _stages(pairs: Sequence[Pair]) -> tuple[str, ...]:
    counts = Counter(pair.stage for pair in pairs if pair.stage is not None)
    return tuple(f"stage {stage}: {counts[stage]} pairs" for stage in sorted(counts))


def _of_two_models(config: PairsConfig, named: Predictions) -> Curated:
    """Pairs of the answers to each prompt that both models answered.

    Source: the delta learning hypothesis (arXiv 2507.06187).
    """
    output, report = check_output(config.output, [named.chosen, named.rejected], "pairs")
    chosen, rejected = (predictions(path, named.prompt, named.answer) for path in (named.chosen, named.rejected))
    found = delta_pairs(chosen.answers, rejected.answers)
    alone = {"no rejected answer": set(chosen.answers) - set(rejected.answers)}
    alone["no chosen answer"] = set(rejected.answers) - set(chosen.answers)
    both = len(chosen.answers) - len(alone["no rejected answer"])
    dropped = Counter({reason: len(keys) for reason, keys in alone.items() if keys} | {"same answer": both - len(found)})
    dropped += Counter()  # counts of 0 go
    faults = (*chosen.faults, *rejected.faults)
    check_any(len(found), dropped, faults)
    pairs = [
        noted(
            Comparison(
                id=f"pair-{number}",
                prompt=chosen.prompts[key],
                candidates=(better, worse),
                provenance=({"predictions": named.chosen}, {"predictions": named.rejected}),
                **order_labels(True),
            ),
            {"pairs": "predictions", "from": chosen.places[key]},
        )
        for number, (key, better, worse) in enumerate(found, 1)
    ]
    result = Curated(
        made="pairs",
        files={output: len(pairs)},
        report=report,
        num_rows=len(set(chosen.answers) | set(rejected.answers)),
        dropped=dropped,
        faults=faults,
        dry_run=config.dry_run,
    )
    if not config.dry_run:
        write_rows(result, {output: pairs}, config)
    return result


if __name__ == "__main__":
    sys.exit(command_line(PairsConfig, main))
