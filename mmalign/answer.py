"""`mmalign answer`: k answers a prompt from one language model or several, which see its images. Restartable."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mmalign.answerers import Answerer, completed, opened_encoder, sees_by_run, settings_of
from mmalign.asked import Prompt, asked_prompts, prompt_key
from mmalign.blind_model import Asked, Speaker, Spoken, asked, sees, sighted_encoder, speaker_of
from mmalign.claims import check_claim, claim, digest_of
from mmalign.config import Choice, Table, check_folder, command_line
from mmalign.errors import UserError
from mmalign.makers import Dtype, bar_label
from mmalign.processes import Processes, launched_processes
from mmalign.records import Fault
from mmalign.records.journal import gather_parts, part_of
from mmalign.records.reading import json_lines
from mmalign.records.stamps import replace_file
from mmalign.records.writing import content_entry, store_media

logger = logging.getLogger(__name__)

ROWS_FILE = "comparisons.jsonl"
MEDIA_FOLDER = "comparisons_media"  # beside it, as `records.write` names it
JOURNAL_FILE = "answers.journal"  # no .jsonl, which would pass for rows
STATE_FILE = "answering.json"
# What may differ between a run and its restart. The batch size may not: rounding can turn a token, and then all that follow.
FREE_KEYS = ("device", "limit", "output")


@dataclass(frozen=True, kw_only=True)
class Generator:
    """One of several models that answer; what is left out is as in the settings above `generators`."""

    name: str = field(metadata={"help": "under which its answers are known"})
    model: str | None = None
    tuned: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    template: Literal["auto", "always"] | None = None
    system_prompt: str | None = None
    num_candidates: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    dtype: Dtype | None = None
    processor: dict[str, bool | int | float | str] | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """Settings of `mmalign answer`; what a tuned model leaves out is as in its run."""

    model: str | None = field(
        default=None,
        metadata={"help": "folder or hub id of a language model, of one that sees for prompts with images; or tiny"},
    )
    tuned: str | None = field(default=None, metadata={"help": "output of `mmalign train`, or its checkpoint-N; LoRA or full"})
    revision: str | None = field(default=None, metadata={"help": "of a hub id"})
    gguf_file: str | None = field(default=None, metadata={"help": "file in the model's folder that holds GGUF weights"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder or hub id; null: the model's"})
    chat_template: str | None = field(default=None, metadata={"help": "Jinja text or a file of it; null: the tokenizer's"})
    chat_template_kwargs: dict[str, bool | int | float | str] | None = field(
        default=None, metadata={"help": "given to the chat template, as enable_thinking: false"}
    )
    template: Literal["auto", "always"] | None = field(
        default=None, metadata={"help": "auto: only messages go through the chat template; always: texts are users' messages"}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "put before conversations that have no system message"})
    prompts: str | tuple[str, ...] | None = field(
        default=None, metadata={"help": "a .txt, a .jsonl of texts or messages, which may show images, or a list of prompts"}
    )
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = field(
        default=None, metadata={"help": "an importer, whose rows' distinct prompts are answered"}
    )
    num_candidates: int = field(default=4, metadata={"help": "answers a prompt and model"})
    seed: int = field(default=0, metadata={"help": "of the run; each answer has its own, recorded"})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token"})
    top_k: int = field(default=0, metadata={"help": "only the likeliest tokens; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "only the likeliest tokens that make up this share; 1: all"})
    max_new_tokens: int = field(default=256, metadata={"help": "of an answer"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; longer prompts lose their beginning"})
    batch_size: int = field(default=8, metadata={"help": "answers sampled at once"})
    dtype: Dtype = field(default="float32", metadata={"help": "of the weights"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    processor: dict[str, bool | int | float | str] | None = field(
        default=None, metadata={"help": "further arguments of the processor of images, as max_pixels"}
    )
    as_video: bool | None = field(default=None, metadata={"help": "several images of a message are the frames of one video"})
    num_frames: int | None = field(default=None, metadata={"help": "of a video with more of them, evenly spaced; null: all"})
    tiny: dict[str, int | str] | None = field(default=None, metadata={"help": "family and sizes of the tiny model"})
    generators: tuple[Generator, ...] = field(default=(), metadata={"help": "several models, each with what differs"})
    output: Path = field(metadata={"help": "folder for comparisons.jsonl"})
    limit: int | None = field(default=None, metadata={"help": "only the first prompts"})

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if (self.prompts is None) == (self.data is None):
            raise ValueError("prompts: got both or neither of prompts and data, want one.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, want 1 or more.")
        names = [one.name for one in self.generators]
        if len(set(names)) < len(names):
            raise ValueError(f"generators: got the names {', '.join(names)}, want each once.")
        for answerer in self.answerers:
            answerer.check(f"generators: {answerer.name}: " if names else "")

    @property
    def answerers(self) -> tuple[Answerer, ...]:
        """The models with all their settings, the settings above filled in."""
        found: list[Answerer] = []
        for entry in self.generators or (None,):
            above = {one.name: getattr(self, one.name) for one in fields(Answerer) if hasattr(self, one.name)}
            own = {key: value for key, value in ({} if entry is None else vars(entry)).items() if value is not None}
            first = sum(answerer.num_candidates for answerer in found)
            found.append(Answerer(**{"name": str(self.tuned or self.model), "first": first, **above, **own}))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a run left: the file of rows, and how much of it is new. Only one of several processes has it `told`.

    Args:
        num_empty: prompts left out of the file: an answer without a visible character, however long.
    """

    file: Path
    num_prompts: int
    num_answers: int
    num_empty: int
    told: bool = True

    def __str__(self) -> str:
        """Say where the rows are and what comes next."""
        if not self.told:
            return ""
        empty = f", {self.num_empty} prompts left out: an empty answer" if self.num_empty else ""
        return (
            f"{self.num_prompts} prompts, {self.num_answers} new answers{empty}: {self.file}\nnext: mmalign score {self.file}"
        )


Job = tuple[int, int]  # (number of the prompt, number of the candidate)


def main(config: AnswerConfig) -> Answered:
    """Answer every prompt k times; a killed run is gone on with by the same command, in as many processes as you like.

    Prompts with images want models that see; their images lie beside the rows.

    Each answer has a seed of its own from (seed, prompt number, candidate number), and is always sampled in the same batch,
    whatever the limit: interrupted or not, by one process or several, the folder ends byte for byte the same. Answers are noted
    batch by batch; rows are written from the notes, in the order of the prompts. No answer ends before it has a visible
    character.

    Raises:
        UserError: unusable prompts, model or tuned weights; a folder made with other settings, or of other files.
    """
    prompts = asked_prompts(config.prompts, config.data)
    answerers = tuple(map(completed, config.answerers))
    seeing = tuple(_sees(answerer, prompts) for answerer in answerers)
    settings = _settings(config, answerers, prompts)
    check_folder(config.output)
    check_claim(config.output / STATE_FILE, settings, "answers")
    run = _Run(config=config, answerers=answerers, seeing=seeing, key=digest_of(settings), prompts=prompts)
    processes = launched_processes()
    processes.wait()  # until here nobody has written
    if processes.is_main and run.journal.parent.is_dir():
        gather_parts(run.journal)
    made, work = processes.agreed(_due(run) if processes.is_main else (set(), []))
    count = sum(run.lacks(job, made) for batches in work for batch in batches for job in batch)
    logger.info("%s: %d answers stand, %d to sample", run.file, len(made), count)
    if count:
        _sample_all(run, work, made, settings, processes)
    processes.wait()
    num_empty = _write_rows(run) if processes.is_main else 0
    processes.wait()
    wanted = len(run.wanted)
    return Answered(file=run.file, num_prompts=wanted, num_answers=count, num_empty=num_empty, told=processes.is_main)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The prompts of one output folder, and by whom and how each is answered; `seeing`: which of them see."""

    config: AnswerConfig
    answerers: tuple[Answerer, ...]
    seeing: tuple[bool, ...]
    key: str
    prompts: Sequence[Prompt]

    @property
    def file(self) -> Path:
        return self.config.output / ROWS_FILE

    @property
    def journal(self) -> Path:
        return self.config.output / JOURNAL_FILE

    @property
    def wanted(self) -> range:
        return range(len(self.prompts[: self.config.limit]))

    @property
    def num_candidates(self) -> int:
        return sum(answerer.num_candidates for answerer in self.answerers)

    def lacks(self, job: Job, made: set[Job]) -> bool:
        return job[0] in self.wanted and job not in made

    def seed(self, job: Job) -> int:
        from mmalign.models.sampling import image_seed

        return image_seed(self.config.seed, *job)

    def row(self, index: int, answers: Sequence[dict[str, Any]]) -> bytes:
        """The row of a prompt, as its notes tell it; its images are put beside the rows."""
        folder = self.config.output / MEDIA_FOLDER
        row = {
            "id": f"{self.key}-{index:06d}",
            "prompt": content_entry(self.prompts[index].whole(), lambda media: f"{folder.name}/{store_media(media, folder)}"),
            "candidates": [answer["text"] for answer in answers],
            "provenance": [answer["provenance"] for answer in answers],
        }
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _sees(answerer: Answerer, prompts: Sequence[Prompt]) -> bool:
    """Whether a model is opened as one that sees: where prompts show something, or it was tuned as such.

    Raises:
        UserError: a prompt shows something, and the model does not see.
    """
    shown = next((prompt for prompt in prompts if prompt.content.media()), None)
    if shown is None:
        return answerer.tuned is not None and sees_by_run(answerer.tuned)
    if not sees(answerer):
        raise UserError(
            f"{shown.where}: got a prompt with images, which {answerer.name} does not see. Name a model that sees, or remove "
            "the row."
        )
    return True


def _due(run: _Run) -> tuple[set[Job], list[list[list[Job]]]]:
    """The answers that stand, and of each model the batches in which one is lacking.

    A batch is of all prompts, beyond the limit too, so that it holds the same answers under any limit.
    """
    made = {(line["prompt"], line["candidate"]) for line in _noted(run.journal)}
    work = []
    for answerer in run.answerers:
        numbers = range(answerer.first, answerer.first + answerer.num_candidates)
        jobs = [(index, number) for index in range(len(run.prompts)) for number in numbers]
        batches = [jobs[start : start + answerer.batch_size] for start in range(0, len(jobs), answerer.batch_size)]
        work.append([batch for batch in batches if any(run.lacks(job, made) for job in batch)])
    return made, work


def _noted(journal: Path) -> list[dict[str, Any]]:
    lines = []
    for where, line in json_lines(journal) if journal.is_file() else ():
        if isinstance(line, Fault) or not {"prompt", "candidate", "text", "provenance"} <= line.keys():
            raise UserError(
                f"{where}: got a line that answer did not write. Remove the line; what it held is then sampled again."
            )
        lines.append(line)
    return lines


def _sample_all(
    run: _Run, work: Sequence[Sequence[list[Job]]], made: set[Job], settings: dict[str, Any], processes: Processes
) -> None:
    from tqdm import tqdm

    device = processes.device(run.config.device)
    encoders = {number: _encoder(run, number) for number, batches in enumerate(work) if batches}
    known = {number: _known(run, encoder, work[number]) for number, encoder in encoders.items()}

    def opened(number: int) -> Speaker:
        return speaker_of(run.answerers[number], encoders[number], device, seeing=run.seeing[number])

    first = min(encoders)
    speakers = {first: opened(first)}
    if processes.is_main:
        claim(run.config.output / STATE_FILE, settings, run.config)
    processes.wait()
    notes = part_of(run.journal, processes.index) if processes.several else run.journal
    for number, encoder in encoders.items():
        mine = processes.share(work[number])
        if not mine:
            continue
        speaker = speakers.pop(number) if number in speakers else opened(number)
        for batch in tqdm(mine, desc=bar_label(speaker.answerer.name), unit="batch", disable=not processes.is_main):
            prompts = {index: known[number].get(index) or _asked(run, encoder, index) for index in dict(batch)}
            answers = speaker.spoken([prompts[index] for index, _ in batch], [run.seed(job) for job in batch])
            lines = [(job, one) for job, one in zip(batch, answers, strict=True) if run.lacks(job, made)]
            _note(notes, [_line(run, job, speaker.provenance, one) for job, one in lines])
        del speaker


def _encoder(run: _Run, number: int) -> Any:
    return sighted_encoder(run.answerers[number]) if run.seeing[number] else opened_encoder(run.answerers[number])


def _known(run: _Run, encoder: Any, batches: Sequence[list[Job]]) -> dict[int, Asked]:
    """The prompts of these batches, where they show nothing: what is wrong with one is told before the first answer."""
    indices = sorted({index for batch in batches for index, _ in batch if not run.prompts[index].content.media()})
    plain = [index for index in indices if not run.prompts[index].content.messages]
    if plain and encoder.template == "auto" and encoder.tokenizer.chat_template is not None:
        logger.info("prompts that are texts go past the chat template: set template: always for users' messages")
    return {index: _asked(run, encoder, index) for index in indices}


def _asked(run: _Run, encoder: Any, index: int) -> Asked:
    prompt = run.prompts[index]
    try:
        return asked(encoder, prompt.whole())
    except UserError as fault:
        raise UserError(f"{prompt.where}: {str(fault).replace('adapter.', '')}") from fault


def _line(run: _Run, job: Job, stamp: dict[str, Any], answer: Spoken) -> dict[str, Any]:
    id = run.prompts[job[0]].id
    origin = {**stamp, **({} if id is None else {"prompt_id": id}), "seed": run.seed(job)}
    origin |= {"tokens": answer.tokens, "ended": answer.ended}
    return {"prompt": job[0], "candidate": job[1], "text": answer.text, "provenance": origin}


def _note(journal: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append the answers of a batch and have them on disk."""
    with open(journal, "ab") as file:
        file.write(b"".join(_noted_line(line) for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _noted_line(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _write_rows(run: _Run) -> int:
    """Put the notes in order, write the rows of all prompts whose answers are there, and return how many have an empty one."""
    if not run.config.output.is_dir():
        return 0
    gather_parts(run.journal)
    notes = {(line["prompt"], line["candidate"]): line for line in _noted(run.journal)}
    ordered = b"".join(_noted_line(notes[job]) for job in sorted(notes))
    if run.journal.is_file() and run.journal.read_bytes() != ordered:
        replace_file(run.journal, ordered)
    rows, num_empty = [], 0
    for index in range(len(run.prompts)):
        answers = [notes.get((index, number)) for number in range(run.num_candidates)]
        whole = [answer for answer in answers if answer is not None]
        if len(whole) < len(answers):
            continue
        if all(answer["text"].strip() for answer in whole):
            rows.append(run.row(index, whole))
        else:
            num_empty += 1
            logger.warning("%s: left out, an answer is empty: raise max_new_tokens", run.prompts[index].where)
    data = b"".join(rows)
    if not run.file.is_file() or run.file.read_bytes() != data:
        replace_file(run.file, data)
    return num_empty


def _settings(config: AnswerConfig, answerers: Sequence[Answerer], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that the answers depend on, with fingerprints of what lies behind names."""
    said = [[prompt_key(prompt.whole()), prompt.id] for prompt in prompts]
    own = {answerer.name: settings_of(answerer) for answerer in answerers}
    return {"prompts": f"{len(prompts)} prompts, sha256 {digest_of(json.dumps(said))}", "seed": config.seed, "generators": own}


if __name__ == "__main__":
    sys.exit(command_line(AnswerConfig, main, prog="mmalign answer"))
