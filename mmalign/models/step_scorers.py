"""Step scorers: judges of the states of a sampler. STEP_SCORERS maps a name to the function that builds one for a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.models.latent_reward import LatentReward, open_latent_reward
from mmalign.models.lora import lora_off
from mmalign.models.small_decoder import open_small_decoder
from mmalign.models.step_aware import ClipInputs, StepAwareCLIP, open_step_aware
from mmalign.scorers import SCORERS, DifferentiableScorer, Scorer, judged_kind, one_score_each

KEPT_PROMPTS = 256
PATH = "source.scorer.path"  # what messages call it
Decode = Callable[[Tensor], Tensor]


@runtime_checkable
class StepScorer(Protocol):
    """What a source of rollouts asks of a judge; no gradient.

    It is asked of the branches of one prompt at a time, which it may look at together: whatever prompts are sampled beside it,
    the numbers are the same.
    """

    @property
    def needs_guess(self) -> bool:
        """Whether it looks at `clean`; if not, a sampler need not ask the network about every state."""

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        noisy: Float[Tensor, "n c h w"],
        clean: Float[Tensor, "n c h w"],
        timestep: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Score i is of state i under prompt i, higher is better; comparable within a prompt and timestep.

        Args:
            prompts: one a state; equal ones are encoded once.
            noisy: x_t.
            clean: the guess x0-hat from it, with the guidance that is sampled with; in the end the image's own latents.
                Anything where no guess is needed.
            timestep: index in the model's schedule; 0 for a finished image.
        """


@runtime_checkable
class StepModel(Protocol):
    """What a step scorer asks of the model that is sampled."""

    denoiser: Any
    schedule: Any
    device: torch.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image."""

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Pixels in [0, 1], of all rows in one pass."""

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All that the denoiser is told of an image of each prompt, by its keywords."""


@dataclass(kw_only=True)
class Kept:
    """What was computed from a prompt, for the prompts that were asked for last: a sampler asks for the same ones each step.

    Args:
        compute: prompts -> tensors, one row a prompt.
        capacity: prompts to keep.
    """

    compute: Callable[[list[str]], dict[str, Tensor]]
    capacity: int = KEPT_PROMPTS
    rows: OrderedDict[str, dict[str, Tensor]] = field(default_factory=OrderedDict)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One row a prompt, each distinct one computed once."""
        distinct = list(dict.fromkeys(prompts))
        if missing := [prompt for prompt in distinct if prompt not in self.rows]:
            computed = self.compute(missing)
            for place, prompt in enumerate(missing):
                self.rows[prompt] = {name: values[place].clone() for name, values in computed.items()}
        for prompt in distinct:
            self.rows.move_to_end(prompt)
        found = {name: torch.stack([self.rows[p][name] for p in prompts]) for name in self.rows[distinct[0]]}
        while len(self.rows) > self.capacity:
            self.rows.popitem(last=False)
        return found


@dataclass(frozen=True, kw_only=True)
class StepAwareScorer:
    """SPO's step-aware preference model on the decoded guess; see `step_aware`."""

    model: StepModel
    decode: Decode
    network: StepAwareCLIP
    reads: ClipInputs
    resize: Literal["shortest", "squash"]
    batch_size: int
    text: Kept
    needs_guess: bool = True

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompts: Sequence[str],
        noisy: Float[Tensor, "n c h w"],
        clean: Float[Tensor, "n c h w"],
        timestep: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """exp(logit_scale) cos(image features of the decoded guess at t, text features)."""
        text = self.text(prompts)["features"]

        def score(part: slice) -> Tensor:
            pixels = self.reads.pixels(self.decode(clean[part]).float(), resize=self.resize)
            image = self.network.image_features(pixels.to(self.model.device), timestep[part].to(self.model.device))
            return self.network.score(image, text[part])

        return _by_parts(score, len(prompts), self.batch_size)


def step_aware(
    model: StepModel,
    *,
    path: str,
    published: str | None = None,
    processor: str | None = None,
    resize: Literal["shortest", "squash"] = "shortest",
    batch_size: int = 8,
    decoder: str | None = None,
) -> StepAwareScorer:
    """The step-aware preference model of SPO, on what the decoded guess shows.

    exp(logit_scale) cos(image features of decode(x0-hat) at t, text features)

    Source: Liang et al. 2024 (SPO), section 3.2; the published scoring resizes the shorter side and crops.
    Args:
        model: what is sampled.
        path: the folder `reward` of a trained step-aware model; or a CLIP, which then knows no time (the paper's ablation).
        published, processor: as in `open_step_aware`, for the authors' own weights.
        resize: of pixels that are no square.
        batch_size: at most so many guesses of a prompt are decoded and scored at a time; see `image`.
        decoder: see `image`.
    Raises:
        UserError: no such model or decoder, or weights that do not fit, listed.
    """
    network, reads = open_step_aware(path, processor=processor, published=published, place=PATH)
    network = network.to(model.device).requires_grad_(False).eval()

    def features(prompts: list[str]) -> dict[str, Tensor]:
        return {"features": network.text_features(reads.tokens(prompts).to(model.device))}

    return StepAwareScorer(
        model=model,
        decode=_decode_of(model, decoder),
        network=network,
        reads=reads,
        resize=resize,
        batch_size=_counted(batch_size),
        text=Kept(compute=features),
    )


@dataclass(frozen=True, kw_only=True)
class ImageScorer:
    """A plain scorer of images on the decoded guess; see `image`."""

    model: StepModel
    decode: Decode
    scorer: Scorer
    batch_size: int
    needs_guess: bool = True

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompts: Sequence[str],
        noisy: Float[Tensor, "n c h w"],
        clean: Float[Tensor, "n c h w"],
        timestep: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The scorer's own score of what the guess shows; the timestep is not looked at."""

        def score(part: slice) -> Tensor:
            pixels, some = self.decode(clean[part]).float(), list(prompts[part])
            if isinstance(self.scorer, DifferentiableScorer):
                return self.scorer.score_pixels(some, pixels).to(self.model.device)
            given = self.scorer(some, [_image(one) for one in pixels])
            return one_score_each(self.scorer.name, given, len(some)).to(self.model.device)

        return _by_parts(score, len(prompts), self.batch_size)


def image(
    model: StepModel, *, scorer: Annotated[Choice, Table(SCORERS)], batch_size: int = 8, decoder: str | None = None
) -> ImageScorer:
    """Any scorer of finished images, on what the decoded guess shows.

    Pixels are given as they are to scorers that take them, and as 8-bit images to the others.

    Source: the ablation of Liang et al. 2024 (SPO) with PickScore, which ends at 20.28 against 21.43 with the step-aware model.
    Args:
        model: what is sampled.
        scorer: a name in SCORERS, with its settings.
        batch_size: at most so many guesses of a prompt are decoded and scored at a time; 1 saves memory. The most that
            decoding adds, with the VAE of SD 1.x or SDXL: 4 of 512 pixels 1.5 GB in float16 and 3 GB in float32 (one: .4 and
            .75), 2 of 1024 pixels 4.4 GB and 6 GB (one: 2.2 and 3).
        decoder: None: the model's own VAE, as published, where decoding is 36 % of an iteration's FLOPs on SD 1.5. Else folder
            or hub id of an `AutoencoderTiny` for these latents (`madebyollin/taesd` ...), which costs a twentieth: what is
            scored then is an approximation, and other pairs come of it.
    Raises:
        UserError: a scorer of texts, or no such decoder.
    """
    judge = scorer.build()
    if judged_kind(judge) != "images":
        raise UserError(f"source.scorer.scorer: got {judge.name}, which judges {judged_kind(judge)}, want a scorer of images.")
    return ImageScorer(model=model, decode=_decode_of(model, decoder), scorer=judge, batch_size=_counted(batch_size))


@dataclass(frozen=True, kw_only=True)
class LatentScorer:
    """A latent reward model on the noisy latents; see `latent`."""

    model: StepModel
    network: LatentReward
    shared: bool
    batch_size: int
    condition: Kept
    needs_guess: bool = False

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompts: Sequence[str],
        noisy: Float[Tensor, "n c h w"],
        clean: Float[Tensor, "n c h w"],
        timestep: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """exp(logit_scale) cos(features of x_t, text); the guess is not looked at."""
        condition = self.condition(prompts)
        given = self.model.schedule.network_timestep(timestep.to(self.model.device))

        def score(part: slice) -> Tensor:
            some = {name: values[part] for name, values in condition.items()}
            found: Tensor = self.network(noisy[part, None], given[part, None], **some)[:, 0]
            return found

        # A UNet that is being trained through a LoRA is read without it: the judge does not move.
        with lora_off(self.model.denoiser) if self.shared else nullcontext():
            return _by_parts(score, len(prompts), self.batch_size)


def latent(model: StepModel, *, path: str, batch_size: int = 16) -> LatentScorer:
    """A latent reward model, on the noisy latents themselves: nothing is decoded, and no guess is needed.

    Source: Zhang et al. 2025 (LPO), with the prompt's condition alone (the published `wocfg` settings).
    Args:
        model: what is sampled; its UNet without LoRA is what the features are read from, unless the reward model has a tuned
            one. A UNet that is trained whole is copied up to its middle.
        path: the folder `reward` of a trained latent reward model.
        batch_size: at most so many latents of a prompt are scored at a time.
    Raises:
        UserError: no such model, one of another family, or weights that do not fit, listed.
    """
    denoiser = model.denoiser
    shared = bool(denoiser.lora_layers)
    core = denoiser.core if shared else copy.deepcopy(denoiser.core)
    network = open_latent_reward(path, denoiser.family, core, place=PATH)
    return LatentScorer(
        model=model,
        network=network,
        shared=shared and not network.tuned,
        batch_size=_counted(batch_size),
        condition=Kept(compute=model.conditions),
    )


def _decode_of(model: StepModel, decoder: str | None) -> Decode:
    if decoder is None:
        return model.decode
    return open_small_decoder(decoder, channels=model.latent_shape[0], device=model.device)


def _counted(batch_size: int) -> int:
    """A number of rows that there can be.

    Raises:
        UserError: fewer than one.
    """
    if batch_size < 1:
        raise UserError(f"source.scorer.batch_size: got {batch_size}, want 1 or more.")
    return batch_size


def _by_parts(score: Callable[[slice], Tensor], count: int, size: int) -> Float[Tensor, " n"]:
    """The scores of all states, `size` of them at a time."""
    return torch.cat([score(slice(start, start + size)) for start in range(0, count, size)])


def _image(pixels: Float[Tensor, "3 h w"]) -> Image.Image:
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


STEP_SCORERS: dict[str, Callable[..., StepScorer]] = {"step_aware": step_aware, "image": image, "latent": latent}
