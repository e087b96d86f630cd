"""Tables: the schema comparisons have in `datasets`, and reading rows of it, with or without their media."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign.errors import UserError
from mmalign.records.columns import content_features, content_of, content_row, outline_contents, outline_lists
from mmalign.records.faults import faults_of
from mmalign.records.rows import Comparison

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 256
Row = TypeVar("Row")


def features(*, conversations: bool = True) -> "datasets.Features":
    """Return the table schema of comparisons. Images are stored as `datasets.Image`: bytes or path, not decoded.

    Args:
        conversations: False gives the prompt and candidates of tables written before there were messages.
    """
    from datasets import Features, List, Value

    content = content_features(conversations=conversations)
    return Features(
        {
            "id": Value("string"),
            "prompt": content,
            "candidates": List(content),
            "scores": List({"judge": Value("string"), "values": List(Value("float64"))}),
            "ranks": List(Value("float64")),
            "prob": Value("float64"),
            "weight": Value("float64"),
            "margin": Value("float64"),
            "beta_scale": Value("float64"),
            "provenance": List(Value("string")),  # one JSON object a candidate
            "prompts": List(content_features()),
            "prefix": Value("string"),
            "extras": List({"name": Value("string"), "content": content_features()}),
            "where": Value("string"),
        }
    )


SIMPLE = ("id", "scores", "ranks", "prob", "weight", "margin", "beta_scale", "provenance", "prefix", "where")  # hold no media
COLUMNS = ("id", "prompt", "candidates", *SIMPLE[1:-1], "prompts", "extras", "where")


def to_row(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as one row of the table schema."""
    return {
        "id": comparison.id,
        "prompt": content_row(comparison.prompt),
        "candidates": [content_row(c) for c in comparison.candidates],
        "scores": [{"judge": judge, "values": list(values)} for judge, values in comparison.scores.items()],
        "ranks": None if comparison.ranks is None else list(comparison.ranks),
        "prob": comparison.prob,
        "weight": comparison.weight,
        "margin": comparison.margin,
        "beta_scale": comparison.beta_scale,
        "provenance": [json.dumps(p, sort_keys=True) for p in comparison.provenance],
        "prompts": None if comparison.prompts is None else [content_row(p) for p in comparison.prompts],
        "prefix": comparison.prefix,
        "extras": [{"name": name, "content": content_row(c)} for name, c in comparison.extras.items()],
        "where": comparison.where,
    }


def comparison(row: Mapping[str, Any], where: str = "", least: int = 2) -> Comparison:
    """Read one row of the table schema and check it.

    Args:
        row: a dict with the columns of `features()`; id, prompt and candidates are required.
        where: `file:row` for messages; the row's own `where` is used when it is empty.
        least: candidates it must have.

    Raises:
        UserError: everything that is wrong with the row, in one message that begins with `where`.
    """
    where = where or row.get("where") or "row"
    missing = [name for name in ("id", "prompt", "candidates") if row.get(name) is None]
    if missing:
        raise UserError(f"{where}: got no {' and no '.join(missing)}. A comparison needs id, prompt and candidates.")
    ranks, prompts = row.get("ranks"), row.get("prompts")
    value = Comparison(
        id=str(row["id"]),
        prompt=content_of(row["prompt"], f"{where}: prompt"),
        candidates=tuple(content_of(c, f"{where}: candidate {n}") for n, c in enumerate(row["candidates"], 1)),
        scores={s["judge"]: tuple(s["values"]) for s in row.get("scores") or ()},
        ranks=None if ranks is None else tuple(ranks),
        prob=row.get("prob"),
        weight=row.get("weight"),
        margin=row.get("margin"),
        beta_scale=row.get("beta_scale"),
        provenance=tuple(_provenance(p, where) for p in row.get("provenance") or ()),
        prompts=None if prompts is None else tuple(content_of(p, f"{where}: prompt {n}") for n, p in enumerate(prompts, 1)),
        prefix=row.get("prefix"),
        extras={e["name"]: content_of(e["content"], f"{where}: {e['name']}") for e in row.get("extras") or ()},
        where=where,
    )
    problems = faults_of(value, least)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    return value


def _provenance(text: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError:
        entry = text
    if not isinstance(entry, dict):
        raise UserError(f"{where}: got the provenance {entry!r}, want an object a candidate. Correct it or remove it.")
    return entry


def to_dataset(comparisons: Iterable[Comparison]) -> "datasets.Dataset":
    """Return the comparisons as an in-memory table of our schema. For more than memory holds use `write`."""
    from datasets import Dataset

    rows = [to_row(c) for c in comparisons]
    return Dataset.from_list(rows, features=features()) if rows else empty_dataset()


def empty_dataset() -> "datasets.Dataset":
    """Return a table of our schema without rows."""
    from datasets import Dataset

    return Dataset.from_dict({name: [] for name in COLUMNS}, features=features())


@dataclass(frozen=True)
class Conversion:
    """Turns rows of a foreign table into our schema while they are read; media stay where they are.

    `dataset.with_transform(Conversion(...))` is a table of our schema without a copy.

    Args:
        convert: (foreign row, media: bool) -> row of our schema. Without media the columns `heavy` are absent from the
            foreign row, and images are `{"bytes": None, "path": None}`.
        heavy: the foreign columns that hold media.
    """

    convert: Callable[..., dict[str, Any]]
    heavy: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Convert a batch, as `datasets` asks for it."""
        rows = [self.convert(row, media=True) for row in _rows(batch)]
        return {name: [row.get(name) for row in rows] for name in COLUMNS}


def outlines(dataset: "datasets.Dataset") -> Iterator[Comparison]:
    """Read every row, of fewer than two candidates too, without its media: texts, numbers of images, judgements.

    A table of a terabyte of images is counted and filtered this way in seconds; images of an outline cannot be opened.

    Raises:
        UserError: a row is faulty.
    """
    for row in outline_rows(dataset):
        yield comparison(row, least=0)


def outline_rows(dataset: "datasets.Dataset") -> Iterator[dict[str, Any]]:
    """Read every row as a dict of our schema without media and without checks."""
    conversion = dataset.format["format_kwargs"].get("transform")
    if isinstance(conversion, Conversion):
        light = dataset.with_format(None).remove_columns(list(conversion.heavy))
        for start in range(0, len(light), BATCH_ROWS):
            for row in _rows(light[start : start + BATCH_ROWS]):
                yield conversion.convert(row, media=False)
        return
    arrow = dataset.with_format("arrow")
    for start in range(0, len(arrow), BATCH_ROWS):
        table = arrow[start : start + BATCH_ROWS]
        batch = {name: table[name].to_pylist() for name in SIMPLE}
        read: dict[str, Callable[[Any], Sequence[Any]]] = {
            "prompt": outline_contents,
            "candidates": outline_lists,
            "prompts": outline_lists,
            "extras": _outline_extras,
        }
        for name, reader in read.items():  # chunk by chunk: joining them would copy the images
            batch[name] = [value for chunk in table[name].chunks for value in reader(chunk)]
        yield from _rows(batch)


def _outline_extras(array: Any) -> list[list[dict[str, Any]]]:
    values = array.flatten()
    named = zip(values.field("name").to_pylist(), outline_contents(values.field("content")), strict=True)
    flat = iter([{"name": name, "content": content} for name, content in named])
    return [list(islice(flat, n or 0)) for n in array.value_lengths().to_pylist()]


def in_batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yield the rows in lists of `size`, the last one shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _rows(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(names, values, strict=True))
