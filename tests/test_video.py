"""Videos as data: files and folders of frames, read, written and told when they will not do; one crop and flip a video."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import comparisons, imagefolder
from mmalign.records import Comparison, Content, Media, animation, comparison, read, write


def pictures(count: int, seed: int = 0, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    """Frames of random pixels, all different; size is (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def encoded(frames: list[Image.Image], kind: str) -> bytes:
    if kind == "APNG":
        return animation(frames)
    stream = io.BytesIO()
    frames[0].save(
        stream, kind, save_all=True, append_images=frames[1:], duration=62, **({"lossless": True} if kind == "WEBP" else {})
    )
    return stream.getvalue()


def film(frames: list[Image.Image], kind: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A video file, written by PyAV."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream(codec, rate=16)
        video.width, video.height = frames[0].size
        video.bit_rate = 4_000_000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        container.mux(video.encode(None))
    return stream.getvalue()


def flat(count: int) -> list[Image.Image]:
    """Frames of one grey each, from dark to bright: what a lossy codec cannot confuse."""
    return [Image.new("RGB", (32, 32), (40 * n + 20,) * 3) for n in range(count)]


def arrays(frames: list[Image.Image]) -> list[bytes]:
    return [np.asarray(frame).tobytes() for frame in frames]


@pytest.mark.parametrize("kind", ["APNG", "WEBP"])
def test_every_frame_of_a_lossless_animation_is_read_in_order(kind: str) -> None:
    frames = pictures(5)
    media = Media(data=encoded(frames, kind))
    assert media.num_frames() == 5
    assert arrays(media.frames()) == arrays(frames)
    assert arrays(media.frames(3)) == arrays(frames[:3])
    assert media.inspect()[0] == (24, 16)


def test_frames_of_a_gif_that_store_only_what_changed_are_whole() -> None:
    frames = [Image.new("RGB", (16, 16), "white") for _ in range(3)]
    for place, frame in enumerate(frames):
        frame.paste((255, 0, 0), (4 * place, 4, 4 * place + 4, 8))
    assert arrays(Media(data=encoded(frames, "GIF")).frames()) == arrays(frames)


@pytest.mark.parametrize(
    ("kind", "codec", "suffix"), [("mp4", "mpeg4", ".mp4"), ("webm", "libvpx", ".webm"), ("avi", "mpeg4", ".avi")]
)
def test_a_video_file_is_read_frame_by_frame(kind: str, codec: str, suffix: str, tmp_path: Path) -> None:
    data = film(flat(5), kind, codec)
    media = Media(data=data)
    assert media.num_frames() == 5
    levels = [np.asarray(frame).mean() for frame in media.frames()]
    assert levels == pytest.approx([20, 60, 100, 140, 180], abs=4)
    assert len(media.frames(2)) == 2
    assert media.inspect() == ((32, 32), "yuv420p")
    candidates = (Content(images=(media,)), Content(images=(Media(data=film(flat(4), kind, codec)),)))
    file = write([Comparison(id="a", prompt=Content(text="a"), candidates=candidates)], tmp_path / "a.jsonl")
    assert [path.suffix for path in (tmp_path / "a_media").iterdir()] == [suffix, suffix]
    assert comparison(read(file)[0]).candidates[0].images[0].read() == data


def test_an_animation_keeps_equal_frames_and_every_pixel() -> None:
    one, other = pictures(2)
    frames = [one, one, other, other, other]
    assert arrays(Media(data=animation(frames)).frames()) == arrays(frames)
    assert Media(data=animation([one] * 4)).num_frames() == 4
    assert arrays(Media(data=animation([one])).frames()) == arrays([one])


@pytest.mark.parametrize("kind", ["APNG", "WEBP", "GIF", "mp4"])
def test_what_has_several_frames_is_never_taken_for_an_image(kind: str) -> None:
    data = film(flat(3)) if kind == "mp4" else encoded(pictures(3), kind)
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: candidate 1: got 3 frames, want one image"):
        Media(data=data, where="pairs.jsonl:2: candidate 1").open()


@pytest.mark.parametrize("kind", ["APNG", "WEBP", "GIF", "mp4"])
def test_a_truncated_video_is_an_error_that_names_its_row(kind: str) -> None:
    data = film(pictures(5, size=(32, 32))) if kind == "mp4" else encoded(pictures(5), kind)
    media = Media(data=data[: len(data) * 2 // 3], where="pairs.jsonl:17: candidate 2")
    for look in (media.frames, media.inspect):
        with pytest.raises(UserError, match=r"pairs\.jsonl:17: candidate 2: got a damaged image"):
            look()


def test_without_pyav_a_video_file_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(flat(2))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install mmalign\[video\]"):
        Media(data=data).frames()
    assert Media(data=encoded(pictures(2), "GIF")).num_frames() == 2


def test_several_images_are_the_frames_of_one_video() -> None:
    frames = pictures(3)
    video = Content(images=tuple(Media(data=encoded([frame], "PNG")) for frame in frames))
    assert video.num_frames() == 3
    assert arrays(video.frames()) == arrays(frames)
    assert arrays(video.frames(2)) == arrays(frames[:2])
    assert video.key() != Content(images=video.images[::-1]).key()
    assert Content(images=video.images[:1]).key() == video.images[0].key()
    wider = Content(images=(*video.images, Media(data=encoded(pictures(1, size=(30, 16)), "PNG"), where="a:4: candidate 1")))
    with pytest.raises(UserError, match=r"a:4: candidate 1: got frames of 24 x 16 and 30 x 16 in one video"):
        wider.frames()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.tar", "folder"])
def test_videos_of_either_kind_survive_every_format(name: str, tmp_path: Path) -> None:
    animated = Content(images=(Media(data=encoded(pictures(3), "WEBP")),))
    folder = Content(images=tuple(Media(data=encoded([frame], "PNG")) for frame in pictures(3, seed=1)))
    row = Comparison(id="a", prompt=Content(text="a cat runs"), candidates=(animated, folder), ranks=(1.0, 2.0))
    place = write([row], tmp_path / name)
    back = comparison(comparisons(path=str(place), verify=True).dataset[0])
    assert [candidate.num_frames() for candidate in back.candidates] == [3, 3]
    assert [arrays(candidate.frames()) for candidate in back.candidates] == [
        arrays(candidate.frames()) for candidate in row.candidates
    ]


def test_a_line_of_jsonl_names_a_video_file_or_its_frames(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded(flat(2), "GIF"))
    for n, frame in enumerate(flat(2)):
        frame.save(tmp_path / f"{n}.png")
    line = {"prompt": "a cat", "candidates": [{"image": "a.gif"}, {"images": ["0.png", "1.png"]}], "ranks": [1, 2]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    row = comparison(read(tmp_path / "a.jsonl")[0])
    assert [arrays(candidate.frames()) for candidate in row.candidates] == [arrays(flat(2))] * 2


def test_folders_of_better_and_worse_videos_are_pairs(tmp_path: Path) -> None:
    for n, name in enumerate(("chosen", "rejected")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(film(flat(2 + n)))
    (tmp_path / "chosen" / "a.txt").write_text("a cat")
    row = comparison(imagefolder(path=str(tmp_path)).dataset[0])
    assert [candidate.num_frames() for candidate in row.candidates] == [2, 3]
