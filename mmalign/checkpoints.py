"""Crash-safe checkpoint folders: whole or absent, whenever the process is killed.

A checkpoint is written into a hidden sibling folder and renamed into place when every byte is on disk, so that
`checkpoint-N` is never half-written. Hidden names beside it:

    .checkpoint-N.tmp-<pid>     being written; worthless after a kill
    .checkpoint-N.old-<pid>     being replaced by a newer `checkpoint-N`; put back if the kill came before the newer one
    .checkpoint-N.trash-<pid>   being deleted

Every function here is for one process of a run, rank 0. Where other ranks write into the same checkpoint, rank 0 opens
`write_folder`, broadcasts the path it yields, and leaves the block only after a barrier.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmalign.errors import UserError

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
STATE = "trainer_state.json"

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old|trash)-[0-9]+")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def write_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final`, complete and on disk, when the block ends without an exception.

    An exception (or Ctrl-C) removes it and leaves what was at `final` before untouched. An existing `final` is replaced.
    The marker `complete.json` lists every file with its size, so that a copy cut short is told from a checkpoint.

    Raises:
        UserError: the disc or the quota is full.
    """
    temporary = _hidden(final, "tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _mark_complete(temporary)
        move_into_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise UserError(
                f"{final}: got '{error.strerror}' while saving, want room for one more checkpoint. Nothing half-written is "
                "left and earlier checkpoints are intact. Free some space, or keep fewer checkpoints, and resume."
            ) from error
        raise


def latest(folder: Path) -> Path | None:
    """Return the complete `checkpoint-N` of the highest N in `folder`, or None; incomplete ones are warned about."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint that misses a file or was cut short.

    Raises:
        UserError: it is not whole.
    """
    if fault := _fault(checkpoint):
        raise UserError(f"{checkpoint}: got an incomplete checkpoint ({fault}), want a whole one. Name another, or `latest`.")


def rotate(folder: Path, keep: int) -> None:
    """Delete the oldest complete checkpoints of `folder`, by step number, until `keep` are left.

    Raises:
        UserError: `keep` is below 1, which would delete the newest.
    """
    if keep < 1:
        raise UserError(f"checkpoints to keep: got {keep}, want at least 1. Raise the number.")
    for checkpoint in _checkpoints(folder)[:-keep]:
        _remove(checkpoint)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of `folder` beyond `step`: a run that goes on from `step` leaves their history behind."""
    for checkpoint in _checkpoints(folder):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            _remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Clear `folder` of what killed runs left behind; call it once at the start of a run, before anything is saved.

    A checkpoint that was being replaced is put back if its replacement never arrived.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old" and not (folder / match["name"]).exists():
            os.replace(path, folder / match["name"])
            logger.info("%s: put back, its replacement was never finished.", folder / match["name"])
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            logger.info("%s: removed, left behind by a killed run.", path)
    _sync(folder)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (JSON values only; floats keep every bit) to `folder/trainer_state.json`, whole or not at all."""
    path = folder / STATE
    temporary = path.with_name(f".{STATE}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(state, indent=2), encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `write_state` wrote.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    path = folder / STATE
    remedy = "Resume from another checkpoint."
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: got no such file, want the state of a checkpoint. {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: got broken JSON ({error}), want the state of a checkpoint. {remedy}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: got {type(state).__name__}, want a JSON object. {remedy}")
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    complete = []
    for _, path in sorted(found):
        if fault := _fault(path):
            logger.warning("%s: ignored, %s. Copy it again or delete it.", path, fault)
        else:
            complete.append(path)
    return complete


def _fault(checkpoint: Path) -> str | None:
    """Return what keeps `checkpoint` from being complete, or None."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {COMPLETE}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _mark_complete(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / COMPLETE).write_text(json.dumps({"files": sizes}, indent=2), encoding="utf-8")


def move_into_place(temporary: Path, final: Path) -> None:
    """Put a finished file or folder on disk and rename it to `final`, in the same folder or one below.

    What stood at `final` is not removed before the new one stands: killed in between, `remove_leftovers` puts it back.
    """
    _sync_tree(temporary)
    replaced = None
    if final.is_dir():
        replaced = _hidden(final, "old")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    try:
        os.replace(temporary, final)
    except BaseException:
        if replaced is not None:
            os.replace(replaced, final)
        raise
    _sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _remove(checkpoint: Path) -> None:
    trash = _hidden(checkpoint, "trash")
    os.replace(checkpoint, trash)
    _sync(checkpoint.parent)
    shutil.rmtree(trash)


def _hidden(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}")


def _sync_tree(top: Path) -> None:
    """Have the kernel put a file, or a folder with all in it, on disk."""
    if top.is_file():
        _sync(top)
    for parent, _, names in os.walk(top):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Have the kernel put a file's bytes, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
