"""`mmalign blind`: what the base model says when it does not see the image, as rejected answers for Blind PO. Restartable."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign.answerers import Answerer, completed, settings_of
from mmalign.blind_model import Asked, Speaker, opened_speaker
from mmalign.blind_rows import BLIND, DEGRADED, Filters, best_text, is_ordered, of_text, question, with_blind
from mmalign.claims import check_claim, claim, digest_of
from mmalign.config import Choice, Table, check_folder, command_line, resolved
from mmalign.errors import UserError
from mmalign.makers import Dtype
from mmalign.multimodal.degradations import check_degradation, drawn
from mmalign.processes import Processes, launched_processes
from mmalign.records import Comparison, Content, Dropped, Fault, write
from mmalign.records.journal import gather_parts, part_of
from mmalign.records.reading import json_lines
from mmalign.records.stamps import replace_file
from mmalign.row_files import Rows, read_rows, source_of

logger = logging.getLogger(__name__)

JOURNAL_FILE = "blind.journal"  # no .jsonl, which would pass for rows
STATE_FILE = "blinding.json"


@dataclass(frozen=True, kw_only=True)
class BlindConfig:
    """Settings of `mmalign blind`: the base model that is to be tuned answers, frozen."""

    model: str = field(metadata={"help": "folder or hub id of a model that sees, or of a language model; or tiny"})
    revision: str | None = field(default=None, metadata={"help": "of a hub id"})
    chat_template: str | None = field(default=None, metadata={"help": "Jinja text or a file of it; null: the model's"})
    chat_template_kwargs: dict[str, bool | int | float | str] | None = field(
        default=None, metadata={"help": "given to the chat template, as enable_thinking: false"}
    )
    template: Literal["auto", "always"] = field(
        default="auto", metadata={"help": "auto: only messages go through the chat template; always: texts are users' messages"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "put before conversations that have no system message"})
    tiny: dict[str, int | str] | None = field(default=None, metadata={"help": "family and sizes of the tiny model"})
    path: str | None = field(default=None, metadata={"help": "comparisons in one of our own formats"})
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = field(
        default=None, metadata={"help": "an importer, in place of path"}
    )
    by: str = field(default="auto", metadata={"help": "what orders the candidates of a row, as in the view pair"})
    num_candidates: int = field(default=1, metadata={"help": "blind answers a prompt"})
    seed: int = field(default=0, metadata={"help": "of the run; each answer has its own, recorded"})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token"})
    top_k: int = field(default=0, metadata={"help": "only the likeliest tokens; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "only the likeliest tokens that make up this share; 1: all"})
    max_new_tokens: int = field(default=512, metadata={"help": "of an answer"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; longer prompts lose their beginning"})
    batch_size: int = field(default=8, metadata={"help": "answers sampled at once"})
    dtype: Dtype = field(default="float32", metadata={"help": "of the weights"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    degradation: Annotated[Choice, Table("mmalign.multimodal.degradations:DEGRADATIONS")] | None = field(
        default=None, metadata={"help": "null: images are taken out; else answers under degraded ones, as noise with t: 900"}
    )
    text_only: Literal["keep", "drop"] = field(
        default="keep", metadata={"help": "rows without an image; keep: the base answers them as they stand"}
    )
    filters: Filters = field(default=Filters(), metadata={"help": "which blind answers are left out; none"})
    output: Path = field(metadata={"help": "folder for the rows with their blind candidates"})
    format: Literal["parquet", "jsonl"] = field(default="parquet", metadata={"help": "of the rows"})
    limit: int | None = field(default=None, metadata={"help": "only the first rows"})

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if (self.path is None) == (self.data is None):
            raise ValueError("path: got both or neither of path and data, want one.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, want 1 or more.")
        if self.filters.like_chosen is not None and not 0 < self.filters.like_chosen <= 1:
            raise ValueError(f"filters.like_chosen: got {self.filters.like_chosen}, want above 0, and at most 1.")
        if self.degradation is not None and check_degradation(self.degradation.build).wants_other:
            raise ValueError(f"degradation: got {self.degradation.name}, which takes another row's image, want one of its own.")
        self.answerer.check("")

    @property
    def source(self) -> str:
        """What the provenance of the answers says."""
        return BLIND if self.degradation is None else DEGRADED

    @property
    def answerer(self) -> Answerer:
        """The model and how it is sampled."""
        own = {one.name: getattr(self, one.name) for one in fields(Answerer) if hasattr(self, one.name)}
        fixed: dict[str, Any] = {"name": self.model, "first": 0, "tuned": None, "gguf_file": None, "tokenizer": None}
        return completed(Answerer(**{**fixed, **own}))


@dataclass(frozen=True, kw_only=True)
class Blinded:
    """What a run left: the file of rows, and how it came to be. Only one of several processes has it `told`.

    Args:
        num_rows: written.
        num_prompts: distinct prompts that are answered.
        num_answers: made by this run.
        num_cut: answers that `max_new_tokens` cut.
        dropped: rows and answers left out, by reason.
        faults: rows that could not be used.
        num_text_only: of the rows, those of text alone.
        num_unordered: of the rows, those whose own candidates nobody has ordered.
    """

    file: Path
    num_rows: int
    num_prompts: int
    num_answers: int
    num_cut: int
    dropped: Counter[str]
    faults: tuple[Fault, ...] = ()
    num_text_only: int = 0
    num_unordered: int = 0
    told: bool = True
    source: str = BLIND

    def __str__(self) -> str:
        """Counts, reasons, the file, and what comes next."""
        if not self.told:
            return ""
        how = "without their images" if self.source == BLIND else "under degraded images"
        lines = [f"{self.num_prompts} prompts {how}, {self.num_answers} new answers: {self.num_rows} rows"]
        kept = "with what the base answers" if self.source == BLIND else "as they were"
        lines += [f"  {self.num_text_only} of them of text alone, {kept}"] * bool(self.num_text_only)
        lines += [f"  {self.num_unordered} of them without an order, which views leave out"] * bool(self.num_unordered)
        lines += [f"  {number} left out: {reason}" for reason, number in self.dropped.most_common()]
        lines += [f"  {self.num_cut} answers cut at max_new_tokens"] * bool(self.num_cut)
        lines += [f"  {len(self.faults)} rows not usable, first: {self.faults[0]}"] if self.faults else []
        importer = f"data.importer.name=comparisons data.importer.path={self.file}"
        view = "loss=blind_bpo data.view=blind" if self.source == BLIND else "loss=dpo data.view.pairs=best_vs_rest"
        return "\n".join([*lines, f"{self.file}", f"next: mmalign train ... {view} {importer}"])


Job = tuple[int, int]  # (number of the prompt, number of the answer)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The rows of one output folder, and what is asked of each without its images.

    Args:
        prompt_of: of each row, the number of its prompt, why it has none, or None: it is kept without an answer.
        prompts: distinct ones, with the number of the first row that asks each; with a degradation one a row.
    """

    config: BlindConfig
    rows: Rows
    prompt_of: tuple[int | Dropped | None, ...]
    prompts: tuple[tuple[Content, int], ...]

    @property
    def file(self) -> Path:
        return self.config.output / f"comparisons.{self.config.format}"

    @property
    def journal(self) -> Path:
        return self.config.output / JOURNAL_FILE

    @property
    def wanted(self) -> set[int]:
        """Prompts of the rows up to the limit."""
        return {one for one in self.prompt_of[: self.config.limit] if isinstance(one, int)}

    def jobs(self) -> list[Job]:
        """All answers, beyond the limit too: batches, and so answers, are the same under any limit."""
        return [(index, n) for index in range(len(self.prompts)) for n in range(self.config.num_candidates)]

    def seed(self, job: Job) -> int:
        from mmalign.models.sampling import image_seed

        return image_seed(self.config.seed, *job)


def main(config: BlindConfig) -> Blinded:
    """Answer every prompt without its images, and write the rows with these answers as further, rejected candidates.

    Images and their placeholders are taken out of the prompt; no other word is changed. Rows that ask the same share an answer.
    Rows of text alone, which hold what is refused and what is answered today, show nothing that could be taken out: what the
    base answers to them is their blind answer, so that they train with the others; where it is the chosen one it teaches
    nothing.

    A killed run is gone on with by the same command, in as many processes as you like, and ends the same; filters may change
    without anything being answered again.

    With a degradation the images stay and are shown degraded, which is how Bootstrapped Preference Optimization (arXiv
    2403.08730; noise, step 900, then plain `dpo`) makes rejected answers; every row is then answered by itself, and rows of
    text alone stay as they are.

    Source: Li et al. 2025 (Blind PO, arXiv 2503.14189); how the authors decoded is not told, greedy is their
        inference script's.

    Raises:
        UserError: no usable row, no row with an image, a model that cannot be opened, a folder made with other settings.
    """
    source = source_of(config.path, config.data)
    if source is not None and Path(source).expanduser().resolve() == config.output.resolve():
        raise UserError(f"output: got the folder of the data, {config.output}, want another one. Name a new folder.")
    run = _planned(config, read_rows(config.path, config.data))
    settings = _settings(run)
    check_folder(config.output)
    check_claim(config.output / STATE_FILE, settings, "blind answers")
    processes = launched_processes()
    processes.wait()  # until here nobody has written
    if processes.is_main and run.journal.parent.is_dir():
        gather_parts(run.journal)
    batches = processes.agreed(_due(run) if processes.is_main else [])
    logger.info("%s: %d batches to answer", run.file, len(batches))
    count = _answer_all(run, batches, settings, processes) if batches else 0
    count = sum(processes.gathered([count]))
    processes.wait()
    result = _write(run, count) if processes.is_main else None
    processes.wait()
    empty = Blinded(file=run.file, num_rows=0, num_prompts=0, num_answers=0, num_cut=0, dropped=Counter(), told=False)
    return result or empty


def _planned(config: BlindConfig, rows: Rows) -> _Run:
    judges = {"auto", "ranks", *(name for row in rows.outlines for name in row.scores)}
    if config.by not in judges:
        raise UserError(f"by: got {config.by}, want one of {', '.join(sorted(judges))}. Correct it.")
    shown, keep = config.degradation is not None, config.text_only == "keep"
    prompt_of: list[int | Dropped | None] = []
    prompts: dict[str, tuple[Content, int]] = {}
    places: dict[str, int] = {}
    for number, row in enumerate(rows.outlines):
        asked = question(row, shown=shown, keep_texts=keep)
        if not isinstance(asked, Content):
            prompt_of.append(asked)
            continue
        key = str(number) if shown else asked.key()
        prompts.setdefault(key, (asked, number))
        prompt_of.append(places.setdefault(key, len(places)))
    hidden = [question(row, shown=shown, keep_texts=False) for row in rows.outlines]
    if all(isinstance(one, Dropped) for one in hidden):
        reasons = Counter(one.reason for one in hidden if isinstance(one, Dropped))
        told = ", ".join(f"{reason}: {number}" for reason, number in reasons.most_common())
        raise UserError(f"data: got no row to make blind ({told}), want prompts with images. Check the data.")
    return _Run(config=config, rows=rows, prompt_of=tuple(prompt_of), prompts=tuple(prompts.values()))


def _settings(run: _Run) -> dict[str, Any]:
    """Everything that the answers depend on, with fingerprints of what lies behind names."""
    config, answerer = run.config, run.config.answerer
    if config.degradation is None:
        said = [prompt.key() for prompt, _ in run.prompts]
    else:
        said = [f"{run.rows.outlines[number].id} {run.rows.whole(number).prompt.key()}" for _, number in run.prompts]
    shown = {} if config.degradation is None else {"degradation": resolved(config)["degradation"]}
    return {
        "prompts": f"{len(said)} prompts, sha256 {digest_of(said)}",
        "seed": config.seed,
        "generator": settings_of(answerer),
        **shown,
    }


def _due(run: _Run) -> list[list[Job]]:
    """Batches in which an answer is lacking."""
    made, jobs = set(_noted(run.journal)), run.jobs()
    size = run.config.batch_size
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return [batch for batch in batches if any(job[0] in run.wanted and job not in made for job in batch)]


def _noted(journal: Path) -> dict[Job, dict[str, Any]]:
    found = {}
    for where, line in json_lines(journal) if journal.is_file() else ():
        if isinstance(line, Fault) or not {"prompt", "answer", "text", "provenance"} <= line.keys():
            raise UserError(f"{where}: got a line that blind did not write. Remove it; what it held is then made again.")
        found[line["prompt"], line["answer"]] = line
    return found


def _answer_all(run: _Run, batches: Sequence[list[Job]], settings: dict[str, Any], processes: Processes) -> int:
    from tqdm import tqdm

    speaker = opened_speaker(run.config.answerer, processes.device(run.config.device))
    known = _known(run, speaker, batches)
    if processes.is_main:
        claim(run.config.output / STATE_FILE, settings, run.config)
    processes.wait()
    notes = part_of(run.journal, processes.index) if processes.several else run.journal
    made, count = set(_noted(run.journal)), 0
    stamp = speaker.provenance | {key: value for key, value in settings.items() if key == "degradation"}
    for batch in tqdm(processes.share(batches), desc="blind", unit="batch", disable=not processes.is_main):
        prompts = [known[index] if index in known else _asked(run, speaker, index) for index, _ in batch]
        answers = speaker.answers(prompts, [run.seed(job) for job in batch])
        lines = [
            {
                "prompt": job[0],
                "answer": job[1],
                "text": answer.text,
                "provenance": {**stamp, "seed": run.seed(job), "tokens": answer.tokens, "ended": answer.ended},
            }
            for job, answer in zip(batch, answers, strict=True)
            if job[0] in run.wanted and job not in made
        ]
        count += len(lines)
        _note(notes, lines)
    return count


def _known(run: _Run, speaker: Speaker, batches: Sequence[list[Job]]) -> dict[int, Asked]:
    """The prompts of these batches, where they show nothing: what is wrong with one is told before the first answer."""
    if run.config.degradation is not None:
        return {}
    return {index: _asked(run, speaker, index) for index in sorted({index for batch in batches for index, _ in batch})}


def _asked(run: _Run, speaker: Speaker, index: int) -> Asked:
    prompt, number = run.prompts[index]
    row = run.rows.outlines[number]
    degradation = run.config.degradation
    try:
        if degradation is None:
            return speaker.asked(prompt)
        condition = drawn(degradation.build(), seed=run.config.seed, epoch=0, example=row.id)
        return speaker.asked(run.rows.whole(number).prompt, condition)
    except UserError as fault:
        raise UserError(f"{row.where or row.id}: {str(fault).replace('adapter.', '')}") from fault


def _note(journal: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append the answers of a batch and have them on disk."""
    with open(journal, "ab") as file:
        file.write(b"".join(_line(line) for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _line(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _write(run: _Run, num_answers: int) -> Blinded:
    """Put the notes in order, and write the rows up to the limit whose prompts have their answers."""
    gather_parts(run.journal)
    notes = _noted(run.journal)
    ordered = b"".join(_line(notes[job]) for job in sorted(notes))
    if run.journal.read_bytes() != ordered:
        replace_file(run.journal, ordered)
    dropped: Counter[str] = Counter()
    kept = list(_kept(run, notes, dropped))
    if not kept:
        told = ", ".join(f"{reason}: {number}" for reason, number in dropped.most_common())
        raise UserError(f"data: every row was left out ({told}), want at least one. Check data and filters.")
    write(_whole(run, kept), run.file, replace=True)
    used = [note for job, note in notes.items() if job[0] in run.wanted]
    return Blinded(
        file=run.file,
        num_rows=len(kept),
        num_prompts=len(run.wanted),
        num_answers=num_answers,
        num_cut=sum(not note["provenance"]["ended"] for note in used),
        dropped=dropped,
        faults=run.rows.faults,
        num_text_only=sum(of_text(run.rows.outlines[number]) for number, _ in kept),
        num_unordered=sum(not is_ordered(run.rows.outlines[number], run.config.by) for number, _ in kept),
        source=run.config.source,
    )


def _kept(run: _Run, notes: dict[Job, dict[str, Any]], dropped: Counter[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The rows that have a blind answer or need none, with the notes of theirs; what is left out is counted."""
    for number, row in enumerate(run.rows.outlines[: run.config.limit]):
        prompt = run.prompt_of[number]
        if isinstance(prompt, Dropped):
            dropped[prompt.reason] += 1
            continue
        if prompt is None:
            yield number, []
            continue
        answers = []
        for one in range(run.config.num_candidates):
            note = notes[prompt, one]
            reason = "an empty blind answer: raise max_new_tokens" if not note["text"].strip() else None
            reason = reason or run.config.filters.reason(note["text"], best_text(row, run.config.by))
            if reason is None:
                answers.append(note)
            else:
                dropped[reason] += 1
        if answers:
            yield number, answers


def _whole(run: _Run, kept: Sequence[tuple[int, list[dict[str, Any]]]]) -> Iterator[Comparison]:
    for number, answers in kept:
        texts, origins = [note["text"] for note in answers], [note["provenance"] for note in answers]
        yield with_blind(run.rows.whole(number), texts, origins, run.config.by, run.config.source)


if __name__ == "__main__":
    sys.exit(command_line(BlindConfig, main, prog="mmalign blind"))
