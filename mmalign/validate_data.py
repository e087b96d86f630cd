"""`mmalign validate-data`: what is in a set of comparisons, and what is wrong with it, before anything is trained on it."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from mmalign.config import Choice, Table, command_line
from mmalign.errors import UserError
from mmalign.importers import Imported, comparisons
from mmalign.records import Comparison, Content, Fault, Media, comparison, outlines
from mmalign.text_findings import TextFindings

if TYPE_CHECKING:
    import datasets

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ValidateDataConfig:
    """What to look at. Either a path in one of our own formats, or data: an importer with its settings."""

    path: str | None = field(default=None, metadata={"positional": True, "help": "comparisons in one of our own formats"})
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = field(
        default=None, metadata={"help": "an importer with its settings: data.name=pick_a_pic data.path=..."}
    )
    strict: bool = field(default=False, metadata={"help": "fail if any row is broken, not only if all are"})
    images: bool = field(default=True, metadata={"help": "decode every image; without it only rows are counted"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "folder or hub id: lengths in tokens, and whether answers leave a prompt's tokens as they are"},
    )
    against: str | None = field(
        default=None, metadata={"help": "other data, such as a test set: tell which prompts are in both"}
    )
    against_split: str | None = field(
        default=None, metadata={"help": "split of the other data; alone: another split of the same"}
    )


@dataclass
class Report:
    """What was found. `str()` is the table that the command line prints; `exit_code` is 2 where the data will not do."""

    num_rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    candidates: Counter[int] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    num_pairs: int = 0
    num_ties: int = 0
    first_won: int = 0
    last_won: int = 0
    repeated_prompts: int = 0
    repeated_rows: int = 0
    repeated_ids: list[str] = field(default_factory=list)
    same_image: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    mixed_sizes: int = 0
    mixed_aspects: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    texts: TextFindings = field(default_factory=TextFindings)
    strict: bool = False

    @property
    def num_usable(self) -> int:
        """Rows without a fault that some judge has ordered."""
        return self.judged["usable"]

    @property
    def exit_code(self) -> int:
        """2 if no row is usable, or, when strict, if any is broken; else 0."""
        return 2 if not self.num_usable or (self.strict and self.faults) else 0

    def __str__(self) -> str:
        """Return the report as a table, the places of faults below it, and the verdict as the last line."""
        lines = [f"{name:<18}{value}" for name, value in self._table()]
        shown = {
            "Broken rows": [str(f) for f in self.faults],
            "Id of an earlier row": self.repeated_ids,
            "Same image twice in a row": self.same_image,
            **{f"Rows with {name}": places for name, places in self.texts.concerns().items()},
        }
        for title, places in shown.items():
            if places:
                lines += ["", f"{title}:", *(f"  {place}" for place in places[:SHOWN])]
                lines += [f"  and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
        return "\n".join([*lines, "", self._verdict()])

    def _table(self) -> Iterator[tuple[str, str]]:
        total = self.num_rows + len(self.faults)
        yield "rows", f"{total} ({self.num_usable} usable, {len(self.faults)} broken)"
        if empty := sum("got an empty completion" in fault.problem for fault in self.faults):
            yield "empty answers", f"{empty} of the broken rows"
        if self.left_out:
            yield "left out by rule", ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        yield "candidates", ", ".join(f"{n} rows with {k}" for k, n in sorted(self.candidates.items())) or "none"
        judges = [(name, n) for name, n in self.judged.most_common() if name not in ("usable", "none")]
        yield "judged by", ", ".join(f"{name} {n} rows" for name, n in judges) or "nobody"
        yield "not judged", f"{self.judged['none']} rows"
        yield "pairs", f"{self.num_pairs} ({self.num_ties} ties, {share(self.num_ties, self.num_pairs)})"
        decided = self.first_won + self.last_won
        yield "balance", f"the earlier candidate won {self.first_won} of {decided} ({share(self.first_won, decided)})"
        yield (
            "repeated",
            (
                f"{self.repeated_prompts} prompts seen before, {self.repeated_rows} whole rows, {len(self.repeated_ids)} ids, "
                f"{len(self.same_image)} rows with the same image twice"
            ),
        )
        if self.sizes:
            for name, values in (("width", [w for w, _ in self.sizes]), ("height", [h for _, h in self.sizes])):
                yield name, f"min {min(values)}, median {median(values):g}, max {max(values)} pixels"
            yield "mixed", f"{self.mixed_sizes} rows with several sizes, {self.mixed_aspects} with several aspect ratios"
            other = {mode: n for mode, n in self.modes.items() if mode != "RGB"}
            text = ", ".join(f"{n} {mode}" for mode, n in sorted(other.items()))
            yield "images", f"{len(self.sizes)} read, " + (f"{text} converted to RGB when used" if other else "all RGB")
        yield from self.texts.table()

    def _verdict(self) -> str:
        if not self.num_usable:
            return "Unusable: no row is both whole and judged."
        if self.faults and self.strict:
            return f"Refused: {len(self.faults)} rows are broken and strict is set. Mend or remove them."
        if self.faults:
            return f"Usable without the {len(self.faults)} broken rows."
        if self.num_pairs and self.num_ties == self.num_pairs:
            ties = "All pairs are ties, of which losses learn nothing but with data.view.ties: soft."
            again = "Give each row an id of its own, by which verdicts are kept, and judge them again."
            return f"{ties} {again if self.repeated_ids else 'Judge the rows again.'}"
        if self.repeated_ids:
            return "Usable, but verdicts are kept by id: give each row its own before it is scored or annotated."
        if concerns := self.texts.concerns():
            return f"Usable, but look at the rows with {', '.join(concerns)}."
        return "Good."


def share(part: int, whole: int) -> str:
    """Return a percentage, or a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def main(config: ValidateDataConfig) -> Report:
    """Read every row and image once and report.

    Raises:
        UserError: there are no such data at all, or both path and data (or neither) are given.
    """
    if (config.path is None) == (config.data is None):
        raise UserError("validate-data: got both or neither of path and data, want one. Give a path, or data.name=... .")
    imported = _imported(config, {})
    left_out = {reason: len(places) for reason, places in imported.left_out.items()}
    texts = TextFindings(tokenizer=None if config.tokenizer is None else _tokenizer(config.tokenizer))
    report = Report(faults=list(imported.faults), left_out=left_out, texts=texts, strict=config.strict)
    others = _prompts_of(config)
    prompts: Counter[str] = Counter()
    rows: Counter[tuple[str, ...]] = Counter()
    first: dict[str, str] = {}
    for row in whole_rows(imported.dataset, report, images=config.images):
        count_verdicts(row, report)
        prompt = row.prompt.words()
        prompts[prompt] += 1
        if first.setdefault(row.id, row.where) != row.where:
            report.repeated_ids.append(f"{row.where}: got id {row.id!r} again, first in {first[row.id]}")
        texts.look(row)
        if there := others.get(_plain(row.prompt)):
            texts.also_there.append(f"{row.where}: as {there}")
        if config.images:
            keys = [content_key(c) for c in row.candidates]
            rows[(prompt, *sorted(keys))] += 1
            if len(set(keys)) < len(keys) and any(c.media() for c in row.candidates):
                report.same_image.append(row.where)
    report.repeated_prompts = prompts.total() - len(prompts)
    report.repeated_rows = rows.total() - len(rows)
    return report


def _imported(config: ValidateDataConfig, changes: dict[str, Any]) -> Imported:
    """Import the data, with other settings of the importer; broken rows are noted and left out."""
    if config.data is None:
        return comparisons(**{"path": str(config.path), "faulty": "drop", "verify": False, **changes})
    known = config.data.settings
    if unknown := [name for name in changes if name not in known]:
        raise UserError(f"validate-data: got another {unknown[0]} for {config.data.name}, which has none. Leave it out.")
    lenient = {name: value for name, value in (("faulty", "drop"), ("verify", False)) if name in known}
    imported: Imported = config.data.build(**lenient, **changes)
    return imported


def _prompts_of(config: ValidateDataConfig) -> dict[str, str]:
    """Return the prompts of the other data, as `_plain` has them, and where each stands first."""
    changes = {name: value for name, value in (("path", config.against), ("split", config.against_split)) if value is not None}
    found: dict[str, str] = {}
    for row in outlines(_imported(config, changes).dataset) if changes else ():
        found.setdefault(_plain(row.prompt), row.where)
    return found


def _plain(prompt: Content) -> str:
    """Return a prompt's words without what does not change their meaning."""
    from mmalign.curation.texts import normalised

    return normalised(prompt.words())


def _tokenizer(name: str) -> Any:
    from mmalign.language.opening import open_tokenizer

    try:
        return open_tokenizer(name)
    except UserError as error:
        raise UserError(str(error).replace("adapter.tokenizer", "validate-data: tokenizer")) from error


def whole_rows(dataset: "datasets.Dataset", report: Report, *, images: bool) -> Iterator[Comparison]:
    """Yield the rows whose images all decode; note the others as faults. One row is in memory at a time."""
    if not images:
        for row in outlines(dataset):
            report.num_rows += 1
            yield row
        return
    for index in range(len(dataset)):
        row = comparison(dataset[index], least=0)
        problems = look_at(row, report)
        if problems:
            report.faults.append(Fault(row.where, "; ".join(problems)))
        else:
            report.num_rows += 1
            yield row


def look_at(row: Comparison, report: Report) -> list[str]:
    """Decode the images of a row, add sizes and modes to the report, and return what is wrong with them."""
    problems, found = [], []
    for media in [m for content in row.contents() for m in content.media()]:
        try:
            size, mode = media.inspect()
        except UserError as error:
            problems.append(str(error).removeprefix(f"{row.where}: "))
            continue
        report.sizes.append(size)
        report.modes[mode] += 1
        found.append(size)
    report.mixed_sizes += len(set(found)) > 1
    report.mixed_aspects += len({round(width / height, 2) for width, height in found}) > 1
    return problems


def count_verdicts(row: Comparison, report: Report) -> None:
    """Count judges, pairs and ties of one row. Pairs are counted for the ranks, or for each scorer without them."""
    report.candidates[len(row.candidates)] += 1
    orders: dict[str, Iterable[float]] = {}
    if row.prob is not None:
        orders["ranks"] = (row.prob, 1 - row.prob)
    elif row.ranks is not None:
        orders["ranks"] = tuple(-r for r in row.ranks)
    report.judged.update([*orders, *row.scores] or ["none"])
    report.judged["usable"] += bool(orders or row.scores)
    for values in orders.values() or row.scores.values():
        for earlier, later in combinations(values, 2):
            report.num_pairs += 1
            report.num_ties += earlier == later
            report.first_won += earlier > later
            report.last_won += earlier < later


def content_key(content: Content) -> str:
    """Return a key that is equal for equal content: text and bytes of the images, or the whole conversation."""
    if content.messages:
        return content.key()
    whole = (content.text or "").encode() + b"\0" + b"".join(m.key().encode() for m in content.images)
    return Media(data=whole).key()


if __name__ == "__main__":
    sys.exit(command_line(ValidateDataConfig, main))
