"""A frozen diffusion model that noises images and guesses them back: what a step-wise reward model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.adapters.encoding import Encoding
from mmalign.adapters.opening import check_timesteps, frozen_dtype, opened_pipeline
from mmalign.adapters.reading import Reader
from mmalign.cache import content_key
from mmalign.families import find_family
from mmalign.families.family import no_size_condition
from mmalign.models.diffusion import Denoiser, schedule_of, vae_dtype

if TYPE_CHECKING:
    from mmalign.adapters.step_reward import StepRewardAdapter


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A micro-batch in noise.

    Args:
        noisy: latents x_t.
        timestep: index in the schedule; one and the same for the candidates of an example.
        condition: of each prompt, by the keywords of the denoiser.
    """

    noisy: Float[Tensor, "batch k c h w"]
    timestep: Int[Tensor, "batch k"]
    condition: Mapping[str, Tensor]


class NoisedImages:
    """An opened, frozen diffusion model: reads examples, noises their images, guesses them back, decodes."""

    def __init__(self, settings: StepRewardAdapter, device: torch.device, mixed_precision: str, seed: int) -> None:
        """Load the model onto the device.

        Args:
            settings: which one.
            mixed_precision: no, fp16 or bf16.
            seed: of noise, timesteps, flips and crops.
        Raises:
            UserError: no such model, wrong family, or timesteps outside its schedule.
        """
        self.settings, self.device, self.seed = settings, device, seed
        self.family = find_family(settings.family)
        dtype = frozen_dtype(settings.dtype, mixed_precision)
        self.pipe = opened_pipeline(self.family, settings, dtype)
        self.pipe.to(device)
        nn.Module.to(self.pipe.vae, vae_dtype(self.pipe.vae.config, dtype))
        self.schedule = schedule_of(self.pipe, settings.size)
        self.encoding = Encoding(self.family, self.pipe, device=device, size=settings.size)
        self.denoiser = Denoiser(self.family, self.family.core(self.pipe))
        for part in self.parts():
            part.requires_grad_(False).eval()
        check_timesteps(settings.timesteps, None, self.schedule)
        self.reader = Reader(
            size=settings.size,
            crop=settings.crop,
            flip=settings.flip,
            draws=None,
            seed=seed,
            size_condition=no_size_condition,
        )
        self._empty: dict[str, Tensor] | None = None

    def parts(self) -> list[nn.Module]:
        """All networks of the pipeline."""
        return [self.denoiser, *self.encoding.parts]

    @property
    def num_parameters(self) -> int:
        """Weights of all networks of the pipeline."""
        return sum(parameter.numel() for part in self.parts() for parameter in part.parameters())

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the latents of one image."""
        return self.encoding.latent_shape(self.settings.size)

    @torch.no_grad()
    def noised(self, batch: Mapping[str, Any]) -> Noised:
        """Encode a collated batch and noise it; draws come from (seed, images of the example, epoch), in whatever batch."""
        mean, std = self.encoding.latents(batch)
        u, noise, posterior = (value.to(self.device) for value in self._draws(batch, tuple(mean.shape[2:])))
        clean = mean if self.settings.latents == "mean" else mean + std * posterior
        timestep = self.settings.timesteps.build(u, self.schedule.num_timesteps).expand(mean.shape[:2])
        return Noised(
            noisy=self.schedule.add_noise(clean, noise.expand(mean.shape), timestep),
            timestep=timestep,
            condition=self.conditions(batch["prompt"]),
        )

    @torch.no_grad()
    def guesses(self, noised: Noised, *, guidance_scale: float) -> Float[Tensor, "batch k c h w"]:
        """x0-hat of every candidate, from one prediction with classifier-free guidance; one candidate a prompt at a time.

        unconditional + guidance_scale * (conditional - unconditional);  scale 1 saves the unconditional pass
        """
        found = []
        for noisy, timestep in zip(noised.noisy.unbind(1), noised.timestep.unbind(1), strict=True):
            output = self._predict(noisy, timestep, noised.condition, guidance_scale)
            found.append(self.schedule.clean(noisy, output, timestep))
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 height width"]:
        """Pixels in [0, 1] of scaled latents."""
        return self.encoding.decode(latents)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of each prompt, by the keywords of the denoiser; sizes are of this resolution."""
        return self.encoding.conditions(prompts)

    def _predict(
        self, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Tensor], guidance_scale: float
    ) -> Float[Tensor, "n c h w"]:
        network_timestep = self.schedule.network_timestep(timestep)
        if guidance_scale == 1:
            alone: Tensor = self.denoiser(noisy, network_timestep, **condition)
            return alone.float()
        if self._empty is None:
            self._empty = self.encoding.unconditional(1)
        both = {name: torch.cat([self._empty[name].expand_as(value), value]) for name, value in condition.items()}
        output: Tensor = self.denoiser(torch.cat([noisy, noisy]), torch.cat([network_timestep, network_timestep]), **both)
        without, with_prompt = output.float().chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def _draws(self, batch: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep and noise of each example, posterior noise of each of its images whichever is preferred."""
        u, noise, posterior = [], [], []
        for key, draw, images in zip(batch["unordered"], batch["draw"], batch["images"], strict=True):
            generator = torch.Generator().manual_seed(int(content_key(self.seed, key, draw)[:15], 16))
            place = torch.tensor(sorted(range(len(images)), key=images.__getitem__)).argsort()
            u.append(torch.rand(1, generator=generator, dtype=torch.float64))
            noise.append(torch.randn((1, *shape), generator=generator))
            posterior.append(torch.randn((len(images), *shape), generator=generator)[place])
        return torch.stack(u), torch.stack(noise), torch.stack(posterior)


@dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """k candidates a prompt, of which a reward model's scores stand for the logps.

    Args:
        each: keyword arguments of the network that are one a candidate.
        shared: those that are one a prompt.
    """

    each: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]

    @property
    def num_candidates(self) -> int:
        """k."""
        return next(iter(self.each.values())).shape[1]

    def logps(self, network: Callable[..., Tensor]) -> Float[Tensor, "batch k"]:
        """The scores, in float32."""
        scores: Tensor = network(**self.each, **self.shared)
        return scores.float()

    def measures(self, network: Callable[..., Tensor]) -> dict[str, Float[Tensor, "batch k"]]:
        """The scores, by the name of the losses' data parameter."""
        return {"policy": self.logps(network)}

    def refer(
        self, network: Callable[..., Tensor], *, drift: bool = False
    ) -> tuple[dict[str, Float[Tensor, "batch k"]], ScoringInputs]:
        """The measures of other weights of the same network, without a graph, and these inputs.

        Raises:
            ValueError: `drift` is asked for, which scores do not have.
        """
        if drift:
            raise ValueError("drift: is not defined for scores. Leave the loss that asks for it out.")
        with torch.no_grad():
            return self.measures(network), self

    def readings(self, logps: Float[Tensor, "batch k"]) -> dict[str, Float[Tensor, "batch k"]]:
        """Other names under which these scores are logged: none."""
        return {}

    def settle(self, network: Callable[..., Tensor]) -> tuple[dict[str, Float[Tensor, "batch k"]], ScoringInputs]:
        """The measures without a graph, and these inputs, whose candidates are independent already."""
        with torch.no_grad():
            return self.measures(network), self

    def candidates(self, part: slice) -> ScoringInputs:
        """The same inputs with only some of the k candidates."""
        return ScoringInputs(each={name: value[:, part] for name, value in self.each.items()}, shared=self.shared)
