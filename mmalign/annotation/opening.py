"""Opening data to judge: tables of comparisons, what an importer made, or folders of images with prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import UserError
from mmalign.importers import Imported, comparisons, imagefolder
from mmalign.records import IMAGE_SUFFIXES, MEDIA_SUFFIXES, Comparison, Content, Fault, Media, comparison

if TYPE_CHECKING:
    import datasets

PROMPT_NAMES = ("prompt.txt", "caption.txt")


def rows_of(imported: "Imported | datasets.Dataset") -> Iterator[Comparison | Fault]:
    """Yield the rows of a table of our schema with their media, one in memory at a time; unusable ones as faults."""
    table = imported.dataset if isinstance(imported, Imported) else imported
    for number in range(len(table)):
        entry = table[number]
        try:
            yield comparison(entry)
        except UserError as error:
            where = entry.get("where") or f"row {number + 1}"
            yield Fault(where, str(error).removeprefix(f"{where}: "))
    if isinstance(imported, Imported):
        yield from imported.faults


def open_data(path: str | Path) -> Iterator[Comparison | Fault]:
    """Yield the rows that lie at a path.

    A file or folder in one of mmalign's own formats; folders `chosen/` and `rejected/`; or a folder of images and prompts:
    one folder a prompt (`cat/1.png cat/2.png cat/prompt.txt`), or one folder a model with images of equal names
    (`one/cat.png two/cat.png`) and the prompt in `cat.txt` beside one of them or above.

    Raises:
        UserError: nothing there, or no such data.
    """
    place = Path(path).expanduser()
    if place.is_dir() and (place / "chosen").is_dir() and (place / "rejected").is_dir():
        return rows_of(imagefolder(path=str(place), faulty="drop", verify=False))
    if place.is_dir() and not any(any(place.glob(f"*{end}")) for end in (".jsonl", ".parquet", ".tar", ".arrow")):
        folders = sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        if any(_images(folder) for folder in folders):
            return _folders(place, folders)
    return rows_of(comparisons(path=str(place), faulty="drop"))


def kind_of(rows: list[Comparison]) -> str:
    """Tell whether rows are judged as images or as texts: images where every candidate has one."""
    return "image" if rows and all(candidate.media() for row in rows for candidate in row.candidates) else "text"


def _folders(place: Path, folders: list[Path]) -> Iterator[Comparison | Fault]:
    """Tell the two ways of keeping images apart: prompts lie inside each folder, or equal names lie in several."""
    if any((folder / name).is_file() for folder in folders for name in PROMPT_NAMES):
        return (_of_prompt(folder) for folder in folders)
    return _of_models(place, folders)


def _of_prompt(folder: Path) -> Comparison | Fault:
    images = _images(folder)
    prompt = next((folder / name for name in PROMPT_NAMES if (folder / name).is_file()), None)
    if prompt is None:
        return Fault(str(folder), f"got no {PROMPT_NAMES[0]}, want the prompt of the images. Write it.")
    return _row(folder.name, str(folder), prompt, list(images.values()), [{"file": name} for name in images])


def _of_models(place: Path, folders: list[Path]) -> Iterator[Comparison | Fault]:
    images = {folder: _images(folder) for folder in folders}
    folders = [folder for folder in folders if images[folder]]
    for stem in sorted({stem for found in images.values() for stem in found}):
        having = [folder for folder in folders if stem in images[folder]]
        where = str(images[having[0]][stem])
        prompt = next((f / f"{stem}.txt" for f in (*having, place) if (f / f"{stem}.txt").is_file()), None)
        if len(having) < 2:
            yield Fault(where, "got an image without partner, want one of the same name in another folder. Add or remove it.")
        elif prompt is None:
            yield Fault(where, f"got no prompt, want it in {place / (stem + '.txt')}. Write it.")
        else:
            yield _row(stem, where, prompt, [images[f][stem] for f in having], [{"model": f.name} for f in having])


def _row(id: str, where: str, prompt: Path, images: list[Path], provenance: list[dict[str, str]]) -> Comparison | Fault:
    try:
        text = prompt.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as fault:
        return Fault(where, f"the prompt {prompt} cannot be read ({fault}). Save it as UTF-8.")
    if not text:
        return Fault(where, f"got an empty prompt in {prompt}, want a text. Write one.")
    candidates = tuple(Content(images=(Media(path=str(image.absolute()), where=where),)) for image in images)
    return Comparison(id=id, prompt=Content(text=text), candidates=candidates, provenance=tuple(provenance), where=where)


def _images(folder: Path) -> dict[str, Path]:
    """Return the images and videos of a folder by their names without ending; of equal names the first."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (*IMAGE_SUFFIXES, *MEDIA_SUFFIXES) and file.is_file():
            found.setdefault(file.stem, file)
    return found
