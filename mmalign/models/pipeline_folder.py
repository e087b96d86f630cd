"""Where the files of a diffusers pipeline lie, and which model family its configs describe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError


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


def detect_family(index: Mapping[str, Any], unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str | None:
    """The name of the family that a pipeline's configs describe; None for one that mmalign does not know.

    SD 2.x differs from SD 1.x in its text encoder (cross-attention width 1024 against 768); at any other width
    (small models of one's own) velocity prediction tells.
    """
    pipeline, width = index.get("_class_name"), unet.get("cross_attention_dim")
    if pipeline == "StableDiffusionXLPipeline":
        return "sdxl"
    if pipeline != "StableDiffusionPipeline":
        return None
    if width in (768, 1024):
        return "sd2" if width == 1024 else "sd15"
    return "sd2" if scheduler.get("prediction_type") == "v_prediction" else "sd15"


def check_family(folder: Path, model: str | Path, *, family: str, pipeline: str, known: tuple[str, ...]) -> None:
    """Refuse a folder of another family before any weight is read.

    Args:
        folder, model: where the files are, and what the user called them.
        family, pipeline: the wanted family and its pipeline class; a family outside `known` is held to its class only.
        known: the families that `detect_family` tells apart.
    Raises:
        UserError: what was found, and the family that fits.
    """
    index = _read_json(folder / "model_index.json")
    unet = _read_json(folder / "unet" / "config.json", missing_ok=True)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", missing_ok=True)
    found = detect_family(index, unet, scheduler)
    if found == family or (family not in known and index.get("_class_name") == pipeline):
        return
    facts = f"{index.get('_class_name')}, cross_attention_dim {unet.get('cross_attention_dim')}"
    facts += f", prediction_type {scheduler.get('prediction_type', 'epsilon')}"
    remedy = f"Set family: {found}." if found else f"Families: {', '.join(known)}."
    raise UserError(f"{model}: got a model of {found or 'an unknown family'} ({facts}), want {family}. {remedy}")


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: not readable as JSON ({fault}). Download or save the model again.") from fault
