"""What may come in, how media go out: folders, limits, no way out of the data, and no name inside a file."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_stores import PLAIN, clock, judge, new_url, people, postgres, store, texts
from PIL import Image, PngImagePlugin

from mmalign.annotation.blinding import blinded
from mmalign.annotation.intake import Added, Limits
from mmalign.annotation.opening import open_data, rows_of
from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.errors import UserError
from mmalign.importers import comparisons
from mmalign.records import Comparison, Content, Fault, Media, write
from mmalign.records.stamps import save_stamped

FIXTURES = (clock, new_url, postgres, store)
SECRET = b"secretmodel"


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def saved(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    target = io.BytesIO()
    (image or picture()).save(target, format=format, **options)
    return target.getvalue()


def files(folder: Path, count: int = 2) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(saved("PNG", picture(n)))
    return paths


def row(*media: Media, id: str = "row") -> Comparison:
    return Comparison(id=id, prompt=Content(text="a cat"), candidates=tuple(Content(images=(m,)) for m in media))


def add(store: Store, *rows: Comparison | Fault, kind: str = "image", **options: Any) -> Added:
    project = store.create_project(f"project {len(store.projects())}", kind, Protocol(**PLAIN))
    return store.add(project.id, rows, **options)


def test_rows_come_back_as_they_were_with_bytes_and_paths(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    rows = [
        replace(
            row(Media(path=str(one)), Media(path=str(two)), id="paths"),
            ranks=(1.0, 2.0),
            provenance=({"model": "x"}, {"seed": 1}),
        ),
        row(Media(data=saved("JPEG")), Media(data=saved("WEBP")), Media(path=str(one)), id="mixed"),
    ]
    assert add(store, *rows) == Added(added=2)
    project = store.projects()[-1]
    assert [item.comparison for item in store.items(project.id)] == rows
    assert [item.comparison.id for item in store.items(project.id, media=False)] == ["paths", "mixed"]


def test_everything_that_mmalign_writes_can_be_judged(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    rows = [row(Media(path=str(one)), Media(path=str(two)), id=f"r{n}") for n in range(2)]
    rows[1] = replace(rows[1], prompt=Content(text="a dog"))
    for name in ("rows.parquet", "rows.jsonl", "rows.tar"):
        write(rows, tmp_path / name)
        added = add(store, *open_data(tmp_path / name))
        assert (added.added, added.faults) == (2, ())
        project = store.projects()[-1]
        found = [item.comparison for item in store.items(project.id)]
        assert [c.prompt.text for c in found] == ["a cat", "a dog"]
        assert [m.key() for m in found[0].candidates[0].images] == [Media(path=str(one)).key()]


def test_content_that_is_there_is_not_added_again_even_from_another_place(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    project = store.create_project("p", "image", Protocol(**PLAIN))
    both = (Media(path=str(one)), Media(path=str(two)))
    assert store.add(project.id, [row(*both), row(*both, id="again"), row(*reversed(both), id="turned")]) == Added(
        added=2, repeated=1
    )
    one.rename(tmp_path / "moved.png")
    [shown] = [store.take(project.id, people(store, 1)[0].id)]
    assert shown is not None
    keys = {picture.key for picture in shown.pictures()}
    moved = row(Media(path=str(tmp_path / "moved.png")), Media(path=str(two)))
    assert store.add(project.id, [moved]) == Added(repeated=1)
    assert all(store.media(key) is not None for key in keys), "the new place is noted"


def test_rows_that_cannot_be_judged_are_told_and_the_others_go_on(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "page.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    good, other = Media(path=str(one)), Media(path=str(two))
    bad = [
        (row(good, Media(path=str(tmp_path / "gone.png"))), "cannot be read"),
        (row(good, Media(path=str(tmp_path / "text.png"))), "damaged image"),
        (row(good, Media(path=str(tmp_path / "page.png"))), "damaged image"),
        (row(good, Media(path="/etc/passwd")), "damaged image"),
        (row(good, good), "same candidate again"),
        (row(good), "got 1 candidates"),
        (row(*(Media(data=saved("PNG", picture(n))) for n in range(7))), "got 7 candidates"),
        (replace(row(good, other), candidates=(Content(images=(good,)), Content(text="words"))), "candidate 2: got no image"),
        (replace(row(good, other), prompt=Content(text="x" * 200_001)), "200001 characters"),
    ]
    rows = [value for value, _ in bad]
    added = add(store, Fault("a.jsonl:1", "got nothing."), *rows, row(good, other))
    assert (added.added, added.num_faults) == (1, len(bad) + 1)
    assert added.faults[0] == Fault("a.jsonl:1", "got nothing.")
    for fault, (_, told) in zip(added.faults[1:], bad, strict=True):
        assert told in fault.problem
    assert add(store, row(good, other), kind="text").faults[0].problem.startswith("candidate 1: got no text")


def test_sizes_have_limits(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    size = one.stat().st_size
    value = row(Media(path=str(one)), Media(path=str(two)))
    embedded = row(Media(data=one.read_bytes()), Media(data=two.read_bytes()))
    assert add(store, value, limits=Limits(media_bytes=size)).added == 1
    assert "bytes" in add(store, value, limits=Limits(media_bytes=size - 1)).faults[0].problem
    assert "bytes" in add(store, embedded, limits=Limits(media_bytes=size - 1)).faults[0].problem
    assert "32 x 24 pixels" in add(store, value, limits=Limits(pixels=32 * 24 - 1)).faults[0].problem


@pytest.mark.parametrize("escape", ["absolute", "dots", "link", "linked folder", "tar"])
def test_files_outside_the_data_stay_outside(store: Store, tmp_path: Path, escape: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    good, other = files(inside)
    private = files(outside)[0]
    private.write_bytes(saved("PNG", picture(9)))
    (inside / "link.png").symlink_to(private)
    (inside / "folder").symlink_to(outside)
    write([row(Media(path=str(private)), Media(path=str(other)))], outside / "rows.tar")
    paths = {
        "absolute": str(private),
        "dots": str(inside / ".." / "outside" / private.name),
        "link": str(inside / "link.png"),
        "linked folder": str(inside / "folder" / private.name),
        "tar": next(iter(rows_of(comparisons(path=str(outside / "rows.tar"))))).candidates[0].images[0].path,  # type: ignore[union-attr]
    }
    limits = Limits(roots=(inside,))
    assert add(store, row(Media(path=str(good)), Media(path=str(other))), limits=limits).added == 1
    added = add(store, row(Media(path=str(good)), Media(path=paths[escape])), limits=limits)
    assert added.num_faults == 1 and "outside the data" in added.faults[0].problem


def test_a_key_gives_the_file_that_was_added_or_nothing(store: Store, tmp_path: Path) -> None:
    one, two = files(tmp_path)
    private = tmp_path / "private.png"
    private.write_bytes(saved("PNG", picture(5)))
    project = store.create_project("p", "image", Protocol(**PLAIN))
    store.add(project.id, [row(Media(path=str(one)), Media(data=two.read_bytes()))])
    shown = store.take(project.id, people(store, 1)[0].id)
    assert shown is not None
    served = {key: store.media(key) for key in [p.key for p in shown.pictures()]}
    assert {file.data for file in served.values() if file} == {one.read_bytes(), two.read_bytes()}
    assert all(len(key) >= 20 and file and len(file.etag) == 64 and file.mime == "image/png" for key, file in served.items())
    for probe in (str(one), "../0.png", "..%2f0.png", "/etc/passwd", "", "x" * 22):
        assert store.media(probe) is None
    key = next(key for key, file in served.items() if file and file.data == one.read_bytes())
    one.unlink()
    one.symlink_to(private)
    with pytest.raises(UserError, match="was changed since"):
        store.media(key)
    one.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        store.media(key)


def test_a_folder_a_prompt_and_a_folder_a_model_are_read(store: Store, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    for name in ("cat", "dog", "fish"):
        (prompts / name).mkdir(parents=True)
        files(prompts / name, 3)
        (prompts / name / "prompt.txt").write_text(f"a {name}\n")
    (prompts / "fish" / "prompt.txt").unlink()
    found = list(open_data(prompts))
    assert [one.prompt.text for one in found if isinstance(one, Comparison)] == ["a cat", "a dog"]
    assert [one.problem[:18] for one in found if isinstance(one, Fault)] == ["got no prompt.txt,"]
    models = tmp_path / "models"
    for model, names in {"sd": ("cat", "dog", "owl"), "flux": ("cat", "dog")}.items():
        (models / model).mkdir(parents=True)
        for n, name in enumerate(names):
            (models / model / f"{name}.png").write_bytes(saved("PNG", picture(n + len(model) * 10)))
    (models / "sd" / "cat.txt").write_text("a cat")
    (models / "dog.txt").write_text("a dog")
    pairs = list(open_data(models))
    rows = [one for one in pairs if isinstance(one, Comparison)]
    assert [(one.id, one.prompt.text, one.provenance) for one in rows] == [
        ("cat", "a cat", ({"model": "flux"}, {"model": "sd"})),
        ("dog", "a dog", ({"model": "flux"}, {"model": "sd"})),
    ]
    [fault] = [one for one in pairs if isinstance(one, Fault)]
    assert fault.problem.startswith("got an image without partner")
    assert add(store, *pairs) == Added(added=2, num_faults=1, faults=(fault,))


def test_chosen_and_rejected_folders_are_read(store: Store, tmp_path: Path) -> None:
    for n, name in enumerate(("chosen", "rejected")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat.png").write_bytes(saved("PNG", picture(n)))
    (tmp_path / "chosen" / "cat.txt").write_text("a cat")
    [found] = open_data(tmp_path)
    assert isinstance(found, Comparison) and found.ranks == (1.0, 2.0)
    assert add(store, found).added == 1


def test_data_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(open_data(tmp_path / "gone"))
    with pytest.raises(UserError, match="without comparisons"):
        list(open_data(tmp_path))


def test_an_intake_that_was_killed_is_repeated_without_doubles(store: Store) -> None:
    project = store.create_project("p", "text", Protocol(**PLAIN))

    def broken() -> Any:
        yield from texts(450)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(project.id, broken())
    assert store.progress(project.id).items == 400, "what was written in whole lots stays"
    [ann] = people(store, 1)
    judge(store, store.take(project.id, ann.id), ann.id)
    assert store.add(project.id, texts(450)) == Added(added=50, repeated=400)
    assert [item.comparison.id for item in store.items(project.id)] == [f"row-{n}" for n in range(450)]


def exif(orientation: int) -> Image.Exif:
    told = Image.Exif()
    told[0x0112], told[0x010E] = orientation, SECRET.decode()
    return told


def jpeg(**options: Any) -> bytes:
    return saved("JPEG", exif=exif(6), comment=SECRET, **options)


def animation(format: str) -> bytes:
    frames = [picture(n) for n in range(3)]
    told = {"comment": SECRET} if format == "GIF" else {"exif": exif(6), "lossless": True}
    return saved(format, frames[0], save_all=True, append_images=frames[1:], duration=[50, 60, 70], loop=3, **told)


def png() -> bytes:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", SECRET.decode())
    told.add_itxt("prompt", SECRET.decode())
    plain = saved("PNG", pnginfo=told, icc_profile=b"profile" * 20, dpi=(72, 72))
    body = b"prVt" + SECRET  # a private chunk of somebody's program
    chunk = struct.pack(">I", len(SECRET)) + body + struct.pack(">I", zlib.crc32(body))
    return plain[:-12] + chunk + plain[-12:] + SECRET


def png_turned() -> bytes:
    return saved("PNG", exif=exif(3))


FILES: dict[str, Callable[[], bytes]] = {
    "png": png,
    "png turned": png_turned,
    "jpeg": jpeg,
    "jpeg of several scans": lambda: jpeg(progressive=True) + SECRET,
    "jpeg with restarts": lambda: jpeg(restart_marker_rows=1),
    "jpeg in cmyk": lambda: saved("JPEG", picture().convert("CMYK"), comment=SECRET),
    "webp": lambda: saved("WEBP", exif=exif(8), xmp=SECRET),
    "webp without loss": lambda: saved("WEBP", lossless=True, xmp=SECRET),
    "moving webp": lambda: animation("WEBP"),
    "moving gif": lambda: animation("GIF"),
    "moving png": lambda: saved("PNG", picture(), save_all=True, append_images=[picture(1)], pnginfo=_info()),
}


def _info() -> PngImagePlugin.PngInfo:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", SECRET.decode(), zip=False)
    return told


@pytest.mark.parametrize("name", FILES)
def test_a_served_image_has_the_same_pixels_and_no_text(name: str) -> None:
    data = FILES[name]()
    assert SECRET in data
    clean = blinded(data)
    assert SECRET not in clean and blinded(clean) == clean
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(clean)) as after:
        assert (before.format, before.mode, before.size) == (after.format, after.mode, after.size)
        assert getattr(before, "n_frames", 1) == getattr(after, "n_frames", 1)
        assert before.getexif().get(0x0112, 1) == after.getexif().get(0x0112, 1)
        assert before.info.get("icc_profile") == after.info.get("icc_profile")
        for frame in range(getattr(before, "n_frames", 1)):
            before.seek(frame)
            after.seek(frame)
            assert np.array_equal(np.asarray(before), np.asarray(after))
            assert [before.info.get(key) for key in ("duration", "loop")] == [
                after.info.get(key) for key in ("duration", "loop")
            ]


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_a_served_film_has_the_same_frames_and_no_text(container: str) -> None:
    av = pytest.importorskip("av")
    target = io.BytesIO()
    codec = {"mp4": "mpeg4", "webm": "libvpx"}[container]
    with av.open(target, "w", format=container) as film:
        film.metadata.update({"title": SECRET.decode(), "comment": SECRET.decode()})
        stream = film.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for n in range(3):
            film.mux(stream.encode(av.VideoFrame.from_image(picture(n))))
        film.mux(stream.encode())
    data = target.getvalue()
    assert SECRET in data
    clean = blinded(data)
    assert SECRET not in clean and len(clean) == len(data) and blinded(clean) == clean

    def frames(film: bytes) -> list[Any]:
        with av.open(io.BytesIO(film)) as opened:
            return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]

    before, after = frames(data), frames(clean)
    assert len(before) == len(after) == 3 and all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_images_that_mmalign_made_do_not_tell_their_model(store: Store, tmp_path: Path) -> None:
    for n in range(2):
        save_stamped(picture(n), {"model": SECRET.decode()}, tmp_path / f"{n}.png")
    assert SECRET in (tmp_path / "0.png").read_bytes()
    project = store.create_project("p", "image", Protocol(**PLAIN))
    store.add(project.id, [row(*(Media(path=str(tmp_path / f"{n}.png")) for n in range(2)))])
    shown = store.take(project.id, people(store, 1)[0].id)
    assert shown is not None
    for held in shown.pictures():
        file = store.media(held.key)
        assert file is not None and SECRET not in file.data


@pytest.mark.parametrize(
    ("format", "mode"), [("TIFF", "RGB"), ("BMP", "RGB"), ("AVIF", "RGB"), ("TIFF", "L"), ("TIFF", "CMYK")]
)
def test_images_that_not_every_browser_shows_are_served_as_png(store: Store, format: str, mode: str) -> None:
    given = [saved(format, picture(n).convert(mode)) for n in range(2)]
    project = store.create_project("p", "image", Protocol(**PLAIN))
    assert store.add(project.id, [row(*(Media(data=data) for data in given))]).added == 1
    shown = store.take(project.id, people(store, 1)[0].id)
    assert shown is not None
    found = []
    for held in shown.pictures():
        file = store.media(held.key)
        assert file is not None and file.mime == held.mime == "image/png"
        found.append(np.asarray(Media(data=file.data).open()).tobytes())
    assert set(found) == {np.asarray(Media(data=data).open()).tobytes() for data in given}


def test_rows_of_gold_carry_their_answer_out_of_sight(store: Store) -> None:
    project = store.create_project("p", "text", Protocol(**PLAIN))
    gold = [replace(one, prob=0.1) for one in texts(2)]
    assert store.add(project.id, gold, role="gold", source="gold.jsonl").added == 2
    items = list(store.items(project.id))
    assert [(item.role, item.answer, item.want) for item in items] == [("gold", {"choice": "b", "ranks": None}, 0)] * 2
    assert store.progress(project.id).items == 0
    assert store.take(project.id, people(store, 1)[0].id) is None
    assert [event.details["role"] for event in store.events(project.id) if event.kind == "added"] == ["gold"]
