"""`mmalign rank`: scored comparisons become ranked lists for RankDPO, or a set of expert images for SFT and Diffusion-DRO."""

import hashlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.config import check_folder, command_line, resolved
from mmalign.config.writing import environment
from mmalign.errors import UserError
from mmalign.records import (
    Comparison,
    Dropped,
    Fault,
    check_target,
    comparison,
    outline_rows,
    preference_scores,
    read,
    told_faults,
    write,
)
from mmalign.records.rows import nearest
from mmalign.records.verdicts import PHI, thinned

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class Select:
    """Which images are experts.

    Args:
        judge: whose scores decide. Diffusion-DRO: HPSv2 or PickScore.
        count: experts in all, or of each prompt. Diffusion-DRO: 500 in all.
        per: `all` compares images over all prompts, `prompt` those of one prompt.
    """

    judge: str
    count: int = 500
    per: Literal["all", "prompt"] = "all"

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.count < 1:
            raise ValueError(f"count: got {self.count}, want 1 or more.")
        if self.judge == PHI:
            raise ValueError(f"judge: got {PHI}, which does not compare images of two prompts, want a scorer's name.")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What `mmalign rank` merges, whose verdicts count, and where the ranked lists go.

    Args:
        data: scored comparisons, one file or folder or several: say one a generator, on the same prompts.
        judges: whose scores count; none: all judges there are. Every candidate must have a score by each.
        rank_by: `ensemble` (phi over all judges), or one of the judges.
        merge: `prompt` makes one list of all rows of a prompt; `nth` joins the n-th row of a prompt in each file, which keeps
            repeated prompts of one file apart.
        min_gap: rows whose best and worst candidate differ by less are left out; in phi (0 to 1), or in the units of the
            judge that ranks.
        num_candidates: of every list; longer ones are thinned evenly from best to worst, shorter ones left out. None: all.
        select: write experts instead of ranked lists.
        output: .jsonl (images that lie under its folder stay where they are, others are copied beside it), .parquet, .tar or a
            folder (images inside).
    """

    data: str | tuple[str, ...] = field(metadata={"positional": True})
    judges: str | tuple[str, ...] | None = None
    rank_by: str = ENSEMBLE
    merge: Literal["prompt", "nth"] = "prompt"
    min_gap: float = 0.0
    num_candidates: int | None = None
    select: Select | None = None
    output: str

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if not self.files:
            raise ValueError("data: got none, want scored comparisons. Name at least one file.")
        named = self.named_judges
        if named is not None and (not named or PHI in named or len(set(named)) < len(named)):
            raise ValueError(f"judges: got {list(named)}, want names of scorers, each once; {PHI} is what rank makes.")
        if named is not None and self.rank_by not in (ENSEMBLE, *named):
            raise ValueError(f"rank_by: got {self.rank_by}, want {ENSEMBLE} or one of {', '.join(named)}.")
        if self.min_gap < 0:
            raise ValueError(f"min_gap: got {self.min_gap}, want 0 or more.")
        if self.num_candidates is not None and self.num_candidates < 2:
            raise ValueError(f"num_candidates: got {self.num_candidates}, want 2 or more, or null for all.")
        if self.select is not None and (self.rank_by != ENSEMBLE or self.min_gap or self.num_candidates is not None):
            raise ValueError("select: got rank_by, min_gap or num_candidates too, which are of ranked lists. Remove them.")

    @property
    def files(self) -> tuple[str, ...]:
        """The data, also of one file."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def named_judges(self) -> tuple[str, ...] | None:
        """The judges, also of one."""
        return (self.judges,) if isinstance(self.judges, str) else self.judges


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What was ranked and where it lies.

    Args:
        output: the data set; `report` beside it says from what it was made.
        num_rows: usable rows read; num_written: rows of the output.
        judges: whose scores counted.
        dropped: rows without a use, by reason.
        faults: rows that could not be used, and why.
        missing: experts that were asked for and not found.
    """

    output: Path
    report: Path
    num_rows: int
    num_written: int
    judges: tuple[str, ...]
    dropped: Counter[str]
    faults: tuple[Fault, ...]
    experts: bool = False
    missing: int = 0

    def __str__(self) -> str:
        """Counts, reasons, faults with their rows, and what comes next."""
        made = "experts" if self.experts else "ranked lists"
        lines = [f"{self.num_rows} rows, judged by {', '.join(self.judges)}: {self.num_written} {made}"]
        lines += [f"  {number} left out: {reason}" for reason, number in self.dropped.most_common()]
        if self.missing:
            lines.append(f"  {self.missing} fewer experts than asked for: there are no more images")
        if self.faults:
            lines.append(f"{len(self.faults)} rows not usable:")
            lines += [f"  {line}" for line in told_faults(self.faults)]
        read = f"mmalign train CONFIG.yaml data.importer.name=comparisons data.importer.path={self.output} data.view="
        ways = [f"{read}best"] if self.experts else [f"{read}pair  (dpo)", f"{read}ranked  (rank_dpo, other losses of lists)"]
        return "\n".join(
            [*lines, f"{self.output}", f"next: mmalign validate-data {self.output}", *(f"then: {w}" for w in ways)]
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A usable row: which table and where in it, and what it says without its media."""

    table: int
    place: int
    outline: Comparison
    prompt: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One row to be written: the rows it is made of, the candidates that stay (numbered through), and their order."""

    id: str
    rows: tuple[Row, ...]
    kept: tuple[int, ...]
    ranks: tuple[float, ...]
    phi: tuple[float, ...] | None = None


def main(config: RankConfig) -> Ranked:
    """Rank the candidates of every prompt by an ensemble of judges, or select expert images.

    phi_i = (wins of i over the other k - 1 candidates, summed over n judges, a tie is half a win) / (n (k - 1))

    A row of the output has the candidates of all its sources with provenance, the raw scores of every judge, phi under the
    name `phi`, and ranks (1 best, equal is a tie). `data.view: ranked` takes that phi as it stands. The same command writes
    the same bytes; the output is whole or absent.

    Source: RankDPO (arXiv 2410.18013), section 3.2 (Syn-Pic); experts: Diffusion-DRO (arXiv 2510.18353), section 5.

    Raises:
        UserError: no usable row, a candidate that a judge has not judged, an output that would destroy other data.
    """
    output, report = _check_output(config)
    faults: list[Fault] = []
    tables = [read(path, faults=faults) for path in config.files]
    rows = _usable(tables, faults)
    judges = _judges(config, rows, faults)
    lists = _lists(rows, config.merge)
    dropped: Counter[str] = Counter()
    missing = 0
    if config.select is not None:
        plans, missing = _experts(lists, config.select)
    else:
        outcomes = [_ranked(one, judges, config) for one in lists]
        plans = [outcome for outcome in outcomes if isinstance(outcome, Plan)]
        dropped.update(outcome.reason for outcome in outcomes if isinstance(outcome, Dropped))
    _check_plans(config, plans, dropped)
    result = Ranked(
        output=output,
        report=report,
        num_rows=len(rows),
        num_written=len(plans),
        judges=judges,
        dropped=dropped,
        faults=tuple(faults),
        experts=config.select is not None,
        missing=missing,
    )
    replaces = report.exists()
    _write_report(result, config)  # before the output, so that a killed run of a folder can be repeated
    write((_merged(plan, tables) for plan in plans), output, replace=replaces)
    return result


def _check_output(config: RankConfig) -> tuple[Path, Path]:
    """Refuse, before anything is read, an output that cannot be written or would take the place of data."""
    output = Path(config.output).expanduser()
    sources = [Path(path).expanduser().resolve() for path in config.files]
    if len(set(sources)) < len(sources):
        raise UserError(f"data: got {', '.join(config.files)}, one of them twice, want each once. Remove the copy.")
    for source in sources:
        if output.resolve().is_relative_to(source) or source.is_relative_to(output.resolve()):
            raise UserError(f"output: got {output} for the data {source}, want a place outside the data. Name another output.")
    check_folder(output.parent)
    report = output.with_name(output.name + ".ranking.json")
    check_target(output, replace=report.exists())
    return output, report


def _usable(tables: Sequence["datasets.Dataset"], faults: list[Fault]) -> list[Row]:
    rows = []
    for number, table in enumerate(tables):
        for place, entry in enumerate(outline_rows(table)):
            try:
                outline = comparison(entry)
                whole = (
                    comparison(table[place]) if any(p.media() for p in (outline.prompt, *(outline.prompts or ()))) else outline
                )
                prompt = _prompt_key(whole)
            except UserError as error:
                where = entry.get("where") or f"row {place + 1}"
                faults.append(Fault(where, str(error).removeprefix(f"{where}: ")))
            else:
                rows.append(Row(table=number, place=place, outline=outline, prompt=prompt))
    for fault in faults:
        logger.warning("%s", fault)
    return rows


def _prompt_key(row: Comparison) -> tuple[str, ...]:
    """Return what is equal for rows whose candidates answer one prompt: its words and images, and where answers begin."""
    prompts = [row.prompt.text or "", *(image.key() for image in row.prompt.images)]
    if row.prompt.messages or row.prompt.tools:
        prompts = [row.prompt.key()]
    return (*prompts, *([] if row.prefix is None else ["prefix", row.prefix]), *(p.key() for p in row.prompts or ()))


def _judges(config: RankConfig, rows: Sequence[Row], faults: Sequence[Fault]) -> tuple[str, ...]:
    """The judges that count, all of whom have judged every candidate.

    Raises:
        UserError: no rows, no judges, a judge that nobody knows, or a row that one of them has not judged.
    """
    if not rows:
        raise UserError("\n".join(["data: got no usable row, want scored comparisons.", *told_faults(faults)]))
    known = tuple(dict.fromkeys(judge for row in rows for judge in row.outline.scores if judge != PHI))
    if not known:
        raise UserError(f"{rows[0].outline.where}: got no scores, want those of at least one judge. Run `mmalign score` first.")
    wanted = (config.select.judge,) if config.select is not None else config.named_judges or known
    for name in (*wanted, *((config.rank_by,) if config.rank_by != ENSEMBLE else ())):
        if name not in known:
            raise UserError(f"judges: got {name}, want some of {', '.join(known)}.{nearest(name, known)}")
    if config.rank_by not in (ENSEMBLE, *wanted):
        raise UserError(f"rank_by: got {config.rank_by}, want {ENSEMBLE} or one of {', '.join(wanted)}.")
    lacking = [(row, judge) for row in rows for judge in wanted if judge not in row.outline.scores]
    if lacking:
        row, judge = lacking[0]
        raise UserError(
            f"{row.outline.where}: got no score by {judge}, want every candidate judged by {', '.join(wanted)} "
            f"({len(lacking)} such gaps in {len(rows)} rows). Run `mmalign score` with {judge}, or name other judges."
        )
    return wanted


def _lists(rows: Sequence[Row], merge: str) -> list[tuple[Row, ...]]:
    """The rows that become one list each, in the order in which their prompts first appear."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        key: tuple[Any, ...] = row.prompt
        if merge == "nth":
            seen[row.table, row.prompt] += 1
            key = (*row.prompt, seen[row.table, row.prompt])
        found.setdefault(key, []).append(row)
    return [tuple(group) for group in found.values()]


def _ranked(rows: tuple[Row, ...], judges: Sequence[str], config: RankConfig) -> Plan | Dropped:
    scores = {judge: _scores(rows, judge) for judge in judges}
    by = list(scores.values()) if config.rank_by == ENSEMBLE else [scores[config.rank_by]]
    phi = preference_scores(by)
    if len(set(phi)) == 1:
        return Dropped("all candidates tie")
    values = phi if config.rank_by == ENSEMBLE else by[0]
    if max(values) - min(values) < config.min_gap:
        return Dropped(f"best and worst differ by less than {config.min_gap:g}")
    kept = list(range(len(phi)))
    if config.num_candidates is not None:
        if len(phi) < config.num_candidates:
            return Dropped(f"{len(phi)} candidates, want {config.num_candidates}")
        kept = sorted(thinned(sorted(kept, key=lambda i: -phi[i]), config.num_candidates))
    ours = tuple(phi[i] for i in kept)
    ranks = tuple(1.0 + sum(other > value for other in ours) for value in ours)
    return Plan(id=_id(rows), rows=rows, kept=tuple(kept), ranks=ranks, phi=ours)


def _experts(lists: Sequence[tuple[Row, ...]], select: Select) -> tuple[list[Plan], int]:
    """One plan an expert, best first (per prompt: in the order of the prompts), and how many are lacking.

    A row holds all candidates of its prompt; rank 1 is the expert, 2 every other one. It is meant for the view `best`.
    """
    found = [
        sorted((-score, number, place) for place, score in enumerate(_scores(rows, select.judge)))
        for number, rows in enumerate(lists)
    ]
    if select.per == "prompt":
        chosen = [one for scored in found for one in scored[: select.count]]
        wanted = select.count * len(lists)
    else:
        chosen = sorted(one for scored in found for one in scored)[: select.count]
        wanted = select.count
    plans = []
    for _, number, place in chosen:
        rows = lists[number]
        everyone = tuple(range(len(_scores(rows, select.judge))))
        ranks = tuple(1.0 if one == place else 2.0 for one in everyone)
        plans.append(Plan(id=f"{_id(rows)}#{place}", rows=rows, kept=everyone, ranks=ranks))
    return plans, wanted - len(plans)


def _scores(rows: Sequence[Row], judge: str) -> tuple[float, ...]:
    return tuple(score for row in rows for score in row.outline.scores[judge])


def _id(rows: Sequence[Row]) -> str:
    """The row's own id, or one of all the rows in it."""
    ids = [row.outline.id for row in rows]
    return ids[0] if len(ids) == 1 else hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _check_plans(config: RankConfig, plans: Sequence[Plan], dropped: Counter[str]) -> None:
    if not plans:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in dropped.most_common())
        raise UserError(f"data: got no row that can be ranked ({reasons}), want at least one. Check data and settings.")
    ids = Counter(plan.id for plan in plans)
    for plan in plans:
        where = plan.rows[0].outline.where
        if ids[plan.id] > 1:
            raise UserError(f"{where}: got id {plan.id!r} for {ids[plan.id]} prompts, want one each. Give the rows ids.")
        for name in ("weight", "margin"):
            values = {getattr(row.outline, name) for row in plan.rows}
            if len(values) > 1:
                raise UserError(
                    f"{where}: got {name}s {sorted(map(str, values))} in rows of one prompt, want one. Correct them."
                )


def _merged(plan: Plan, tables: Sequence["datasets.Dataset"]) -> Comparison:
    """The row to be written, with its media."""
    sources = [comparison(tables[row.table][row.place]) for row in plan.rows]
    candidates = [candidate for source in sources for candidate in source.candidates]
    own = [source.prompt_of(n) for source in sources for n in range(len(source.candidates))]
    origins = [origin for source in sources for origin in source.provenance or ({},) * len(source.candidates)]
    judges = [judge for judge in sources[0].scores if judge != PHI and all(judge in source.scores for source in sources)]
    scores = {judge: [score for source in sources for score in source.scores[judge]] for judge in judges}
    kept = {judge: tuple(values[i] for i in plan.kept) for judge, values in scores.items()}
    return replace(
        sources[0],
        id=plan.id,
        candidates=tuple(candidates[i] for i in plan.kept),
        prompts=None if sources[0].prompts is None else tuple(own[i] for i in plan.kept),
        scores=kept if plan.phi is None else {**kept, PHI: plan.phi},
        ranks=plan.ranks,
        prob=None,
        provenance=tuple(origins[i] for i in plan.kept) if any(origins) else (),
    )


def _write_report(result: Ranked, config: RankConfig) -> None:
    told = {
        "config": resolved(config),
        "num_rows": result.num_rows,
        "num_written": result.num_written,
        "judges": list(result.judges),
        "dropped": dict(result.dropped),
        "not_usable": [str(fault) for fault in result.faults],
        "environment": environment(),
    }
    result.report.parent.mkdir(parents=True, exist_ok=True)
    part = result.report.with_name(f".{result.report.name}.partial")
    part.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    os.replace(part, result.report)


if __name__ == "__main__":
    sys.exit(command_line(RankConfig, main))
