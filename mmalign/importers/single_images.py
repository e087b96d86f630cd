"""Single images with their prompts, good or bad ones, or an expert's: nothing is compared."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.tables import Faulty, Imported, finish
from mmalign.records import Fault
from mmalign.records.table import empty_dataset, features

IMAGE_KEYS = ("image", "file_name")
PROMPT_KEYS = ("prompt", "caption", "text")
# Diffusion-KTO's csv: images that only ever won, only ever lost, or both.
SPLITS = {"exclusive_win": 1.0, "exclusive_lose": 0.0, "intersections": 1.0}
LABELS = {"1": 1.0, "1.0": 1.0, "True": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "False": 0.0, "false": 0.0}


def single_images(*, path: str, faulty: Faulty = "raise", verify: bool = True, num_proc: int | None = None) -> Imported:
    """One image a line of a JSONL or CSV file, or of a folder with metadata.jsonl or metadata.csv (imagefolder).

    Columns: `image` or `file_name` (a path beside the file), `prompt`, `caption` or `text`, and for unpaired losses `label`
    (1 wanted, 0 not) or Diffusion-KTO's `split` (exclusive_win, exclusive_lose, intersections; an image counts as wanted if it
    ever won). For the views `best` (SFT, experts) and `unpaired` (KTO).

    Args:
        path: the file or folder.
        faulty, verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such file, no rows, faulty rows (a missing image, an empty prompt, a label that is neither 0 nor 1).
    """
    from datasets import Dataset

    place = _file(Path(path).expanduser())
    faults: list[Fault] = []
    rows = []
    empty = dict.fromkeys(features())
    for number, entry in _entries(place):
        row = entry if isinstance(entry, Fault) else _row(entry, place, f"{place}:{number}")
        if isinstance(row, Fault):
            faults.append(row)
        else:
            rows.append({**empty, "id": str(number), **row})
    if not rows and not faults:
        raise UserError(f"{place}: got no rows, want at least one image with its prompt. Check the file.")
    dataset = Dataset.from_list(rows, features=features()) if rows else empty_dataset()
    return finish(dataset, faults, place=str(place), faulty=faulty, verify=verify, num_proc=num_proc)


def _file(place: Path) -> Path:
    if place.is_dir():
        found = [place / name for name in ("metadata.jsonl", "metadata.csv") if (place / name).is_file()]
        if not found:
            raise UserError(f"{place}: got a folder without metadata.jsonl or metadata.csv, want one of them. Check the path.")
        return found[0]
    if place.suffix not in (".jsonl", ".csv") or not place.is_file():
        raise UserError(f"{place}: want a .jsonl or .csv file, or a folder with metadata.jsonl. Check the path.")
    return place


def _entries(place: Path) -> Iterator[tuple[int, Mapping[str, Any] | Fault]]:
    """Rows with the number of their (last) line."""
    try:
        with place.open(encoding="utf-8-sig", newline="" if place.suffix == ".csv" else None) as file:
            if place.suffix == ".csv":
                rows = csv.DictReader(file)
                yield from ((rows.line_num, row) for row in rows)
                return
            for number, line in enumerate(file, 1):
                yield number, _entry(line, f"{place}:{number}")
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{place}: cannot be read ({fault}). Give a file in UTF-8.") from fault


def _entry(line: str, where: str) -> Mapping[str, Any] | Fault:
    try:
        entry = json.loads(line)
    except ValueError as fault:
        return Fault(where, f"got no valid JSON ({fault}). Correct the line.")
    return entry if isinstance(entry, dict) else Fault(where, f"got {line.strip()[:40]}, want an object with image and prompt.")


def _row(entry: Mapping[str, Any], place: Path, where: str) -> dict[str, Any] | Fault:
    image, prompt = (next((entry[name] for name in keys if entry.get(name)), None) for keys in (IMAGE_KEYS, PROMPT_KEYS))
    if not isinstance(image, str) or not isinstance(prompt, str) or not image.strip() or not prompt.strip():
        name, value = ("prompt", prompt) if isinstance(image, str) and image.strip() else ("image", image)
        got = f"no {name}" if value is None else f"the {name} {value!r}"
        return Fault(where, f"got {got}, want an image and its prompt. Complete or remove the row.")
    file = Path(image) if Path(image).is_absolute() else place.parent / image
    if not file.is_file():
        return Fault(where, f"the image {file} is missing. Put it there or remove the row.")
    label = SPLITS.get(str(entry.get("split")), entry.get("label"))
    scores = []
    if label not in (None, ""):  # an empty cell of a CSV file
        if str(label) not in LABELS:
            return Fault(where, f"got the label {label!r}, want 1 (wanted) or 0. Correct it.")
        scores = [{"judge": "label", "values": [LABELS[str(label)]]}]
    return {
        "prompt": {"text": prompt, "images": []},
        "candidates": [{"text": None, "images": [{"bytes": None, "path": str(file.absolute())}]}],
        "scores": scores,
        "where": where,
    }
