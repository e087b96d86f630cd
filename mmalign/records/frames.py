"""Moving pictures in one file: animations (GIF, WebP, APNG, AVIF) through Pillow, video files (MP4, WebM ...) through PyAV.

Every stored frame counts once and none is held, dropped or blended: the frames are those at the file's own rate.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from PIL import Image

from mmalign.errors import UserError

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # in Pillow's words; the further pictures of a JPEG or TIFF are not frames
FRAME_MS = 62  # 16 frames a second, at which Wan was trained


def video_suffix(data: bytes) -> str | None:
    """The file ending of a video file, told from its first bytes; None for anything else, animated images included."""
    if data[4:8] == b"ftyp" and data[8:12] not in (b"avif", b"avis", b"heic", b"mif1"):
        return ".mov" if data[8:12] == b"qt  " else ".mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return ".webm" if b"webm" in data[:64] else ".mkv"
    return ".avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def num_frames_of(image: Image.Image) -> int:
    """The number of frames of an opened image; 1 for a still one."""
    return int(getattr(image, "n_frames", 1)) if image.format in ANIMATIONS else 1


def rate_of(image: Image.Image) -> float | None:
    """Frames a second of an opened animation, the mean where they differ; None: its file does not tell, or it is still.

    Every frame is decoded on the way.
    """
    shown = 0.0
    for place in range(num_frames_of(image)):
        image.seek(place)
        image.load()
        shown += float(image.info.get("duration", 0))
    return 1000 * num_frames_of(image) / shown if shown > 0 and num_frames_of(image) > 1 else None


def video_rate(data: bytes) -> float | None:
    """Frames a second of a video file, the mean where they differ; None: it does not tell. Nothing is decoded.

    Raises:
        UserError: PyAV is not installed.
        ValueError: not a readable video.
    """
    with _opened(data) as (_, stream):
        return float(stream.average_rate) if stream.average_rate else None


def video_num_frames(data: bytes) -> int:
    """The number of frames of a video file, without decoding them.

    Raises:
        UserError: PyAV is not installed.
        ValueError: not a readable video.
    """
    with _opened(data) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def video_frames(data: bytes, count: int | None = None) -> tuple[list[Image.Image], str]:
    """Decode the first `count` frames of a video file, or all: RGB, in the order of showing; and the stored pixel format.

    Raises:
        UserError: PyAV is not installed.
        ValueError: not a readable video.
    """
    with _opened(data) as (container, stream):
        frames = [frame.to_image() for frame in islice(container.decode(stream), count)]
        if not frames:
            raise ValueError("no frames")
        return frames, str(stream.codec_context.pix_fmt)


def animation(frames: Sequence[Image.Image], *, frame_ms: int = FRAME_MS) -> bytes:
    """An animated PNG of these frames: lossless, with all of them, played by every browser.

    Pillow drops a frame that equals the one before, which would shorten a video. Here the way of blending alternates, which
    for opaque frames changes nothing else, and keeps every frame. Animated WebP, smaller, drops them in any case.

    Args:
        frames: RGB, of one size.
        frame_ms: how long a frame is shown, in milliseconds.
    """
    stream = io.BytesIO()
    first, *others = frames
    blends = [number % 2 for number in range(len(frames))]
    options: dict[str, Any] = {"append_images": others, "duration": frame_ms, "loop": 0, "blend": blends} if others else {}
    first.save(stream, "PNG", save_all=bool(others), **options)
    return stream.getvalue()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError as fault:
        raise UserError("a video file is decoded by PyAV, which is not installed. Run: pip install mmalign[video]") from fault
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            yield container, container.streams.video[0]
    except av.FFmpegError as fault:
        raise ValueError(str(fault)) from fault
