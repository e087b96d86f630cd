"""The diffusion adapter: draws, crops and conditions by hand; every family trains into weights that stock diffusers loads."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from loss_inputs import OF_IMAGES
from PIL import Image
from runs import (
    SGD,
    comparison_of,
    config_of,
    encoded,
    final_weights,
    largest_difference,
    metrics_of,
    preference_data,
    train,
    tree,
    write_rows,
)
from safetensors.torch import load_file
from test_loop import counted_passes
from tiny import tiny_folder

from mmalign.adapters.images import frame
from mmalign.errors import UserError
from mmalign.experiment import read_examples
from mmalign.losses import LOSSES
from mmalign.noise import scaled_linear_alphas_cumprod
from mmalign.records import Example, Examples


def opened(tmp_path: Path, family: str = "sd15", rows: Path | None = None, **adapter: Any) -> tuple[Any, Examples]:
    """The policy of a config, and its examples."""
    config = config_of(tree(tmp_path / "out", family, rows, adapter=adapter))
    return config.adapter.build().open(seed=config.seed), read_examples(config.data)[0]


def prepared(policy: Any, *drawn: tuple[Example, int]) -> Any:
    return policy.prepare(policy.collate([policy.item(example, epoch) for example, epoch in drawn]))


def test_the_candidates_of_an_example_share_noise_and_timestep_and_examples_do_not(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path)
    inputs = prepared(policy, *((examples[i], 0) for i in range(4))).inputs
    assert torch.equal(inputs.target[:, 0], inputs.target[:, 1])  # the target of epsilon prediction is the noise
    assert torch.equal(inputs.timestep[:, 0], inputs.timestep[:, 1])
    assert not torch.equal(inputs.noisy[:, 0], inputs.noisy[:, 1])
    assert len({row.sum().item() for row in inputs.target[:, 0]}) == 4
    assert len(set(inputs.timestep[:, 0].tolist())) > 1


@pytest.mark.parametrize("own", ["noise", "timestep"])
def test_what_is_set_independent_is_drawn_for_each_candidate_and_the_other_is_shared(tmp_path: Path, own: str) -> None:
    policy, examples = opened(tmp_path, **{own: "independent"})
    inputs = prepared(policy, *((examples[i], 0) for i in range(4))).inputs
    share_of_other_noise = (inputs.target[:, 0] != inputs.target[:, 1]).float().mean()
    assert share_of_other_noise > 0.99 if own == "noise" else share_of_other_noise == 0
    assert bool((inputs.timestep[:, 0] != inputs.timestep[:, 1]).any()) == (own == "timestep")


@pytest.mark.parametrize("adapter", [{}, {"flip": True, "noise": "independent", "timestep": "independent"}, {"crop": "random"}])
def test_a_draw_does_not_depend_on_the_batch_it_is_in(tmp_path: Path, adapter: dict[str, Any]) -> None:
    policy, examples = opened(tmp_path, **adapter)
    together = prepared(policy, (examples[0], 1), (examples[1], 1), (examples[2], 4)).inputs
    alone = prepared(policy, (examples[1], 1)).inputs
    for name in ("noisy", "target", "timestep"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))


def test_every_epoch_has_draws_of_its_own_and_a_bank_repeats_them(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, draws=2)
    noise = [prepared(policy, (examples[0], epoch)).inputs.target for epoch in range(4)]
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[1], noise[3])
    fresh, _ = opened(tmp_path)
    assert len({prepared(fresh, (examples[0], epoch)).inputs.target.sum().item() for epoch in range(4)}) == 4


@pytest.mark.parametrize("each", ["shared", "independent"])
def test_a_flipped_label_changes_no_draw(tmp_path: Path, each: str) -> None:
    policy, examples = opened(tmp_path, noise=each, timestep=each, flip=True)
    example = examples[0]
    swapped = replace(example, samples=example.samples[::-1])
    one, other = (prepared(policy, (labelled, 3)).inputs for labelled in (example, swapped))
    assert torch.equal(one.noisy, other.noisy.flip(1))
    assert torch.equal(one.target, other.target.flip(1))
    assert torch.equal(one.timestep, other.timestep.flip(1))


def test_each_image_keeps_its_own_aspect_ratio_crop_and_sdxl_time_ids(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, family="sdxl")
    inputs = prepared(policy, (examples[1], 0)).inputs
    # 40 x 36 is scaled by 32/36 to 36 x 32, of which 2 columns go on each side; 33 x 64 by 32/33 to 32 x 62, 15 rows.
    expected = [[36.0, 40.0, 0.0, 2.0, 32.0, 32.0], [64.0, 33.0, 15.0, 0.0, 32.0, 32.0]]
    assert inputs.condition["time_ids"].tolist() == [expected]
    assert "time_ids" in inputs.per_candidate


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (128, 64), (32, 32)])
def test_a_square_stays_a_square_whatever_the_shape_of_its_image(size: tuple[int, int]) -> None:
    width, height = size
    side = min(size) // 2
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    framed = frame(image, target=(32, 32), crop="center", flip=False)
    white = framed.pixels[0] > 127
    assert (int(white.any(0).sum()), int(white.any(1).sum())) == (16, 16)
    assert (framed.original, framed.target) == ((height, width), (32, 32))


def test_a_flip_mirrors_the_pixels_and_the_crop() -> None:
    image = Image.fromarray(np.arange(40 * 32 * 3, dtype=np.uint8).reshape(32, 40, 3))
    for seed in range(5):
        plain, mirrored = (
            frame(image, target=(32, 32), crop="random", flip=flip, rng=random.Random(seed)) for flip in (False, True)
        )
        assert torch.equal(mirrored.pixels, plain.pixels.flip(2))
        assert mirrored.crop == (plain.crop[0], 8 - plain.crop[1])


def test_flips_are_drawn_for_each_image_alone(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, flip=True)
    plain = policy.item(examples[0], 0)["images"]
    flipped = [[name.endswith("flipped") for name in policy.item(examples[0], epoch)["images"]] for epoch in range(100)]
    assert len(plain) == 2
    for place in range(2):
        assert 30 <= sum(row[place] for row in flipped) <= 70
    assert 30 <= sum(row[0] != row[1] for row in flipped) <= 70


def test_prompts_are_dropped_at_their_rate_for_the_empty_prompt(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, prompt_dropout=0.3)
    inputs = prepared(policy, *((examples[0], epoch) for epoch in range(200))).inputs
    embeds = inputs.condition["encoder_hidden_states"]
    prompt = examples[0].samples[0].prompt.text
    empty, full = (policy.conditions([text])["encoder_hidden_states"][0] for text in ("", prompt))
    is_empty = [torch.equal(row, empty) for row in embeds]
    assert all(dropped or torch.equal(row, full) for dropped, row in zip(is_empty, embeds, strict=True))
    assert 40 <= sum(is_empty) <= 80


def test_latents_are_a_sample_of_the_posterior_or_its_mean(tmp_path: Path) -> None:
    mean_policy, examples = opened(tmp_path, latents="mean", timesteps={"name": "fixed", "values": [0]})
    sample_policy, _ = opened(tmp_path, latents="sample", timesteps={"name": "fixed", "values": [0]})
    mean, sample = (prepared(policy, (examples[1], 0)).inputs for policy in (mean_policy, sample_policy))
    pixels = mean_policy.item(examples[1], 0)["framed"]
    encoded_mean = mean_policy.encoding.encode(torch.stack([one.pixels for one in pixels]))
    alpha, sigma = mean_policy.schedule.alpha[0], mean_policy.schedule.sigma[0]
    assert torch.allclose(mean.noisy[0], alpha * encoded_mean["mean"] + sigma * mean.target[0], atol=1e-6)
    spread = (sample.noisy - mean.noisy)[0] / alpha / encoded_mean["std"]
    assert 0.8 < float(spread.std()) < 1.2


def test_a_candidate_without_an_image_and_timesteps_outside_the_schedule_are_refused(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path)
    sample = examples[0].samples[0]
    empty = replace(examples[0], samples=(sample, replace(sample, completion=replace(sample.completion, images=()))))
    with pytest.raises(UserError, match=r"example row0: got 0 images in candidate 2, want 1"):
        policy.item(empty, 0)
    with pytest.raises(UserError, match=r"adapter\.timesteps: got range 0 to 5000"):
        opened(tmp_path, timesteps={"name": "range", "low": 0, "high": 5000})


def image_of(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipe("a red 1", height=32, width=32, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(made.images[0])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_every_family_trains_into_weights_that_stock_diffusers_loads(tmp_path: Path, family: str, kind: str) -> None:
    adapter = {"lora": {"rank": 4}} if kind == "lora" else {"lora": None}
    output = train(tmp_path / "out", family, adapter=adapter, training={"steps": 2, "optimiser": {"learning_rate": 1e-2}})
    assert [row["step"] for row in metrics_of(output)] == [1, 2]
    assert metrics_of(output)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    base = image_of(pipeline.from_pretrained(tiny_folder(family)))
    if kind == "lora":
        tuned = pipeline.from_pretrained(tiny_folder(family))
        tuned.load_lora_weights(output)
    else:
        tuned = pipeline.from_pretrained(output / "pipeline")
    after = image_of(tuned)
    assert np.isfinite(after).all()
    assert np.abs(after - base).max() > 1e-3
    card = (output / "README.md").read_text()
    assert pipeline.__name__ in card and str(output) in card


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_in_bfloat16_the_policy_starts_exactly_as_its_reference(tmp_path: Path, lora: Any) -> None:
    output = train(
        tmp_path / "out",
        adapter={"lora": lora},
        loss={"name": "dpo", "beta": 5000},
        training={"mixed_precision": "bf16", "steps": 2},
    )
    first, second = metrics_of(output)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["logps/chosen"] == first["logps/ref_chosen"]
    assert first["rewards/accuracies"] == 0.5
    assert second["logps/chosen"] != second["logps/ref_chosen"]
    assert all(value.dtype == torch.float32 for value in final_weights(output).values())


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_bfloat16_training_shows_validation_images_and_rounds_no_frozen_weight_of_the_result(tmp_path: Path, lora: Any) -> None:
    validation = {"prompts": ["a red 1"], "steps": 1, "guidance_scale": 2.0}
    output = train(tmp_path / "out", adapter={"lora": lora, "validation": validation}, training={"mixed_precision": "bf16"})
    assert (output / "validation" / "step-2" / "000.png").exists()
    if lora is None:
        for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
            saved, base = load_file(output / "pipeline" / part), load_file(tiny_folder("sd15") / part)
            assert largest_difference(saved, base) == 0


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_in_bfloat16_the_vae_keeps_every_bit_whatever_is_sampled(tmp_path: Path, family: str) -> None:
    config = config_of(tree(tmp_path / "out", family, adapter={"validation": {"prompts": ["a red 1"], "steps": 1}}))
    examples = read_examples(config.data)[0]
    half, whole = (config.adapter.build().open(mixed_precision=precision) for precision in ("bf16", "no"))
    assert (half.pipe.text_encoder.dtype, half.network.core.dtype) == (torch.bfloat16, torch.bfloat16)
    pixels = torch.stack([one.pixels for one in half.item(examples[0], 0)["framed"]])
    wanted = whole.encoding.encode(pixels)
    torch.testing.assert_close(half.encoding.encode(pixels), wanted, atol=1e-6, rtol=0)
    half.validate(tmp_path / "images")
    assert (tmp_path / "images" / "000.png").is_file()
    torch.testing.assert_close(half.encoding.encode(pixels), wanted, atol=1e-6, rtol=0)


SUITS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": {"name": "dpo", "beta": 500, "label_smoothing": 0.1}},
    "robust": {"loss": {"name": "robust", "beta": 500}},
    "ipo": {"loss": {"name": "ipo", "beta": 500, "scale_free": True}},
    "hinge": {"loss": {"name": "hinge", "beta": 500}},
    "dro": {"loss": {"name": "dro"}},
    "mapo": {"loss": {"name": "mapo"}},
    "spo": {"loss": {"name": "spo"}},
    "rank_dpo": {"loss": {"name": "rank_dpo", "beta": 500}, "data": {"view": "ranked"}},
    "kto": {"loss": {"name": "kto", "beta": 500}, "data": {"view": "unpaired"}},
    "sft": {"loss": {"name": "sft"}, "data": {"view": "best"}},
}


def test_every_loss_is_trained_below() -> None:
    elsewhere = {"output_anchor"}  # alone it has no gradient: see test_moving_reference.py
    assert SUITS.keys() >= OF_IMAGES - elsewhere
    assert SUITS.keys() <= LOSSES.keys()


@pytest.mark.parametrize("name", SUITS)
def test_every_loss_trains(tmp_path: Path, name: str) -> None:
    rows = preference_data(num_candidates=3) if name == "rank_dpo" else None
    with counted_passes() as passes:
        output = train(tmp_path / "out", rows=rows, **SUITS[name], training={"steps": 2, "batch_size": 4})
    referenced = name not in ("mapo", "sft")
    candidates = {"rank_dpo": 3, "kto": 1, "sft": 1}.get(name, 2)
    assert passes == [4 * candidates] * (4 if referenced else 2)
    assert ("logps/ref_chosen" in metrics_of(output)[0]) == referenced
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in metrics_of(output))
    assert max(float(value.abs().max()) for key, value in final_weights(output).items() if "lora_B" in key) > 1e-4


def test_losses_add_up_with_their_weights(tmp_path: Path) -> None:
    output = train(
        tmp_path / "out",
        loss=[{"name": "dpo", "beta": 500, "weight": 0.5}, {"name": "sft", "weight": 2.0}],
        training={"steps": 1},
    )
    row = metrics_of(output)[0]
    assert row["loss"] == pytest.approx(0.5 * math.log(2) + 2.0 * 0.5 * row["mse/chosen"], rel=1e-5)


def tied_rows(folder: Path, num_ties: int, num_others: int = 0) -> Path:
    rows = [
        comparison_of(
            n, [encoded(32, 32, 2 * n), encoded(32, 32, 2 * n + 1)], **({"ranks": (1.0, 1.0)} if n < num_ties else {})
        )
        for n in range(num_ties + num_others)
    ]
    return write_rows(rows, folder / "ties.parquet")


def test_a_soft_tie_pulls_to_neither_side(tmp_path: Path) -> None:
    view = {"name": "pair", "ties": "soft"}
    output = train(tmp_path / "out", rows=tied_rows(tmp_path, 4), data={"view": view}, training={"steps": 1, "optimiser": SGD})
    assert metrics_of(output)[0]["grad_norm"] < 1e-5
    assert "rewards/accuracies" not in metrics_of(output)[0]
    assert max(float(value.abs().max()) for key, value in final_weights(output).items() if "lora_B" in key) < 1e-6


def test_ties_are_dropped_and_counted_unless_kept_as_soft_labels(tmp_path: Path) -> None:
    rows = tied_rows(tmp_path, 2, 3)
    dropped = read_examples(config_of(tree(tmp_path / "out", rows=rows)).data)
    assert len(dropped[0]) == 3 and "2 rows dropped (tie: 2)" in dropped[1]
    kept = read_examples(config_of(tree(tmp_path / "out", rows=rows, data={"view": {"name": "pair", "ties": "soft"}})).data)
    assert [example.side["prob"] for example in kept[0]] == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_timestep_weights_scale_the_errors_of_policy_and_reference_alike(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", training={"steps": 1}, adapter={"timesteps": {"name": "fixed", "values": [10]}})
    weighed = train(
        tmp_path / "weighed",
        training={"steps": 1},
        adapter={"timesteps": {"name": "fixed", "values": [10]}, "weights": {"name": "min_snr", "gamma": 5.0}},
    )
    (before,), (after,) = metrics_of(plain), metrics_of(weighed)
    alpha = float(scaled_linear_alphas_cumprod()[10])
    for name in ("mse/chosen", "mse/ref_rejected"):
        assert after[name] == pytest.approx(before[name] * 5 * (1 - alpha) / alpha, rel=1e-4)
