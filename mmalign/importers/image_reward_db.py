"""ImageRewardDB: one row an image, k images a prompt with a human rank each."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import UserError
from mmalign.importers.tables import (
    Faulty,
    Imported,
    check_columns,
    finish,
    json_list,
    local_path,
    open_table,
    stored_image,
    undecoded,
)
from mmalign.records import Conversion, Fault, collect, fault_of

if TYPE_CHECKING:
    import datasets

RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
NEEDED = ("prompt_id", "prompt", "rank")


def image_reward_db(
    *, path: str, split: str = "train", faulty: Faulty = "raise", verify: bool = True, num_proc: int | None = None
) -> Imported:
    """ImageRewardDB: rows of prompt_id, prompt, rank (1 is best, equal is a tie) and image or image_path, grouped by prompt.

    The ratings are kept in the provenance of each image; the order is the human rank.

    Args:
        path: the folder of the published files (`metadata-<split>.parquet`, or `images/<split>/*/*.json`, with the images
            unpacked), one such file, or a table with an `image` column. The hub repository itself is a program, which
            `datasets` no longer runs: download its files.
        split: train, validation or test.
        faulty, verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data, missing columns, faulty rows.
    """
    path = local_path(path)
    table, root = _opened(path, split)
    has_image = "image" in table.column_names
    check_columns(table, (*NEEDED, *(() if has_image else ("image_path",))), path, "ImageRewardDB columns")
    faults: list[Fault] = []
    light = table.remove_columns(["image"]) if has_image else table
    rows = _grouped(light, path, None if has_image else root)
    if not has_image:
        dataset = collect(rows, path, faults)
    else:
        dataset = _with_images(list(rows), undecoded(table, ["image"]).select_columns(["image"]), faults)
    return finish(dataset, faults, place=path, faulty=faulty, verify=verify, num_proc=num_proc)


def _opened(path: str, split: str) -> tuple["datasets.Dataset", Path]:
    """Return the rows, and the folder that image_path is relative to."""
    from datasets import Dataset

    place = Path(path)
    if place.is_dir():
        metadata = place / f"metadata-{split}.parquet"
        if metadata.exists():
            return open_table(str(metadata), split), place.absolute()
        files = sorted(place.glob(f"images/{split}/*/*.json"))
        if files:
            return Dataset.from_list([row for file in files for row in json_list(file)]), place.absolute()
    return open_table(path, split), (place if place.is_dir() else place.parent).absolute()


def _grouped(light: "datasets.Dataset", path: str, root: Path | None) -> Iterator[dict[str, Any] | Fault]:
    """Yield one row a prompt, in order of first appearance; `where` names the prompt's first row."""
    groups: dict[Any, list[int]] = {}
    for index, prompt_id in enumerate(light["prompt_id"]):
        groups.setdefault(prompt_id, []).append(index)
    for prompt_id, members in groups.items():
        where = f"{path}:{members[0] + 1}"
        entries = [light[i] for i in members]
        if len({e["prompt"] for e in entries}) > 1:
            yield Fault(where, f"got several prompts under prompt_id {prompt_id}, want one. Correct prompt_id.")
            continue
        if any(e["rank"] is None or e["rank"] < 1 for e in entries):
            yield Fault(where, f"got the ranks {[e['rank'] for e in entries]}, want 1 for the best and up. Correct them.")
            continue
        ratings = [{name: e[name] for name in RATINGS if e.get(name) is not None} for e in entries]
        paths = [None if root is None else str(root / e["image_path"]) for e in entries]
        yield {
            "id": f"image_reward_db-{prompt_id}",
            "prompt": {"text": entries[0]["prompt"], "images": []},
            "candidates": [{"text": None, "images": [{"bytes": None, "path": p}]} for p in paths],
            "ranks": [float(e["rank"]) for e in entries],
            "provenance": [json.dumps(r, sort_keys=True) for r in ratings],
            "where": where,
            **({"members": members} if root is None else {}),
        }


def _with_images(rows: list[dict[str, Any] | Fault], images: "datasets.Dataset", faults: list[Fault]) -> "datasets.Dataset":
    """Return the groups as a table whose images are fetched from `images` when a row is read."""
    from datasets import Dataset

    good = []
    for row in rows:
        fault = row if isinstance(row, Fault) else fault_of(row)
        if fault is not None:
            faults.append(fault)
        elif not isinstance(row, Fault):
            good.append({key: row[key] for key in ("id", "prompt", "ranks", "provenance", "where", "members")})
    if not good:
        raise UserError("\n".join(str(f) for f in faults[:5]) or "image_reward_db: got no rows, want some.")
    return Dataset.from_list(good).with_transform(Conversion(partial(_convert, images=images), ()))


def _convert(row: Mapping[str, Any], *, media: bool, images: "datasets.Dataset") -> dict[str, Any]:
    empty = {"bytes": None, "path": None}
    found = [stored_image(images[i]["image"]) if media else empty for i in row["members"]]
    prompt = {"text": row["prompt"]["text"], "images": []}
    candidates = [{"text": None, "images": [image]} for image in found]
    return {
        **{"scores": [], "prob": None, "weight": None, "margin": None},
        **{key: row[key] for key in ("id", "ranks", "provenance", "where")},
        **{"prompt": prompt, "candidates": candidates},
    }
