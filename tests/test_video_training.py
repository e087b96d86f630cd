"""Training on videos: frames of one cut and flip, draws, cache, unequal lengths, validation; generating and scoring them."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config_of, encoded, train, tree, write_rows

from mmalign import generate, prepare, score
from mmalign.adapters.images import frame, frame_video
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.experiment import read_examples
from mmalign.records import Comparison, Content, Media, animation, comparison, read
from mmalign.scorers import SCORERS

FRAMES = 5


def video(seed: int, count: int = FRAMES, size: tuple[int, int] = (40, 36)) -> Content:
    """An animated PNG of random frames; size is (width, height)."""
    rng = np.random.default_rng(seed)
    frames = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]
    return Content(images=(Media(data=animation(frames)),))


def data(folder: Path, lengths: tuple[int, int] = (FRAMES, FRAMES), rows: int = 4) -> Path:
    """Pairs of videos; those of the last row have the given lengths."""
    found = [
        Comparison(
            id=f"row{n}",
            prompt=Content(text=f"a red {n % 3}"),
            candidates=tuple(
                video(10 * n + k, count=length) for k, length in enumerate(lengths if n == rows - 1 else (FRAMES, FRAMES))
            ),
            ranks=(1.0, 2.0),
        )
        for n in range(rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(found, folder / "videos.parquet")


def config(folder: Path, rows: Path, **adapter: Any) -> Any:
    return config_of(tree(folder / "out", "wan", rows, adapter={"frames": FRAMES, **adapter}))


def opened(folder: Path, rows: Path | None = None, **adapter: Any) -> tuple[Any, Any]:
    made = config(folder, rows or data(folder), **adapter)
    return made.adapter.build().open(seed=made.seed), read_examples(made.data)[0]


def test_all_frames_of_a_video_are_cut_and_mirrored_alike() -> None:
    first = Image.fromarray(np.arange(40 * 32 * 3, dtype=np.uint8).reshape(32, 40, 3))
    frames = [first, *(Image.fromarray(np.roll(np.asarray(first), shift, axis=0)) for shift in (5, 9))]
    options: dict[str, Any] = {"target": (32, 32), "crop": "random"}
    for seed in range(5):
        made = frame_video(frames, flip=bool(seed % 2), rng=random.Random(seed), **options)
        alone = [frame(one, flip=bool(seed % 2), rng=random.Random(seed), **options) for one in frames]
        assert made.pixels.shape == (3, 3, 32, 32)
        assert torch.equal(made.pixels, torch.stack([one.pixels for one in alone], dim=1))
        assert made.crop == alone[0].crop and made.original == (32, 40)


def test_candidates_are_batches_of_frames_under_one_noise_and_timestep(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, latents="mean", timesteps={"name": "fixed", "values": [399]})
    assert policy.latent_shape == (4, 2, 4, 4)
    prepared = policy.prepare(policy.collate([policy.item(examples[i], 0) for i in range(2)]))
    inputs = prepared.inputs
    assert inputs.noisy.shape == inputs.target.shape == (2, 2, 4, 2, 4, 4)
    assert torch.equal(inputs.timestep[:, 0], inputs.timestep[:, 1])
    frames = examples[0].samples[1].completion.frames()
    pixels = torch.stack([frame(one, target=(32, 32), crop="center", flip=False).pixels for one in frames], dim=1)
    clean = policy.encoding.encode(pixels[None])["mean"][0]
    sigma = policy.schedule.sigma[399]
    noise = inputs.target[0, 1] + clean  # the target of flow is noise - clean
    torch.testing.assert_close(inputs.noisy[0, 1], (1 - sigma) * clean + sigma * noise, atol=1e-5, rtol=0)
    assert torch.allclose(noise, inputs.target[0, 0] + (inputs.noisy[0, 0] - sigma * noise) / (1 - sigma), atol=1e-4)
    logps = inputs.logps(policy.network)
    assert logps.shape == (2, 2) and torch.isfinite(logps).all()


def test_the_first_frames_are_trained_on_whatever_follows(tmp_path: Path) -> None:
    longer = data(tmp_path, lengths=(9, 9), rows=1)
    policy, examples = opened(tmp_path, longer)
    item = policy.item(examples[0], 0)
    frames = examples[0].samples[0].completion.frames(FRAMES)
    wanted = frame_video(frames, target=(32, 32), crop="center", flip=False).pixels
    assert torch.equal(item["framed"][0].pixels, wanted)


@pytest.mark.parametrize(
    ("lengths", "fault"),
    [
        ((5, 9), r"videos\.parquet:4: candidate 2: got a video of 9 frames beside one of 5, want one length in an example"),
        ((4, 4), r"videos\.parquet:4: candidate 1: got a video of 4 frames, want 5 or more\. Set adapter\.frames lower"),
        ((5, 1), r"videos\.parquet:4: candidate 2: got a video of 1 frames, want 5 or more"),
    ],
)
def test_a_video_too_short_or_longer_than_its_rival_is_one_error_that_names_the_row(
    tmp_path: Path, lengths: tuple[int, int], fault: str
) -> None:
    policy, examples = opened(tmp_path, data(tmp_path, lengths))
    with pytest.raises(UserError, match=fault):
        policy.item(examples[3], 0)
    cached = tree(tmp_path / "cached", "wan", data(tmp_path, lengths), adapter={"frames": FRAMES, "cache": str(tmp_path / "c")})
    with pytest.raises(UserError, match=fault):
        prepare.main(config_of(cached))


@pytest.mark.parametrize(
    ("counts", "fault"),
    [
        ((5, 6), r"videos\.parquet:2: got videos of 5 and 6 frames in one row, want one length"),
        ((3, 3), r"videos\.parquet:2: got a video of 3 frames, want 5 or more"),
        ((5, 0), r"videos\.parquet:2: candidate 2 has neither text nor image|got a candidate without a video"),
    ],
)
def test_folders_of_frames_that_will_not_do_are_refused_before_the_model_is_opened(
    tmp_path: Path, counts: tuple[int, int], fault: str
) -> None:
    def folder(seed: int, count: int) -> Content:
        images = tuple(Media(data=encoded(32, 32, seed=100 * seed + n)) for n in range(count))
        return Content(images=images, text=None if images else "no video")

    rows = [
        Comparison(id=f"r{n}", prompt=Content(text="a"), candidates=(folder(n, one), folder(10 + n, two)), ranks=(1.0, 2.0))
        for n, (one, two) in enumerate([(5, 5), counts])
    ]
    path = write_rows(rows, tmp_path / "videos.parquet")
    with pytest.raises(UserError, match=fault):
        train(tmp_path / "out", "wan", path, adapter={"frames": FRAMES})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "frames", "fault"),
    [
        ("wan", None, "frames: got none for wan, want 1 more than a multiple of 4"),
        ("wan", 6, "frames: got 6 for wan, want 1 more than a multiple of 4"),
        ("wan", 0, "frames: got 0 for wan"),
        ("sd15", 5, "frames: got 5 for sd15, which makes images"),
    ],
)
def test_a_number_of_frames_that_the_family_cannot_have_is_refused(
    tmp_path: Path, family: str, frames: int | None, fault: str
) -> None:
    with pytest.raises(UserError, match=rf"adapter\.{fault}"):
        config_of(tree(tmp_path / "out", family, adapter={"frames": frames}))


def test_an_animation_in_the_data_of_an_image_model_is_refused_with_its_row(tmp_path: Path) -> None:
    made = config_of(tree(tmp_path / "out", "sd15", data(tmp_path)))
    policy, examples = made.adapter.build().open(), read_examples(made.data)[0]
    with pytest.raises(
        UserError, match=r"videos\.parquet:1: candidate 1: got 5 frames, want one image\. Use a family of video"
    ):
        policy.item(examples[0], 0)


def test_a_cache_of_other_frames_is_refused(tmp_path: Path) -> None:
    rows = data(tmp_path, lengths=(9, 9), rows=1)
    folder = str(tmp_path / "cache")
    prepared = prepare.main(config(tmp_path, rows, cache=folder, flip=True))
    assert prepared.num_images == 4  # two videos, each in both orientations
    with pytest.raises(UserError, match="frames"):
        opened(tmp_path, rows, cache=folder, flip=True, frames=9)


def test_a_flipped_label_changes_no_draw_of_a_video(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, flip=True, crop="random")
    swapped = replace(examples[0], samples=examples[0].samples[::-1])
    one, other = (policy.prepare(policy.collate([policy.item(each, 3)])).inputs for each in (examples[0], swapped))
    assert torch.equal(one.noisy, other.noisy.flip(1))


def test_validation_writes_animations_of_all_frames(tmp_path: Path) -> None:
    validation = {"prompts": ["a red 1"], "steps": 2, "guidance_scale": 2.0}
    output = train(
        tmp_path / "out",
        "wan",
        data(tmp_path),
        adapter={"frames": FRAMES, "validation": validation},
        training={"steps": 1, "mixed_precision": "bf16"},
    )
    made = Media(path=str(output / "validation" / "step-1" / "000.png"))
    assert made.num_frames() == FRAMES and made.frames()[0].size == (32, 32)


def test_generate_writes_lossless_videos_with_their_frames_in_the_provenance_and_score_means_over_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompts": ("a red disc", "a cube"), "num_candidates": 2, "steps": 2, "device": "cpu"}
    made = generate.main(
        generate.GenerateConfig(family="wan", model="tiny", output=tmp_path / "made", size=(32, 32), frames=FRAMES, **settings)
    )
    rows = [comparison(row) for row in read(made.file)]
    assert [candidate.num_frames() for row in rows for candidate in row.candidates] == [FRAMES] * 4
    told = rows[0].provenance[0]
    assert (told["frames"], told["size"], told["family"]) == (FRAMES, [32, 32], "wan")
    again = generate.main(
        generate.GenerateConfig(family="wan", model="tiny", output=tmp_path / "made", size=(32, 32), frames=FRAMES, **settings)
    )
    assert again.num_images == 0
    choice = Choice(name="sharpness", target=SCORERS["sharpness"])
    scored = score.main(score.ScoreConfig(data=str(made.file), scorers=(choice,), output=str(tmp_path / "scored.jsonl")))
    for row in (comparison(entry) for entry in read(scored.output)):
        scorer = choice.build()
        wanted = [float(scorer([row.prompt.text] * FRAMES, candidate.frames()).double().mean()) for candidate in row.candidates]
        assert row.scores["sharpness"] == pytest.approx(wanted, rel=1e-6)
    others = [float(choice.build()([""], candidate.frames(1))[0]) for row in rows for candidate in row.candidates]
    assert not np.allclose(others, [v for entry in read(scored.output) for v in comparison(entry).scores["sharpness"]])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"family": "sd15", "frames": 5}, "frames: got 5 for sd15, which makes images"),
        ({"family": "wan", "frames": 4}, "frames: got 4 for wan, want 1 more than a multiple of 4"),
        ({"family": "wan", "size": (40, 32)}, r"size: got \[40, 32\], want multiples of 16 for wan"),
    ],
)
def test_generate_refuses_frames_and_sizes_that_the_family_cannot_have(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompts": ("a",), "output": tmp_path / "made", "device": "cpu", **changes}
    with pytest.raises(UserError, match=fault):
        generate.main(generate.GenerateConfig(**settings))
    assert not (tmp_path / "made").exists()
