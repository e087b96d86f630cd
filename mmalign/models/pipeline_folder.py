"""Where the files of a diffusers pipeline lie, and which model family its configs describe."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.families import FAMILIES, Family


def local_folder(model: str | Path, *, revision: str | None, variant: str | None, local_files_only: bool) -> Path:
    """The folder itself (no network), or the one in the hub cache that a hub id was brought to.

    Raises:
        UserError: neither a folder nor a reachable hub id; a single file; a folder without `model_index.json`.
    """
    path = Path(model).expanduser()
    if path.is_file():
        save = f'Pipeline.from_single_file("{path.name}").save_pretrained("folder")'
        raise UserError(f"{model}: got a single file, want a diffusers folder. Convert it once: {save}.")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{model}: got a folder without model_index.json, want a diffusers pipeline folder.")
        return path
    words = str(model).split("/")
    if len(words) != 2 or not all(words) or words[0] in (".", "..", "~"):
        raise UserError(f"{model}: no such folder. Name a diffusers pipeline folder or a hub id owner/name.")
    return _hub_folder(str(model), revision=revision, variant=variant, local_files_only=local_files_only)


def _hub_folder(model: str, *, revision: str | None, variant: str | None, local_files_only: bool) -> Path:
    from diffusers import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(
            model, revision=revision, variant=variant, local_files_only=local_files_only, safety_checker=None
        )
    except (OSError, ValueError) as fault:
        text = f"{model}: neither a folder nor a hub model that could be fetched ({fault})."
        raise UserError(f"{text} Check the name, the network and, for a gated model, the login.") from fault
    return Path(folder)


def detect_family(folder: Path) -> str | None:
    """The name of the family that a pipeline folder's configs describe; None for one that mmalign does not know."""
    index, scheduler = _configs(folder, "model_index.json", "scheduler/scheduler_config.json")
    for family in FAMILIES.values():
        (network,) = _configs(folder, f"{family.network}/config.json")
        if family.recognise(index, network, scheduler):
            return family.name
    return None


def check_family(folder: Path, model: str | Path, family: Family) -> None:
    """Refuse a folder of another family before any weight is read.

    Args:
        folder, model: where the files are, and what the user called them.
        family: the wanted family; one of the user's own, outside FAMILIES, is held to what it recognises.
    Raises:
        UserError: what was found, and the family that fits.
    """
    index, network, scheduler = _configs(
        folder, "model_index.json", f"{family.network}/config.json", "scheduler/scheduler_config.json"
    )
    if family.recognise(index, network, scheduler):
        return
    found = detect_family(folder)
    facts = str(index.get("_class_name"))
    if "cross_attention_dim" in network:
        facts += f", cross_attention_dim {network['cross_attention_dim']}"
    facts += f", prediction_type {scheduler.get('prediction_type', 'epsilon')}"
    remedy = f"Set family: {found}." if found else f"Families: {', '.join(FAMILIES)}."
    raise UserError(f"{model}: got a model of {found or 'an unknown family'} ({facts}), want {family.name}. {remedy}")


def absent_parts(family: Family, folder: Path) -> dict[str, None]:
    """Encoders and tokenizers that a folder does without (SD3 without its T5), as keywords of `from_pretrained`.

    Stock diffusers wants them named, although the folder says so.
    """
    (index,) = _configs(folder, "model_index.json")
    return {name: None for name in (*family.encoders, *family.tokenizers) if index.get(name) == [None, None]}


def opening_code(family: Family, base: Path | str, *, like: Path | str | None = None) -> str:
    """The line of stock Python that opens a pipeline as `pipe`, given `import diffusers`.

    Args:
        family: of the model.
        base: folder or hub id.
        like: a folder with the same parts, where `base` is not written yet.
    """
    folder = Path(base if like is None else like)
    absent = absent_parts(family, folder) if (folder / "model_index.json").is_file() else {}
    arguments = ", ".join([f'"{base}"', *(f"{name}=None" for name in absent)])
    return f"pipe = diffusers.{family.pipeline}.from_pretrained({arguments})"


def from_anywhere(model: str) -> str:
    """A folder by its whole path, so that it is found from any other; a hub id as it is."""
    return str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model


def check_tokenizers(folder: Path, model: str | Path, family: Family) -> None:
    """Refuse tokenizers that exist only as a SentencePiece model (PixArt's) where the packages that read one are missing.

    Raises:
        UserError: which packages to install.
    """
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    for name in family.tokenizers:
        held = {path.name for path in (folder / name).glob("*")}
        if missing and "tokenizer.json" not in held and held & {"spiece.model", "tokenizer.model"}:
            packages = " ".join(one.removeprefix("google.") for one in missing)
            raise UserError(f"{model}: its {name} is a SentencePiece model, which needs {packages}. pip install {packages}.")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _configs(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [_read_json(folder / name, missing_ok=name != "model_index.json") for name in names]


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: not readable as JSON ({fault}). Download or save the model again.") from fault
