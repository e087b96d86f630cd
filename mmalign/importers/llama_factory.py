"""LLaMA-Factory's files: alpaca and sharegpt rows with chosen and rejected answers, or KTO tags."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.importers.conversations import CALL, media_of, read_messages, tools_of
from mmalign.importers.row_wise import import_rows, list_of, open_rows, shown, text_of
from mmalign.importers.tables import Faulty, Imported, local_path
from mmalign.records import Comparison, Content, Message

Formatting = Literal["alpaca", "sharegpt"]
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    **{name: name for name in ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")},
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
SPEAKERS = {"user": "user", "assistant": "assistant", "observation": "tool", "function": CALL, "system": "system"}
CHAT = {**TAGS, "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
INFO = "dataset_info.json"
UNREAD = ("videos", "audios")


def llama_factory(
    *,
    path: str,
    dataset: str | None = None,
    split: str = "train",
    formatting: Formatting = "alpaca",
    columns: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    images: str | None = None,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """LLaMA-Factory data: instruction, input, history, system with chosen and rejected, or output with kto_tag; or sharegpt.

    sharegpt rows are conversations (`{from, value}`) whose answers are `chosen` and `rejected`, or their last message with
    kto_tag. Prompts are messages; instruction and input are joined by a line break, `<image>` marks where an image stands. KTO
    rows are single answers with the label 1 or 0, for the view `unpaired`.

    Source: LLaMA-Factory, data/README.md; its defaults, with the optional columns read under their own names.

    Args:
        path: the data (JSON, JSONL, Parquet, a folder, hub id); with dataset, the folder of dataset_info.json or that file.
        dataset: a name of dataset_info.json, whose file, formatting, columns and tags then count; columns and tags beside it
            add to them.
        split: of a hub data set.
        formatting: `alpaca` or `sharegpt`.
        columns: LLaMA-Factory's name of a column -> its name in the data, as in dataset_info.json.
        tags: role_tag, content_tag, user_tag ... of sharegpt messages, as there.
        images: the folder of images; None is that of the data.
        faulty: rows without prompt or answers, with unknown roles or unmatched images: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, name or column; a data set of a kind that is not read here; faulty rows.
    """
    entry: dict[str, Any] = {}
    root, part = Path(local_path(path)), dict[str, Any]()
    if dataset is not None:
        path, entry, root = _described(root, dataset)
        part = {name: entry.get(name) for name in ("folder", "subset")}
        split, formatting = entry.get("split", split), entry.get("formatting", formatting)
    base = Path(images).expanduser() if images is not None else root if root.is_dir() else root.parent
    convert = partial(
        llama_factory_row,
        formatting=formatting,
        columns=_known({**entry.get("columns", {}), **(columns or {})}, COLUMNS, "columns"),
        tags=_known({**entry.get("tags", {}), **(tags or {})}, TAGS, "tags"),
        images=base,
    )
    table = open_rows(path, split, **part)
    return import_rows(
        table, convert, name="llama_factory", path=path, split=split, faulty=faulty, verify=verify, num_proc=num_proc, least=1
    )


def _described(place: Path, dataset: str) -> tuple[str, dict[str, Any], Path]:
    """Return the path of a data set that dataset_info.json describes, its entry, and the folder paths are relative to."""
    file = place / INFO if place.is_dir() else place
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{file}: cannot be read ({fault}), want {INFO}. Give its folder as path.") from fault
    if not isinstance(entries, dict) or not isinstance(entries.get(dataset), dict):
        raise UserError(f"{file}: got no data set {dataset!r}, want one of {', '.join(entries)}. Set dataset.")
    entry = entries[dataset]
    named = entry.get("hf_hub_url") or entry.get("file_name")
    if not isinstance(named, str):
        raise UserError(f"{file}: {dataset} has neither file_name nor hf_hub_url, want one of them. Download the data.")
    return (named if entry.get("hf_hub_url") else str(file.parent / named)), entry, file.parent


def _known(given: Mapping[str, str], defaults: Mapping[str, str], what: str) -> dict[str, str]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(f"{what}: got {', '.join(unknown)}, want names of LLaMA-Factory: {', '.join(defaults)}.")
    return {**defaults, **given}


def llama_factory_row(
    row: Mapping[str, Any],
    *,
    formatting: Formatting = "alpaca",
    columns: Mapping[str, str] = COLUMNS,
    tags: Mapping[str, str] = TAGS,
    images: Path = Path(),
) -> Comparison:
    """Convert one row; see `llama_factory`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    found = {name: row[column] for name, column in columns.items() if row.get(column) is not None}
    unread = next((name for name in UNREAD if found.get(name)), None)
    if unread is not None:
        raise UserError(f"got {columns[unread]}, want texts and images only. Leave such rows out.")
    if formatting == "alpaca" and "messages" in found and not (found.get("prompt") or found.get("query")):
        raise UserError(f"got the column {columns['messages']}, which alpaca rows have not. Set formatting: sharegpt.")
    rated = "kto_tag" in found
    if not rated and not ("chosen" in found and "rejected" in found):
        wanted = f"{columns['chosen']} and {columns['rejected']}, or {columns['kto_tag']}"
        raise UserError(f"got the columns {', '.join(row)}, want {wanted}. Set columns.")
    said, keys = (_alpaca(found, rated), CHAT) if formatting == "alpaca" else (_sharegpt(found, rated), tags)
    turns, answers = said
    roles = {keys[f"{name}_tag"]: role for name, role in SPEAKERS.items()}
    read = partial(read_messages, role_key=keys["role_tag"], content_key=keys["content_tag"], roles=roles)
    messages = read(turns, media_of(found.get("images"), images))
    system = found.get("system")
    if system and (not messages or messages[0].role != "system"):
        messages = (Message("system", text_of(found, "system")), *messages)
    candidates = tuple(Content(messages=read([answer])) for answer in answers)
    wrong = next((c.messages[0].role for c in candidates if c.messages[0].role != "assistant"), None)
    if wrong is not None or not messages or messages[-1].role == "assistant":
        raise UserError("got an answer that does not follow a question, want the assistant's after another's. Correct the row.")
    prompt = Content(messages=messages, tools=tools_of(found.get("tools")))
    if not rated:
        return Comparison(id="", prompt=prompt, candidates=candidates, ranks=(1.0, 2.0))
    if not isinstance(found["kto_tag"], bool):
        raise UserError(f"got {columns['kto_tag']} {shown(found['kto_tag'])}, want true or false. Correct the row.")
    return Comparison(id="", prompt=prompt, candidates=candidates, scores={"label": (float(found["kto_tag"]),)})


Turns = tuple[list[Any], list[Any]]


def _alpaca(found: Mapping[str, Any], rated: bool) -> Turns:
    """Return the messages of an alpaca row and its answers, in CHAT's keys."""

    def turn(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    turns = []
    for pair in list_of(found, "history") if "history" in found else []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"got {shown(pair)} in the history, want [question, answer]. Correct the row.")
        turns += [turn("user", pair[0]), turn("assistant", pair[1])]
    question = [text_of(found, name) for name in ("prompt", "query") if found.get(name)]
    turns.append(turn("user", "\n".join(question)))
    return turns, [turn("assistant", text_of(found, name)) for name in (("response",) if rated else ("chosen", "rejected"))]


def _sharegpt(found: Mapping[str, Any], rated: bool) -> Turns:
    """Return the messages of a sharegpt row and its answers, in the tags of the data."""
    turns = list_of(found, "messages")
    return (turns[:-1], turns[-1:]) if rated else (turns, [found["chosen"], found["rejected"]])
