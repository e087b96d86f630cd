"""Media by opaque key: the bytes that a browser gets, without what they say of their maker."""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageOps
from sqlalchemy import Connection, bindparam, select

from mmalign.annotation.blinding import blinded
from mmalign.annotation.leases import KEY
from mmalign.annotation.schema import BLOB, MEDIA
from mmalign.errors import UserError
from mmalign.records import Media

ONE = (
    select(MEDIA.c.path, MEDIA.c.mime, MEDIA.c.sha256, BLOB.c.data)
    .outerjoin(BLOB, BLOB.c.media == MEDIA.c.key)
    .where(MEDIA.c.key == bindparam("of_key"))
)


@dataclass(frozen=True, kw_only=True)
class MediaFile:
    """What is served for a key.

    Args:
        data: pixels as in the file; texts and names inside it are left out.
        mime: image/png ...
        etag: sha256 of data.
    """

    data: bytes
    mime: str
    etag: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A medium as it was added."""

    media: Media
    mime: str
    sha256: str


def find(connection: Connection, key: str) -> Stored | None:
    """Return a medium by its key; None when there is none."""
    row = connection.execute(ONE, {"of_key": key}).first() if KEY.fullmatch(key) else None
    if row is None:
        return None
    found = Media(path=row.path) if row.data is None else Media(data=bytes(row.data))
    return Stored(media=found, mime=row.mime, sha256=row.sha256)


def serve(stored: Stored) -> MediaFile:
    """Return what is served of a medium.

    Raises:
        UserError: the file is gone, or is not the one that was added.
    """
    data = stored.media.read()
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        place = stored.media.place()
        raise UserError(f"{place}: the file was changed since it was added. Put the old one back, or add the row anew.")
    served = blinded(data) if stored.mime.startswith("video/") or not _is_converted(data) else _png(data)
    etag = stored.sha256 if served == data else hashlib.sha256(served).hexdigest()
    return MediaFile(data=served, mime=stored.mime, etag=etag)


def _is_converted(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format not in ("PNG", "JPEG", "WEBP", "GIF")


def _png(data: bytes) -> bytes:
    """Return an image that not every browser shows as PNG, its pixels as mmalign decodes them."""
    with Image.open(io.BytesIO(data)) as image:
        plain = ImageOps.exif_transpose(image)
        target = io.BytesIO()
        (plain if plain.mode in ("L", "RGB", "RGBA", "1", "P", "LA", "I;16") else Media(data=data).open()).save(
            target, format="PNG", icc_profile=image.info.get("icc_profile")
        )
    return blinded(target.getvalue())
