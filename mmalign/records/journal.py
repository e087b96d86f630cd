"""The journal of verdicts: what several processes and killed runs wrote, brought into one file and one order."""

import glob
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mmalign.records.stamps import replace_file

logger = logging.getLogger(__name__)


def part_of(journal: Path, process: int) -> Path:
    """Where one of several processes notes its verdicts, until the main one gathers them."""
    return journal.with_name(f"{journal.name}.part-{process:03d}")


def gather_parts(journal: Path) -> None:
    """Bring the verdicts of all processes, also of killed runs, into the one journal. Torn last lines are cut off."""
    for path in (journal, *sorted(journal.parent.glob(f"{glob.escape(journal.name)}.part-*"))):
        if not path.exists():
            continue
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            text = text[: text.rfind(b"\n") + 1]
            os.truncate(path, len(text))
            logger.info("%s: the last line was cut short and is judged again", path)
        if path != journal:
            with open(journal, "ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            path.unlink()


def sort_journal(journal: Path, ids: Sequence[str], names: Sequence[str]) -> None:
    """Order the verdicts as the rows, then as the judges, whoever wrote them when; of equal ones one stays."""
    if not journal.exists():
        return
    rows = {id: number for number, id in enumerate(ids)}
    order = {name: number for number, name in enumerate(names)}

    def key(line: bytes) -> tuple[int, int]:
        verdict = json.loads(line)
        return rows.get(verdict["comparison"], len(rows)), order.get(verdict["judge"], -1)

    before = journal.read_bytes()
    lines: list[bytes] = list(dict.fromkeys(before.splitlines(keepends=True)))
    lines.sort(key=key)
    after = b"".join(lines)
    if after != before:
        replace_file(journal, after)
