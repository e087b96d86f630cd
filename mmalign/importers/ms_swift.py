"""ms-swift's files: messages with a rejected response, rejected messages or rejected images, or a KTO label."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import first_difference, media_of, read_messages, tools_of
from mmalign.importers.row_wise import import_rows, list_of, number_of, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported, local_path
from mmalign.records import Comparison, Content, Message

UNREAD = ("videos", "audios", "rejected_videos", "rejected_audios", "objects")
REJECTED = ("rejected_response", "rejected_messages", "rejected_images")


def ms_swift(
    *,
    path: str,
    split: str = "train",
    columns: dict[str, str] | None = None,
    images: str | None = None,
    margin: bool = False,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """ms-swift data: messages that end with the chosen answer, beside rejected_response, rejected_messages, rejected_images.

    A row with several rejected_response is a list whose first answer is the best. Answers to different questions or images
    have a prompt each. KTO rows (`label` true or false) are single answers, for the view `unpaired`. `query`, `response`,
    `history` and `system` are read in place of messages; roles tool_call and tool_response become tool calls and their results.

    Source: ms-swift, docs/Customization/Custom-dataset.

    Args:
        path: the data (JSONL, JSON, Parquet, a folder, hub id).
        split: of a hub data set.
        columns: name in the data -> ms-swift's name, as its setting of that name.
        images: the folder of images; None is that of the data.
        margin: take the column `margin` as the margin of the row.
        faulty: rows without messages or a rejected answer, with unknown roles or unmatched images: `raise`, or `drop` and
            report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set or split; faulty rows.
    """
    root = Path(local_path(path))
    base = Path(images).expanduser() if images is not None else root if root.is_dir() else root.parent
    convert = partial(ms_swift_row, columns=columns or {}, images=base, margin=margin)
    return import_rows(
        open_rows(path, split),
        convert,
        name="ms_swift",
        path=path,
        split=split,
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
        least=1,
    )


def ms_swift_row(
    row: Mapping[str, Any], *, columns: Mapping[str, str] | None = None, images: Path = Path(), margin: bool = False
) -> Comparison:
    """Convert one row; see `ms_swift`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    found = {(columns or {}).get(name, name): value for name, value in row.items() if value is not None}
    unread = next((name for name in UNREAD if found.get(name)), None)
    if unread is not None:
        raise UserError(f"got {unread}, want texts and images only. Leave such rows out.")
    pictures = media_of(found.get("images"), images)
    chosen = _ending(read_messages(_entries(found), pictures))
    tools = tools_of(found.get("tools"))
    if not any(found.get(name) is not None for name in REJECTED):
        label = found.get("label")
        if not isinstance(label, bool):
            raise UserError(
                f"got no {' and no '.join(REJECTED)} and the label {shown(label)}, want one of them. Correct the row."
            )
        prompt = Content(messages=chosen[:-1], tools=tools)
        answer = Content(messages=chosen[-1:])
        return Comparison(id="", prompt=prompt, candidates=(answer,), scores={"label": (float(label),)})
    others = _rejected(found, chosen, media_of(found["rejected_images"], images) if "rejected_images" in found else pictures)
    start = min(first_difference(chosen, other) for other in others)
    rests = [one[start:] for one in (chosen, *others)]
    shared = all(rest[0].role == "assistant" and all(m.role != "user" for m in rest) for rest in rests)
    whole = (chosen, *others)
    prompts = tuple(Content(messages=one[:-1], tools=tools) for one in whole)
    return Comparison(
        id="",
        prompt=Content(messages=chosen[:start], tools=tools) if shared else prompts[0],
        candidates=tuple(Content(messages=one[start:] if shared else one[-1:]) for one in whole),
        ranks=(1.0, *(2.0 for _ in others)),
        prompts=None if shared else prompts,
        margin=number_of(found, "margin") if margin else None,
    )


def _entries(found: Mapping[str, Any]) -> list[Any]:
    """Return the messages, or those that query, response, history and system make."""
    if "messages" in found:
        return list_of(found, "messages")
    entries = [{"role": "system", "content": text_of(found, "system")}] if found.get("system") else []
    turns = list_of(found, "history") if "history" in found else []
    for pair in [*turns, [text_of(found, "query"), text_of(found, "response")]]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"got {shown(pair)} in the history, want [question, answer]. Correct the row.")
        entries += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return entries


def _ending(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise UserError("got messages that do not end with the assistant's answer to something. Correct the row.")
    return messages


def _rejected(found: Mapping[str, Any], chosen: tuple[Message, ...], pictures: tuple[Any, ...]) -> list[tuple[Message, ...]]:
    """Return the rejected conversations: their messages, the chosen ones with another answer, or with other images."""
    if "rejected_messages" in found:
        return [_ending(read_messages(list_of(found, "rejected_messages"), pictures))]
    prompt = chosen[:-1]
    if "rejected_images" in found:
        prompt = _ending(read_messages(_entries(found), pictures))[:-1]
    if "rejected_response" not in found:
        return [(*prompt, chosen[-1])]
    given = found["rejected_response"]
    answers = [given] if isinstance(given, str) else list_of(found, "rejected_response")
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"got the rejected_response {shown(given)}, want a text, or a list of texts. Correct the row.")
    return [(*prompt, *read_messages([{"role": "assistant", "content": answer}])) for answer in answers]
