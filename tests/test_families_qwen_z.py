"""Qwen-Image (and Edit) and Z-Image: each forward is the stock network's call, padding changes nothing, noise is Gaussian."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import metrics_of, train
from test_adapter_diffusion import opened, prepared
from tiny import tiny_folder
from torch import Tensor

from mmalign.errors import UserError
from mmalign.families import FAMILIES, encode_prompt
from mmalign.families.captions import padded, trimmed
from mmalign.models.diffusion import latent_shape, open_pipeline, schedule_of

NAMES = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "z_image")
PROMPTS = ("a red disc", "two dogs that play in the snow behind a wooden house")
SIZE = (32, 64)


def sources(count: int) -> list[Image.Image]:
    """Drawn squares on a ground, one colour a picture."""
    pictures = []
    for number in range(count):
        picture = Image.new("RGB", (SIZE[1], SIZE[0]), (40 * number, 120, 200 - 40 * number))
        picture.paste((250, 10, 90), (8, 4, 30 + 8 * number, 20))
        pictures.append(picture)
    return pictures


def pixels_of(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in pictures])


def condition_of(name: str, pipe: Any, prompts: tuple[str, ...], pictures: list[Image.Image]) -> dict[str, Tensor]:
    return encode_prompt(name, pipe, prompts, *([pixels_of(pictures)] if FAMILIES[name].edits else []))


def hooked_call(
    name: str, pipe: Any, pictures: list[Image.Image], guidance: float, prompts: tuple[str, ...] = PROMPTS
) -> list[tuple[tuple[Any, ...], Any, Any]]:
    """Arguments and outputs of the network in a stock call of two steps."""
    calls: list[tuple[tuple[Any, ...], Any, Any]] = []
    count = 1 if name == "qwen_image_edit_plus" else len(prompts)  # its pipeline takes one prompt at a time
    pictures = pictures[:count]
    handle = pipe.transformer.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    pipe(
        prompt=list(prompts[:count]),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(n) for n in range(count)],
        **({"image": pictures} if FAMILIES[name].edits else {}),
        **FAMILIES[name].call_options(guidance, None, count),
    )
    handle.remove()
    return calls


def from_packed(pipe: Any, tokens: Tensor) -> Tensor:
    """By the stock pipeline's own hand; the tokens of a source follow those of the image."""
    h, w = latent_shape(pipe, SIZE)[1:]
    latents: Tensor = pipe._unpack_latents(tokens[:, : h * w // 4], *SIZE, pipe.vae_scale_factor)
    return latents.squeeze(2)


@pytest.mark.parametrize("name", NAMES[:3])
def test_qwen_forward_is_what_the_network_says_in_a_guided_stock_call(name: str) -> None:
    pipe, pictures = open_pipeline(name, tiny_folder(name)), sources(2)
    calls = hooked_call(name, pipe, pictures, guidance=4.0)
    assert len(calls) == 4  # two steps, each with and without the prompt
    count = len(calls[0][2][0])
    prompted = (PROMPTS[:count], (" ",) * count)
    conditions = [condition_of(name, pipe, prompts, pictures[:count]) for prompts in prompted]
    for number, (_, given, output) in enumerate(calls):
        noisy = from_packed(pipe, given["hidden_states"])
        time = pipe.scheduler.timesteps[number // 2].expand(count)
        with torch.no_grad():
            ours = FAMILIES[name].forward(pipe.transformer, noisy, time, **conditions[number % 2])
        torch.testing.assert_close(ours, from_packed(pipe, output[0]), atol=1e-4, rtol=1e-4)
        assert ours.std() > 1e-2
    assert not torch.allclose(calls[0][2][0], calls[1][2][0], atol=1e-4)  # guidance had something to say


def test_z_image_forward_is_what_the_network_says_in_a_guided_stock_call() -> None:
    pipe = open_pipeline("z_image", tiny_folder("z_image"))
    calls = hooked_call("z_image", pipe, [], guidance=4.0)
    assert len(calls) == 2
    conditions = [condition_of("z_image", pipe, prompts, []) for prompts in (PROMPTS, ("", ""))]
    for number, (given, _, output) in enumerate(calls):
        noisy = torch.stack(given[0][:2]).squeeze(2)
        time = pipe.scheduler.timesteps[number].expand(2)
        with torch.no_grad():
            ours = torch.cat([FAMILIES["z_image"].forward(pipe.transformer, noisy, time, **one) for one in conditions])
        torch.testing.assert_close(ours, -torch.stack(output[0]).squeeze(2), atol=1e-5, rtol=1e-4)
        assert ours.std() > 1e-2


def test_guidance_1_is_none_and_the_scales_are_those_of_every_other_family() -> None:
    """z_image: the pipeline adds scale * (prompt - none) to the prompted prediction, others to the unprompted one."""
    pipe = open_pipeline("z_image", tiny_folder("z_image"))
    ((_, _, prompted),) = hooked_call("z_image", pipe, [], guidance=1.0)[:1]
    assert len(prompted[0]) == 2  # no second half for the empty prompt
    assert FAMILIES["z_image"].call_options(5.0, "blurry", 2) == {"guidance_scale": 4.0, "negative_prompt": ["blurry"] * 2}
    for name in NAMES[:3]:
        assert FAMILIES[name].call_options(1.0, "blurry", 2) == {"true_cfg_scale": 1.0}
        assert FAMILIES[name].call_options(4.0, None, 2) == {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_prompts_in_a_batch_changes_no_prediction(name: str) -> None:
    pipe, pictures = open_pipeline(name, tiny_folder(name)), sources(2)
    condition = condition_of(name, pipe, PROMPTS, pictures)
    counts = condition["prompt_embeds_mask"].sum(1).tolist()
    assert counts[0] != counts[1]
    noisy, time = (
        torch.randn(2, *latent_shape(pipe, SIZE), generator=torch.Generator().manual_seed(0)),
        torch.tensor([250.0, 700.0]),
    )

    def forward(rows: slice, **changes: Tensor) -> Tensor:
        given = {key: value[rows] for key, value in {**condition, **changes}.items()}
        with torch.no_grad():
            return FAMILIES[name].forward(pipe.transformer, noisy[rows], time[rows], **given)

    both = forward(slice(0, 2))
    torch.testing.assert_close(both, torch.cat([forward(slice(0, 1)), forward(slice(1, 2))]), atol=1e-5, rtol=1e-4)
    embeds, padding = condition["prompt_embeds"], condition["prompt_embeds_mask"] == 0
    other = torch.where(padding[..., None], torch.full_like(embeds, 7.0), embeds)
    assert torch.equal(forward(slice(0, 2), prompt_embeds=other), both)
    kept = torch.where(padding[..., None], embeds, embeds.flip(0))
    assert (forward(slice(0, 2), prompt_embeds=kept) - both).abs().max() > 1e-4


def test_captions_are_padded_trimmed_and_too_long_ones_refused() -> None:
    captions = [torch.ones(2, 3), 2 * torch.ones(4, 3)]
    embeds, mask = padded(captions, 6)
    assert embeds[:, :, 0].tolist() == [[1, 1, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    short, kept = trimmed(embeds, mask)
    assert torch.equal(short, embeds[:, :4]) and kept is not None and kept.tolist() == [[True, True, False, False], [True] * 4]
    assert trimmed(embeds[:1], mask[:1])[1] is None
    with pytest.raises(UserError, match=r"prompt: got 4 tokens, want at most 3\. Shorten the prompt\."):
        padded(captions, 3)


def test_the_source_is_read_at_a_megapixel_as_the_stock_pipeline_does_and_decides_the_edit() -> None:
    """1 x 2 pictures become 736 x 1440: 46 x 90 latents of this VAE, which makes 16 pixels one."""
    name = "qwen_image_edit"
    pipe, (first, second) = open_pipeline(name, tiny_folder(name)), sources(2)
    one, other = (condition_of(name, pipe, PROMPTS[:1], [picture]) for picture in (first, second))
    assert one["image_latents"].shape == (1, 4, 736 // 16, 1440 // 16)
    noisy = torch.randn(1, *latent_shape(pipe, SIZE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, by_latents, by_encoder = (
            FAMILIES[name].forward(pipe.transformer, noisy, torch.tensor([500.0]), **{**one, **change})
            for change in ({}, {"image_latents": other["image_latents"]}, {"prompt_embeds": other["prompt_embeds"]})
        )
    assert (by_latents - base).abs().max() > 1e-5
    assert (by_encoder - base).abs().max() > 1e-5


def test_the_shift_is_the_one_the_stock_pipeline_samples_this_size_with() -> None:
    """Qwen-Image: mu from 0.5 at 256 tokens to 0.9 at 8192; at 64 x 64 pixels of this VAE 64 tokens."""
    pipe = open_pipeline("qwen_image", tiny_folder("qwen_image"))
    sigma = schedule_of(pipe, (64, 64)).sigma
    shift = np.exp(0.5 + (0.9 - 0.5) * (64 - 256) / (8192 - 256))
    assert sigma[499].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1e-6)
    z = schedule_of(open_pipeline("z_image", tiny_folder("z_image")), (64, 64)).sigma
    assert z[499].item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-6)


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_the_shared_noise_of_a_flow_model_is_gaussian(name: str, tmp_path: Path) -> None:
    """x_t = (1 - sigma) clean + sigma noise and target = noise - clean; uniform noise on [0, 1] has mean 0.5 and std 0.29."""
    policy, examples = opened(tmp_path, name, latents="mean")
    inputs = prepared(policy, *((examples[n], epoch) for n in range(8) for epoch in range(3))).inputs
    sigma = (inputs.timestep / 1000).reshape(-1, 2, 1, 1, 1)
    noise = inputs.noisy + (1 - sigma) * inputs.target
    torch.testing.assert_close(noise[:, 0], noise[:, 1], atol=1e-5, rtol=0)  # one noise for both candidates
    drawn = noise[:, 0].flatten()
    assert len(drawn) == 24 * 256
    assert drawn.mean().abs() < 0.05
    assert drawn.std() == pytest.approx(1, abs=0.05)
    assert (drawn.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.01)
    assert (drawn < 0).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_a_batch_of_one_trains_from_its_reference(name: str, tmp_path: Path) -> None:
    output = train(tmp_path / "out", name, training={"batch_size": 1, "steps": 2})
    losses = [row["loss"] for row in metrics_of(output)]
    assert losses[0] == pytest.approx(0.6931472, rel=1e-6)
    assert len(losses) == 2 and np.isfinite(losses[1]) and losses[1] != losses[0]


def test_qwen_image_reads_as_many_tokens_of_a_prompt_as_the_stock_call() -> None:
    pipe, prompt = open_pipeline("qwen_image", tiny_folder("qwen_image")), "a" * 700
    (_, given, _), *_ = hooked_call("qwen_image", pipe, [], guidance=1.0, prompts=(prompt,))
    assert given["encoder_hidden_states"].shape[1] == 512
    condition = condition_of("qwen_image", pipe, (prompt,), [])
    assert condition["prompt_embeds_mask"].sum() == 512
    torch.testing.assert_close(condition["prompt_embeds"], given["encoder_hidden_states"], atol=1e-5, rtol=1e-4)
