"""A diffusion model in training with preferences: reads examples, prepares the inputs of a step, holds policy and reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.adapters.diffusion_cache import Cache, opened_cache
from mmalign.adapters.draws import drawn
from mmalign.adapters.encoding import Encoding
from mmalign.adapters.opening import check_timesteps, frozen_dtype, opened_pipeline
from mmalign.adapters.options import told_family
from mmalign.adapters.prompts import prompt_of
from mmalign.adapters.reading import Reader
from mmalign.adapters.samples import save_samples
from mmalign.likelihoods import DenoisingInputs, winner_guard
from mmalign.memory import activations, known_size
from mmalign.models.casting import cast
from mmalign.models.diffusion import (
    Denoiser,
    add_lora,
    frozen_copy,
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
from mmalign.models.pipeline_folder import from_anywhere, opening_code
from mmalign.models.tiny import TINY
from mmalign.records import Example
from mmalign.sources import Prepared

if TYPE_CHECKING:
    from mmalign.adapters.diffusion import DiffusionAdapter

FULL = "pipeline"  # the folder, in a run's output, that a full fine-tune is saved to


class DiffusionPolicy:
    """An opened diffusion model in training: reads examples, prepares inputs, holds policy and reference."""

    library: ClassVar[str] = "diffusers"

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
        frozen = frozen_dtype(settings.dtype, mixed_precision)
        self.pipe = opened_pipeline(self.family, settings, frozen if settings.lora is not None else torch.float32)
        self.schedule = schedule_of(self.pipe, settings.size)
        buckets = () if settings.buckets is None else settings.buckets.all()
        self.schedules = {size: schedule_of(self.pipe, size) for size in (settings.size, *buckets)}
        self.pipe.to(device)
        self.encoding = Encoding(self.family, self.pipe, device=device, size=settings.size, frames=settings.frames)
        for part in self.encoding.parts:
            part.requires_grad_(False).eval()
            if part is not self.pipe.vae and part.dtype != frozen:
                cast(part, device, frozen)
        nn.Module.to(self.pipe.vae, vae_dtype(self.pipe.vae.config, frozen))
        self.denoiser = Denoiser(self.family, self.family.core(self.pipe))
        check_timesteps(settings.timesteps, settings.weights, self.schedule)
        if settings.cache is not None:
            self.encoding.cache = opened_cache(self, frozen, mixed_precision, caching)
            if caching is None:
                for part in self.encoding.parts:
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
    def cache(self) -> Cache | None:
        """What stands for the encoders."""
        return self.encoding.cache

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
        mean, std = self.encoding.latents(batch)
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
        condition = self.encoding.prompts(prompts, batch["sources"])
        inputs = DenoisingInputs(
            noisy=schedule.add_noise(clean, noise, timestep),
            timestep=schedule.network_timestep(timestep),
            target=schedule.target(clean, noise, timestep),
            condition={**condition, **{name: value.to(self.device) for name, value in batch["sizes"].items()}},
            per_candidate=frozenset(batch["sizes"]),
            error_weight=None if weights is None else weights.build(schedule, timestep),
            safeguard=self._safeguard(side),
        )
        logps = None if self.cache is None else self.cache.reference(batch["key"], batch["draw"])
        reference = None if logps is None else {"policy": logps.to(self.device)}
        return Prepared(inputs=inputs, side=side, ids=batch["id"], reference=reference)

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`; full: the folder `pipeline`. Both load in stock diffusers."""
        if self.settings.lora is not None:
            save_lora(self.family, self.denoiser, folder)
        else:
            # The encoders may be in half precision here: the result gets them as the base model has them.
            whole = all(part.dtype == torch.float32 for part in self.encoding.parts)
            pipe = self.pipe if whole else opened_pipeline(self.family, self.settings, torch.float32)
            save_full(pipe, self.denoiser, folder / FULL)

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
        return self.encoding.latent_shape(self.settings.size)

    @property
    def keeps_references(self) -> bool:
        """Whether the cache holds the reference's logps of a bank of draws."""
        return self.settings.cache is not None and self.settings.draws is not None

    def activations(self) -> float | None:
        """GB of activations per image in bf16, or None for a network that was not counted."""
        lora = self.settings.lora is not None
        total = sum(p.numel() for p in self.network.parameters())
        base = total - sum(p.numel() for p in self.parameters()) if lora else total
        stock = known_size(self.settings.family, base)
        if stock is None:
            return None
        side = math.prod(self.latent_shape[-2:]) ** 0.5
        return activations(stock, lora=lora, checkpointing=self.settings.gradient_checkpointing, latent_side=side)

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Nothing beyond the plan."""
        return []

    @property
    def num_encoder_parameters(self) -> int:
        """Weights of VAE and text encoders that stay on the device; 0 when a cache stands for them."""
        return 0 if self.cache is not None else sum(p.numel() for part in self.encoding.parts for p in part.parameters())

    def loading_lines(self, folder: Path) -> str:
        """Stock diffusers code that loads the result, from any folder."""
        folder = folder.absolute()
        if self.settings.lora is None:
            return opening_code(self.family, folder / FULL, like=self.settings.model)
        model = self.settings.model
        base = model_folder(self.family, model) if model == TINY else from_anywhere(model)
        return loading_code(self.family, base, folder)

    # --- what sources and step scorers ask for ----------------------------------------------------------------------

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All that the network is told of images that it makes itself, (n, ...) each, on the device."""
        return self.encoding.conditions(prompts)

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The same without a prompt, as the stock sampler's guidance has it."""
        return self.encoding.unconditional(count)

    def decode(self, latents: Float[Tensor, "n c *latent"]) -> Float[Tensor, "n 3 *dims"]:
        """Pixels in [0, 1] of scaled latents."""
        return self.encoding.decode(latents)

    # --- parts ----------------------------------------------------------------------------------------------------

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

    def _safeguard(self, side: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
        guard = self.settings.winner_guard
        if guard is None:
            return None
        tie = side["prob"] == 0.5 if "prob" in side else None
        return partial(winner_guard, tie=tie, mu=guard.mu, per=guard.per)
