"""Single images with their prompts, good or bad ones, or an expert's: nothing is compared."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.tables import Faulty, Imported, finish
from mmalign.records import Fault
from mmalign.records.table import features

IMAGE_KEYS = ("image", "file_name")
PROMPT_KEYS = ("prompt", "caption", "text")
# Diffusion-KTO's csv: images that only ever won, only ever lost, or both.
SPLITS = {"exclusive_win": 1.0, "exclusive_lose": 0.0, "intersections": 1.0}


def single_images(*, path: str, faulty: Faulty = "raise", verify: bool = True, num_proc: int | None = None) -> Imported:
    """One image a line of a JSONL or CSV file, or of a folder with metadata.jsonl or metadata.csv (imagefolder).

    Columns: `image` or `file_name` (a path beside the file), `prompt`, `caption` or `text`, and for unpaired losses `label`
    (1 wanted, 0 not) or Diffusion-KTO's `split` (exclusive_win, exclusive_lose, intersections; an image counts as wanted if it
    ever won). For the views `best` (SFT, experts) and `unpaired` (KTO).

    Args:
        path: the file or folder.
        faulty, verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such file, faulty rows (a missing image, an empty prompt, a label that is neither 0 nor 1).
    """
    from datasets import Dataset

    place = _file(Path(path).expanduser())
    faults: list[Fault] = []
    rows = []
    empty = dict.fromkeys(features())
    for number, entry in _entries(place):
        row = _row(entry, place, f"{place}:{number}")
        if isinstance(row, Fault):
            faults.append(row)
        else:
            rows.append({**empty, "id": str(number), **row})
    if not rows and not faults:
        raise UserError(f"{place}: got no rows, want at least one image with its prompt.")
    dataset = (
        Dataset.from_list(rows, features=features()) if rows else Dataset.from_dict({n: [] for n in empty}, features=features())
    )
    return finish(dataset, faults, place=str(place), faulty=faulty, verify=False, num_proc=num_proc)


def _file(place: Path) -> Path:
    if place.is_dir():
        found = [place / name for name in ("metadata.jsonl", "metadata.csv") if (place / name).is_file()]
        if not found:
            raise UserError(f"{place}: got a folder without metadata.jsonl or metadata.csv, want one of them. Check the path.")
        return found[0]
    if place.suffix not in (".jsonl", ".csv") or not place.is_file():
        raise UserError(f"{place}: want a .jsonl or .csv file, or a folder with metadata.jsonl. Check the path.")
    return place


def _entries(place: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if place.suffix == ".csv":
        with place.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.DictReader(file), 2)
        return
    for number, line in enumerate(place.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            yield number, json.loads(line)
        except ValueError as fault:
            raise UserError(f"{place}:{number}: got no valid JSON ({fault}). Correct the line.") from fault


def _row(entry: Mapping[str, Any], place: Path, where: str) -> dict[str, Any] | Fault:
    image = next((entry[name] for name in IMAGE_KEYS if entry.get(name)), None)
    prompt = next((entry[name] for name in PROMPT_KEYS if entry.get(name)), None)
    if not image or not (prompt or "").strip():
        return Fault(where, f"got no {'image' if not image else 'prompt'}, want both. Complete or remove the row.")
    file = Path(image) if Path(image).is_absolute() else place.parent / image
    if not file.is_file():
        return Fault(where, f"the image {file} is missing. Put it there or remove the row.")
    label = SPLITS.get(str(entry.get("split")), entry.get("label"))
    scores = []
    if label is not None:
        if str(label) not in ("0", "1", "0.0", "1.0", "True", "False"):
            return Fault(where, f"got the label {label!r}, want 1 (wanted) or 0. Correct it.")
        scores = [{"judge": "label", "values": [float(str(label) in ("1", "1.0", "True"))]}]
    return {
        "prompt": {"text": prompt, "images": []},
        "candidates": [{"text": None, "images": [{"bytes": None, "path": str(file.absolute())}]}],
        "scores": scores,
        "where": where,
    }
