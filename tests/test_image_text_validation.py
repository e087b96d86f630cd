"""Answers that a run writes to prompts with images: what the model says itself, whatever else is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_text_runs import seen_tree, train_seen
from multimodal import arguments, encoder, parts, picture, sample, sequence
from runs import config_of, forget_accelerate

from mmalign.adapters.image_text import SightedAnswers
from mmalign.errors import UserError
from mmalign.language.generation import ends_of, generate_ids
from mmalign.multimodal.families import FAMILIES
from mmalign.train import main


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_likeliest_token_of_the_whole_text_so_far_again_and_again(family: str) -> None:
    model, processor = parts(family)
    encode = encoder(family)
    for images in ((picture(0, 60, 40), picture(1, 40, 70)), ()):
        asked = sample("what?", "a", *images).prompt
        if images:
            told = encode.arguments(asked)
            prompt = told.pop("input_ids")[0].tolist()
            shown = {n: t.double() if t.is_floating_point() else t for n, t in told.items() if n != "attention_mask"}
        else:
            prompt, shown = encode.prompt(asked), None
        ends = ends_of(model, processor.tokenizer)
        [said] = generate_ids(model, [prompt], max_new_tokens=5, pad=processor.tokenizer.pad_token_id, eos=ends, shown=shown)
        ids, seen = sequence(encode([sample("what?", "a", *images)]), 0)
        context = ids[: len(prompt)]
        assert context == prompt and len(said) >= 1
        want: list[int] = []
        for _ in said:
            if set(want) & set(FAMILIES[family].ids(processor)):
                break  # a random model may say what stands for an image, which a whole text must not hold
            with torch.no_grad():
                logits = model(**arguments(family, [*context, *want], seen)).logits[0, -1]
            want.append(int(logits.argmax()))
        assert said[: len(want)] == want and len(want) >= min(2, len(said))


def test_a_run_writes_answers_to_prompts_with_images_and_without(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number, 40, 40).read())
    validation = {"prompts": ["what?"] * 3, "images": [str(files[0]), None, str(files[1])], "max_new_tokens": 6}
    output = train_seen(tmp_path / "run", adapter={"validation": validation}, training={"validate_every": 1})
    found = [
        [json.loads(line) for line in (output / "validation" / f"step-{step}" / "answers.jsonl").read_text().splitlines()]
        for step in (1, 2)
    ]
    assert [row["prompt"] for row in found[1]] == ["what?"] * 3
    assert [row.get("image") for row in found[1]] == [str(files[0]), None, str(files[1])]
    said = [row["answer"] for row in found[1]]
    assert said[0] != said[2] and said[1] not in (said[0], said[2])  # random weights: each image makes another answer
    plain = train_seen(tmp_path / "plain", training={"validate_every": 1})
    assert (plain / "metrics.jsonl").exists() and not (plain / "validation").exists()
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (output, plain)]
    assert weights[0] == weights[1]


def test_images_that_cannot_be_shown_are_told_before_the_run(tmp_path: Path) -> None:
    validation = {"prompts": ["what?"], "images": [str(tmp_path / "absent.png")]}
    forget_accelerate()
    with pytest.raises(UserError, match=r"adapter\.validation\.images .*absent\.png"):
        main(config_of(seen_tree(tmp_path / "run", adapter={"validation": validation})))
    with pytest.raises(ValueError, match="images: got 1 for 2 prompts"):
        SightedAnswers(prompts=("a", "b"), images=("a.png",))
    for changes, told in ((("max_new_tokens", 0), "max_new_tokens: got 0"), (("temperature", -1.0), "temperature: got -1")):
        settings: dict[str, Any] = dict([changes])
        with pytest.raises(ValueError, match=told):
            SightedAnswers(prompts=("a",), **settings)
    with pytest.raises(ValueError, match="prompts: got none"):
        SightedAnswers(prompts=())
