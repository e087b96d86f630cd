"""Aspect-ratio buckets: which sizes, which example goes where, steps of one bucket, the same with a cache and after a kill."""

import io
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import (
    comparison_of,
    config_of,
    encoded,
    final_weights,
    forget_accelerate,
    largest_difference,
    metrics_of,
    train,
    tree,
    write_rows,
)
from tiny import tiny_pipeline

from mmalign import prepare
from mmalign.adapters.buckets import Buckets, nearest_size
from mmalign.errors import UserError
from mmalign.experiment import read_examples
from mmalign.families import FAMILIES
from mmalign.models.diffusion import schedule_of
from mmalign.records import Media
from mmalign.sources import Offline, Order, Shape

SIZES = [[32, 32], [24, 40], [40, 24]]
BUCKETS = {"sizes": SIZES}
# (width, height) of the candidates of a row, of which the first won in odd rows and the last in even ones.
SHAPES = [((40, 36), (64, 32)), ((64, 32), (40, 36)), ((33, 64), (32, 33)), ((30, 30), (64, 64)), ((70, 40), (30, 60))]


def data(folder: Path) -> Path:
    rows = [
        comparison_of(n, [encoded(*size, seed=10 * n + place) for place, size in enumerate(sizes)])
        for n, sizes in enumerate(SHAPES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(rows, folder / "rows.parquet")


def opened(folder: Path, family: str = "sd15", **adapter: Any) -> tuple[Any, Any]:
    config = config_of(tree(folder / "out", family, data(folder), adapter={"buckets": BUCKETS, **adapter}))
    return config.adapter.build().open(seed=config.seed), read_examples(config.data)[0]


def test_made_sizes_hold_the_pixels_and_are_multiples_within_the_aspect() -> None:
    sizes = Buckets(pixels=1024 * 1024, step=64).all()
    assert (1024, 1024) in sizes and (1152, 896) in sizes and (896, 1152) in sizes
    assert all(h % 64 == 0 == w % 64 and h * w <= 1024 * 1024 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert all(h * (w + 64) > 1024 * 1024 or w + 64 > 2 * h for h, w in sizes)
    heights = [h for h, _ in sizes]
    assert heights == sorted(set(heights))


def test_an_image_goes_to_the_size_nearest_in_shape() -> None:
    sizes = ((512, 512), (384, 640), (640, 384))
    assert nearest_size(sizes, 100, 100) == (512, 512)
    assert nearest_size(sizes, 1080, 1920) == (384, 640)
    assert nearest_size(sizes, 3000, 1000) == (640, 384)
    # Half way between 1 and 640 / 384 by ratio is their geometric mean, 1.291.
    assert nearest_size(sizes, 128, 100) == (512, 512) and nearest_size(sizes, 130, 100) == (640, 384)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"buckets": {"sizes": [[32, 32], [20, 40]]}}, r"buckets: got \[20, 40\], want multiples of 8 for sd15"),
        ({"buckets": {}}, "got both or neither of sizes and pixels"),
        ({"buckets": {"pixels": 100, "step": 64}}, "got no size at all"),
        ({"buckets": BUCKETS, "family": "wan", "frames": 5}, "got wan, want a family that makes images from prompts"),
    ],
)
def test_sizes_that_will_not_do_are_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        config_of(tree(tmp_path / "out", adapter=changes))


def test_buckets_of_a_source_that_makes_its_own_samples_are_refused(tmp_path: Path) -> None:
    source = {"name": "test_buckets:Elsewhere"}
    with pytest.raises(
        UserError, match=r"adapter\.buckets: got them with source: test_buckets:Elsewhere, want source: offline"
    ):
        train(tmp_path / "out", rows=data(tmp_path), adapter={"buckets": BUCKETS}, source=source)


def test_the_head_of_an_image_tells_its_size_after_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (8, 4)).save(stream, "JPEG", exif=exif)
    assert Media(data=stream.getvalue()).size() == (4, 8)
    assert Media(data=encoded(9, 5, seed=0)).size() == (9, 5)
    with pytest.raises(UserError, match="damaged"):
        Media(data=b"nothing").size()


def test_an_example_goes_with_all_its_candidates_to_the_bucket_of_the_chosen_one(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, "sdxl")
    # Chosen: 64 x 32, 64 x 32, 32 x 33, 30 x 30, 30 x 60 (width x height).
    expected = [(24, 40), (24, 40), (32, 32), (32, 32), (40, 24)]
    items = [policy.item(example, 0) for example in examples]
    assert [item["size"] for item in items] == expected
    assert policy.groups(examples) == ((0, 1), (2, 3), (4,))
    for item, (height, width) in zip(items, expected, strict=True):
        assert [tuple(one.pixels.shape) for one in item["framed"]] == [(3, height, width)] * 2
        inputs = policy.prepare(policy.collate([item])).inputs
        assert inputs.noisy.shape == (1, 2, 4, height // 4, width // 4)
        assert inputs.condition["time_ids"][0, :, 4:].tolist() == [[height, width]] * 2
    with pytest.raises(ValueError, match="want those of one bucket"):
        policy.collate(items)


def test_a_shift_that_depends_on_the_resolution_is_that_of_the_bucket(tmp_path: Path) -> None:
    name = next(name for name in ("flux", "qwen_image", "sd3") if name in FAMILIES)
    scheduler = {
        "use_dynamic_shifting": True,
        "base_image_seq_len": 4,
        "max_image_seq_len": 64,
        "base_shift": 0.5,
        "max_shift": 2.0,
    }
    model = tiny_pipeline(name, tmp_path / "model", scheduler=scheduler)
    sizes = [[32, 32], [64, 32]]
    policy, examples = opened(tmp_path, name, model=str(model), buckets={"sizes": sizes})
    assert policy.schedules[(64, 32)].sigma[500] > policy.schedules[(32, 32)].sigma[500]
    for example in (examples[0], examples[4]):
        item = policy.item(example, 0)
        inputs = policy.prepare(policy.collate([item])).inputs
        allowed = schedule_of(policy.pipe, item["size"]).network_timesteps
        assert all((allowed - timestep).abs().min() < 1e-4 for timestep in inputs.timestep.flatten())
    assert {policy.item(examples[i], 0)["size"] for i in (0, 4)} == {(32, 32), (64, 32)}


GROUPS = (tuple(range(0, 50)), tuple(range(50, 80)), tuple(range(80, 87)))


def order(batch_size: int, accumulation: int, num_processes: int = 1, process: int = 0) -> Order:
    return Order(
        num_examples=87, batch_size=batch_size, accumulation=accumulation, seed=3, num_processes=num_processes,
        process=process, groups=GROUPS,
    )  # fmt: skip


def group_of(index: int) -> int:
    return next(g for g, members in enumerate(GROUPS) if index in members)


def test_every_step_is_of_one_group_and_the_same_however_it_is_split() -> None:
    whole = list(order(8, 1).micro_batches(0, 40))
    assert all(len({group_of(index) for _, index in batch}) == 1 for batch in whole)
    for batch_size, accumulation, num_processes in ((4, 2, 1), (2, 2, 2), (4, 1, 2)):
        shares = [list(order(batch_size, accumulation, num_processes, p).micro_batches(0, 40)) for p in range(num_processes)]
        for step, batch in enumerate(whole):
            mine = [
                draw for share in shares for micro in share[step * accumulation : (step + 1) * accumulation] for draw in micro
            ]
            assert sorted(mine) == sorted(batch)


def test_a_resumed_order_goes_on_and_each_example_comes_as_often_as_any_other() -> None:
    assert list(order(4, 2).micro_batches(17, 23)) == list(order(4, 2).micro_batches(0, 23))[34:]
    drawn = [draw for batch in order(8, 1).micro_batches(0, 870) for draw in batch]  # 80 epochs
    assert len(set(drawn)) == len(drawn)
    counts = Counter(index for _, index in drawn)
    assert counts.keys() == set(range(87)) and min(counts.values()) >= 78 and max(counts.values()) <= 82
    places = [[n for n, (_, index) in enumerate(drawn) if group_of(index) == 1][::8]]
    gaps = [later - earlier for earlier, later in pairwise(places[0])]
    assert max(gaps) <= 5 * 8  # 30 of 87 examples: about every third step, never left for last


@pytest.mark.parametrize(("family", "draws"), [("sd15", None), ("sdxl", None), ("sdxl", 2)])
def test_training_from_a_cache_of_buckets_is_training_without_it(tmp_path: Path, family: str, draws: int | None) -> None:
    changes: dict[str, Any] = {
        "rows": data(tmp_path),
        "adapter": {"buckets": BUCKETS, "draws": draws, "flip": True, "crop": "center"},
        "training": {"steps": 6},
    }
    plain = train(tmp_path / "plain", family, **changes)
    changes["adapter"]["cache"] = str(tmp_path / "cache")
    forget_accelerate()
    made = prepare.main(config_of(tree(tmp_path / "cached", family, **changes)))
    assert (made.num_images, made.num_references) == (20, 0 if draws is None else 5)
    cached = train(tmp_path / "cached", family, **changes)
    for one, other in zip(metrics_of(plain), metrics_of(cached), strict=True):
        # Reference logps are computed one example at a time, and beta is 500.
        assert one["loss"] == pytest.approx(other["loss"], abs=0 if draws is None else 5e-5, rel=0)
        assert one["logps/rejected"] == pytest.approx(other["logps/rejected"], rel=1e-6)
    changes["adapter"]["buckets"] = {"sizes": [*SIZES[:2], [48, 24]]}
    with pytest.raises(UserError, match="buckets"):
        train(tmp_path / "other", family, **changes)


def test_a_killed_run_on_buckets_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rows": data(tmp_path), "adapter": {"buckets": BUCKETS}}
    whole = train(tmp_path / "whole", training={"steps": 6, "checkpoint_every": 3}, **changes)
    train(tmp_path / "halves", training={"steps": 3, "checkpoint_every": 3}, **changes)
    halves = train(tmp_path / "halves", training={"steps": 6, "checkpoint_every": 3}, resume="latest", **changes)
    assert largest_difference(final_weights(whole), final_weights(halves)) == 0
    assert torch.isfinite(torch.tensor([row["loss"] for row in metrics_of(whole)])).all()


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A source of one's own that is not offline."""

    online = False

    def check(self, examples: Any, adapter: Any) -> None:
        pass

    def shape(self, examples: Any) -> Shape:
        return Offline().shape(examples)

    def open(self, examples: Any, policy: Any, *, accelerator: Any = None, seed: int = 0) -> Any:
        return Offline().open(examples, policy)
