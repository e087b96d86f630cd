"""Which importer reads data whose owner did not say: told by the columns of the first row."""

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv")
INFORMATION = "dataset_info.json"  # beside the tables that `datasets` saves
LONGEST_ROW = 16 * 2**20
TURNS = "\n\nHuman:"

# The first whose columns are all there. What is in none of them is read as mmalign's own.
KNOWN: tuple[tuple[str, frozenset[str]], ...] = (
    ("pick_a_pic", frozenset({"caption", "jpg_0", "jpg_1", "label_0"})),
    ("shp", frozenset({"history", "human_ref_A", "human_ref_B"})),
    ("pku_safe_rlhf", frozenset({"prompt", "response_0", "response_1", "better_response_id"})),
    ("helpsteer2_preference", frozenset({"prompt", "response_1", "response_2", "preference_strength"})),
    ("ultrafeedback", frozenset({"instruction", "completions"})),
    ("nectar", frozenset({"prompt", "answers"})),
    ("trl", frozenset({"chosen", "rejected"})),
    ("trl", frozenset({"prompt", "completions"})),
)


def importer_of(place: Path) -> str | None:
    """Return the name of the importer of a local file or folder; None for mmalign's own formats, and for what is not known."""
    first = _first_row(place)
    if "candidates" in first:
        return None
    name = next((name for name, columns in KNOWN if columns <= first.keys()), None)
    return "hh_rlhf" if name == "trl" and "prompt" not in first and str(first["chosen"]).startswith(TURNS) else name


def _first_row(place: Path) -> Mapping[str, Any]:
    """Return the first row of the data, or just its columns; empty where it cannot be told."""
    try:
        if (place / "chosen").is_dir():  # folders of images
            return {}
        file = place if place.is_file() else _first_file(place)
        return {} if file is None else _row_of(file)
    except (OSError, ValueError, EOFError):  # the reader of the data says what is wrong with it
        return {}


def _first_file(folder: Path) -> Path | None:
    found = sorted(folder.rglob(INFORMATION)) or [one for one in sorted(folder.iterdir()) if one.name.endswith(DATA)]
    return next((one for one in found if one.is_file()), None)


def _row_of(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return dict.fromkeys(pyarrow.parquet.read_schema(file).names)
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return dict.fromkeys(next(csv.reader(lines), []))
    if file.name == INFORMATION:
        return _object(json.loads(file.read_text(encoding="utf-8")).get("features"))
    if file.suffix == ".json":
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
        return _object(rows[0] if isinstance(rows, list) and rows else None)
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        return {}
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
        return _object(json.loads(lines.readline(LONGEST_ROW)))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
