"""The header of a store: what its content depends on, written once and compared at every opening."""

import fcntl
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.cache.part import NUMPY_DTYPES, Fields, sync_folder, told_by_folder, write_at
from mmalign.errors import UserError

_FORMAT = 1
_FILE = "header.json"
_UNFINISHED = "header.json.tmp"
_LOCK = "create.lock"
_FIELD_NAME = re.compile(r"[A-Za-z0-9_]+")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NUMPY_DTYPES}


def make_header(fields: Fields, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header as JSON will read it back.

    Raises:
        ValueError: a field's name, shape or dtype cannot be stored.
        TypeError: the fingerprint is not made of JSON values.
    """
    described = {}
    for name, (shape, dtype) in fields.items():
        if not _FIELD_NAME.fullmatch(name) or dtype not in NUMPY_DTYPES or math.prod(shape) == 0:
            raise ValueError(
                f"fields: {name}: got shape {tuple(shape)} and {dtype}, want a name of letters, digits and _, "
                f"at least one element, and a dtype among {', '.join(_DTYPES)}."
            )
        described[name] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    header = {"format": _FORMAT, "fingerprint": dict(fingerprint), "fields": described}
    return dict(json.loads(json.dumps(header)))


def fields_of(header: dict[str, Any]) -> Fields:
    """Return name -> (shape, dtype), as `make_header` was given them."""
    return {name: (tuple(field["shape"]), _DTYPES[field["dtype"]]) for name, field in header["fields"].items()}


def write_header(folder: Path, header: dict[str, Any]) -> bool:
    """Write the header unless there is one, and tell whether it was written; of many processes, one writes.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    if (folder / _FILE).exists():
        return False
    with told_by_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if others := sorted({path.name for path in folder.iterdir()} - {_FILE, _UNFINISHED, _LOCK}):
            if (folder / _FILE).exists():
                return False
            raise UserError(f"{folder}: got a folder with other files ({others[0]}), want an empty one. Name another.")
        with (folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _FILE).exists():
                return False
            (folder / _UNFINISHED).unlink(missing_ok=True)
            write_at(folder / _UNFINISHED, 0, memoryview(json.dumps(header, indent=2).encode()))
            os.replace(folder / _UNFINISHED, folder / _FILE)
            sync_folder(folder)
    return True


def read_header(folder: Path) -> dict[str, Any]:
    """Return the header on disk.

    Raises:
        UserError: there is none, or it is broken.
    """
    path = folder / _FILE
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: got no cache, want one. Run `mmalign prepare`, or name its folder.") from None
    except ValueError as error:
        raise UserError(f"{path}: got broken JSON ({error}). Delete {folder} and run `mmalign prepare`.") from error
    if not isinstance(header, dict) or not isinstance(header.get("fields"), dict):
        raise UserError(f"{path}: got no header of a cache. Delete {folder} and run `mmalign prepare`.")
    return header


def check_same(folder: Path, header: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the header on disk with the expected one.

    Raises:
        UserError: they differ; names every differing value, old and new, and the remedy.
    """
    old, new = _flat(header), _flat(expected)
    differences = [
        f"  {key.removeprefix('fingerprint.')}: got {old.get(key, 'nothing')}, want {new.get(key, 'nothing')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise UserError(
            f"{folder}: the cache was made for something else (got: the cache, want: this run):\n"
            + "\n".join(differences)
            + f"\nRun `mmalign prepare` into another folder, or delete {folder} and run it again."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested dicts into one, from dotted keys to JSON text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat
