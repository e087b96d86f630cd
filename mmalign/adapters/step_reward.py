"""The step_reward adapter: pairs of images -> scores of their noisy states, for training a step-wise reward model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmalign.adapters.noised_images import Noised, NoisedImages, ScoringInputs
from mmalign.adapters.opening import check_resolution, check_single_images, size_of
from mmalign.adapters.prompts import check_sources
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.families import find_family
from mmalign.models.diffusion import model_folder
from mmalign.models.latent_reward import LatentReward, check_unet, first_half, save_latent_reward, text_summary
from mmalign.models.pipeline_folder import from_anywhere
from mmalign.models.step_aware import open_step_aware, save_step_aware
from mmalign.models.tiny import TINY
from mmalign.noise import TIMESTEPS
from mmalign.records import Example
from mmalign.sources import Prepared

FOLDER = "reward"  # in a run's output
UNIFORM = Choice(name="uniform", target=TIMESTEPS["uniform"])


@runtime_checkable
class Reward(Protocol):
    """A reward model in training, on the device."""

    network: nn.Module

    def inputs(self, noised: Noised, prompts: Sequence[str]) -> ScoringInputs:
        """What the network scores."""

    def save(self, folder: Path) -> None:
        """Write the model as a folder."""

    def loading_lines(self, folder: Path) -> str:
        """Code that loads the folder."""


@dataclass(frozen=True, kw_only=True)
class StepAware:
    """SPO's step-aware preference model: a time-conditioned CLIP on the decoded guess x0-hat (`models.step_aware`).

    Args:
        clip, clip_revision, processor, published: what to start from; see `open_step_aware`. Published: PickScore v1.
        guidance_scale: of the guess. Published: 5.
        resize: how the decoded guess becomes the CLIP's square. Published: squash.
        gradient_checkpointing: recompute the image tower's activations in the backward pass.
    """

    clip: str
    clip_revision: str | None = None
    processor: str | None = None
    published: str | None = None
    guidance_scale: float = 5.0
    resize: Literal["squash", "shortest"] = "squash"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse a guidance that would leave the prompt out or push away from it."""
        if not 0 < self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, want a positive number; 1 is no guidance.")

    def open(self, images: NoisedImages, seed: int) -> StepAwareReward:
        """Load the CLIP and make all of it trainable."""
        return StepAwareReward(self, images, seed)


class StepAwareReward:
    """A step-aware preference model in training."""

    def __init__(self, settings: StepAware, images: NoisedImages, seed: int) -> None:
        """Use `StepAware.open`."""
        self.settings, self.images = settings, images
        model, self.reads = open_step_aware(
            settings.clip,
            revision=settings.clip_revision,
            processor=settings.processor,
            published=settings.published,
            seed=seed,
            place="adapter.reward.clip",
        )
        model.gradient_checkpointing = settings.gradient_checkpointing
        self.network = model.requires_grad_(True).to(images.device)

    def inputs(self, noised: Noised, prompts: Sequence[str]) -> ScoringInputs:
        """The guesses as the CLIP sees them, their timesteps, and the tokens of the prompts."""
        guesses = self.images.guesses(noised, guidance_scale=self.settings.guidance_scale)
        alone = [self.images.decode(one[None]) for one in guesses.flatten(0, 1)]  # so that no batch changes the numbers
        decoded = torch.cat(alone)
        pixels = self.reads.pixels(decoded, resize=self.settings.resize)
        return ScoringInputs(
            each={"pixels": pixels.view(*guesses.shape[:2], *pixels.shape[1:]), "timestep": noised.timestep},
            shared={"tokens": self.reads.tokens(prompts).to(self.images.device)},
        )

    def save(self, folder: Path) -> None:
        """Weights, config and processor."""
        save_step_aware(self.network, self.reads, folder)

    def loading_lines(self, folder: Path) -> str:
        """Code that loads the folder."""
        return f'from mmalign.models.step_aware import open_step_aware\nmodel, reads = open_step_aware("{folder}")'


@dataclass(frozen=True, kw_only=True)
class Latent:
    """LPO's kind of reward model: a head on the diffusion UNet's own features, without decoding (`models.latent_reward`).

    Args:
        tune: head: the projections and the scale, on the frozen UNet; network: its down and middle blocks too (published).
        dim: of the space where image and prompt meet. Published: 768.
    """

    tune: Literal["head", "network"] = "head"
    dim: int = 768

    def __post_init__(self) -> None:
        """Refuse a space without dimensions."""
        if self.dim < 1:
            raise ValueError(f"dim: got {self.dim}, want 1 or more.")

    def open(self, images: NoisedImages, seed: int) -> LatentRewardTraining:
        """Put a new head on the UNet of the images."""
        return LatentRewardTraining(self, images, seed)


class LatentRewardTraining:
    """A latent reward model in training."""

    def __init__(self, settings: Latent, images: NoisedImages, seed: int) -> None:
        """Use `Latent.open`."""
        self.images = images
        check_unet(images.family, images.denoiser.core)
        half = first_half(images.denoiser.core)
        tuned = settings.tune == "network"
        network = LatentReward(
            images.family,
            half.float() if tuned else half,  # the other half of the UNet is never run here
            text_width=text_summary(images.conditions([""])).shape[1],
            dim=settings.dim,
            tuned=tuned,
            seed=seed,
        )
        self.network = network.requires_grad_(True).to(images.device)

    def inputs(self, noised: Noised, prompts: Sequence[str]) -> ScoringInputs:
        """The noisy latents themselves, their timesteps, and the conditions of the prompts."""
        timestep = self.images.schedule.network_timestep(noised.timestep)
        return ScoringInputs(each={"noisy": noised.noisy, "timestep": timestep}, shared=noised.condition)

    def save(self, folder: Path) -> None:
        """The head, and with `tune: network` the half UNet."""
        save_latent_reward(self.network, folder)

    def loading_lines(self, folder: Path) -> str:
        """Code that loads the folder for a pipeline's UNet."""
        family, settings = self.images.family, self.images.settings
        base = model_folder(family, settings.model) if settings.model == TINY else from_anywhere(settings.model)
        return (
            "from mmalign.families import find_family\n"
            "from mmalign.models.latent_reward import open_latent_reward\n"
            f'pipe = diffusers.{family.pipeline}.from_pretrained("{base}")\n'
            f'model = open_latent_reward("{folder}", find_family("{family.name}"), pipe.{family.network})'
        )


REWARDS: dict[str, type[StepAware] | type[Latent]] = {"step_aware": StepAware, "latent": Latent}


@dataclass(frozen=True, kw_only=True)
class StepRewardAdapter:
    """Settings of the step_reward adapter: a frozen diffusion model, and the reward model that is trained on its noise.

    Source: Liang et al. 2024 (SPO), section 3.2, and the published training code: timesteps uniform over 0 ... 999, noise and
        timestep shared by the images of a pair.
    Args:
        family, model, revision, variant, vae: the diffusion model, as in the diffusion adapter.
        reward: the reward model.
        resolution: side, or (height, width), in pixels.
        crop, flip: as in the diffusion adapter.
        timesteps: distribution of the timestep.
        latents: a sample of the VAE's posterior (published), or its mean.
        dtype: of the diffusion model; auto: that of the mixed precision. A VAE whose config says force_upcast is float32.
    """

    family: str
    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    reward: Annotated[Choice, Table(REWARDS)]
    resolution: int | tuple[int, int]
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    timesteps: Annotated[Choice, Table(TIMESTEPS)] = UNIFORM
    latents: Literal["sample", "mean"] = "sample"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    measures: ClassVar[frozenset[str]] = frozenset()
    side: ClassVar[tuple[str, ...]] = ()
    errors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        family = find_family(self.family)
        if family.frame_multiple is not None or family.edits:
            raise ValueError(f"family: got {self.family}, want one that makes images from prompts alone.")
        check_resolution(family, self.resolution)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return size_of(self.resolution)

    def check_losses(self, losses: Sequence[Choice], num_candidates: int) -> None:
        """Refuse losses that scores of images are not enough for.

        Raises:
            UserError: a loss asks for a reference, or for embeddings that are compared.
        """
        for loss in losses:
            if any(name.split("_")[0] == "reference" for name in inspect.signature(loss.target).parameters):
                raise UserError(
                    f"loss: got {loss.name}, which asks for a reference, which a reward model has not, want bradley_terry."
                )
            if loss.name == "gpm":
                raise UserError("loss: got gpm, which compares embeddings of texts, want bradley_terry.")

    def check_sources(self, numbers: Mapping[int, str]) -> None:
        """Refuse prompts with a source image; `numbers` as `records.Examples.sources` has them.

        Raises:
            UserError: names the first such row.
        """
        check_sources(find_family(self.family), numbers)

    def check_examples(self, kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
        """Refuse examples that are not one image a candidate; `kinds` as `records.Examples` has them.

        Raises:
            UserError: names the first such row.
        """
        check_single_images(kinds)

    def open(
        self,
        *,
        device: torch.device | str = "cpu",
        mixed_precision: str = "no",
        seed: int = 0,
        num_candidates: int = 2,
        needs_reference: bool = False,
        caching: int | None = None,
        weights: Path | None = None,
        asked: frozenset[str] = frozenset(),
    ) -> StepRewardPolicy:
        """Load both models.

        Args:
            device: where they run.
            mixed_precision: no, fp16 or bf16.
            seed: of the reward model's new weights and of every noise and timestep draw.
            num_candidates: k of the data.
            needs_reference: never: `check_losses` refuses losses that ask for one.
            caching, weights: not for this adapter.
            asked: names of all data that the losses ask for.
        Raises:
            UserError: no such model; a cache or tuned weights asked for.
        """
        if caching is not None or weights is not None:
            raise UserError("adapter: got step_reward, which neither fills a cache nor starts from a run. Use diffusion.")
        return StepRewardPolicy(self, torch.device(device), mixed_precision, seed)


class StepRewardPolicy:
    """An opened reward model in training: what the loop and the command line ask of an adapter."""

    library: ClassVar[str] = "diffusers"

    def __init__(self, settings: StepRewardAdapter, device: torch.device, mixed_precision: str, seed: int) -> None:
        """Use `StepRewardAdapter.open`."""
        self.settings = settings
        self.images = NoisedImages(settings, device, mixed_precision, seed)
        reward: Reward = settings.reward.build().open(self.images, seed)
        self.reward = reward

    @property
    def network(self) -> nn.Module:
        """The trained reward model."""
        return self.reward.network

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Tensor]]:
        """There is none: `check_losses` refuses losses that ask for one."""
        raise ValueError("reference: a reward model has none.")
        yield

    @property
    def item(self) -> Callable[[Example, int], dict[str, Any]]:
        """(example, epoch) -> item, for worker processes; holds no model."""
        return self.images.reader.item

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Items -> micro-batch."""
        return self.images.reader.collate

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Any]) -> Prepared:
        """Encode, noise with one draw a pair, guess and decode where the reward model wants it."""
        side = {name: value.to(self.images.device) for name, value in batch["side"].items()}
        inputs = self.reward.inputs(self.images.noised(batch), batch["prompt"])
        return Prepared(inputs=inputs, side=side, ids=batch["id"])

    def save(self, folder: Path) -> None:
        """The folder `reward`."""
        self.reward.save(folder / FOLDER)

    def validate(self, folder: Path) -> None:
        """A reward model makes no samples."""

    def plan(self) -> str:
        """What is trained, in words."""
        trained = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.settings.reward.name} reward on {self.settings.family}: {trained:,} parameters"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the latents of one image."""
        return self.images.latent_shape

    def activations(self) -> float | None:
        """Activation memory of a sample: not counted for reward models."""
        return None

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Nothing beyond the plan."""
        return []

    @property
    def num_encoder_parameters(self) -> int:
        """Weights of the frozen diffusion model."""
        return self.images.num_parameters

    def loading_lines(self, folder: Path) -> str:
        """Code that loads the result, from any folder."""
        return self.reward.loading_lines(folder.absolute() / FOLDER)
