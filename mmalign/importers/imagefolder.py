"""Folders of images: `chosen/` and `rejected/` with captions, or one folder with metadata.jsonl."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.tables import Faulty, Imported, finish
from mmalign.records import MEDIA_SUFFIXES, Fault, collect, read


def imagefolder(
    *,
    path: str,
    split: str | None = None,
    chosen: str = "chosen",
    rejected: str = "rejected",
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """Pairs from folders: `chosen/a.png` with `rejected/a.png` and the prompt in `a.txt` beside either of them.

    A folder with metadata.jsonl is read line by line instead: `{image or file_name, lose_image, prompt}`, or
    `{file_names, prompt, ranks}` for k images.

    Args:
        path: the folder.
        split: a folder in it, for folders that have one per split.
        chosen, rejected: names of the two folders.
        faulty, verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such folders, faulty rows (an image without partner or two of one name, a missing or empty caption).
    """
    folder = Path(path).expanduser() / (split or "")
    faults: list[Fault] = []
    if (folder / "metadata.jsonl").exists():
        dataset = read(folder / "metadata.jsonl", faults=faults)
    else:
        missing = [str(folder / name) for name in (chosen, rejected) if not (folder / name).is_dir()]
        if missing:
            raise UserError(
                f"{folder}: got no {' and no '.join(missing)}, want metadata.jsonl, or the folders of better and worse "
                "images. Check the path, or set chosen and rejected."
            )
        dataset = collect(_paired(folder / chosen, folder / rejected), folder, faults)
    return finish(dataset, faults, place=str(folder), faulty=faulty, verify=verify, num_proc=num_proc)


def _paired(chosen: Path, rejected: Path) -> Iterator[dict[str, Any] | Fault]:
    better, worse = _images(chosen), _images(rejected)
    for stem in sorted(better.keys() | worse.keys()):
        where = str((better.get(stem) or worse[stem])[0])
        twice = next((files for files in (better.get(stem, []), worse.get(stem, [])) if len(files) > 1), None)
        captions = [f for f in (chosen / f"{stem}.txt", rejected / f"{stem}.txt") if f.is_file()]
        if twice:
            names = " and ".join(file.name for file in twice)
            yield Fault(where, f"got {names} in one folder, want one image of that name. Remove or rename the others.")
        elif stem not in better or stem not in worse:
            lacking = rejected if stem in better else chosen
            yield Fault(where, f"got an image without partner, want one of the same name in {lacking}. Add or remove it.")
        elif not captions:
            yield Fault(where, f"got no caption, want the prompt in {chosen / (stem + '.txt')}. Write it.")
        else:
            try:
                caption = captions[0].read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as fault:
                yield Fault(where, f"got the caption {captions[0]}, which is not UTF-8 ({fault}). Save it as UTF-8.")
                continue
            images = (better[stem][0], worse[stem][0])
            yield {
                "id": stem,
                "prompt": {"text": caption, "images": []},
                "candidates": [{"text": None, "images": [{"bytes": None, "path": str(i.absolute())}]} for i in images],
                "ranks": [1.0, 2.0],
                "where": where,
            }


def _images(folder: Path) -> dict[str, list[Path]]:
    """Return stem -> images (one, or there is a fault), for subfolders too (`set/a`)."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in MEDIA_SUFFIXES:
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return found
