"""`mmalign generate`: N candidates a prompt from one stock pipeline or several, to be annotated or scored. Restartable."""

import gc
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmalign.claims import check_claim, claim, digest_of
from mmalign.config import check_folder, command_line, resolved
from mmalign.errors import UserError
from mmalign.makers import Dtype, Maker, bar_label, files_of, opened, provenance_of
from mmalign.processes import Processes, launched_processes
from mmalign.prompts import read_prompts, read_sources
from mmalign.records.stamps import replace_file, save_stamped, stamp_of

__all__ = ["GenerateConfig", "Generated", "Generator", "main", "read_prompts"]

logger = logging.getLogger(__name__)

ROWS_FILE = "comparisons.jsonl"
IMAGES_FOLDER = "media"
STATE_FILE = "generation.json"
# What may differ between a run and its restart: it changes no image beyond rounding.
FREE_KEYS = ("batch_size", "device", "limit", "output")


@dataclass(frozen=True, kw_only=True)
class Generator:
    """One of several models that make candidates; what is left out is as in the settings above `generators`."""

    name: str = field(metadata={"help": "under which its images are known"})
    family: str | None = None
    model: str | None = None
    revision: str | None = None
    lora: str | None = None
    lora_scale: float | None = None
    num_candidates: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    scheduler: str | None = None
    batch_size: int | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of `mmalign generate`."""

    family: str | None = field(default=None, metadata={"help": "a name in FAMILIES (sd15, sdxl ...), or package.module:thing"})
    model: str | None = field(default=None, metadata={"help": "diffusers folder, hub id, or checkpoint-N of a full fine-tune"})
    revision: str | None = field(default=None, metadata={"help": "of a hub id"})
    lora: str | None = field(default=None, metadata={"help": "folder of a trained LoRA, its checkpoint-N, or a .safetensors"})
    lora_scale: float = field(default=1.0, metadata={"help": "0 is the base model, 1 the trained one"})
    prompts: str | tuple[str, ...] = field(metadata={"help": "a .txt or .jsonl file, or a list of prompts"})
    num_candidates: int = field(default=4, metadata={"help": "images a prompt and model; 2 or more a prompt in all"})
    seed: int = field(default=0, metadata={"help": "of the run; each image has its own, recorded"})
    steps: int = field(default=50, metadata={"help": "sampler steps"})
    guidance_scale: float = field(default=7.5, metadata={"help": "1 is none; published: 7.5 for SD, 5 for SDXL"})
    negative_prompt: str | None = field(default=None, metadata={"help": "what to guide away from"})
    size: tuple[int, int] | None = field(default=None, metadata={"help": "[height, width] in pixels; null: the model's own"})
    frames: int | None = field(default=None, metadata={"help": "of a video, written as animated PNG; null: the model's own"})
    scheduler: str | None = field(default=None, metadata={"help": "diffusers class name; null: the model's own"})
    batch_size: int = field(default=4, metadata={"help": "images sampled at once"})
    dtype: Dtype = field(default="float32", metadata={"help": "of the weights"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 ..."})
    generators: tuple[Generator, ...] = field(default=(), metadata={"help": "several models, each with what differs"})
    output: Path = field(metadata={"help": "folder for comparisons.jsonl and media/"})
    limit: int | None = field(default=None, metadata={"help": "only the first prompts"})

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}, want 1 or more.")
        names = [one.name for one in self.generators]
        if len(set(names)) < len(names):
            raise ValueError(f"generators: got the names {', '.join(names)}, want each once.")
        for maker in self.makers:
            maker.check(f"generators: {maker.name}: " if names else "")
        total = sum(maker.num_candidates for maker in self.makers)
        if total < 2:
            raise ValueError(f"num_candidates: got {total}, want 2 or more.")

    @property
    def makers(self) -> tuple["Maker", ...]:
        """The models with all their settings, the settings above filled in."""
        found: list[Maker] = []
        for entry in self.generators or (None,):
            above = {one.name: getattr(self, one.name) for one in fields(Maker) if hasattr(self, one.name)}
            own = {key: value for key, value in ({} if entry is None else vars(entry)).items() if value is not None}
            first = sum(maker.num_candidates for maker in found)
            found.append(Maker(**{"name": str(self.model), "first": first, **above, **own}))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a run of `generate` has made. Only one of several processes has it `told`."""

    file: Path
    num_prompts: int
    num_images: int
    told: bool = True

    def __str__(self) -> str:
        """Say where the rows are and what comes next."""
        if not self.told:
            return ""
        return f"{self.num_prompts} prompts, {self.num_images} new images: {self.file}\nnext: mmalign score {self.file}"


Job = tuple[int, int]  # (number of the prompt, number of the candidate)


def main(config: GenerateConfig) -> Generated:
    """Sample candidates for every prompt; a killed run is gone on with by the same command, in as many processes as you like.

    Each image has a seed of its own from (seed, prompt number, candidate number), and is always sampled in the same batch:
    interrupted or not, by one process or several, the folder ends byte for byte the same. An image is complete or absent
    and says itself how it was made; rows are written after the images, in the order of the prompts.

    Raises:
        UserError: unusable prompts, model, LoRA or sampler; a folder made with other settings, or of other files.
    """
    prompts, sources = read_prompts(config.prompts), read_sources(config.prompts)
    _check_sources(config, sources)
    settings = _settings(config, prompts, sources)
    check_folder(config.output)
    check_claim(config.output / STATE_FILE, settings, "images")
    run = _Run(config=config, key=digest_of(settings), prompts=prompts, sources=sources)
    processes = launched_processes()
    standing = _standing_rows(run.file)
    processes.wait()  # until here nobody has written
    work = processes.agreed([_due_batches(run, maker, standing) for maker in config.makers])
    count = sum(run.lacks(job) for batches in work for batch in batches for job in batch)
    logger.info("%s: %d rows stand, %d images to make", run.file, len(standing), count)
    if count:
        _sample_all(run, work, settings, processes)
    processes.wait()
    if processes.is_main:
        _write_rows(run, standing)
    processes.wait()
    return Generated(file=run.file, num_prompts=len(run.wanted), num_images=count, told=processes.is_main)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The prompts of one output folder, and where and how each image of theirs is made."""

    config: GenerateConfig
    key: str
    prompts: Sequence[str]
    sources: Sequence[Path]

    @property
    def file(self) -> Path:
        return self.config.output / ROWS_FILE

    @property
    def wanted(self) -> range:
        return range(len(self.prompts[: self.config.limit]))

    def row_id(self, index: int) -> str:
        return f"{self.key}-{index:06d}"

    def image_path(self, job: Job) -> Path:
        return self.config.output / IMAGES_FOLDER / f"{job[0]:06d}-{job[1]:02d}.png"

    def lacks(self, job: Job) -> bool:
        return not self.image_path(job).is_file()

    def source_path(self, index: int) -> Path:
        return self.config.output / IMAGES_FOLDER / f"{index:06d}-source{self.sources[index].suffix}"

    def prompt(self, index: int) -> str | dict[str, str]:
        if not self.sources:
            return self.prompts[index]
        return {"text": self.prompts[index], "image": self.source_path(index).relative_to(self.config.output).as_posix()}

    def paths(self, index: int) -> list[Path]:
        count = sum(maker.num_candidates for maker in self.config.makers)
        return [self.image_path((index, number)) for number in range(count)]

    def seed(self, job: Job) -> int:
        from mmalign.models.sampling import image_seed

        return image_seed(self.config.seed, *job)

    def line(self, index: int) -> bytes:
        """The row of a prompt whose images are there, as they themselves tell it."""
        paths = self.paths(index)
        candidates = [{"image": path.relative_to(self.config.output).as_posix()} for path in paths]
        row = {"id": self.row_id(index), "prompt": self.prompt(index), "candidates": candidates}
        return (json.dumps({**row, "provenance": [stamp_of(path) for path in paths]}, ensure_ascii=False) + "\n").encode()


def _due_batches(run: _Run, maker: Maker, standing: dict[str, bytes]) -> list[list[Job]]:
    """The batches in which an image is lacking. A batch's images depend on nothing but settings, batch size and limit."""
    numbers = range(maker.first, maker.first + maker.num_candidates)
    jobs = [(index, number) for index in run.wanted for number in numbers]
    batches = [jobs[start : start + maker.batch_size] for start in range(0, len(jobs), maker.batch_size)]
    return [batch for batch in batches if any(run.row_id(job[0]) not in standing and run.lacks(job) for job in batch)]


def _sample_all(run: _Run, work: Sequence[Sequence[list[Job]]], settings: dict[str, Any], processes: Processes) -> None:
    from tqdm import tqdm

    makers = run.config.makers
    device = processes.device(run.config.device)
    due = [number for number, batches in enumerate(work) if batches]
    for number in due[1:]:
        opened(makers[number])  # a fault of any model is told before the first image
    pipe = opened(makers[due[0]]).to(device)
    if processes.is_main:
        claim(run.config.output / STATE_FILE, settings, run.config)
        (run.config.output / IMAGES_FOLDER).mkdir(exist_ok=True)
        for index in run.wanted[: len(run.sources)]:
            replace_file(run.source_path(index), run.sources[index].read_bytes())
    processes.wait()
    for number in due:
        mine = processes.share(work[number])
        if not mine:
            continue
        pipe = pipe or opened(makers[number]).to(device)
        stamp = provenance_of(makers[number], pipe, settings)
        for batch in tqdm(mine, desc=bar_label(makers[number].name), unit="batch", disable=not processes.is_main):
            images = _sampled(run, makers[number], pipe, batch)
            for job, image in zip(batch, images, strict=True):
                if run.lacks(job):
                    save_stamped(image, {**stamp, "seed": run.seed(job)}, run.image_path(job))
        pipe = None
        _free_memory(device)


def _free_memory(device: Any) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_sources(config: GenerateConfig, sources: Sequence[Path]) -> None:
    """Refuse prompts without source images for a family that edits, and with them for any other."""
    from mmalign.families import find_family

    for family in (find_family(str(maker.family)) for maker in config.makers):
        if family.edits and not sources:
            wanted = 'a .jsonl file with {"prompt": "text", "image": "file"} a line'
            raise UserError(f"prompts: got no source images, want {wanted}: {family.name} edits them.")
        if sources and not family.edits:
            raise UserError(f"prompts: got source images, want texts alone: {family.name} does not edit. Set another family.")


def _settings(config: GenerateConfig, prompts: Sequence[str], sources: Sequence[Path]) -> dict[str, Any]:
    """Everything that the images depend on, with fingerprints of what lies behind names."""
    settings = {key: value for key, value in resolved(config).items() if key not in (*FREE_KEYS, "generators")}
    settings["prompts"] = f"{len(prompts)} prompts, sha256 {digest_of(json.dumps(prompts))}"
    if sources:
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
        settings["sources"] = f"{len(sources)} images, sha256 {digest_of(json.dumps(contents))}"
    files = {maker.name: files_of(maker) for maker in config.makers}
    if not config.generators:
        return {**settings, **files[config.makers[0].name]}
    entries = {entry["name"]: entry for entry in resolved(config)["generators"]}
    own = {name: {key: value for key, value in entry.items() if key not in FREE_KEYS} for name, entry in entries.items()}
    return {**settings, "generators": {name: {**entry, **files[name]} for name, entry in own.items()}}


def _standing_rows(file: Path) -> dict[str, bytes]:
    """The rows that stand, by id and as they are; a last line cut short by a kill does not count."""
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        logger.info("%s: the last line was cut short; it is written again", file)
    lines = enumerate(whole.splitlines(keepends=True), 1)
    return {_id_of(line, f"{file}:{number}"): line for number, line in lines}


def _id_of(line: bytes, where: str) -> str:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, TypeError, KeyError) as fault:
        text = line.decode(errors="replace").rstrip("\n")[:60]
        raise UserError(
            f"{where}: got {text!r}, want a row that generate wrote. Remove the line; its row is then written again."
        ) from fault


def _write_rows(run: _Run, standing: dict[str, bytes]) -> None:
    """Write the rows of all prompts whose images are there, in the order of the prompts; rows that stand stay as they are."""
    ids = [run.row_id(index) for index in range(len(run.prompts))]
    known = set(ids)
    lines = [line for name, line in standing.items() if name not in known]
    for index, name in enumerate(ids):
        if name in standing:
            lines.append(standing[name])
        elif all(path.is_file() for path in run.paths(index)):
            lines.append(run.line(index))
    whole = b"".join(lines)
    if not run.file.is_file() or run.file.read_bytes() != whole:
        replace_file(run.file, whole)


def _sampled(run: _Run, maker: Maker, pipe: Any, batch: Sequence[Job]) -> list[Any]:
    from mmalign.adapters.prompts import source_image
    from mmalign.families import find_family
    from mmalign.models.sampling import sample_images
    from mmalign.records import Media

    media = [Media(path=str(run.sources[index])) for index, _ in batch if run.sources]
    images = sample_images(
        find_family(str(maker.family)),
        pipe,
        [run.prompts[index] for index, _ in batch],
        [run.seed(job) for job in batch],
        steps=maker.steps,
        guidance_scale=maker.guidance_scale,
        negative_prompt=maker.negative_prompt,
        size=maker.size,
        frames=maker.frames,
        sources=[one.open() if maker.size is None else source_image(one, maker.size) for one in media],
        batch_size=len(batch),
    )
    return list(images)


if __name__ == "__main__":
    sys.exit(command_line(GenerateConfig, main, prog="mmalign generate"))
