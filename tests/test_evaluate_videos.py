"""`mmalign evaluate` on videos: the mean over evenly spaced frames, whatever the form of the video, and first frames shown."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmalign.clips import OpenedLate, spaced
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.evaluate import EvaluateConfig, main
from mmalign.records import Comparison, Content, Media, animation, to_dataset, write

PROMPTS = ("a cat", "a dog")
SEEDS = (1, 2)


def flat(levels: Sequence[int]) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (level, level, level)) for level in levels]


def as_file(levels: Sequence[int]) -> Content:
    return Content(images=(Media(data=animation(flat(levels))),))


def as_frames(levels: Sequence[int]) -> Content:
    return Content(images=tuple(Media(data=animation([frame])) for frame in flat(levels)))


def side(path: Path, videos: Sequence[Content]) -> Path:
    rows = []
    for number, prompt in enumerate(PROMPTS):
        own = tuple(videos[number * len(SEEDS) : (number + 1) * len(SEEDS)])
        provenance = tuple({"seed": seed} for seed in SEEDS)
        rows.append(Comparison(id=f"r{number}", prompt=Content(text=prompt), candidates=own, provenance=provenance))
    write(to_dataset(rows), path)
    return path


def evaluate(before: Path, after: Path, output: Path) -> dict[str, float]:
    settings = [f"before={before}", f"after={after}", f"output={output}", "scorers=brightness"]
    main(read_config(EvaluateConfig, None, settings))
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("form", [as_file, as_frames])
def test_the_score_of_a_video_is_the_mean_over_its_frames(tmp_path: Path, form: object) -> None:
    before = side(tmp_path / "before.parquet", [form([level, level + 30, level + 60]) for level in (10, 20, 30, 40)])
    after = side(tmp_path / "after.parquet", [form([level, level + 90, level + 60]) for level in (10, 20, 30, 40)])
    results = evaluate(before, after, tmp_path / "report")
    scores = results["scorers"]["brightness"]
    assert scores["mean_before"] == pytest.approx((25 + 30) / 255, abs=1e-6)
    assert scores["mean_after"] == pytest.approx((25 + 50) / 255, abs=1e-6)
    assert results["win_rate"] == 1.0  # by the second frames: the first ones are equal
    assert results["diversity_before"] == results["diversity_after"]
    assert (tmp_path / "report/grid.png").is_file() and "<img" in (tmp_path / "report/report.html").read_text()


def test_of_a_long_video_eight_frames_are_seen_the_first_and_the_last_among_them() -> None:
    assert spaced(3) == [0, 1, 2] and spaced(8) == list(range(8))
    assert spaced(81) == [0, 11, 23, 34, 46, 57, 69, 80]
    levels = [2 * place for place in range(81)]
    for form in (as_file, as_frames):
        clips = OpenedLate([form(levels)])
        assert [frame.getpixel((0, 0))[0] for frame in clips.frames(0)] == [levels[place] for place in spaced(81)]
        assert clips[0].getpixel((0, 0)) == (0, 0, 0)


def test_videos_of_unequal_length_are_compared_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    before = side(tmp_path / "before.parquet", [as_file([50] * 3)] * 4)
    after = side(tmp_path / "after.parquet", [as_file([60] * 5)] * 4)
    assert evaluate(before, after, tmp_path / "report")["win_rate"] == 1.0
    cut = as_file(range(40, 60)).images[0].read()
    broken = Content(images=(Media(data=cut[: len(cut) // 2]),))
    damaged = side(tmp_path / "damaged.parquet", [*[as_file([60] * 5)] * 3, broken])
    with pytest.raises(UserError, match=r"damaged\.parquet:2: candidate 2: got a damaged image"):
        evaluate(before, damaged, tmp_path / "other")
