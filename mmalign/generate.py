"""`mmalign generate`: N candidates a prompt from a stock pipeline, as comparisons to be annotated or scored. Restartable."""

import hashlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.config import check_folder, command_line, differences, resolved, write_resolved
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

ROWS_FILE = "comparisons.jsonl"
IMAGES_FOLDER = "media"
STATE_FILE = "generation.json"
# What may differ between a run and its restart: it changes no image beyond rounding.
FREE_KEYS = ("batch_size", "device", "limit", "output")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of `mmalign generate`."""

    family: str = field(metadata={"help": "sd15, sd2, sdxl, or package.module:thing"})
    model: str = field(metadata={"help": "diffusers folder or hub id"})
    revision: str | None = field(default=None, metadata={"help": "of a hub id"})
    lora: str | None = field(default=None, metadata={"help": "folder of a trained LoRA, or a .safetensors file"})
    lora_scale: float = field(default=1.0, metadata={"help": "0 is the base model, 1 the trained one"})
    prompts: str | tuple[str, ...] = field(metadata={"help": "a .txt or .jsonl file, or a list of prompts"})
    num_candidates: int = field(default=4, metadata={"help": "images a prompt, 2 or more"})
    seed: int = field(default=0, metadata={"help": "of the run; each image has its own, recorded"})
    steps: int = field(default=50, metadata={"help": "sampler steps"})
    guidance_scale: float = field(default=7.5, metadata={"help": "1 is none; published: 7.5 for SD, 5 for SDXL"})
    negative_prompt: str | None = field(default=None, metadata={"help": "what to guide away from"})
    size: tuple[int, int] | None = field(default=None, metadata={"help": "[height, width] in pixels; null: the model's own"})
    scheduler: str | None = field(default=None, metadata={"help": "diffusers class name; null: the model's own"})
    batch_size: int = field(default=4, metadata={"help": "images sampled at once"})
    dtype: Literal["float32", "float16", "bfloat16"] = field(default="float32", metadata={"help": "of the weights"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 ..."})
    output: Path = field(metadata={"help": "folder for comparisons.jsonl and media/"})
    limit: int | None = field(default=None, metadata={"help": "only the first prompts"})

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        for name, least in (("num_candidates", 2), ("steps", 1), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, want {least} or more.")
        if self.size is not None and any(side <= 0 or side % 8 for side in self.size):
            raise ValueError(f"size: got {list(self.size)}, want multiples of 8, [height, width].")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a run of `generate` has made."""

    file: Path
    num_prompts: int
    num_images: int

    def __str__(self) -> str:
        """Say where the rows are and what comes next."""
        return f"{self.num_prompts} prompts, {self.num_images} new images: {self.file}\nnext: mmalign score {self.file}"


def main(config: GenerateConfig) -> Generated:
    """Sample candidates for every prompt; a killed run is gone on with by the same command.

    Each image has a seed of its own from (seed, prompt number, candidate number), so that it does not depend on batch
    size or on where a run was interrupted. An image is complete or absent, and a row is written after its images.

    Raises:
        UserError: unusable prompts, model, LoRA or sampler; a folder made with other settings, or of other files.
    """
    prompts = read_prompts(config.prompts)
    settings = _settings(config, prompts)
    check_folder(config.output)
    _check_state(config.output, settings)
    run = _Run(config=config, key=_sha256(json.dumps(settings, sort_keys=True)), prompts=prompts[: config.limit])
    done = _done_rows(run.file)
    rows = [index for index in range(len(run.prompts)) if run.row_id(index) not in done]
    missing = [job for index in rows for job in run.images_of(index) if not run.image_path(*job).is_file()]
    logger.info("%s: %d of %d prompts are done, %d images to make", run.file, len(done), len(run.prompts), len(missing))
    if rows:
        pipe = _open(config)
        _claim_folder(config, settings)
        _fill(run, pipe, rows, missing)
    return Generated(file=run.file, num_prompts=len(run.prompts), num_images=len(missing))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The prompts of one output folder, and where and how each image of theirs is made."""

    config: GenerateConfig
    key: str
    prompts: Sequence[str]

    @property
    def file(self) -> Path:
        return self.config.output / ROWS_FILE

    def row_id(self, index: int) -> str:
        return f"{self.key}-{index:06d}"

    def images_of(self, index: int) -> list[tuple[int, int]]:
        return [(index, number) for number in range(self.config.num_candidates)]

    def image_path(self, index: int, number: int) -> Path:
        return self.config.output / IMAGES_FOLDER / f"{index:06d}-{number:02d}.png"

    def seed(self, index: int, number: int) -> int:
        from mmalign.models.sampling import image_seed

        return image_seed(self.config.seed, index, number)

    def line(self, index: int, provenance: dict[str, Any]) -> str:
        jobs = self.images_of(index)
        paths = [self.image_path(*job).relative_to(self.config.output).as_posix() for job in jobs]
        row = {"id": self.row_id(index), "prompt": self.prompts[index], "candidates": [{"image": path} for path in paths]}
        row["provenance"] = [{**provenance, "seed": self.seed(*job)} for job in jobs]
        return json.dumps(row, ensure_ascii=False) + "\n"


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """Prompts of a .txt file (one a line), a .jsonl file (`"text"` or `{"prompt": "text"}` a line), or a list.

    Raises:
        UserError: no such file, another kind of file, or an empty prompt, with file and line.
    """
    if not isinstance(source, str):
        numbered: list[tuple[str, Any]] = [(f"prompts.{index}", text) for index, text in enumerate(source)]
        place = "prompts"
    else:
        file, place = Path(source).expanduser(), source
        if file.suffix not in (".txt", ".jsonl"):
            raise UserError(f"prompts: got {source!r}, want a .txt or .jsonl file, or a list of prompts.")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"{source}: cannot be read ({fault}). Give a .txt or .jsonl file in UTF-8.") from fault
        numbered = [(f"{source}:{number}", line) for number, line in enumerate(lines, 1)]
        if file.suffix == ".jsonl":
            numbered = [(where, _prompt_of(line, where)) for where, line in numbered]
    for where, text in numbered:
        if not text.strip():
            raise UserError(f"{where}: got an empty prompt, want a text. Write one or remove the line.")
    if not numbered:
        raise UserError(f"{place}: got no prompts, want at least one.")
    return [text for _, text in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as fault:
        raise UserError(f'{where}: got no valid JSON ({fault}), want {{"prompt": "text"}}. Correct the line.') from fault
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'{where}: got {line[:60]!r}, want {{"prompt": "text"}} or "text". Correct the line.')
    return text


def _settings(config: GenerateConfig, prompts: Sequence[str]) -> dict[str, Any]:
    """Everything that the images depend on, with fingerprints of what lies behind names."""
    from mmalign.models.sampling import lora_file

    settings = {key: value for key, value in resolved(config).items() if key not in FREE_KEYS}
    settings["prompts"] = f"{len(prompts)} prompts, sha256 {_sha256(json.dumps(prompts))}"
    settings["files of model"] = _fingerprint(Path(config.model).expanduser())
    if config.lora is not None:
        settings["files of lora"] = _fingerprint(lora_file(config.lora))
    return settings


def _check_state(output: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder of other files, or one made with other settings."""
    state = output / STATE_FILE
    if state.is_file():
        try:
            changed = differences(json.loads(state.read_text(encoding="utf-8")), settings)
        except ValueError as fault:
            raise UserError(
                f"{state}: got no valid JSON ({fault}), want the settings that made the images. Name another output folder."
            ) from fault
        if changed:
            raise UserError(
                f"{output}: was made with other settings: {'; '.join(changed)}. "
                "Go on with the same ones, or name another output folder."
            )
    elif output.exists() and (not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())):
        raise UserError(f"{output}: exists and holds no {STATE_FILE}, want a new folder. Name another output.")


def _claim_folder(config: GenerateConfig, settings: dict[str, Any]) -> None:
    """Write the settings before the first image, so that no image can stand beside settings that did not make it."""
    config.output.mkdir(parents=True, exist_ok=True)
    state = config.output / STATE_FILE
    partial = state.with_name(f".{STATE_FILE}.partial")
    partial.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    partial.replace(state)
    (config.output / IMAGES_FOLDER).mkdir(exist_ok=True)
    write_resolved(config, config.output)


def _fingerprint(place: Path, *, pieces: int = 16, length: int = 4096) -> str | None:
    """A hash of names, sizes and evenly spaced pieces of the files: a retrained model at the same path differs.

    None for a hub id, which its revision names.
    """
    if not place.exists():
        return None
    digest = hashlib.sha256()
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place)}:{size}:".encode())
        with open(path, "rb") as file:
            for piece in range(pieces):
                file.seek(piece * max(0, size - length) // (pieces - 1))
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _done_rows(file: Path) -> set[str]:
    """The ids of the rows that stand; a last line cut short by a kill is removed."""
    if not file.is_file():
        return set()
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        logger.info("%s: the last line was cut short; it is written again", file)
        with open(file, "rb+") as rows:
            rows.truncate(len(whole))
    return {_id_of(line, f"{file}:{number}") for number, line in enumerate(whole.splitlines(), 1)}


def _id_of(line: bytes, where: str) -> str:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, TypeError, KeyError) as fault:
        text = line.decode(errors="replace")[:60]
        raise UserError(
            f"{where}: got {text!r}, want a row that generate wrote. Remove the line; its row is then written again."
        ) from fault


def _open(config: GenerateConfig) -> Any:
    import torch

    from mmalign.devices import torch_device
    from mmalign.models.diffusion import find_family, open_pipeline
    from mmalign.models.sampling import set_scheduler, use_lora

    pipe = open_pipeline(config.family, config.model, dtype=getattr(torch, config.dtype), revision=config.revision)
    torch.nn.Module.to(pipe.vae, getattr(torch, config.dtype))
    if config.scheduler is not None:
        set_scheduler(pipe, config.scheduler)
    if config.lora is not None:
        use_lora(find_family(config.family), pipe, config.lora, scale=config.lora_scale)
    try:
        return pipe.to(torch_device(config.device))
    except (RuntimeError, AssertionError) as fault:
        raise UserError(f"device: got {config.device!r}, which cannot be used ({fault}). Set device: auto.") from fault


def _fill(run: _Run, pipe: Any, rows: Sequence[int], missing: Sequence[tuple[int, int]]) -> None:
    """Sample and save the missing images, and append each row as soon as its last image is there."""
    from tqdm import tqdm

    provenance = _provenance(run.config, pipe)
    waiting = deque(rows)
    with open(run.file, "a", encoding="utf-8") as file, tqdm(total=len(missing), unit="image") as bar:

        def write_complete_rows() -> None:
            while waiting and all(run.image_path(*job).is_file() for job in run.images_of(waiting[0])):
                file.write(run.line(waiting.popleft(), provenance))
                file.flush()
                os.fsync(file.fileno())

        write_complete_rows()
        for job, image in zip(missing, _sampled(run, pipe, missing), strict=True):
            _save_image(image, run.image_path(*job))
            write_complete_rows()
            bar.update()


def _sampled(run: _Run, pipe: Any, jobs: Sequence[tuple[int, int]]) -> Iterator[Any]:
    from mmalign.families import find_family
    from mmalign.models.sampling import sample_images

    return sample_images(
        find_family(run.config.family),
        pipe,
        [run.prompts[index] for index, _ in jobs],
        [run.seed(*job) for job in jobs],
        steps=run.config.steps,
        guidance_scale=run.config.guidance_scale,
        negative_prompt=run.config.negative_prompt,
        size=run.config.size,
        batch_size=run.config.batch_size,
    )


def _save_image(image: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        image.save(file, format="PNG")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _provenance(config: GenerateConfig, pipe: Any) -> dict[str, Any]:
    """What made the images, as recorded with each of them."""
    keys = ("family", "model", "revision", "lora", "steps", "guidance_scale", "negative_prompt", "size", "dtype")
    made = {key: value for key, value in resolved(config).items() if key in keys and value is not None}
    lora = {"lora_scale": config.lora_scale} if config.lora is not None else {}
    return {**made, **lora, "scheduler": type(pipe.scheduler).__name__}


if __name__ == "__main__":
    sys.exit(command_line(GenerateConfig, main, prog="mmalign generate"))
