"""One model that makes candidates: how it is sampled, opened, and told apart from another of the same name."""

import hashlib
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mmalign.config import resolved
from mmalign.config.writing import environment
from mmalign.errors import UserError

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Maker:
    """One model and how it is sampled; its candidates of a prompt are numbered from `first`."""

    name: str
    first: int
    family: str | None
    model: str | None
    revision: str | None
    lora: str | None
    lora_scale: float
    num_candidates: int
    steps: int
    guidance_scale: float
    negative_prompt: str | None
    size: tuple[int, int] | None
    frames: int | None
    scheduler: str | None
    batch_size: int
    dtype: Dtype

    def check(self, where: str) -> None:
        """Refuse what the types do not tell. Raises ValueError, its message beginning with `where`."""
        for name in ("family", "model"):
            if getattr(self, name) is None:
                raise ValueError(f"{where}{name}: got none, want one. Set it, or give it to each of generators.")
        for name in ("num_candidates", "steps", "batch_size"):
            if getattr(self, name) < 1:
                least = "2 or more" if name == "num_candidates" and not where else "1 or more"
                raise ValueError(f"{where}{name}: got {getattr(self, name)}, want {least}.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"{where}guidance_scale: got {self.guidance_scale}, want 0 or more; 1 is no guidance.")
        if self.size is not None and any(side <= 0 or side % 8 for side in self.size):
            raise ValueError(f"{where}size: got {list(self.size)}, want multiples of 8, [height, width].")


def bar_label(name: str) -> str:
    """What a progress bar calls a model: the last part of its path or hub id, at most 30 letters of it.

    A folder of the hub's cache, which is called after a hash, goes by the name of its model.
    """
    parts = [part for part in name.split("/") if part] or [name]
    cached = next((part for part in parts if part.startswith("models--")), None)
    last = parts[-1] if cached is None else cached.rpartition("--")[2]
    return last if len(last) <= 30 else last[:27] + "..."


def files_of(maker: Maker) -> dict[str, str | None]:
    """Fingerprints of the files behind the names."""
    from mmalign.models.sampling import lora_file
    from mmalign.snapshots import is_checkpoint, weights_file

    found = {"files of model": fingerprint(Path(str(maker.model)).expanduser())}
    if maker.lora is not None:
        place = Path(maker.lora).expanduser()
        found["files of lora"] = fingerprint(weights_file(place) if is_checkpoint(place) else lora_file(maker.lora))
    vae = vae_of_run(maker.lora)
    if vae is not None:
        found["files of vae"] = fingerprint(Path(vae).expanduser()) or vae
    return found


def vae_of_run(lora: str | None) -> str | None:
    """The `adapter.vae` of the run that left a LoRA, which was trained on its latents; None: the model's own.

    Args:
        lora: a run's output or its checkpoint-N, whose config.yaml tells it; or another LoRA, of which nothing is known.
    """
    from mmalign.snapshots import is_checkpoint

    place = Path(lora or "").expanduser().absolute()
    run = place.parent if place.is_file() or is_checkpoint(place) else place
    if lora is None or not (run / "config.yaml").is_file() or not (run / "environment.json").is_file():
        return None
    told = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    adapter = told.get("adapter") if isinstance(told, dict) else None
    return adapter.get("vae") if isinstance(adapter, dict) else None


def opened(maker: Maker) -> Any:
    """The stock pipeline with its LoRA, on the CPU."""
    import torch

    from mmalign.models.diffusion import find_family, open_pipeline
    from mmalign.models.other_vae import replace_vae
    from mmalign.models.sampling import set_scheduler, use_lora
    from mmalign.snapshots import stock_places

    dtype, family = getattr(torch, maker.dtype), find_family(str(maker.family))
    _check_measures(maker, family)
    with tempfile.TemporaryDirectory(prefix="mmalign-") as scratch:
        model, lora = stock_places(str(maker.model), maker.lora, Path(scratch))
        pipe = open_pipeline(family, model, dtype=dtype, revision=maker.revision)
        vae = vae_of_run(maker.lora)
        if vae is not None:
            logger.info("%s: adapter.vae of its run decodes: %s", maker.lora, vae)
            replace_vae(pipe, vae, dtype)
        torch.nn.Module.to(pipe.vae, dtype)
        if maker.scheduler is not None:
            set_scheduler(pipe, maker.scheduler)
        if lora is not None:
            use_lora(family, pipe, lora, scale=maker.lora_scale)
        return pipe


def _check_measures(maker: Maker, family: Any) -> None:
    from mmalign.adapters.options import check_frames

    multiple = family.size_multiple
    if maker.size is not None and any(side % multiple for side in maker.size):
        raise UserError(f"size: got {list(maker.size)}, want multiples of {multiple} for {family.name}.")
    if maker.frames is not None:
        try:
            check_frames(family, maker.frames)
        except ValueError as fault:
            raise UserError(str(fault)) from fault


def provenance_of(maker: Maker, pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What made the images, as recorded with each of them."""
    own = {key: value for key, value in resolved(maker).items() if value is not None}
    made = {
        key: value
        for key, value in own.items()
        if key not in ("name", "first", "num_candidates", "batch_size", "size", "frames")
    }
    if maker.lora is None:
        del made["lora_scale"]
    known = environment()
    packages = {name: known["packages"][name] for name in ("torch", "diffusers", "transformers", "peft")}
    return {
        "generator": maker.name,
        **made,
        **_revision(maker),
        "scheduler": type(pipe.scheduler).__name__,
        "files": {key.removeprefix("files of "): value for key, value in files_of(maker).items() if value is not None},
        "versions": {"mmalign": known["mmalign"], **packages},
    }


def _revision(maker: Maker) -> dict[str, str]:
    """The commit of a model of the hub, which its folder in the hub's cache bears."""
    from mmalign.models.diffusion import find_family, model_folder
    from mmalign.snapshots import is_checkpoint

    if maker.model is None or Path(maker.model).expanduser().exists() or is_checkpoint(maker.model):
        return {}
    folder = model_folder(find_family(str(maker.family)), maker.model, revision=maker.revision, local_files_only=True)
    return {"revision": folder.name} if folder.parent.name == "snapshots" else {}


def fingerprint(place: Path, *, pieces: int = 16, length: int = 4096) -> str | None:
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
