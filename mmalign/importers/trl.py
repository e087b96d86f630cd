"""TRL's data sets unchanged: pairs with explicit or implicit prompt, unpaired, stepwise, prompts; texts or conversations."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.conversations import ROLES, media_of
from mmalign.importers.row_wise import LINE, Outcome, import_rows, list_of, open_rows, shown
from mmalign.importers.tables import Faulty, Imported, local_path
from mmalign.importers.trl_format import CONVERSATIONS, chatml, extract_prompt
from mmalign.records import Comparison, Content, Media, Message, message_of
from mmalign.records.conversations import without_nulls

SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
GIVEN = "chat_template_kwargs"
NUMBERS = ("margin", "weight", "beta_scale")
EXTRAS = ("rationale", "exploration", "gold")
READ = (
    *("id", "prompt", "chosen", "rejected", "completion", "completions", "label", "labels", "messages", "conversations"),
    *("system", "tools", GIVEN, "image", "images", "prefix", "prob", "margin", "weight", "scores"),
    *("ranks", "beta_scale", LINE),
    *EXTRAS,
    *(name for names in SCORES for name in names),
)

logger = logging.getLogger(__name__)


def trl(
    *,
    path: str,
    split: str = "train",
    folder: str | None = None,
    subset: str | None = None,
    step_separator: str = "\n",
    faulty: Faulty = "raise",
    verify: bool = False,
    num_proc: int | None = None,
) -> Imported:
    """TRL's formats, told row by row from the columns; texts or conversations in each.

    Pairs: prompt, chosen, rejected; or chosen, rejected that begin with their prompt. Unpaired: prompt, completion, label.
    Stepwise: prompt, completions, labels: one row a step, whose prefix is the steps before it. Also prompt, completion;
    messages or conversations, whose last answer is the completion; prompt alone. Beyond TRL: prompt, completions with scores
    or ranks; `chosen` and `rejected` that are objects of prompt and completion (joint pairs); a `prefix` of both answers;
    `rejected` (or `chosen`) that is a list of texts or of conversations, all ranked alike: view `pair` makes a pair of each
    with `pairs: all` (or, of one chosen answer, `best_vs_rest`), view `ranked` one list.

    An answer may also be an image, `{bytes, path}`, as pairs of generated images have them.

    Messages are {role, content}, or {from, value} with the names human and gpt. Images: `image`, `images`, or inside the
    parts of messages. Further columns: tools, chat_template_kwargs (given to the template of this row, before what the
    adapter gives all rows), system, prob, margin, weight, beta_scale (a factor of beta), chosen_score and rejected_score (the
    judge `score`), rationale, exploration, gold, id. Others are not read, which is told.

    Args:
        path: hub id, JSONL, JSON, Parquet or CSV file, or a folder of them or of `save_to_disk`.
        split: of the data set.
        folder, subset: the part of a data set that has several: its folder, or the name that its card gives it.
        step_separator: what TRL puts after each step.
        faulty: rows that are unusable, an empty completion among them: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set or split; faulty rows.
    """
    table = open_rows(path, split, folder, subset)
    _tell_unread(table)
    place = Path(local_path(path))
    root = place.parent if place.is_file() else place
    convert = partial(comparison_of, root=root, step_separator=step_separator)
    kept: dict[str, Any] = {"path": path, "split": split, "faulty": faulty, "verify": verify, "num_proc": num_proc}
    return import_rows(table, convert, name="trl", least=0, **kept)


def _tell_unread(table: Any) -> None:
    unread = [name for name in table.column_names if name not in READ]
    if unread:
        logger.info("columns that are not read: %s", ", ".join(unread))


def comparison_of(row: Mapping[str, Any], *, root: Path = Path(), step_separator: str = "\n") -> Outcome:
    """Return the comparison that a row of TRL's is; several for the steps of a solution.

    Args:
        row: columns that are null are as if they were absent.
        root: folder that paths of images are relative to.
        step_separator: as in `trl`.

    Raises:
        UserError: none of TRL's forms, or a value of the wrong type.
    """
    row = chatml({name: _without_gaps(name, value) for name, value in row.items() if value is not None})
    reader = _Reader(row, root)
    if isinstance(row.get("chosen"), Mapping) and "completion" in row["chosen"]:
        return _joint(row, reader)
    if "chosen" in row or "rejected" in row:
        return _pair(row, reader)
    if "completions" in row:
        return _steps(row, reader, step_separator) if "labels" in row else _ranked(row, reader)
    if "completion" in row:
        label = {"scores": {"label": (_label(row["label"]),)}} if "label" in row else {}
        return reader.comparison(row.get("prompt"), (row["completion"],), **label)
    if "messages" in row and "prompt" not in row:
        messages = _listed(row["messages"])
        answered = bool(messages) and isinstance(messages[-1], Mapping) and _role(messages[-1]) == "assistant"
        return reader.comparison(messages[:-1], (messages[-1:],)) if answered else reader.comparison(messages, ())
    if "prompt" in row:
        return reader.comparison(row["prompt"], ())
    raise UserError(f"got the columns {', '.join(row)}, want prompt, chosen and rejected, or another form of TRL's.")


def _pair(row: Mapping[str, Any], reader: "_Reader") -> Comparison:
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise UserError(f"got no {missing[0]}, want chosen and rejected. Complete or remove the row.")
    sides = [_alternatives(row[name]) for name in ("chosen", "rejected")]
    answers, best = [answer for side in sides for answer in side], len(sides[0])
    plain = [isinstance(answer, str) or _is_picture(answer) for answer in answers]
    if len({(isinstance(answer, str), one) for answer, one in zip(answers, plain, strict=True)}) > 1:
        raise UserError("got two forms of answers, want chosen and rejected of one form. Correct the row.")
    prompt = row.get("prompt", row.get("messages"))
    if prompt is None and not _is_picture(answers[0]):
        prompt, answers = _without_prompt(answers)
    elif not plain[0]:
        prompt, answers = _conversations(prompt, answers)
    known: dict[str, Any] = {"ranks": (1.0,) * best + (2.0,) * (len(answers) - best)}
    if "prob" in row:
        if len(answers) > 2:
            raise UserError(f"got prob for {len(answers)} answers, want it for two. Leave it out, or give ranks.")
        known = {"prob": _number(row, "prob")}
    return reader.comparison(prompt, answers, **known, **_scored(row, len(answers)))


def _alternatives(value: Any) -> list[Any]:
    """The answers of one side: a list of texts, or of conversations, is several that rank alike."""
    several = isinstance(value, list) and bool(value) and all(isinstance(one, str | list) for one in value)
    return value if several else [value if isinstance(value, str) or _is_picture(value) else _listed(value)]


def _scored(row: Mapping[str, Any], num_answers: int) -> dict[str, Any]:
    """The scores of both sides as those of the judge `score`; a list where a side has several answers."""
    pair = next(((row[a], row[b]) for a, b in SCORES if a in row and b in row), None)
    if pair is None:
        return {}
    scores = [_finite(score, "a score") for side in pair for score in (side if isinstance(side, list) else [side])]
    if len(scores) != num_answers:
        raise UserError(f"got {len(scores)} scores of {num_answers} answers, want one each. Correct the row.")
    return {"scores": {"score": tuple(scores)}}


def _without_prompt(answers: Sequence[Any]) -> tuple[Any, list[Any]]:
    """What all answers begin with, and how each goes on."""
    prompt = min((extract_prompt(answers[0], other)[0] for other in answers[1:]), key=len)
    return prompt, [answer[len(prompt) :] for answer in answers]


def _conversations(prompt: Any, answers: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Split conversations beside a prompt, which they may hold; where they begin alike without it, it comes first."""
    if isinstance(prompt, str):
        shared, rests = _without_prompt(answers)
        if any(_asks(message, prompt) for message in shared):
            return shared, rests
        told = sum(1 for _ in takewhile(lambda one: isinstance(one, Mapping) and _role(one) == "system", shared))
        return [*shared[:told], {"role": "user", "content": prompt}, *shared[told:]], rests
    prompt = _listed(prompt)
    whole = bool(prompt) and all(side[: len(prompt)] == prompt for side in answers)
    return prompt, [side[len(prompt) :] for side in answers] if whole else list(answers)


def _asks(message: Any, prompt: str) -> bool:
    """Whether a message is the user's, and its words are the prompt."""
    if not isinstance(message, Mapping) or _role(message) != "user":
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip() == prompt.strip()


def _joint(row: Mapping[str, Any], reader: "_Reader") -> Comparison:
    sides = [row["chosen"], row.get("rejected")]
    if not all(isinstance(side, Mapping) and {"prompt", "completion"} <= set(side) for side in sides):
        raise UserError("got chosen or rejected without prompt and completion, want both in each of them. Complete the row.")
    chosen, rejected = (reader.comparison(side["prompt"], (side["completion"],)) for side in map(chatml, sides))
    prompts = (chosen.prompt, rejected.prompt)
    order: dict[str, Any] = {"ranks": (1.0, 2.0)} if "prob" not in row else {"prob": _number(row, "prob")}
    return replace(chosen, candidates=(*chosen.candidates, *rejected.candidates), prompts=prompts, **order)


def _ranked(row: Mapping[str, Any], reader: "_Reader") -> Comparison:
    known: dict[str, Any] = {}
    scores = row.get("scores")
    if scores is not None:
        judges = without_nulls(scores) if isinstance(scores, Mapping) else {"score": scores}
        known["scores"] = {judge: _numbers(judges, judge) for judge in judges}
    if "ranks" in row:
        known["ranks"] = _numbers(row, "ranks")
    return reader.comparison(row.get("prompt"), list_of(row, "completions"), **known)


def _steps(row: Mapping[str, Any], reader: "_Reader", separator: str) -> tuple[Comparison, ...]:
    steps, labels = list_of(row, "completions"), list_of(row, "labels")
    if not steps or len(steps) != len(labels) or not all(isinstance(step, str) for step in steps):
        raise UserError(f"got {len(steps)} completions and {len(labels)} labels, want texts with one label each.")
    rows = []
    for n, (step, label) in enumerate(zip(steps, labels, strict=True)):
        value = reader.comparison(row.get("prompt"), (step,), scores={"label": (_label(label),)})
        before = "".join(one + separator for one in steps[:n])
        rows.append(replace(value, id=f"{value.id}-{n}" if value.id else "", prefix=before or None))
    return tuple(rows)


class _Reader:
    """Reads what all forms share: the contents of a row, its images, tools and numbers."""

    def __init__(self, row: Mapping[str, Any], root: Path) -> None:
        self.row = row
        self.root = root
        self.images = media_of(row.get("images", row.get("image")), root)

    def comparison(self, prompt: Any, answers: Sequence[Any], **known: Any) -> Comparison:
        """Return the row's comparison; where one content is a conversation all are."""
        if prompt is None:
            raise UserError("got no prompt, want one. Complete or remove the row.")
        system = self.row.get("system")
        said = [value for value in (prompt, *answers) if not _is_picture(value)]
        talks = bool(system) or any(isinstance(value, list | Mapping) for value in said)
        numbers: dict[str, Any] = {
            name: _number(self.row, name) for name in ("margin", "weight", "beta_scale") if name in self.row
        }
        prefix = self.row.get("prefix")
        return Comparison(
            id=str(self.row.get("id", "")),
            prompt=self._prompt(prompt, system, talks),
            candidates=tuple(self._answer(value, talks) for value in answers),
            prefix=None if prefix is None else _words(prefix, "prefix"),
            extras={name: self._answer(self.row[name], talks) for name in EXTRAS if name in self.row},
            **numbers,
            **known,
        )

    def _prompt(self, value: Any, system: Any, talks: bool) -> Content:
        given: dict[str, Any] = {"tools": tuple(_tools(self.row.get("tools"))), "template_kwargs": _given(self.row.get(GIVEN))}
        if not talks:
            return Content(text=_words(value, "prompt"), images=self.images, **given)
        waiting = iter(self.images)
        entries = [{"role": "user", "content": value}] if isinstance(value, str) else _listed(value)
        messages = [self._message(entry, waiting) for entry in entries]
        if system:
            told = Message("system", _words(system, "system"))
            if messages and messages[0].role == "system" and messages[0] != told:
                raise UserError("got a system prompt in its own column and another one in the conversation, want one of them.")
            messages = messages if messages[:1] == [told] else [told, *messages]
        return Content(messages=tuple(self._placed(messages, tuple(waiting))), **given)

    def _placed(self, messages: list[Message], left: tuple[Media, ...]) -> list[Message]:
        """Put images that no part names before the first words of the user, as TRL does."""
        if not left:
            return messages
        first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
        if first is None or len(left) < len(self.images):
            raise UserError(f"got {len(self.images)} images and {len(self.images) - len(left)} places for them, want one each.")
        told = replace(messages[first], images=(*left, *messages[first].images), places=())
        return [*messages[:first], told, *messages[first + 1 :]]

    def _answer(self, value: Any, talks: bool) -> Content:
        if _is_picture(value):
            return Content(images=(self._image(value),))
        if not talks:
            return Content(text=_words(value, "completion"))
        entries = [{"role": "assistant", "content": value}] if isinstance(value, str) else _listed(value)
        if not entries:
            return Content(text="")
        return Content(messages=tuple(self._message(entry, iter(())) for entry in entries))

    def _message(self, entry: Any, images: Iterator[Media]) -> Message:
        try:
            entry = {**entry, "role": _role(entry)} if isinstance(entry, Mapping) else entry
            return message_of(entry, self._image, images)
        except (TypeError, ValueError) as fault:
            raise UserError(f"got {fault}. Correct the row.") from fault

    def _image(self, value: Any) -> Media:
        return media_of(value, self.root)[0]


def _without_gaps(name: str, value: Any) -> Any:
    """Return a conversation as a list, without the keys that a table gave each message."""
    if name not in CONVERSATIONS or isinstance(value, str) or _is_picture(value):
        return value
    value = without_nulls(value)
    return [value] if isinstance(value, Mapping) and "completion" not in value else value


def _is_picture(value: Any) -> bool:
    """Whether a value is an image as `datasets` stores it undecoded, and no message."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= {"bytes", "path"}


def _role(message: Mapping[str, Any]) -> Any:
    """Return the role of a message; the names of from/value conversations are those of chat templates."""
    role = message.get("role", message.get("from"))
    return ROLES[role] if role in ("human", "gpt") else role


def _listed(value: Any) -> list[Any]:
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list):
        raise UserError(f"got {shown(value)}, want a text or a list of messages. Correct the row.")
    return listed


def _words(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"got the {name} {shown(value)}, want a text. Correct the row.")
    return value


def _tools(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a row: objects, or JSON of them, as a whole or one by one."""
    try:
        listed = json.loads(value) if isinstance(value, str) and value.strip() else value or []
        tools = [json.loads(tool) if isinstance(tool, str) else without_nulls(tool) for tool in listed]
    except (TypeError, ValueError) as fault:
        raise UserError(f"got the tools {shown(value)}, want a list of JSON schemas. Correct the row.") from fault
    if not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"got the tools {shown(value)}, want a list of JSON schemas. Correct the row.")
    return tools


def _given(value: Any) -> dict[str, Any]:
    """Return what the chat template is given in a row: an object, or JSON of it."""
    try:
        given = json.loads(value) if isinstance(value, str) and value.strip() else value or {}
    except ValueError as fault:
        raise UserError(f"got the {GIVEN} {shown(value)}, want an object. Correct the row.") from fault
    if not isinstance(given, Mapping):
        raise UserError(f"got the {GIVEN} {shown(value)}, want an object. Correct the row.")
    return dict(without_nulls(dict(given)))


def _label(value: Any) -> float:
    if value not in (0, 1):
        raise UserError(f"got the label {shown(value)}, want true or false. Correct the row.")
    return float(value)


def _number(row: Mapping[str, Any], name: str) -> float:
    return _finite(row[name], name)


def _numbers(row: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(_finite(value, name) for value in list_of(row, name))


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"got {shown(value)} for {name}, want a number. Correct the row.")
    return float(value)
