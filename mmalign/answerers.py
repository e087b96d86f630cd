"""One language model that answers prompts: how it is sampled, opened, and told apart from another of the same name."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmalign.config import Choice, resolved
from mmalign.config.writing import environment
from mmalign.errors import UserError
from mmalign.makers import Dtype, fingerprint
from mmalign.snapshots import is_checkpoint, weights_file, write_stock_weights

INHERITED = (
    *("model", "revision", "gguf_file", "tokenizer", "chat_template", "chat_template_kwargs", "template", "system_prompt"),
    *("tiny", "processor", "as_video", "num_frames"),
)
OF_SIGHT = ("processor", "as_video", "num_frames")  # settings of models that see, not told where they are not given
LORA, FULL = "adapter_model.safetensors", "model"  # what a run leaves in its output folder
NOT_TOLD = ("name", "first", "num_candidates", "batch_size", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """One model and how it is sampled; its answers to a prompt are numbered from `first`."""

    name: str
    first: int
    model: str | None
    tuned: str | None
    revision: str | None
    gguf_file: str | None
    tokenizer: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, bool | int | float | str] | None
    template: Literal["auto", "always"] | None
    system_prompt: str | None
    num_candidates: int
    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    max_prompt_length: int | None
    batch_size: int
    dtype: Dtype
    trust_remote_code: bool
    tiny: dict[str, int | str] | None = None
    processor: dict[str, bool | int | float | str] | None = None
    as_video: bool | None = None
    num_frames: int | None = None

    def check(self, where: str) -> None:
        """Refuse what the types do not tell. Raises ValueError, its message beginning with `where`."""
        if self.model is None and self.tuned is None:
            raise ValueError(f"{where}model: got neither model nor tuned, want one. Set it, or give it to each of generators.")
        for name in ("num_candidates", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}{name}: got {getattr(self, name)}, want 1 or more.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{where}temperature, top_k, top_p: got {self.temperature}, {self.top_k}, {self.top_p}, want 0 or more, 0 or "
                "more, and above 0 to 1."
            )
        if self.temperature == 0 and self.num_candidates > 1:
            raise ValueError(
                f"{where}num_candidates: got {self.num_candidates} with temperature 0, which gives equal answers, want 1. "
                "Set a temperature above 0."
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 2:
            raise ValueError(f"{where}max_prompt_length: got {self.max_prompt_length}, want 2 or more, or null for no limit.")


def completed(answerer: Answerer) -> Answerer:
    """The same with what it leaves out: of a tuned model, as its run was trained.

    Raises:
        UserError: `tuned` is no run of the adapter text or image_text, or one that left no weights.
    """
    if answerer.tuned is None:
        return replace(answerer, template=answerer.template or "auto")
    settings = _adapter_of(answerer.tuned).settings
    _weights_of(answerer.tuned)
    if answerer.model is not None and answerer.model != settings["model"]:
        settings = {**settings, "revision": None, "gguf_file": None, "tiny": None}
    missing: dict[str, Any] = {name: settings.get(name) for name in INHERITED if getattr(answerer, name) is None}
    return replace(answerer, **missing)


def settings_of(answerer: Answerer) -> dict[str, Any]:
    """All that its answers depend on, with fingerprints of the files behind names."""
    told = {name: value for name, value in resolved(answerer).items() if value is not None or name not in OF_SIGHT}
    return {**told, **files_of(answerer)}


def sees_by_run(tuned: str) -> bool:
    """Whether the run that left these weights is one of a model that sees.

    Raises:
        UserError: no run of the adapter text or image_text is there.
    """
    from mmalign.adapters.image_text import ImageTextAdapter

    return _adapter_of(tuned).target is ImageTextAdapter


def files_of(answerer: Answerer) -> dict[str, str | None]:
    """Fingerprints of the files behind the names; None for what lies on the hub."""
    found = {"files of model": fingerprint(Path(str(answerer.model)).expanduser())}
    if answerer.tuned is not None:
        found["files of tuned"] = fingerprint(_weights_of(answerer.tuned))
    if answerer.tokenizer is not None:
        found["files of tokenizer"] = fingerprint(Path(answerer.tokenizer).expanduser())
    if answerer.chat_template is not None:
        found["files of chat_template"] = _short_hash(template_text(answerer.chat_template))
    return found


def opened_encoder(answerer: Answerer) -> Any:
    """`language.chat.Encoder` with the tokenizer.

    Raises:
        UserError: no tokenizer, or no such file of a template.
    """
    from mmalign.language.chat import Encoder
    from mmalign.language.opening import open_tokenizer

    with own_words():
        tokenizer = open_tokenizer(
            answerer.tokenizer or str(answerer.model),
            revision=answerer.revision if answerer.tokenizer is None else None,
            trust_remote_code=answerer.trust_remote_code,
            **({} if answerer.gguf_file is None or answerer.tokenizer else {"gguf_file": answerer.gguf_file}),
        )
    if answerer.chat_template is not None:
        tokenizer.chat_template = template_text(answerer.chat_template)
    return Encoder(
        tokenizer=tokenizer,
        template=answerer.template or "auto",
        template_kwargs=answerer.chat_template_kwargs or {},
        system_prompt=answerer.system_prompt,
        max_prompt_length=answerer.max_prompt_length,
    )


def opened_model(answerer: Answerer, device: Any, *, sees: bool = False) -> Any:
    """The model with its tuned weights.

    Args:
        answerer: which one.
        device: where it runs.
        sees: whether it is opened as a model of images and texts.
    Raises:
        UserError: no such model, or weights that do not fit it.
    """
    import torch

    from mmalign.language import opening as of_texts
    from mmalign.multimodal import opening as of_images

    open_model: Any = of_images.open_sighted if sees else of_texts.open_model
    load_weights: Any = of_images.load_weights if sees else of_texts.load_weights
    more: dict[str, Any] = {} if answerer.gguf_file is None else {"gguf_file": answerer.gguf_file}
    with own_words(), tempfile.TemporaryDirectory(prefix="mmalign-") as scratch:
        model = open_model(
            str(answerer.model),
            revision=answerer.revision,
            dtype=getattr(torch, answerer.dtype),
            device=device,
            trust_remote_code=answerer.trust_remote_code,
            tiny=answerer.tiny,
            **more,
        )
        if answerer.tuned is not None:
            place = Path(answerer.tuned).expanduser()
            if is_checkpoint(place):
                write_stock_weights(place, Path(scratch))
                place = Path(scratch)
            load_weights(model, place)
    return model.requires_grad_(False).eval()


def provenance_of(answerer: Answerer, model: Any) -> dict[str, Any]:
    """What made the answers, as recorded with each of them."""
    told = {key: value for key, value in resolved(answerer).items() if value is not None and key not in NOT_TOLD}
    if "{" in (answerer.chat_template or ""):
        told["chat_template"] = f"sha256 {_short_hash(str(answerer.chat_template))}"
    commit = getattr(model.config, "_commit_hash", None)
    known = environment()
    packages = {name: known["packages"][name] for name in ("torch", "transformers", "peft")}
    return {
        "generator": answerer.name,
        **told,
        **({} if commit is None else {"revision": commit}),
        "files": {key.removeprefix("files of "): value for key, value in files_of(answerer).items() if value is not None},
        "versions": {"mmalign": known["mmalign"], **packages},
    }


def _adapter_of(tuned: str) -> Choice:
    """The adapter of the run that left these weights, of texts or of images and texts."""
    from mmalign.adapters.image_text import ImageTextAdapter
    from mmalign.adapters.text import TextAdapter
    from mmalign.experiment import read_run

    place = Path(tuned).expanduser()
    path = (place.absolute().parent if is_checkpoint(place) else place) / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"tuned: got {tuned}, and there is no {path}, want the output folder of `mmalign train` or its checkpoint-N. For a "
            "model as such, name it as model."
        )
    adapter = read_run(path).adapter
    if adapter.target not in (TextAdapter, ImageTextAdapter):
        raise UserError(
            f"tuned: got {tuned}, a run of adapter {adapter.name}, want one of adapter text or image_text. Name another run."
        )
    return adapter


def _weights_of(tuned: str) -> Path:
    place = Path(tuned).expanduser()
    found = [weights_file(place)] if is_checkpoint(place) else [place / LORA, place / FULL]
    there = next((path for path in found if path.exists()), None)
    if there is None:
        raise UserError(f"tuned: got {tuned}, which holds no tuned weights yet. Let the run end, or name its checkpoint-N.")
    return there


def template_text(value: str) -> str:
    """The Jinja text that a setting gives, or names a file of."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"chat_template: cannot read {value} ({fault}). Give a file, or Jinja text.") from fault


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def own_words() -> Iterator[None]:
    """Faults told under the settings of this verb."""
    try:
        yield
    except UserError as fault:
        raise UserError(str(fault).replace("adapter.", "")) from fault
