"""HPDv2: train.json with pairs, test.json with rankings, images in folders beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmalign.importers.tables import Faulty, Imported, finish, json_list
from mmalign.records import Fault, collect

PREFERENCES = ([1, 0], [0, 1], [0, 0], [1, 1], [0.5, 0.5])


def hpdv2(
    *,
    path: str,
    split: str = "train",
    images: str | None = None,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """HPDv2: `{prompt, file_path[2], human_preference[2]}` and `{prompt, image_path[k], rank[k], raw_annotations}`.

    In human_preference 1 marks the preferred image; equal values are a tie. A lower rank is better, from 0 or from 1.

    Args:
        path: the folder of train.json and test.json, or one such file.
        split: `train` or `test`: which file of the folder, and which image folder.
        images: folder of the images; None is `<split>` beside the JSON file if there is one, else the file's folder.
        faulty, verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such file, no JSON list, faulty rows.
    """
    place = Path(path).expanduser()
    file = place / f"{split}.json" if place.is_dir() else place
    entries = json_list(file)
    beside = file.parent / file.stem
    root = Path(images).expanduser() if images is not None else beside if beside.is_dir() else file.parent

    def rows() -> Iterator[dict[str, Any] | Fault]:
        for number, entry in enumerate(entries, 1):
            yield _row(entry, f"{file}:{number}", f"hpdv2-{file.stem}-{number}", root.absolute())

    faults: list[Fault] = []
    dataset = collect(rows(), file, faults)
    return finish(dataset, faults, place=str(file), faulty=faulty, verify=verify, num_proc=num_proc)


def _row(entry: Any, where: str, name: str, root: Path) -> dict[str, Any] | Fault:
    paths = entry.get("file_path", entry.get("image_path")) if isinstance(entry, dict) else None
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        return Fault(where, "got a row without file_path or image_path, want the list of images. Is this HPDv2?")
    preference, rank = entry.get("human_preference"), entry.get("rank")
    if preference is not None:
        if preference not in PREFERENCES:
            return Fault(where, f"got human_preference {preference!r}, want [1, 0], [0, 1] or equal values. Correct it.")
        ranks = [1.0 if p == max(preference) else 2.0 for p in preference]
    elif isinstance(rank, list) and rank and all(isinstance(r, int | float) for r in rank):
        ranks = [float(r - min(rank) + 1) for r in rank]
    else:
        return Fault(where, "got neither human_preference nor rank, want one of them, as a list of numbers. Is this HPDv2?")
    return {
        "id": name,
        "prompt": {"text": entry.get("prompt"), "images": []},
        "candidates": [{"text": None, "images": [{"bytes": None, "path": str(root / p)}]} for p in paths],
        "ranks": ranks,
        "where": where,
    }
