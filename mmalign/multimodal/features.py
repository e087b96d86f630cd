"""Features of images on disk: what a frozen vision tower and projector make of each, encoded once for all runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign.errors import UserError

if TYPE_CHECKING:
    from mmalign.multimodal.families import Features


class FeatureStore:
    """A folder with a file for each image.

    Args:
        folder: where it lies; made where it is not there.
        fingerprint: of tower, projector and precision: features of others lie in another folder within.
    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Make the folder."""
        self.folder = folder / fingerprint[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"adapter.features: {folder} cannot be written ({fault}). Choose another folder.") from fault

    def get(self, key: str, device: torch.device) -> Features | None:
        """What is known of an image; None: nothing."""
        from safetensors.torch import load_file

        from mmalign.multimodal.families import Features

        path = self._path(key)
        if not path.is_file():
            return None
        kept = load_file(path, device=str(device))
        deep = sorted(name for name in kept if name.startswith("deep"))
        return Features(tokens=kept["tokens"], deep=tuple(kept[name] for name in deep))

    def put(self, key: str, features: Features) -> None:
        """Keep the features of an image; of several processes that do, the last one's stay."""
        from safetensors.torch import save_file

        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {"tokens": features.tokens, **{f"deep{n:02}": one for n, one in enumerate(features.deep)}}
        save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, scratch)
        os.replace(scratch, path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
