"""LLaVA-Hound's pairs of answers to videos: a prompt with `<video>`, chosen and rejected, frames in a folder of images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.importers.row_wise import import_rows, number_of, open_rows, shown, text_of
from mmalign.importers.sight import answer, folder_of, question
from mmalign.importers.tables import Faulty, Imported
from mmalign.records import IMAGE_SUFFIXES, MEDIA_SUFFIXES, Comparison, Media, thinned

VIDEO_TAG = "<video>"


def llava_hound(
    *,
    path: str,
    split: str = "train",
    videos: str | None = None,
    frames: int | None = None,
    faulty: Faulty = "raise",
    verify: bool = True,
    num_proc: int | None = None,
) -> Imported:
    """LLaVA-Hound (sft_dpo_17k.jsonl): video, prompt, chosen, rejected, and the scores of both where they are there.

    A video is the folder of its frames, in the order of their names, or one file of several frames. Train on folders with
    `adapter.as_video: true`.

    Source: ShareGPTVideo/train_video_and_instruction (arXiv 2404.01258).

    Args:
        path: a JSONL, JSON or Parquet file, a folder, or a hub id.
        split: of a hub data set.
        videos: the folder of videos; None is that of the data.
        frames: how many of a folder's frames, evenly spaced from first to last. None: all.
        faulty: rows without prompt, video or answer: `raise`, or `drop` and report.
        verify, num_proc: as in `pick_a_pic`.

    Raises:
        UserError: no such data set, split or columns; frames below 2; faulty rows.
    """
    if frames is not None and frames < 2:
        raise UserError(f"llava_hound: got frames {frames}, want 2 or more, or null for all. Correct the config.")
    convert = partial(llava_hound_row, videos=folder_of(path, videos), frames=frames)
    return import_rows(
        open_rows(path, split),
        convert,
        name="llava_hound",
        path=path,
        split=split,
        columns=("video", "prompt", "chosen", "rejected"),
        faulty=faulty,
        verify=verify,
        num_proc=num_proc,
    )


def llava_hound_row(row: Mapping[str, Any], *, videos: Path = Path(), frames: int | None = None) -> Comparison:
    """Convert one row; see `llava_hound`.

    Raises:
        UserError: what is wrong with it, without its place.
    """
    scored = all(row.get(f"{name}_score") is not None for name in ("chosen", "rejected"))
    scores = tuple(number_of(row, f"{name}_score") for name in ("chosen", "rejected")) if scored else ()
    named = row.get("id")
    return Comparison(
        id="" if named is None else f"llava_hound-{named}",
        prompt=question(text_of(row, "prompt"), _shown(text_of(row, "video"), videos, frames), VIDEO_TAG),
        candidates=tuple(answer(row, name) for name in ("chosen", "rejected")),
        ranks=(1.0, 2.0),
        scores={"score": scores} if scored else {},
    )


def _shown(name: str, videos: Path, frames: int | None) -> tuple[Media, ...]:
    """The frames of a folder, or the one file; its ending may be left out."""
    place = videos / name
    if place.is_dir():
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        kept = found if frames is None or len(found) <= frames else [found[i] for i in thinned(range(len(found)), frames)]
        if not kept:
            raise UserError(f"got the video {shown(str(place))}, a folder without images. Put its frames there.")
        return tuple(Media(path=str(path.absolute())) for path in kept)
    files = [place, *(place.with_name(f"{place.name}{suffix}") for suffix in sorted(MEDIA_SUFFIXES))]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise UserError(f"got no video {place}, want the folder of its frames or a file. Set videos, or put it there.")
    return (Media(path=str(file.absolute())),)
