"""Our own formats on disk, by path."""

from pathlib import Path

from mmalign.importers.tables import Faulty, Imported, finish
from mmalign.records import Fault, outline_rows, read
from mmalign.records import fault_of as fault_of_row


def comparisons(
    *,
    path: str,
    split: str | None = None,
    faulty: Faulty = "raise",
    verify: bool = False,
    least: int = 2,
    num_proc: int | None = None,
) -> Imported:
    """Comparisons as mmalign writes them: x.jsonl, x.parquet, x.tar, imagefolder, shards, or a save_to_disk folder.

    Columns: id, prompt {text, images, messages, tools}, candidates [the same], and if known ranks, prob, scores, weight,
    margin, provenance, prompts (one a candidate), prefix, extras. A candidate's video is one image that is a file of several
    frames (GIF, WebP, APNG, MP4, WebM), or several images: its frames in order.

    Args:
        path: file or folder.
        split: a file or folder in it, for folders that have one per split (`train`, `train.parquet`).
        faulty, num_proc: as in `pick_a_pic`.
        least: candidates a row must have: 1 for answers that are judged alone (view unpaired), 0 for prompts.
        verify: decode every image once and leave broken ones out. Off: `mmalign validate-data` does it once.

    Raises:
        UserError: nothing there, no known format, faulty rows.
    """
    place = Path(path).expanduser()
    if split is not None:
        named = sorted(place.glob(f"{split}.*")) if place.is_dir() else []
        place = named[0] if named and not (place / split).exists() else place / split
    faults: list[Fault] = []
    dataset = read(place, faults=faults, least=least)
    broken = {i: fault for i, row in enumerate(outline_rows(dataset)) if (fault := fault_of_row(row, least))}
    if broken:
        dataset = dataset.select([i for i in range(len(dataset)) if i not in broken])
    faults += broken.values()
    return finish(dataset, faults, place=str(place), faulty=faulty, verify=verify, num_proc=num_proc)
