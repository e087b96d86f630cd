"""Stamped images: PNG files that say themselves how they were made, written whole or not at all."""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.errors import UserError
from mmalign.records.frames import animation

HEAD = 33  # bytes of a PNG before its second chunk: signature and IHDR
KEYWORD = "mmalign"


def save_stamped(image: Image.Image | Sequence[Image.Image], provenance: dict[str, Any], path: Path) -> None:
    """Write a PNG with its provenance, and its size as [height, width], in a text chunk that any PNG reader passes over.

    The frames of a video become an animated PNG, which is lossless too; the provenance tells their number.
    """
    frames = [image] if isinstance(image, Image.Image) else image
    data = animation(frames)
    number = {} if isinstance(image, Image.Image) else {"frames": len(frames)}
    told = json.dumps({**provenance, **number, "size": [frames[0].height, frames[0].width]}, sort_keys=True)
    chunk = b"tEXt" + KEYWORD.encode() + b"\0" + told.encode("ascii")
    stamp = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    replace_file(path, data[:HEAD] + stamp + data[HEAD:])


def stamp_of(path: Path) -> dict[str, Any]:
    """The provenance in an image that `save_stamped` wrote; the pixels are not decoded.

    Raises:
        UserError: no such stamp.
    """
    with Image.open(path) as image:
        text = image.info.get(KEYWORD)
    if text is None:
        raise UserError(f"{path}: got an image that generate did not make, want its own. Remove it; it is then made again.")
    found: dict[str, Any] = json.loads(text)
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and have it on disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
