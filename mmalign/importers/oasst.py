"""OpenAssistant: trees of messages, in which the replies to one message are ranked by people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from mmalign.errors import UserError
from mmalign.importers.row_wise import LINE, foreign_rows, import_groups, number_of, open_rows, text_of
from mmalign.importers.tables import Faulty, Imported, check_columns, local_path, row_place
from mmalign.records import Comparison, Content, Dropped, Fault, Message

ROLES = {"prompter": "user", "assistant": "assistant"}
NEEDED = ("message_id", "parent_id", "text", "role")
KEPT = ("model_name", "lang", "synthetic")

Node = tuple[str, Mapping[str, Any]]
Answer = Comparison | Fault | tuple[str, Dropped]


def oasst(
    *,
    path: str,
    split: str = "train",
    faulty: Faulty = "raise",
    languages: tuple[str, ...] | None = None,
    deleted: bool = False,
    synthetic: bool = True,
) -> Imported:
    """OASST1 and OASST2: rows of message_id, parent_id, text, role, rank, lang, deleted; one comparison a ranked prompt.

    The path from the first message is the prompt, the ranked replies of the assistant are the candidates (rank 0, the best,
    becomes 1): lists for the view `ranked`, best and worst for `pair`. Model, language and the people's quality labels are kept
    in the provenance.

    Source: OpenAssistant/oasst1, oasst2 (arXiv 2304.07327).

    Args:
        path, split: as in `ultrafeedback`; train or validation. Flat tables of messages, not the exports of whole trees.
        faulty: messages without id, text or a known role, or whose parent is missing: `raise`, or `drop` and report. The
            messages below them go with them.
        languages: of the message that is answered, `en` for one; None: all. Others are left out, counted.
        deleted: keep deleted messages. False: deleted replies are no candidates, and prompts with one are left out, counted.
        synthetic: keep replies that a model wrote.

    Raises:
        UserError: no such data set, split or columns; faulty rows.
    """
    table = open_rows(path, split)
    place = row_place(local_path(path), split)
    if LINE not in table.column_names:
        check_columns(table, NEEDED, path, "oasst columns")
    nodes, replies, faults = _tree(foreign_rows(table, place))

    def values() -> Iterator[Answer]:
        yield from faults
        for parent, children in replies.items():
            if parent not in nodes:
                problem = f"its parent {parent} is missing. Add it or remove the row."
                yield from (Fault(nodes[child][0], problem) for child in children)
                continue
            candidates = [nodes[child] for child in children if nodes[child][1]["role"] == "assistant"]
            if len(candidates) > 1:
                yield _comparison(parent, candidates, nodes, languages=languages, deleted=deleted, synthetic=synthetic)

    return import_groups(values(), place=place, faulty=faulty)


def _tree(
    rows: Iterator[tuple[int, str, Mapping[str, Any] | Fault]],
) -> tuple[dict[str, Node], dict[str, list[str]], list[Fault]]:
    """Return the messages by id with their places, the ids of the replies to each, and what is wrong."""
    nodes, replies, faults = dict[str, Node](), dict[str, list[str]](), list[Fault]()
    for _, where, row in rows:
        try:
            fault = row if isinstance(row, Fault) else _message_fault(row, where, nodes)
        except UserError as error:
            fault = Fault(where, str(error))
        if fault is not None:
            faults.append(fault)
        elif not isinstance(row, Fault):
            nodes[row["message_id"]] = (where, row)
            if row.get("parent_id") is not None:
                replies.setdefault(row["parent_id"], []).append(row["message_id"])
    return nodes, replies, faults


def _message_fault(row: Mapping[str, Any], where: str, nodes: Mapping[str, Node]) -> Fault | None:
    name = text_of(row, "message_id")
    if not text_of(row, "text").strip():
        return Fault(where, "got an empty message, want a text. Write one or remove the row.")
    if text_of(row, "role") not in ROLES:
        return Fault(where, f"got the role {row['role']!r}, want prompter or assistant. Correct the row.")
    if row.get("rank") is not None:
        number_of(row, "rank")
    if name in nodes:
        return Fault(where, f"got the message_id {name} again, first in {nodes[name][0]}. Remove one of the two.")
    return None


def _comparison(
    parent: str,
    candidates: Sequence[Node],
    nodes: Mapping[str, Node],
    *,
    languages: Sequence[str] | None,
    deleted: bool,
    synthetic: bool,
) -> Answer:
    """Make the comparison of the replies to one message, or say why it is left out."""
    where, asked = nodes[parent]
    path = _path(parent, nodes)
    if isinstance(path, Fault):
        return path
    if languages is not None and asked.get("lang") not in languages:
        return where, Dropped("in other languages")
    if not deleted and any(row.get("deleted") for row in path):
        return where, Dropped("with a deleted message in the prompt")
    kept = [row for _, row in candidates if (deleted or not row.get("deleted")) and (synthetic or not row.get("synthetic"))]
    ranked = [row for row in kept if row.get("rank") is not None]
    if len(ranked) < 2:
        return where, Dropped("with fewer than two ranked replies")
    return Comparison(
        id=f"oasst-{parent}",
        prompt=Content(messages=tuple(Message(ROLES[row["role"]], row["text"]) for row in path)),
        candidates=tuple(Content(messages=(Message("assistant", row["text"]),)) for row in ranked),
        ranks=tuple(float(row["rank"]) + 1 for row in ranked),
        provenance=tuple({key: row[key] for key in KEPT if row.get(key) is not None} | _labels(row) for row in ranked),
        where=where,
    )


def _path(name: str, nodes: Mapping[str, Node]) -> list[Mapping[str, Any]] | Fault:
    """Return the messages from the first one to this one."""
    path: list[Mapping[str, Any]] = []
    start, parent = nodes[name][0], cast("str | None", name)
    while parent is not None:
        if parent not in nodes:
            return Fault(start, f"the message {parent} before it is missing. Add it or remove the rows after it.")
        if len(path) > len(nodes):
            return Fault(start, "its parents go round in a circle. Correct parent_id.")
        path.insert(0, nodes[parent][1])
        parent = nodes[parent][1].get("parent_id")
    return path


def _labels(row: Mapping[str, Any]) -> dict[str, Any]:
    labels = row.get("labels") or {}
    values = zip(labels.get("name") or (), labels.get("value") or (), strict=False)
    found = {name: value for name, value in values if value is not None}
    return {"labels": found} if found else {}
