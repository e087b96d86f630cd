"""Tiny random pipelines of the families' real classes: `model: tiny` in a config, for smoke runs and tests on any laptop.

Random weights make no pictures; everything else (loading, encoding, training, saving, sampling) is the real code.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import UserError
from mmalign.families import FAMILIES
from mmalign.models.quiet import quiet_libraries

TINY = "tiny"
_VERSION = 1  # of the recipe; another one is another folder


def tiny_folder(family: str) -> Path:
    """The folder of a family's tiny pipeline in the user's cache, built at the first call (a second, below 1 MB).

    Raises:
        UserError: a family without one.
    """
    if family not in FAMILIES or FAMILIES[family].tiny is None:
        known = ", ".join(name for name, one in FAMILIES.items() if one.tiny is not None)
        raise UserError(f"model: got {TINY} for family {family}, want one of {known}.")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign" / "tiny"
    folder = root / f"{family}-{_VERSION}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{family}-"))
        try:
            tiny_pipeline(family, scratch / family)
            os.replace(scratch / family, folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def tiny_pipeline(family: str, folder: Path | str, *, seed: int = 0, **changes: dict[str, Any]) -> Path:
    """Save a random pipeline of `family` into `folder`: below 1 MB, about a second.

    `changes` overrides entries of a part's config: `scheduler={"rescale_betas_zero_snr": True}`, also of
    `unet` or `transformer`, `vae` and `text_encoder`.
    """
    folder, build = Path(folder), FAMILIES[family].tiny
    assert build is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with quiet_libraries():
            build(changes).save_pretrained(folder)
    return folder
