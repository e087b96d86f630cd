"""What guidance pushes away from, where we sample ourselves, is what each stock pipeline pushes away from by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import (
    PROMPTS,
    SIZE,
    condition_of,
    every_family,
    num_frames,
    source_images,
    stock_call,
    tiny_models,  # noqa: F401
)
from test_step_reward import LATENT
from test_step_reward import opened as step_reward
from torch import Tensor

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.families import FAMILIES, unconditional
from mmalign.models.diffusion import latent_shape, open_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

BY_TEXT = [name for name, family in FAMILIES.items() if not family.edits]


class Network:
    """Rows that a pipeline's network said while it was listened to."""

    def __init__(self, network: Any) -> None:
        self.rows: list[Tensor] = []
        self.handle = network.register_forward_hook(self.listen)

    def listen(self, network: Any, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        self.rows += [row.float() for row in first]

    def heard(self) -> list[Tensor]:
        self.handle.remove()
        return self.rows


def answers(name: str, pipe: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of the first step of a guided stock call of one prompt; ours to the prompt, and ours to none."""
    family = FAMILIES[name]
    core = family.core(pipe)
    times: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(output: Tensor, timestep: Tensor, *arguments: Any, **options: Any) -> Any:
        times.append(timestep)
        return step(output, timestep, *arguments, **options)

    pipe.scheduler.step = watched
    network = Network(core)
    # FLUX.1 has no unconditional prompt of its own: users of true guidance give the empty one.
    pipe(**{**stock_call(family, PROMPTS[:1], 3.0, "" if family.embeds_guidance else None, 2), "output_type": "latent"})
    stock = network.heard()[:2]
    del pipe.scheduler.step
    latents = torch.randn(1, *latent_shape(pipe, SIZE, num_frames(family)), generator=torch.Generator().manual_seed(0))
    latents = latents * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    if hasattr(pipe.scheduler, "scale_model_input"):
        pipe.scheduler._step_index = None
        latents = pipe.scheduler.scale_model_input(latents, times[0])
    sizes = {key: value[None] for key, value in family.size_condition(SIZE, (0, 0), SIZE).items()}
    positive = condition_of(family, pipe, PROMPTS[:1])
    sources = [source_pixels(family)] if family.edits else []
    negative = {**unconditional(name, pipe, 1, *sources), **sizes}
    network = Network(core)
    with torch.no_grad():
        for condition in (positive, negative):
            family.forward(core, latents, times[0].expand(1), **condition)
    ours = network.heard()
    return stock, ours[0], ours[1]


def source_pixels(family: Any) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in source_images(family, 1)])


@every_family
def test_the_unconditional_half_of_guidance_is_the_stock_pipeline_s(name: str) -> None:
    stock, positive, negative = answers(name, open_pipeline(name, "tiny"))
    assert len(stock) == 2

    def told(row: Tensor) -> list[bool]:
        return [torch.allclose(row, other, atol=2e-4, rtol=1e-3) for other in stock]

    assert sorted(told(positive)) == sorted(told(negative)) == [False, True]
    assert told(positive) != told(negative)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_pushes_away_from_zeros_only_where_its_pipeline_says_so(zeros: bool) -> None:
    pipe = open_pipeline("sdxl", "tiny")
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock, _, negative = answers("sdxl", pipe)
    torch.testing.assert_close(negative, stock[0], atol=1e-5, rtol=1e-4)
    assert all(bool(value.any()) != zeros for value in unconditional("sdxl", pipe, 2).values())


@pytest.mark.parametrize("name", BY_TEXT)
def test_a_policy_is_told_as_much_of_it_as_of_a_prompt(name: str) -> None:
    settings: dict[str, Any] = {"model": "tiny", "resolution": 32, "frames": num_frames(FAMILIES[name])}
    policy = DiffusionAdapter(family=name, **settings).open(needs_reference=False)
    prompted, without = policy.conditions(PROMPTS), policy.unconditional(2)
    assert {key: value.shape for key, value in prompted.items()} == {key: value.shape for key, value in without.items()}
    for key, value in unconditional(name, policy.pipe, 1).items():
        torch.testing.assert_close(without[key], value.expand_as(without[key]))
    for key in policy.family.size_condition(SIZE, (0, 0), SIZE):
        assert torch.equal(without[key], prompted[key])


def test_the_guesses_of_a_step_reward_are_guided_away_from_it(tmp_path: Path) -> None:
    images = step_reward(tmp_path, LATENT, family="sdxl")[0].images
    noisy, timestep = torch.randn(1, *images.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    condition = images.conditions(PROMPTS[:1])
    sizes = images.conditions([""])["time_ids"]
    with torch.no_grad():
        guided = images._predict(noisy, timestep, condition, 3.0)
        without = images.denoiser(noisy, timestep, **unconditional("sdxl", images.pipe, 1), time_ids=sizes)
        torch.testing.assert_close(guided, without + 3 * (images.denoiser(noisy, timestep, **condition) - without))
