"""Features of images on disk: what a frozen vision tower and projector make of each, encoded once for all runs."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import UserError

if TYPE_CHECKING:
    from mmalign.multimodal.families import Features

TOLD = "of.json"  # in a folder of features: what they were made by


class FeatureStore:
    """A folder with a file for each image, which any number of processes may fill and read at once.

    A file's name is the key of its image (pixels as the processor gave them, degradation included: see `seen.image_key`); it
    lies in a folder whose name is the fingerprint of all else that features depend on. So what was made by other weights,
    another precision or another processor's settings is never found, and never overwritten.

    Args:
        folder: where it lies; made where it is not there.
        fingerprint: of tower, projector, their config and the precision.
        told: the same in words, for who looks into the folder.
    Raises:
        UserError: the folder cannot be written, or was made by what only the beginning of the fingerprint is shared with.
    """

    def __init__(self, folder: Path, fingerprint: str, told: dict[str, Any] | None = None) -> None:
        """Make the folder."""
        self.folder = folder / fingerprint[:16]
        note = self.folder / TOLD
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not note.is_file():
                scratch = _scratch(note)
                scratch.write_text(json.dumps({"fingerprint": fingerprint, **(told or {})}, indent=1) + "\n", encoding="utf-8")
                os.replace(scratch, note)
            known = json.loads(note.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError) as fault:
            raise UserError(f"adapter.features: {folder} cannot be used ({fault}). Choose another folder.") from fault
        if known != fingerprint:
            raise UserError(f"adapter.features: {note} tells of another model. Remove {self.folder}, or choose another folder.")

    def get(self, key: str, num_tokens: int, device: torch.device) -> Features | None:
        """What is known of an image; None: nothing.

        Args:
            key: of the image.
            num_tokens: that its features fill; 0: not told.
            device: where they go.
        Raises:
            UserError: a file that is damaged, or of another number of tokens.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from mmalign.multimodal.families import Features

        path = self._path(key)
        try:
            kept = load_file(path, device=str(device))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as fault:
            raise UserError(f"adapter.features: {path} is damaged ({fault}). Remove it; it is then made again.") from fault
        if "tokens" not in kept or (num_tokens and len(kept["tokens"]) != num_tokens):
            raise UserError(
                f"adapter.features: {path} lacks the {num_tokens} tokens of its image. Remove it; it is then made again."
            )
        deep = sorted(name for name in kept if name.startswith("deep"))
        return Features(tokens=kept["tokens"], deep=tuple(kept[name] for name in deep))

    def put(self, key: str, features: Features) -> None:
        """Keep the features of an image; of several processes that do, the last one's stay.

        Raises:
            UserError: they cannot be written.
        """
        from safetensors.torch import save_file

        path = self._path(key)
        tensors = {"tokens": features.tokens, **{f"deep{n:02}": one for n, one in enumerate(features.deep)}}
        try:
            path.parent.mkdir(exist_ok=True)
            scratch = _scratch(path)
            save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, scratch)
            os.replace(scratch, path)
        except OSError as fault:
            raise UserError(f"adapter.features: {path} cannot be written ({fault}). Make room, or set it to null.") from fault

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _scratch(path: Path) -> Path:
    """A name of this process alone, whatever machine of a shared disk it runs on."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
