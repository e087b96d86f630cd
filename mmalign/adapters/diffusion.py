"""The diffusion adapter: images or videos of a prompt -> denoising likelihoods, for training with any preference loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.adapters.buckets import Buckets
from mmalign.adapters.diffusion_cache import Cache, opened_cache
from mmalign.adapters.draws import drawn
from mmalign.adapters.options import Lora, Validation, WinnerGuard, check_frames, check_numbers_of_frames, told_family
from mmalign.adapters.prompts import Prompt, check_sources, encoded_prompts, prompt_of, texts_of
from mmalign.adapters.reading import Reader
from mmalign.adapters.samples import encoders_of, save_samples
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.families import unconditional
from mmalign.likelihoods import DenoisingInputs, winner_guard
from mmalign.models.casting import cast
from mmalign.models.diffusion import (
    Denoiser,
    add_lora,
    decode_latents,
    encode_images,
    find_family,
    frozen_copy,
    latent_shape,
    load_lora,
    lora_off,
    model_folder,
    open_pipeline,
    save_full,
    save_lora,
    schedule_of,
    trainable_parameters,
    training_plan,
    vae_dtype,
)
from mmalign.models.lora import loading_code
from mmalign.models.pipeline_folder import opening_code
from mmalign.models.tiny import TINY
from mmalign.noise import TIMESTEP_WEIGHTS, TIMESTEPS
from mmalign.records import Example
from mmalign.sources import Prepared

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FULL = "pipeline"  # the folder, in a run's output, that a full fine-tune is saved to
LORA = Lora()
UNIFORM = Choice(name="uniform", target=TIMESTEPS["uniform"])


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapter:
    """Settings of the diffusion adapter.

    Args:
        family, model, revision, variant: what to open: a name in FAMILIES; local folder or hub id.
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

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is loaded."""
        family = told_family(self.family, self.guidance_embedding)
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout: got {self.prompt_dropout}, want a share from 0 to below 1.")
        if any(side <= 0 or side % family.size_multiple for side in self.size):
            raise ValueError(f"resolution: got {self.resolution}, want multiples of {family.size_multiple}, such as 512.")
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
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    def check_examples(self, kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
        """Refuse examples that are not one image, or one video, a candidate; `kinds` as `records.Examples` has them.

        Raises:
            UserError: names the first such row.
        """
        for (_, images), where in kinds.items():
            if self.frames is not None:
                check_numbers_of_frames(images, self.frames, where)
            elif images != (1,):
                raise UserError(f"{where}: got candidates with {images[0]} images, want 1 each. Complete or remove the row.")

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

        Raises:
            UserError: no such model, wrong family, or settings that do not go together.
        """
        if self.winner_guard is not None and num_candidates != 2:
            raise UserError(f"adapter.winner_guard: got {num_candidates} candidates, want pairs. Set it to null.")
        return DiffusionPolicy(self, torch.device(device), mixed_precision, seed, needs_reference, caching, weights)

    def frozen_dtype(self, mixed_precision: str) -> torch.dtype:
        """Of the weights that are not trained."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


class DiffusionPolicy:
    """An opened diffusion model in training: reads examples, prepares inputs, holds policy and reference."""

    def __init__(
        self,
        settings: DiffusionAdapter,
        device: torch.device,
        mixed_precision: str,
        seed: int,
        needs_reference: bool,
        caching: int | None,
        weights: Path | None,
    ) -> None:
        """Use `DiffusionAdapter.open`."""
        self.settings = settings
        self.family = told_family(settings.family, settings.guidance_embedding)
        self.device = device
        self.seed = seed
        frozen = settings.frozen_dtype(mixed_precision)
        trained = frozen if settings.lora is not None else torch.float32
        self.pipe = self._open(trained)
        self.schedule = schedule_of(self.pipe, settings.size)
        buckets = () if settings.buckets is None else settings.buckets.all()
        self.schedules = {size: schedule_of(self.pipe, size) for size in (settings.size, *buckets)}
        self.pipe.to(device)
        for part in self._encoders():
            part.requires_grad_(False).eval()
            if part is not self.pipe.vae and part.dtype != frozen:
                cast(part, device, frozen)
        nn.Module.to(self.pipe.vae, vae_dtype(self.pipe.vae.config, frozen))
        self.denoiser = Denoiser(self.family, self.family.core(self.pipe))
        self._check_timesteps()
        self.cache: Cache | None = None
        if settings.cache is not None:
            self.cache = opened_cache(self, frozen, mixed_precision, caching)
            if caching is None:
                for part in self._encoders():
                    nn.Module.to(part, "cpu")  # the cache stands for them; validation brings them back
        self.reader = Reader(
            size=settings.size,
            crop=settings.crop,
            flip=settings.flip,
            draws=settings.draws,
            seed=seed,
            size_condition=self.family.size_condition,
            frames=None if self.cache is None else self.cache.frames,
            num_frames=settings.frames,
            edits=self.family.edits,
            buckets=buckets,
        )
        self._copy = frozen_copy(self.denoiser) if settings.lora is None and needs_reference else None
        self._make_trainable(weights)
        for network in filter(None, (self.denoiser, self._copy)):
            network.save_memory(
                gradient_checkpointing=settings.gradient_checkpointing and network is self.denoiser,
                channels_last=settings.channels_last,
                compile=settings.compile,
            )

    # --- what the loop asks for -----------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The trained network."""
        return self.denoiser

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return trainable_parameters(self.denoiser)

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Tensor]]:
        """The policy with its LoRA off, or the frozen copy of a full fine-tune."""
        if self._copy is not None:
            yield self._copy
        else:
            with lora_off(self.denoiser):
                yield self.denoiser

    @property
    def item(self) -> Callable[[Example, int], dict[str, Any]]:
        """(example, epoch) -> item, for worker processes; holds no model."""
        return self.reader.item

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """Items -> micro-batch."""
        return self.reader.collate

    def groups(self, examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
        """Which examples may share a step: those of one bucket; () where all may. The head of each chosen image is read."""
        if self.settings.buckets is None:
            return ()
        found: dict[tuple[int, int], list[int]] = {}
        for index in range(len(examples)):
            found.setdefault(self.reader.size_of(examples[index]), []).append(index)
        return tuple(tuple(found[size]) for size in sorted(found))

    def prepare(self, batch: Mapping[str, Any]) -> Prepared:
        """Encode what is not cached, make every random draw, and build the inputs of one step."""
        schedule = self.schedules[batch["size"]]
        mean, std = self._latents(batch)
        settings = self.settings
        draws = drawn(
            batch,
            tuple(mean.shape[2:]),
            seed=self.seed,
            prompt_dropout=settings.prompt_dropout,
            timestep=settings.timestep,
            noise=settings.noise,
        )
        clean = mean if settings.latents == "mean" else mean + std * draws.posterior.to(self.device)
        rows = zip(draws.drop, batch["prompt"], batch["source"], strict=True)
        prompts = [prompt_of("" if dropped else text, source) for dropped, text, source in rows]
        timestep = settings.timesteps.build(draws.u, schedule.num_timesteps).to(self.device).expand(mean.shape[:2])
        noise = draws.noise.to(self.device).expand(mean.shape)
        side = {name: value.to(self.device) for name, value in batch["side"].items()}
        weights = settings.weights
        inputs = DenoisingInputs(
            noisy=schedule.add_noise(clean, noise, timestep),
            timestep=schedule.network_timestep(timestep),
            target=schedule.target(clean, noise, timestep),
            condition={**self._prompts(prompts, batch["sources"]), **{k: v.to(self.device) for k, v in batch["sizes"].items()}},
            per_candidate=frozenset(batch["sizes"]),
            error_weight=None if weights is None else weights.build(schedule, timestep),
            safeguard=self._safeguard(side),
        )
        reference = None if self.cache is None else self.cache.reference(batch["key"], batch["draw"])
        if reference is not None:
            reference = reference.to(self.device)
        return Prepared(inputs=inputs, side=side, ids=batch["id"], reference=reference)

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`; full: the folder `pipeline`. Both load in stock diffusers."""
        if self.settings.lora is not None:
            save_lora(self.family, self.denoiser, folder)
        else:
            # The encoders may be in half precision here: the result gets them as the base model has them.
            whole = all(part.dtype == torch.float32 for part in self._encoders())
            save_full(self.pipe if whole else self._open(torch.float32), self.denoiser, folder / FULL)

    def validate(self, folder: Path) -> None:
        """One image, or animation, a validation prompt."""
        if self.settings.validation is not None:
            save_samples(
                self.denoiser,
                self.pipe,
                self.settings.validation,
                folder,
                device=self.device,
                size=self.settings.size,
                frames=self.settings.frames,
            )

    # --- what the command line tells ------------------------------------------------------------------------------

    def plan(self) -> str:
        """What is trained, in words."""
        return training_plan(self.denoiser)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the latents of one image; (channels, frames, height, width) of a video."""
        return self.latent_shape_of(self.settings.size)

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The same of an image or video of this (height, width) in pixels."""
        return latent_shape(self.pipe, size, self.settings.frames)

    @property
    def num_encoder_parameters(self) -> int:
        """Weights of VAE and text encoders that stay on the device; 0 when a cache stands for them."""
        return 0 if self.cache is not None else sum(p.numel() for part in self._encoders() for p in part.parameters())

    def loading_lines(self, folder: Path) -> str:
        """Stock diffusers code that loads the result, from any folder."""
        folder = folder.absolute()
        if self.settings.lora is None:
            return opening_code(self.family, folder / FULL, like=self.settings.model)
        model = self.settings.model
        base = model_folder(self.family, model) if model == TINY else model
        return loading_code(self.family, base, folder)

    # --- parts ----------------------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor, *, check: bool = True) -> dict[str, Tensor]:
        """Mean and std of the scaled latents of 8-bit pixels, one image at a time so that no batch changes the numbers."""
        parts = [encode_images(self.pipe, one.to(self.device)[None].float() / 127.5 - 1, check=check) for one in pixels]
        return {"mean": torch.cat([mean for mean, _ in parts]), "std": torch.cat([std for _, std in parts])}

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All that the network is told of images that it makes itself, (n, ...) each, on the device."""
        return {**self._prompts(texts_of(self.family, prompts), {}), **self._sizes(len(prompts))}

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The same without a prompt, as the stock sampler's guidance has it."""
        texts_of(self.family, [""])
        empty = unconditional(self.family, self.pipe, 1)
        rows = {name: value.to(self.device).expand(count, *value.shape[1:]) for name, value in empty.items()}
        return {**rows, **self._sizes(count)}

    def decode(self, latents: Float[Tensor, "n c *latent"]) -> Float[Tensor, "n 3 *dims"]:
        """Pixels in [0, 1] of scaled latents, one at a time so that no batch changes the numbers."""
        return torch.cat([decode_latents(self.pipe, one[None]) for one in latents])

    def encode_prompts(self, prompts: Sequence[Prompt], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The condition of each prompt, one at a time for the same reason; `sources` are 8-bit pixels by key."""
        return encoded_prompts(self.family, self.pipe, prompts, sources)

    def _sizes(self, count: int) -> dict[str, Tensor]:
        sizes = self.family.size_condition(self.settings.size, (0, 0), self.settings.size)
        return {name: value.to(self.device).expand(count, *value.shape) for name, value in sizes.items()}

    def _open(self, dtype: torch.dtype) -> Any:
        settings = self.settings
        return open_pipeline(self.family, settings.model, dtype=dtype, revision=settings.revision, variant=settings.variant)

    def _make_trainable(self, weights: Path | None) -> None:
        lora = self.settings.lora
        if lora is None:
            self.denoiser.train_fully()
            if weights is not None:
                tuned = open_pipeline(self.family, weights / FULL, dtype=torch.float32)
                self.denoiser.core.load_state_dict(self.family.core(tuned).state_dict())
        elif weights is None:
            add_lora(self.denoiser, **vars(lora), seed=self.seed)
        else:
            load_lora(self.denoiser, weights)

    def _encoders(self) -> list[nn.Module]:
        return encoders_of(self.family, self.pipe)

    def _check_timesteps(self) -> None:
        try:
            tried = self.settings.timesteps.build(torch.tensor([0.5]), self.schedule.num_timesteps)
            if self.settings.weights is not None:
                self.settings.weights.build(self.schedule, tried)
        except ValueError as fault:
            raise UserError(f"adapter.{fault}") from fault

    def _latents(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, "batch k *dims"], Float[Tensor, "batch k *dims"]]:
        names = [name for row in batch["images"] for name in row]
        if self.cache is not None and self.cache.frames is not None:
            found = self.cache.latents(names, self.latent_shape_of(batch["size"]))
        else:
            encoded = self.encode(batch["pixels"], check=False)  # NaN shows in the loss, where the loop looks once a step
            where = {name: place for place, name in enumerate(batch["names"])}
            index = torch.tensor([where[name] for name in names])
            found = {field: value[index.to(value.device)] for field, value in encoded.items()}
        shape = (len(batch["images"]), -1, *self.latent_shape_of(batch["size"]))
        mean, std = (found[name].to(self.device, torch.float32).reshape(shape) for name in ("mean", "std"))
        return mean, std

    def _prompts(self, prompts: Sequence[Prompt], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(prompts))
        if self.cache is not None and self.cache.frames is not None:
            encoded = self.cache.prompts_of(distinct)
        else:
            encoded = self.encode_prompts(distinct, sources)
        index = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return {name: value[index.to(value.device)].to(self.device) for name, value in encoded.items()}

    def _safeguard(self, side: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
        guard = self.settings.winner_guard
        if guard is None:
            return None
        tie = side["prob"] == 0.5 if "prob" in side else None
        return partial(winner_guard, tie=tie, mu=guard.mu, per=guard.per)
