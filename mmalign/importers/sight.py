"""What the importers of answers to images share: a question with its pictures before it, and where pictures lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import IMAGE_TAG, media_of
from mmalign.importers.row_wise import shown, text_of
from mmalign.importers.tables import local_path
from mmalign.records import Content, Media, Message


def folder_of(path: str, images: str | None) -> Path:
    """Return the folder that paths of pictures are relative to: the one named, or that of the data."""
    if images is not None:
        return Path(images).expanduser()
    root = Path(local_path(path))
    return root if root.is_dir() else root.parent


def picture_of(row: Mapping[str, Any], root: Path, name: str = "image") -> Media:
    """Return the one picture of a column: bytes, a path, or `{bytes, path}`.

    Raises:
        UserError: none, or several.
    """
    value = row.get(name)
    found = (Media(data=value),) if isinstance(value, bytes) else media_of(value, root)
    if len(found) != 1:
        raise UserError(f"got {len(found)} pictures for {name}, want one. Correct the row.")
    return found[0]


def question(text: str, pictures: tuple[Media, ...], tag: str = IMAGE_TAG) -> Content:
    """Return the user's question with its pictures before it; a placeholder in the text is taken out.

    Raises:
        UserError: there is no text beside it.
    """
    said = text.replace(tag, "").strip()
    if not said:
        raise UserError(f"got the question {shown(text)}, want a text. Correct the row.")
    return Content(messages=(Message("user", said, images=pictures),))


def answer(row: Mapping[str, Any], name: str) -> Content:
    """Return the assistant's answer in a column.

    Raises:
        UserError: there is none.
    """
    return Content(messages=(Message("assistant", text_of(row, name).strip()),))
