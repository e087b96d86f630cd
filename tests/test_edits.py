"""Source images of prompts: read, encoded, cached, validated, generated from; refused with their row where they do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import encoded, metrics_of, train, write_rows
from test_adapter_diffusion import opened, prepared
from tiny import tiny_folder

from mmalign import generate
from mmalign.adapters.prompts import framed_source
from mmalign.errors import UserError
from mmalign.families import encode_prompt
from mmalign.records import Comparison, Content, Media, read

EDIT = "qwen_image_edit"


def edits(folder: Path, *, sources: tuple[int, ...] = (0, 1, 0, 1), text: str = "make it red") -> Path:
    """Rows of one instruction, each with the source of that seed and a pair of edits of its own; None of -1."""
    rows = [
        Comparison(
            id=f"row{n}",
            prompt=Content(text=text, images=() if seed < 0 else (Media(data=encoded(36, 40, seed=900 + seed)),)),
            candidates=tuple(Content(images=(Media(data=encoded(40, 36, seed=10 * n + place)),)) for place in range(2)),
            ranks=(1.0, 2.0),
        )
        for n, seed in enumerate(sources)
    ]
    return write_rows(rows, folder / "edits.parquet")


def test_the_condition_is_that_of_the_rows_own_source_cut_as_its_edits_are(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, EDIT, edits(tmp_path))
    condition = prepared(policy, *((examples[n], 0) for n in range(3))).inputs.condition
    assert torch.equal(condition["image_latents"][0], condition["image_latents"][2])
    assert (condition["image_latents"][0] - condition["image_latents"][1]).abs().max() > 1e-3
    assert (condition["prompt_embeds"][0] - condition["prompt_embeds"][1]).abs().max() > 1e-4
    pixels = framed_source(examples[1].samples[0].prompt.images[0], (32, 32))
    assert pixels.shape == (3, 32, 32)
    own = encode_prompt(EDIT, policy.pipe, ["make it red"], pixels[None].float() / 127.5 - 1)
    assert torch.equal(condition["image_latents"][1:2], own["image_latents"])


def test_draws_and_cache_keys_tell_rows_apart_by_their_source(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, EDIT, edits(tmp_path))
    first, other = (policy.item(examples[n], 0) for n in range(2))
    swapped = tuple(replace(sample, prompt=examples[1].samples[0].prompt) for sample in examples[0].samples)
    changed = policy.item(replace(examples[0], id="another", samples=swapped), 0)
    assert changed["images"] == first["images"] and changed["source"] == other["source"] != first["source"]
    assert changed["key"] != first["key"] and changed["unordered"] != first["unordered"]


@pytest.mark.parametrize(
    ("family", "rows", "told"),
    [
        (EDIT, (0, -1), r"edits\.parquet:2: got a prompt with 0 images, want 1: qwen_image_edit edits a source image\."),
        ("qwen_image", (-1, 0), r"edits\.parquet:2: got a prompt with an image, want a text alone: qwen_image makes images"),
        ("sd15", (0, 0), r"edits\.parquet:1: got a prompt with an image, want a text alone: sd15 makes images from texts\."),
    ],
)
def test_a_source_image_where_none_belongs_or_none_where_one_does_is_refused_with_its_row(
    tmp_path: Path, family: str, rows: tuple[int, ...], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train(tmp_path / "out", family, edits(tmp_path, sources=rows))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"flip": True}, "must stay aligned"),
        ({"crop": "random"}, "must stay aligned"),
        ({"validation": {"prompts": ["make it red"]}}, r"validation\.sources: got 0, want 1: qwen_image_edit edits"),
        ({"validation": {"prompts": ["make it red"], "sources": ["absent.png"]}}, r"absent\.png"),
    ],
)
def test_settings_that_an_edit_cannot_have_are_refused_before_anything_is_loaded(
    tmp_path: Path, adapter: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        opened(tmp_path, EDIT, edits(tmp_path), **adapter)


def test_a_family_that_does_not_edit_takes_no_validation_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.sources: got 1, want 0: sd15 does not edit"):
        opened(tmp_path, validation={"prompts": ["a disc"], "sources": ["a.png"]})


def test_a_batch_of_one_trains_with_validation_edits_of_the_given_sources(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (48, 40), colour).save(tmp_path / f"{number}.png")
    validation = {"prompts": ["make it red"] * 2, "sources": [str(tmp_path / f"{n}.png") for n in range(2)], "steps": 2}
    training = {"steps": 1, "batch_size": 1, "validate_every": 1}
    adapter = {"validation": {**validation, "guidance_scale": 1.0}}
    output = train(tmp_path / "out", EDIT, edits(tmp_path), adapter=adapter, training=training)
    assert metrics_of(output)[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)
    pictures = sorted(output.rglob("00[01].png"))
    assert len(pictures) >= 2
    assert {Media(path=str(path)).inspect()[0] for path in pictures} == {(32, 32)}


def write_prompts(folder: Path, rows: list[Any]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_generate_edits_each_source_and_writes_rows_that_an_edit_family_trains_on(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(64, 40, seed=number))
    prompts = write_prompts(tmp_path, [{"prompt": "make it red", "image": f"{number}.png"} for number in range(2)])
    settings: dict[str, Any] = {"num_candidates": 2, "steps": 2, "guidance_scale": 1.0, "size": (32, 64), "device": "cpu"}
    config = generate.GenerateConfig(
        family=EDIT, model=str(tiny_folder(EDIT)), prompts=str(prompts), output=tmp_path / "made", **settings
    )
    made = generate.main(config)
    assert (made.num_prompts, made.num_images) == (2, 4)
    rows = [json.loads(line) for line in made.file.read_text().splitlines()]
    assert rows[1]["prompt"] == {"text": "make it red", "image": "media/000001-source.png"}
    assert (tmp_path / "made" / "media" / "000001-source.png").read_bytes() == encoded(64, 40, seed=1)
    images = [Image.open(tmp_path / "made" / one["image"]) for row in rows for one in row["candidates"]]
    assert {image.size for image in images} == {(64, 32)} and len({image.tobytes() for image in images}) == 4
    assert [len(row["prompt"]["images"]) for row in read(made.file)] == [1, 1]
    assert generate.main(config).num_images == 0
    (tmp_path / "0.png").write_bytes(encoded(64, 40, seed=7))
    with pytest.raises(UserError, match="sources"):
        generate.main(config)


@pytest.mark.parametrize(
    ("family", "rows", "told"),
    [
        (EDIT, ["make it red"], "got no source images, want a .jsonl file"),
        ("sd15", [{"prompt": "a disc", "image": "0.png"}], "got source images, want texts alone: sd15 does not edit"),
        (EDIT, [{"prompt": "a", "image": "0.png"}, {"prompt": "b"}], r"prompts\.jsonl:2: got no source image"),
        (EDIT, [{"prompt": "a", "image": "absent.png"}], r"prompts\.jsonl:1: the image absent\.png is missing"),
    ],
)
def test_generate_refuses_sources_that_do_not_fit(tmp_path: Path, family: str, rows: list[Any], told: str) -> None:
    (tmp_path / "0.png").write_bytes(encoded(32, 32, seed=0))
    with pytest.raises(UserError, match=told):
        generate.main(
            generate.GenerateConfig(
                family=family,
                model="absent",
                prompts=str(write_prompts(tmp_path, rows)),
                output=tmp_path / "made",
                device="cpu",
            )
        )
    assert not (tmp_path / "made").exists()
