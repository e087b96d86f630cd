"""The tiny random pipelines of mmalign.models.tiny, one folder per family and test process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from mmalign.families.parts import IMAGE_SIZE, LATENT_SHAPE, tiny_tokenizer
from mmalign.models.tiny import tiny_pipeline

__all__ = ["IMAGE_SIZE", "LATENT_SHAPE", "tiny_folder", "tiny_pipeline", "tiny_tokenizer"]


@functools.cache
def tiny_folder(family: str) -> Path:
    """A folder with the tiny pipeline of that family, built once per test process and removed at its end."""
    root = Path(tempfile.mkdtemp(prefix="mmalign-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return tiny_pipeline(family, root / family)
