"""The diffusion adapter: images or videos of a prompt -> denoising likelihoods, for training with any preference loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from mmalign.adapters.buckets import Buckets
from mmalign.adapters.diffusion_policy import DiffusionPolicy
from mmalign.adapters.opening import check_resolution, check_single_images, size_of
from mmalign.adapters.options import Lora, Validation, WinnerGuard, check_frames, check_numbers_of_frames, told_family
from mmalign.adapters.prompts import check_sources
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.families import find_family
from mmalign.noise import TIMESTEP_WEIGHTS, TIMESTEPS

LORA = Lora()
UNIFORM = Choice(name="uniform", target=TIMESTEPS["uniform"])


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapter:
    """Settings of the diffusion adapter.

    Args:
        family, model, revision, variant: what to open: a name in FAMILIES; local folder or hub id.
        vae: another VAE than the model's own, of the same latents: a folder or hub id. Published for SDXL (DPO, SPO):
            madebyollin/sdxl-vae-fp16-fix, which runs in half precision. A full fine-tune is saved with it.
        resolution: side, or (height, width), in pixels; a multiple of what the family asks for: 8 or 16.
        buckets: several sizes to train at, by the shape of the chosen image; `resolution` is then that of the validation
            images. Of the offline source.
        frames: of a video, whose first so many are trained on at its own rate: for families of videos, 1 more than a multiple
            of 4. All videos of an example must have one length, and this many frames at least. None: images.
        crop, flip: how images become that size; `flip` mirrors each image with probability 1/2, each on its own. All frames of
            a video are cut and mirrored alike. A family that edits takes neither random crops nor flips.
        prompt_dropout: share of examples trained on the empty prompt. Published: 0.2 (Salesforce), 0 (diffusers).
        timesteps: distribution of the timestep.
        weights: factor of the squared error by timestep, for policy and reference alike; None: 1, as every published method.
        noise, timestep: `shared`: the candidates of an example see one; `independent`: each its own. Published: both shared;
            for RankDPO the noise is each image's own.
        latents: a sample of the VAE's posterior, or its mean.
        guidance_embedding: the guidance scale that FLUX.1 dev is told in training, policy and reference alike; None: 1.
        lora: None trains all weights that are used, against a frozen copy.
        dtype: of frozen weights: text encoders and, under a LoRA, the network; auto: that of the mixed precision. Always
            float32: trained weights, the reference of a full fine-tune, and a VAE whose config says force_upcast.
        cache: folder that `mmalign prepare` fills and training reads; None encodes at every step.
        cache_dtype: of the cached tensors; float32 gives the same numbers as no cache.
        draws: number of seeded (timestep, noise) draws per example, used in turn epoch by epoch; with a cache their reference
            logps are computed once. None: a fresh draw every epoch.
        validation: None makes no images.
    """

    family: str
    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    resolution: int | tuple[int, int]
    buckets: Buckets | None = None
    frames: int | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    prompt_dropout: float = 0.0
    timesteps: Annotated[Choice, Table(TIMESTEPS)] = UNIFORM
    weights: Annotated[Choice, Table(TIMESTEP_WEIGHTS)] | None = None
    noise: Literal["shared", "independent"] = "shared"
    timestep: Literal["shared", "independent"] = "shared"
    latents: Literal["sample", "mean"] = "sample"
    guidance_embedding: float | None = None
    lora: Lora | None = LORA
    winner_guard: WinnerGuard | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    cache: str | None = None
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    draws: int | None = None
    validation: Validation | None = None

    measures: ClassVar[frozenset[str]] = frozenset({"drift"})
    side: ClassVar[tuple[str, ...]] = ()
    errors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        family = told_family(self.family, self.guidance_embedding)
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout: got {self.prompt_dropout}, want a share from 0 to below 1.")
        check_resolution(family, self.resolution)
        check_frames(family, self.frames)
        if self.buckets is not None:
            self.buckets.check(family)
        if self.crop == "random" and self.cache is not None:
            raise ValueError("crop: got random with a cache, which holds one crop of an image. Use crop: center.")
        if family.edits and (self.flip or self.crop == "random"):
            raise ValueError(
                f"flip, crop: {family.name} edits, and source and edits must stay aligned. Use flip: false, crop: center."
            )
        if self.validation is not None:
            self.validation.check_sources(family)
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws: got {self.draws}, want 1 or more, or null for fresh draws.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return size_of(self.resolution)

    def check_examples(self, kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
        """Refuse examples that are not one image, or one video, a candidate; `kinds` as `records.Examples` has them.

        Raises:
            UserError: names the first such row.
        """
        if self.frames is None:
            check_single_images(kinds)
            return
        for (_, images), where in kinds.items():
            check_numbers_of_frames(images, self.frames, where)

    def check_sources(self, numbers: Mapping[int, str]) -> None:
        """Refuse prompts without a source image for a family that edits, and with one for any other."""
        check_sources(find_family(self.family), numbers)

    def open(
        self,
        *,
        device: torch.device | str = "cpu",
        mixed_precision: str = "no",
        seed: int = 0,
        num_candidates: int = 2,
        needs_reference: bool = True,
        caching: int | None = None,
        weights: Path | None = None,
        asked: frozenset[str] = frozenset(),
    ) -> DiffusionPolicy:
        """Load the model and make it trainable.

        Args:
            device: where it runs.
            mixed_precision: no, fp16 or bf16.
            seed: of LoRA's initialisation and of every noise and timestep draw.
            num_candidates: k of the data.
            needs_reference: whether the loss asks for one; a full fine-tune then keeps a frozen copy.
            caching: number of the process that fills the cache (`mmalign prepare`); None only reads it.
            weights: output folder of a run whose tuned weights the policy starts from; the reference is the base model.
            asked: names of all data that the losses ask for.

        Raises:
            UserError: no such model, wrong family, or settings that do not go together.
        """
        if self.winner_guard is not None and num_candidates != 2:
            raise UserError(f"adapter.winner_guard: got {num_candidates} candidates, want pairs. Set it to null.")
        return DiffusionPolicy(self, torch.device(device), mixed_precision, seed, needs_reference, caching, weights)
