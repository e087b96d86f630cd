"""MMSafe-PO: flat transcripts in which the last turn of the user is about an image, with a harmless and a worse answer."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.conversations import IMAGE_TAG
from mmalign.importers.row_wise import import_rows, open_rows, shown, text_of
from mmalign.importers.sight import folder_of, picture_of
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import Comparison, Content, Media, Message

Asked = Literal["question", "text_prompt", "mid_prompt"]
TURN = re.compile(r"(?:^| )(USER|ASSISTANT): ?")
SPEAKERS = {"USER": "user", "ASSISTANT": "assistant"}
ANSWER = re.compile(r"\s*ASSISTANT: ?")


def mmsafe_po(
    *,
    path: str,
    split: str = "train",
    images: str | None = None,
    prompt: Asked = "question",
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """MMSafe-PO: question, image, chosen, rejected; `USER: ... ASSISTANT: ...` becomes messages, the image stands in its turn.

    The transcript is split into turns, the image stands before the text of the turn with `<image>` (the user's last one), and
    `ASSISTANT: ` and white space are taken off the answers, whose end the chat template marks.

    Source: Lu-Yang666/MMsafe-PO (arXiv 2503.14189); Downton/MMSafe-PO.

    Args:
        path: train.json or test.json, a Parquet file, a folder, or a hub id.
        split: of a hub data set.
        images: the folder of images; None is that of the data.
        prompt: the published question about the image; `mid_prompt`, as its template made it; or `text_prompt`, the text of
            HH-RLHF without an image, to probe what a model does without one.
        faulty: rows of another form, without an answer or an image: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    convert = partial(mmsafe_po_row, prompt=prompt, images=folder_of(path, images))
    return import_rows(
        open_rows(path, split),
        convert,
        name="mmsafe_po",
        path=path,
        split=split,
        columns=(prompt, "image", "chosen", "rejected"),
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def mmsafe_po_row(row: Mapping[str, Any], *, prompt: Asked = "question", images: Path = Path()) -> Comparison:
    """Convert one row; see `mmsafe_po`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    pictures = () if prompt == "text_prompt" else (picture_of(row, images),)
    named = row.get("id")
    return Comparison(
        id="" if named is None else f"mmsafe_po-{named}",
        prompt=Content(messages=_turns(text_of(row, prompt), pictures)),
        candidates=tuple(_answer(text_of(row, name)) for name in ("chosen", "rejected")),
        ranks=(1.0, 2.0),
    )


def _turns(text: str, pictures: tuple[Media, ...]) -> tuple[Message, ...]:
    """Split a transcript that ends where the assistant is to speak."""
    before, *parts = TURN.split(text)
    messages = [Message(SPEAKERS[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    roles = [message.role for message in messages]
    wanted = [("user", "assistant")[n % 2] for n in range(len(messages))]
    if before.strip() or len(messages) < 2 or roles != wanted or messages[-1].role != "assistant" or messages[-1].text:
        raise UserError(f"got the transcript {shown(text)}, want USER: ... ASSISTANT: in turn, the last one empty. Correct it.")
    asked = messages[:-1]
    if text.count(IMAGE_TAG) != len(pictures):
        raise UserError(f"got {text.count(IMAGE_TAG)} {IMAGE_TAG} for {len(pictures)} images, want one each. Correct the row.")
    return tuple(
        Message(one.role, one.text.replace(IMAGE_TAG, "").strip(), images=pictures) if IMAGE_TAG in one.text else one
        for one in asked
    )


def _answer(text: str) -> Content:
    begun = ANSWER.match(text)
    return Content(messages=(Message("assistant", text[begun.end() if begun else 0 :].strip()),))
