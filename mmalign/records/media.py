"""Media: one image, animation or video file as bytes or as a place on disk, read only when asked for."""

import functools
import hashlib
import io
import os
import struct
import sys
import tarfile
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmalign.errors import UserError
from mmalign.records.frames import num_frames_of, rate_of, video_frames, video_num_frames, video_rate, video_suffix

# What Pillow raises on damaged files: most plugins OSError, the PNG reader SyntaxError, the GIF reader IndexError, short
# headers the rest.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
TAR = "tar://"


@dataclass(frozen=True, kw_only=True)
class Media:
    """One image, animation (GIF, WebP, APNG) or video file (MP4, WebM): encoded bytes, or a path that is read when needed.

    A path is a file, or `tar://member::shard.tar` for a member of an uncompressed tar file.

    Args:
        data: the encoded file (JPEG, PNG, MP4, ...), or None.
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
            UserError: the image is missing, damaged, truncated, of a kind without a defined range, or has several frames.
        """
        data = self.read()
        if video_suffix(data):
            raise UserError(self._moving(self.num_frames()))
        try:
            with Image.open(io.BytesIO(data)) as image:
                count = num_frames_of(image)
                image.load()
                still = to_rgb(ImageOps.exif_transpose(image))
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault
        if count > 1:
            raise UserError(self._moving(count))
        return still

    def num_frames(self) -> int:
        """Return how many frames the file holds, without decoding them; 1 for a still image.

        Raises:
            UserError: the file is missing or damaged.
        """
        data = self.read()
        try:
            if video_suffix(data):
                return video_num_frames(data)
            with Image.open(io.BytesIO(data)) as image:
                return num_frames_of(image)
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault

    def frames(self, count: int | None = None) -> list[Image.Image]:
        """Decode the first `count` frames, or all, each as `open` does a still image.

        Raises:
            UserError: as `open`, but for the number of frames.
        """
        data = self.read()
        try:
            if video_suffix(data):
                return video_frames(data, count)[0]
            with Image.open(io.BytesIO(data)) as image:
                found = []
                for place in range(min(num_frames_of(image), count or sys.maxsize)):
                    image.seek(place)
                    image.load()
                    found.append(to_rgb(ImageOps.exif_transpose(image)))
                return found
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault

    def frame_rate(self) -> float | None:
        """Return the frames a second that the file tells, the mean where they differ; None: it does not, or is a still image.

        Raises:
            UserError: the file is missing or damaged.
        """
        data = self.read()
        try:
            if video_suffix(data):
                return video_rate(data)
            with Image.open(io.BytesIO(data)) as image:
                return rate_of(image)
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault

    def size(self) -> tuple[int, int]:
        """Return (width, height) after EXIF rotation, from the head of an image; nothing is decoded.

        Raises:
            UserError: the image is missing or damaged.
        """
        plain = self.data is None and self.path and "://" not in self.path
        try:
            with Image.open(self.path if plain and self.path else io.BytesIO(self.read())) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) >= 5
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault
        return (height, width) if turned else (width, height)

    def inspect(self) -> tuple[tuple[int, int], str]:
        """Decode once, cheaply, and return ((width, height) after EXIF rotation, mode as stored).

        JPEG is decoded at reduced scale: all of the stream is read, so truncation is found, in a fraction of the time. Of
        animations and videos every frame is decoded.

        Raises:
            UserError: as `open`.
        """
        data = self.read()
        try:
            if video_suffix(data):
                frames, stored = video_frames(data)
                return frames[0].size, stored
            with Image.open(io.BytesIO(data)) as image:
                for place in range(1, num_frames_of(image)):
                    image.seek(place)
                    image.load()
                image.seek(0)
                (width, height), mode = image.size, image.mode
                image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 exchange the sides
                image.load()
        except DAMAGED as fault:
            raise UserError(self._damaged(fault)) from fault
        return ((height, width) if turned else (width, height)), mode

    def _moving(self, count: int) -> str:
        return (
            f"{self.place()}: got {count} frames, want one image. "
            "Use a family of video models with adapter.frames, or replace it by an image."
        )

    def _damaged(self, fault: Exception) -> str:
        told = "of no known format" if isinstance(fault, UnidentifiedImageError) else fault
        return f"{self.place()}: got a damaged image ({told}), want one that decodes. Replace it or remove the row."


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
