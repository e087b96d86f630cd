"""Media: one image as bytes or as a place on disk, read only when asked for."""

import functools
import hashlib
import io
import os
import struct
import tarfile
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from mmalign.errors import UserError

# What Pillow raises on damaged files: most plugins OSError, the PNG reader SyntaxError, short headers the rest.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
TAR = "tar://"


@dataclass(frozen=True, kw_only=True)
class Media:
    """One image: encoded bytes, or a path that is read when needed.

    A path is a file, or `tar://member::shard.tar` for a member of an uncompressed tar file.

    Args:
        data: the encoded file (JPEG, PNG, ...), or None.
        path: where the encoded file lies, or None.
        where: the row it belongs to, as it should stand in error messages. Not part of equality.
    """

    data: bytes | None = None
    path: str | None = None
    where: str = field(default="", compare=False)

    def place(self) -> str:
        """Say where this image is, for messages: `pairs.jsonl:17: candidate 2 (media/a.png)`."""
        named = f"({self.path})" if self.path else ""
        return f"{self.where} {named}".strip() or "image"

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            UserError: the file is missing or cannot be read.
        """
        if self.data is not None:
            return self.data
        if not self.path:
            raise UserError(f"{self.place()}: got an image without bytes and without path, want one of them. Add it.")
        try:
            return read_member(self.path) if self.path.startswith(TAR) else _read_file(self.path)
        except (OSError, KeyError, tarfile.TarError) as fault:
            raise UserError(
                f"{self.place()}: the image cannot be read ({fault}). "
                "Image paths are relative to the file that names them; put the image there or remove the row."
            ) from fault

    def key(self) -> str:
        """Return the sha256 of the encoded bytes in hexadecimal: equal content has an equal key."""
        return hashlib.sha256(self.read()).hexdigest()

    def open(self) -> Image.Image:
        """Decode to an RGB image of 8 bits.

        EXIF orientation is applied; transparency is laid on white; greyscale, palette and CMYK are converted;
        16-bit greyscale is scaled (65535 becomes 255), not clipped.

        Raises:
            UserError: the image is missing, damaged, truncated, or of a kind without a defined range.
        """
        data = self.read()
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault

    def inspect(self) -> tuple[tuple[int, int], str]:
        """Decode once, cheaply, and return ((width, height) after EXIF rotation, mode as stored).

        JPEG is decoded at reduced scale: all of the stream is read, so truncation is found, in a fraction of the time.

        Raises:
            UserError: as `open`.
        """
        data = self.read()
        try:
            with Image.open(io.BytesIO(data)) as image:
                (width, height), mode = image.size, image.mode
                image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 exchange the sides
                image.load()
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault
        return ((height, width) if turned else (width, height)), mode

    def _damaged(self, fault: Exception) -> str:
        return f"{self.place()}: got a damaged image ({fault}), want one that decodes. Replace it or remove the row."


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB with 8 bits a channel; transparency is composited on white.

    Raises:
        ValueError: 32-bit or floating-point pixels beyond 16 bits, for which no white is defined.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.float64)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"mode {image.mode} has no fixed range; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(pixels / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def tar_path(shard: str, member: str) -> str:
    """Return the address of one member of a tar file."""
    return f"{TAR}{member}::{shard}"


def read_member(path: str) -> bytes:
    """Read one member of an uncompressed tar file by its address, without scanning the tar again.

    Raises:
        KeyError: the shard has no such member.
        OSError: the shard cannot be read.
    """
    member, _, shard = path.removeprefix(TAR).rpartition("::")
    start, size = _members(shard, os.stat(shard).st_mtime_ns)[member]
    with open(shard, "rb") as file:
        file.seek(start)
        return file.read(size)


@functools.lru_cache(maxsize=256)
def _members(shard: str, changed: int) -> dict[str, tuple[int, int]]:
    """Index a tar file; `changed` (its time of change) makes a rewritten shard a new entry of the cache."""
    with tarfile.open(shard, "r:") as tar:
        return {info.name: (info.offset_data, info.size) for info in tar if info.isfile()}


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
