"""TRL's forms of rows as pure functions, and writing pairs in the one that every trainer reads: prompt, chosen, rejected."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from mmalign.errors import UserError
from mmalign.records import Content, Example, Media, Sample, entry_of

CONVERSATIONS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
Text = TypeVar("Text", str, list[Any])


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Return (prompt, chosen, rejected) of two texts, or two lists of messages, that begin with their prompt.

    The prompt is the longest common prefix; of texts, a space at its end goes to the completions, since tokenizers join it
    with the word that follows.

    Source: TRL 1.16, extract_prompt. Departures: where one side begins with all of the other, the shorter one's completion is
    empty here, and not its last character or message, so that it is reported; a prompt without a character stays so.
    """
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def unpair(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of completion and label: those of all chosen ones, then those of all rejected ones; other columns stay.

    Source: TRL 1.16, unpair_preference_dataset.
    """
    kept = [{key: value for key, value in row.items() if key not in ("chosen", "rejected")} for row in rows]
    return [
        {**rest, "completion": row[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for row, rest in zip(rows, kept, strict=True)
    ]


def chatml(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with messages of `from` and `value` as messages of `role` and `content`; `conversations` is `messages`.

    Source: TRL 1.16, maybe_convert_to_chatml.
    """
    names = {"from": "role", "value": "content"}

    def renamed(message: Any) -> Any:
        if isinstance(message, list):  # one of several conversations
            return [renamed(one) for one in message]
        return {names.get(key, key): value for key, value in message.items()} if isinstance(message, Mapping) else message

    found: dict[str, Any] = {}
    for key, value in row.items():
        listed = key in CONVERSATIONS and isinstance(value, list)
        found["messages" if key == "conversations" else key] = [renamed(one) for one in value] if listed else value
    return found


def trl_row(example: Example) -> dict[str, Any]:
    """Return a pair as TRL's explicit form: prompt, chosen, rejected, and what is known besides under the names we read.

    Texts stay texts. Where the prompt or an answer is a conversation all three are. A prefix ends the prompt: the words of a
    text, or a last message of the assistant, which TRL continues. Images stand in `images`, their places in the messages.

    Raises:
        UserError: not a pair, or each candidate answers a prompt of its own, for which there is no such form.
    """
    if len(example.samples) != 2 or example.samples[0].prompt != example.samples[1].prompt:
        raise UserError(f"{example.id}: got {len(example.samples)} samples, want a pair with one prompt. Use the view pair.")
    chosen, rejected = example.samples
    row = laid_out(chosen, {"chosen": chosen.completion, "rejected": rejected.completion})
    side: dict[str, Any] = {
        name: example.side[name] for name in ("prob", "margin", "weight", "beta_scale") if name in example.side
    }
    scores = example.side.get("scores")
    if isinstance(scores, tuple):
        side |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    further = {name: sample.completion.words() for name, sample in example.extras.items()}
    return {**row, **side, **further}


def laid_out(sample: Sample, answers: Mapping[str, Content]) -> dict[str, Any]:
    """Return the prompt of a sample and answers to it under their names, with tools and images where there are some.

    Raises:
        UserError: images in place of a text.
    """
    contents = (sample.prompt, *answers.values())
    if any(content.messages for content in contents):
        prefix = [{"role": "assistant", "content": sample.prefix}] if sample.prefix else []
        row: dict[str, Any] = {"prompt": _alike([*_messages(sample.prompt, "user"), *prefix])}
        row |= {name: _alike(_messages(content, "assistant")) for name, content in answers.items()}
    else:
        row = {"prompt": _text(sample, sample.prompt) + (sample.prefix or "")}
        row |= {name: _text(sample, content) for name, content in answers.items()}
    images = [media for content in contents for media in content.media()]
    tools: dict[str, Any] = {"tools": list(sample.prompt.tools)} if sample.prompt.tools else {}
    if sample.prompt.template_kwargs:
        tools["chat_template_kwargs"] = sample.prompt.template_kwargs
    return {**row, **tools, **({"images": images} if images else {})}


def _messages(content: Content, role: str) -> list[dict[str, Any]]:
    if content.messages:
        return [entry_of(message) for message in content.messages]
    if not content.images:
        return [{"role": role, "content": content.text or ""}]
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in content.images]
    return [{"role": role, "content": [*parts, {"type": "text", "text": content.text or ""}]}]


def _alike(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with every text in parts where one of them has parts: a column of a table holds one type."""
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    return [
        {**one, "content": [{"type": "text", "text": one["content"]}]} if isinstance(one.get("content"), str) else one
        for one in messages
    ]


def _text(sample: Sample, content: Content) -> str:
    if content.text is None:
        raise UserError(f"got images without a text for the prompt {sample.prompt.words()[:40]!r}, want texts in TRL's form.")
    return content.text


def to_trl(examples: Iterable[Example], path: str | Path) -> Path:
    """Write pairs in TRL's explicit form, a line each in x.jsonl, or a row each in x.parquet, which can hold images.

    Raises:
        UserError: another ending; images in JSONL; texts beside conversations in Parquet; as `trl_row`.
    """
    target = Path(path)
    if target.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{target}: got the ending {target.suffix!r}, want .jsonl or .parquet. Name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = map(trl_row, examples)
    if target.suffix == ".parquet":
        _write_parquet(list(rows), target)
        return target
    with open(target, "w", encoding="utf-8") as file:
        for row in rows:
            if "images" in row:
                raise UserError(f"{target}: got a pair with images, which JSONL cannot hold. Write .parquet instead.")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def _write_parquet(rows: list[dict[str, Any]], target: Path) -> None:
    from datasets import Dataset, Image, List

    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise UserError(f"{target}: got texts and conversations, want one of the two in a table. Write .jsonl instead.")
    pictured = any("images" in row for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = [{name: row.get(name) for name in names} for row in rows]
    for row in plain:
        if pictured:
            row["images"] = [_picture(media) for media in row["images"] or ()]
        if "tools" in row:  # one schema cannot hold the parameters of all functions; TRL reads JSON too
            row["tools"] = None if row["tools"] is None else json.dumps(row["tools"])
    table = Dataset.from_list(plain)
    if pictured:
        table = table.cast_column("images", List(Image(decode=False)))
    table.to_parquet(str(target))


def _picture(media: Media) -> dict[str, Any]:
    return {"bytes": media.read(), "path": None}
