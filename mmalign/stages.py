"""What the quickstarts share: a claimed output folder, numbered stages with their time, and a CPU of one thread."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmalign.errors import UserError

logger = logging.getLogger(__name__)

STATE = "quickstart.json"


def claimed(folder: Path, state: Any, made: Sequence[str], files: Sequence[str]) -> Path:
    """The output folder, empty but for a note of what it is; an earlier quickstart there is replaced.

    Args:
        folder: as the user named it.
        state: what the note says, as JSON.
        made, files: names of folders and files that a quickstart leaves.
    Raises:
        UserError: it holds other files.
    """
    out = folder.expanduser().absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / STATE).is_file()):
        raise UserError(
            f"out: {out} holds other files, want a new folder or an earlier quickstart's. Name another one with --out."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except OSError as fault:
        raise UserError(f"out: got {out}, which cannot be written ({fault}). Name another folder with --out.") from fault
    for name in made:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in files:
        (out / name).unlink(missing_ok=True)
    return out


class Stages:
    """Tells what each stage does when it begins, and keeps its time."""

    def __init__(self) -> None:
        """Begin before the first stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """A stage, told by its number, name and what it does."""
        logger.info("\n%d  %s: %s", len(self.seconds) + 1, name, what)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@contextmanager
def on_cpu() -> Iterator[None]:
    """Training on the CPU whatever the machine has, and one torch thread unless OMP_NUM_THREADS is set; then as before.

    Numbers are then comparable everywhere. On a network of this size a second thread gains little on an idle machine, and on
    a busy one the threads wait for each other: sampling was measured 10 times slower with two threads.
    """
    import torch

    threads, chosen = torch.get_num_threads(), os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if chosen is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = chosen
