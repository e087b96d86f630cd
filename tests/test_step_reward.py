"""The step_reward adapter: pairs of images in noise train a reward model, whose folder loads and scores."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from runs import comparison_of, config_of, encoded, largest_difference, metrics_of, train, tree, write_rows
from safetensors.torch import load_file
from tiny import tiny_folder

from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.experiment import TrainConfig, read_examples
from mmalign.families import FAMILIES
from mmalign.held_out import pair_fit
from mmalign.models.latent_reward import LatentReward
from mmalign.models.step_aware import StepAwareCLIP
from mmalign.records import Comparison, Content, Example, Media
from mmalign.train import main

CONFIGS = Path(__file__).parents[1] / "configs"
STEP_AWARE = {"name": "step_aware", "clip": "tiny"}
LATENT = {"name": "latent", "dim": 8}
REWARDS = [STEP_AWARE, LATENT, {**LATENT, "tune": "network"}]
LOSS = {"loss": {"name": "bradley_terry"}}


def adapter_of(reward: dict[str, Any], family: str = "sd15", **more: Any) -> dict[str, Any]:
    base = {"name": "step_reward", "family": family, "model": str(tiny_folder(family)), "resolution": 32, "reward": reward}
    return {**base, **more}


def opened(tmp_path: Path, reward: dict[str, Any] = STEP_AWARE, family: str = "sd15", **more: Any) -> tuple[Any, Any]:
    """The policy, and its examples."""
    config = config_of(tree(tmp_path / "out", family, adapter=adapter_of(reward, family, **more), **LOSS))
    return config.adapter.build().open(seed=config.seed), read_examples(config.data)[0]


def batch_of(policy: Any, *drawn: tuple[Example, int]) -> Any:
    return policy.collate([policy.item(example, epoch) for example, epoch in drawn])


def run(output: Path, reward: dict[str, Any], rows: Path | None = None, training: Any = None, **more: Any) -> Path:
    return train(output, rows=rows, adapter=adapter_of(reward, **more), training=training or {}, **LOSS)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "reward" / "model.safetensors")


# Noise


def test_both_images_of_a_pair_get_the_same_noise_at_the_same_timestep(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, latents="mean")
    found = []
    for epoch in range(4):
        noised = policy.images.noised(batch_of(policy, (examples[0], epoch), (examples[1], epoch)))
        assert torch.equal(noised.timestep[:, 0], noised.timestep[:, 1])
        alpha, _ = policy.images.schedule.coefficients(noised.timestep[:, 0], noised.noisy[:, 0])
        found.append((noised.noisy[:, 0] - noised.noisy[:, 1]) / alpha)  # the noise is gone only if it is the same
        assert not torch.allclose(noised.noisy[0, 0], noised.noisy[1, 0], atol=0.1)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)


def test_every_epoch_draws_anew_and_a_draw_depends_neither_on_batch_nor_on_label(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path)
    example = examples[0]
    swapped = replace(example, samples=example.samples[::-1])
    first, later = (policy.images.noised(batch_of(policy, (example, epoch))) for epoch in (0, 1))
    assert not torch.equal(first.noisy, later.noisy)
    together = policy.images.noised(batch_of(policy, (examples[1], 0), (example, 0)))
    assert torch.equal(together.noisy[1:], first.noisy) and torch.equal(together.timestep[1:], first.timestep)
    other = policy.images.noised(batch_of(policy, (swapped, 0)))
    assert torch.equal(other.noisy.flip(1), first.noisy) and torch.equal(other.timestep, first.timestep)


def test_timesteps_cover_the_whole_schedule_evenly(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path)
    draws = torch.cat([policy.images._draws(batch_of(policy, (examples[0], epoch)), (1,))[0] for epoch in range(60)])
    timesteps = policy.settings.timesteps.build(draws, 1000).flatten()
    assert int(timesteps.min()) < 100 and int(timesteps.max()) >= 900
    assert 350 < float(timesteps.double().mean()) < 650


# What the reward model sees


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_the_step_aware_model_sees_the_decoded_guess_under_guidance(tmp_path: Path, guidance_scale: float) -> None:
    policy, examples = opened(tmp_path, {**STEP_AWARE, "guidance_scale": guidance_scale})
    batch = batch_of(policy, (examples[0], 0), (examples[1], 0))
    noised, inputs = policy.images.noised(batch), policy.prepare(batch).inputs
    pipe, schedule = policy.images.pipe, policy.images.schedule
    for row in range(2):
        x, t = noised.noisy[row], noised.timestep[row]
        embeds = [pipe.encode_prompt(text, "cpu", 1, False)[0].expand(2, -1, -1) for text in ("", batch["prompt"][row])]
        without, with_prompt = (pipe.unet(x, t, one).sample for one in embeds)
        noise = without + guidance_scale * (with_prompt - without)
        alpha, sigma = schedule.coefficients(t, x)
        guess = (x - sigma * noise) / alpha
        decoded = pipe.vae.decode(guess / pipe.vae.config.scaling_factor).sample
        pixels = policy.reward.reads.pixels((decoded / 2 + 0.5).clamp(0, 1), resize="squash")
        torch.testing.assert_close(inputs.each["pixels"][row], pixels, rtol=0, atol=1e-4)
        assert torch.equal(inputs.each["timestep"][row], t)
    assert torch.equal(inputs.shared["tokens"], policy.reward.reads.tokens(batch["prompt"]))


@pytest.mark.parametrize("reward", REWARDS, ids=str)
def test_scores_are_one_a_candidate_and_part_by_part_the_same(tmp_path: Path, reward: dict[str, Any]) -> None:
    policy, examples = opened(tmp_path, reward)
    inputs = policy.prepare(batch_of(policy, *((examples[i], 0) for i in range(3)))).inputs
    measured, settled = inputs.settle(policy.network)
    scores = measured["policy"]
    assert scores.shape == (3, 2) and scores.dtype == torch.float32 and not scores.requires_grad
    assert inputs.num_candidates == 2 and settled.candidates(slice(1, 2)).num_candidates == 1
    alone = torch.cat([settled.candidates(slice(n, n + 1)).logps(policy.network) for n in range(2)], dim=1)
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-4)
    assert inputs.logps(policy.network).requires_grad
    assert inputs.measures(policy.network).keys() == {"policy"}


def test_a_latent_reward_decodes_nothing_and_stops_at_the_middle_of_the_unet(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, LATENT)
    ran = []
    core = policy.images.denoiser.core
    handles = [part.register_forward_hook(lambda *_: ran.append(1)) for part in (*core.up_blocks, core.conv_out)]
    handles.append(policy.images.pipe.vae.decoder.register_forward_hook(lambda *_: ran.append(1)))
    inputs = policy.prepare(batch_of(policy, (examples[0], 0))).inputs
    scores = inputs.logps(policy.network)
    for handle in handles:
        handle.remove()
    assert not ran and scores.shape == (1, 2)
    core(inputs.each["noisy"][0], 0, inputs.shared["encoder_hidden_states"].expand(2, -1, -1))  # still whole


def test_latent_features_are_the_means_of_what_the_unet_itself_computes(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, LATENT)
    inputs = policy.prepare(batch_of(policy, (examples[0], 0))).inputs
    core, network = policy.images.denoiser.core, policy.network
    noisy, timestep = inputs.each["noisy"][0], inputs.each["timestep"][0]
    embeds = inputs.shared["encoder_hidden_states"]
    seen: list[torch.Tensor] = []
    handles = [core.down_blocks[n].resnets[-1].register_forward_hook(lambda m, i, o: seen.append(o)) for n in (1,)]
    handles.append(core.down_blocks[0].attentions[-1].register_forward_hook(lambda m, i, o: seen.insert(0, o[0])))
    handles.append(core.mid_block.register_forward_hook(lambda m, i, o: seen.append(o)))
    core(noisy, timestep, embeds.expand(2, -1, -1))
    for handle in handles:
        handle.remove()
    expected = torch.cat([one.mean((2, 3)) for one in seen], dim=1)
    features = network.features(noisy, timestep, {"encoder_hidden_states": embeds.expand(2, -1, -1)})
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    image, text = network.image_projection(features), network.text_projection(embeds[:, -1])
    score = network.logit_scale.exp() * torch.cosine_similarity(image, text, dim=-1)
    torch.testing.assert_close(inputs.logps(network)[0], score, rtol=0, atol=1e-4)


# Training


@pytest.mark.parametrize("reward", ["step", "latent"])
def test_the_smoke_config_trains_and_its_loading_lines_load_a_model_that_scores(
    reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    output = tmp_path / "run"
    result = main(read_config(TrainConfig, CONFIGS / f"smoke_{reward}_reward_sd15.yaml", [f"output={output}"]))
    rows = metrics_of(output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(0 <= row["rewards/accuracies"] <= 1 and "logps/ref_chosen" not in row for row in rows)
    names: dict[str, Any] = {"diffusers": diffusers}
    exec(result.loading, names)  # the very lines that the run prints
    model = names["model"]
    if reward == "step":
        assert isinstance(model, StepAwareCLIP)
        pixels = names["reads"].pixels(torch.rand(2, 3, 32, 32), resize="shortest")
        scores = model(pixels[None], torch.tensor([[0, 500]]), names["reads"].tokens(["a red disc"]))
    else:
        assert isinstance(model, LatentReward)
        embeds = names["pipe"].encode_prompt("a red disc", "cpu", 1, False)[0]
        scores = model(torch.randn(1, 2, 4, 8, 8), torch.tensor([[0, 500]]), encoder_hidden_states=embeds)
    assert scores.shape == (1, 2) and scores.isfinite().all()
    with pytest.raises(UserError, match=r"which trained a reward model, want the run of a diffusion or language model"):
        pair_fit(output, read_config(TrainConfig, output / "config.yaml").data)
    card = (output / "README.md").read_text()
    assert "reward model for the sampling steps of `tiny`" in card and "text-to-image" not in card


@pytest.mark.parametrize("reward", [STEP_AWARE, {**LATENT, "tune": "network"}], ids=str)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, reward: dict[str, Any]) -> None:
    steps = {"steps": 2, "checkpoint_every": 1}
    whole = run(tmp_path / "whole", reward, training=steps)
    cut = run(tmp_path / "cut", reward, training={**steps, "steps": 1})
    halfway = weights_of(cut)
    train(cut, adapter=adapter_of(reward), training=steps, resume="latest", **LOSS)
    assert largest_difference(weights_of(whole), weights_of(cut)) == 0
    assert largest_difference(weights_of(whole), halfway) > 1e-4


def test_candidates_one_at_a_time_train_the_same_weights(tmp_path: Path) -> None:
    settings = {"steps": 2, "optimiser": {"name": "runs:sgd", "learning_rate": 1e-3}}
    joint = run(tmp_path / "joint", STEP_AWARE, training=settings)
    alone = run(tmp_path / "alone", STEP_AWARE, training={**settings, "candidate_microbatch": 1})
    assert largest_difference(weights_of(joint), weights_of(alone)) < 1e-4, largest_difference(
        weights_of(joint), weights_of(alone)
    )


def dark_and_bright(folder: Path, num_rows: int = 6) -> Path:
    """Pairs whose image that is dark and brighter to the right is preferred to one that is bright and darker to the right."""

    def ramp(first: int, last: int) -> Media:
        file = io.BytesIO()
        row = np.linspace(first, last, 32).astype(np.uint8)
        Image.fromarray(np.broadcast_to(row[None, :, None], (32, 32, 3)).copy()).save(file, "PNG")
        return Media(data=file.getvalue())

    rows = [
        Comparison(
            id=f"row{n}",
            prompt=Content(text="a ramp"),
            candidates=tuple(Content(images=(one,)) for one in (ramp(n, 80 + n), ramp(255 - n, 175 - n))),
            ranks=(1.0, 2.0),
        )
        for n in range(num_rows)
    ]
    return write_rows(rows, folder / "rows.parquet")


@pytest.mark.parametrize("reward", [STEP_AWARE, LATENT], ids=str)
def test_a_preference_is_learnt_and_holds_for_other_noise(tmp_path: Path, reward: dict[str, Any]) -> None:
    rows = dark_and_bright(tmp_path)
    clearest = {"timesteps": {"name": "fixed", "values": [0]}, "latents": "mean"}
    training = {"steps": 24, "batch_size": 6, "checkpoint_every": None, "optimiser": {"name": "adamw", "learning_rate": 1e-2}}
    output = run(tmp_path / "run", reward, rows, training, **clearest)
    accuracies = [row["rewards/accuracies"] for row in metrics_of(output)]  # each step draws noise of its own
    assert sum(accuracies[-6:]) / 6 > 0.9
    assert metrics_of(output)[-1]["loss"] < 0.4


@pytest.mark.parametrize("reward", [STEP_AWARE, {**LATENT, "tune": "network"}], ids=str)
def test_bfloat16_trains_float32_weights(tmp_path: Path, reward: dict[str, Any]) -> None:
    output = run(tmp_path / "run", reward, training={"mixed_precision": "bf16"})
    assert all(value.dtype == torch.float32 for value in weights_of(output).values())
    assert all(math.isfinite(row["loss"]) for row in metrics_of(output))


OF_IMAGES = [name for name, family in FAMILIES.items() if family.frame_multiple is None and not family.edits]


@pytest.mark.parametrize("family", [name for name in OF_IMAGES if name != "sd15"])
def test_every_family_of_images_noises_guesses_and_scores(tmp_path: Path, family: str) -> None:
    policy, examples = opened(tmp_path, STEP_AWARE, family)
    inputs = policy.prepare(batch_of(policy, (examples[0], 0))).inputs
    scores = inputs.logps(policy.network)
    assert scores.shape == (1, 2) and scores.isfinite().all() and scores[0, 0] != scores[0, 1]


def test_the_guess_of_a_flow_model_is_what_its_velocity_says(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, {**STEP_AWARE, "guidance_scale": 1.0}, "sd3")
    images = policy.images
    noised = images.noised(batch_of(policy, (examples[0], 0)))
    with torch.no_grad():
        given = images.schedule.network_timesteps[noised.timestep[:, 0]]
        velocity = images.denoiser(noised.noisy[:, 0], given, **noised.condition)
    sigma = given / 1000
    guess = images.guesses(noised, guidance_scale=1.0)[:, 0]
    torch.testing.assert_close(guess, noised.noisy[:, 0] - sigma[:, None, None, None] * velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["wan", "qwen_image_edit"])
def test_a_family_of_videos_or_edits_is_refused(tmp_path: Path, family: str) -> None:
    with pytest.raises(UserError, match=rf"family: got {family}, want one that makes images from prompts alone"):
        config_of(tree(tmp_path / "out", adapter={**adapter_of(STEP_AWARE), "family": family}, **LOSS))


def test_a_latent_reward_of_sdxl_reads_its_pooled_prompt(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, LATENT, "sdxl")
    assert policy.network.text_projection.in_features == 24
    assert policy.prepare(batch_of(policy, (examples[0], 0))).inputs.logps(policy.network).isfinite().all()


def test_a_soft_tie_pulls_to_neither_side_and_costs_nothing_where_scores_agree(tmp_path: Path) -> None:
    same = encoded(32, 32, 1)
    rows = write_rows([comparison_of(n, [same, same], ranks=(1.0, 1.0)) for n in range(4)], tmp_path / "ties.parquet")
    output = train(
        tmp_path / "run",
        rows=rows,
        adapter=adapter_of(STEP_AWARE, latents="mean"),
        data={"view": {"name": "pair", "ties": "soft"}},
        training={"steps": 1},
        **LOSS,
    )
    [row] = metrics_of(output)
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-4


# Bad input


def test_what_a_reward_model_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss: got dpo, which asks for a reference.*want bradley_terry"):
        train(tmp_path / "run", adapter=adapter_of(STEP_AWARE), loss={"name": "dpo"})
    with pytest.raises(UserError, match=r"resolution: got 30, want multiples of 8"):
        opened(tmp_path, resolution=30)
    with pytest.raises(UserError, match=r"adapter\.timesteps: got range 0 to 5000"):
        opened(tmp_path, timesteps={"name": "range", "low": 0, "high": 5000})
    with pytest.raises(UserError, match=r"clip: got '/nowhere'"):
        opened(tmp_path, {**STEP_AWARE, "clip": "/nowhere"})
    with pytest.raises(UserError, match=r"reward"):
        opened(tmp_path, {"name": "step_awar", "clip": "tiny"})
    with pytest.raises(UserError, match=r"reward\.guidance_scale: got 0\.0, want a positive number"):
        opened(tmp_path, {**STEP_AWARE, "guidance_scale": 0})
    with pytest.raises(UserError, match=r"reward\.dim: got 0, want 1 or more"):
        opened(tmp_path, {**LATENT, "dim": 0})
