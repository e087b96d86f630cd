"""The two sides of the comparison: one Diffusion-DPO step as the public script is built, and the step of mmalign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusion_toy import Size
from measuring import Answer
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.adapters.diffusion_policy import DiffusionPolicy
from mmalign.adapters.draws import Draws, drawn
from mmalign.adapters.options import Lora
from mmalign.config import Choice
from mmalign.loop import Run  # the micro step and the optimiser step of `fit`, without its log and checkpoints
from mmalign.losses import LOSSES
from mmalign.objective import Objective, Term
from mmalign.optimisers import OPTIMISERS
from mmalign.records import Example
from mmalign.sources import Order
from mmalign.training import Training, start

# Published for SD 1.5: 2000, with which float32 rounding of the errors (1e-7 of about 1) moves the loss by 1e-4 between two
# passes of one image and one pass of two. The gate is finer than that. Beta costs no time; the policy is moved the farther.
BETA = 20.0
DISTANCE = 0.1
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
SEED = 0


@dataclass(frozen=True, kw_only=True)
class PublicBatch:
    """What the public script's loader gives, and the draws of the step, made outside so that both sides see the same.

    Args:
        pixels: float32 in [-1, 1]; first all chosen images, then all rejected ones.
        tokens: of the prompts.
        timestep, noise: one a pair. posterior: of the VAE's distribution, one an image, in the order of `pixels`.
    """

    pixels: Tensor
    tokens: Tensor
    timestep: Tensor
    noise: Tensor
    posterior: Tensor


class PublicStep:
    """Diffusion-DPO as the public scripts do a step, written from their description; nothing is prepared ahead.

    Encode both images with the VAE and the prompt with the text encoder, noise both with one draw, one joint forward of the
    pair, the reference on the chosen and on the rejected image (two passes, or `joint_reference`: one of both), one joint
    backward, clip, AdamW. Reference: a frozen copy, or with LoRA the adapter switched off. Five numbers are read for the log
    at every micro-step, as there.

    loss = -log sigma(-beta / 2 * ((e_w - e_l) - (e_ref_w - e_ref_l))),  e = mean squared error of the noise

    Source: Wallace et al. 2023, eq. 14; SalesforceAIResearch/DiffusionDPO and the diffusers research scripts, as described.
    """

    def __init__(self, policy: DiffusionPolicy, folder: Path, batches: Sequence[PublicBatch], *, joint_reference: bool) -> None:
        """Start from the weights of `policy`, in its mode (full or LoRA)."""
        from diffusers import DDPMScheduler, StableDiffusionPipeline
        from peft import LoraConfig

        pipe: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
        self.vae, self.text_encoder, self.unet = pipe.vae, pipe.text_encoder, pipe.unet
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.vae.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        lora = policy.settings.lora
        self.reference: Any = None
        if lora is None:
            self.reference = policy._copy.core if policy._copy is not None else None
        else:
            self.unet.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets))
        self.unet.load_state_dict(policy.denoiser.core.state_dict())
        self.unet.train()
        self.joint_reference = joint_reference
        self.beta = BETA
        self.batches = cycle(batches)
        self.parameters = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(list(self.parameters.values()), lr=LEARNING_RATE, weight_decay=0.01)
        self.logged: tuple[float, ...] = ()

    def micro_step(self, batch: PublicBatch) -> float:
        """Gradients of one micro-batch; returns its loss."""
        with torch.no_grad():
            posterior = self.vae.encode(batch.pixels).latent_dist
            latents = (posterior.mean + posterior.std * batch.posterior) * self.vae.config.scaling_factor
            text = self.text_encoder(batch.tokens)[0].repeat(2, 1, 1)
        noise, timestep = batch.noise.repeat(2, 1, 1, 1), batch.timestep.repeat(2)
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        errors = self._errors(self.unet, noisy, timestep, text, noise)
        with torch.no_grad():
            reference = self._reference_errors(noisy, timestep, text, noise)
        chosen, rejected = (errors - reference).chunk(2)
        inside = -0.5 * self.beta * (chosen - rejected)
        loss = -logsigmoid(inside).mean()
        loss.backward()
        read = (loss, errors.mean(), reference.mean(), (inside > 0).float().mean(), inside.mean())
        self.logged = tuple(value.item() for value in read)
        return self.logged[0]

    def answer(self) -> Answer:
        """Loss and gradients of the next batch; the weights stay."""
        loss = self.micro_step(next(self.batches))
        return answer_of(loss, self.parameters)

    def micro_step_of_next(self) -> None:
        """Gradients of the next batch, which stay."""
        self.micro_step(next(self.batches))

    def drop_gradients(self) -> None:
        """As after a step."""
        self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step."""
        self.micro_step(next(self.batches))
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), MAX_GRAD_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """All that is held between steps."""
        return held_tensors([self.vae, self.text_encoder, self.unet, self.reference], self.optimiser)

    def _reference_errors(self, noisy: Tensor, timestep: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        network = self.reference
        if network is None:
            self.unet.disable_adapters()
            network = self.unet
        if self.joint_reference:
            errors = self._errors(network, noisy, timestep, text, noise)
        else:
            halves = zip(*(whole.chunk(2) for whole in (noisy, timestep, text, noise)), strict=True)
            errors = torch.cat([self._errors(network, *half) for half in halves])
        if self.reference is None:
            self.unet.enable_adapters()
        return errors

    @staticmethod
    def _errors(network: Any, noisy: Tensor, timestep: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return (network(noisy, timestep, text).sample.float() - target.float()).square().mean((1, 2, 3))


class OurStep:
    """mmalign's own step: `policy.prepare`, then `micro_step` and `take_step` of the training loop."""

    def __init__(
        self, policy: DiffusionPolicy, items: Sequence[Any], work: Path, size: Size, *, candidates: int | None
    ) -> None:
        """Args:
        policy: opened, and already away from its reference.
        items: collated micro-batches.
        work: folder for the run's output.
        size: of the toy.
        candidates: the setting `training.candidate_microbatch`.
        """
        optimiser = Choice(name="adamw", target=OPTIMISERS["adamw"], settings={"learning_rate": LEARNING_RATE})
        training = Training(
            steps=1_000_000,
            batch_size=size.batch_size,
            optimiser=optimiser,
            schedule="constant",
            max_grad_norm=MAX_GRAD_NORM,
            candidate_microbatch=candidates,
            mixed_precision="no",
        )
        self.policy = policy
        self.items = cycle(items)
        self.run = Run(
            accelerator=start(training, work),
            policy=policy,
            objective=Objective([Term(name="dpo", loss=LOSSES["dpo"], settings={"beta": BETA})]),
            training=training,
            order=Order(num_examples=size.num_pairs, batch_size=size.batch_size, accumulation=1, seed=SEED),
            output=work,
            config={},
            total=1_000_000,
        )
        self.run.network.train()

    def answer(self) -> Answer:
        """Loss and gradients of the next batch; the weights stay."""
        self.run.sums = {}
        self.run.micro_step(self.policy.prepare(next(self.items)), sync=True)
        total, count = self.run.sums["loss"]
        parameters = {name: p for name, p in self.policy.denoiser.core.named_parameters() if p.requires_grad}
        return answer_of(float(total / count), parameters)

    def micro_step_of_next(self) -> None:
        """Gradients of the next batch, which stay."""
        self.run.micro_step(self.policy.prepare(next(self.items)), sync=True)

    def drop_gradients(self) -> None:
        """As after a step."""
        self.run.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step."""
        self.run.take_step([self.policy.prepare(next(self.items))])

    def tensors(self) -> list[Tensor]:
        """All that is held between steps."""
        parts = [part for part in self.policy.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return held_tensors([*parts, self.policy.denoiser, self.policy._copy], self.run.optimiser)


def open_ours(
    folder: Path, size: Size, *, lora: bool, cache: Path | None = None, draws: int | None = None, caching: int | None = None
) -> DiffusionPolicy:
    """Open the policy as `mmalign train` does it; with `caching` as `mmalign prepare` does it."""
    adapter = DiffusionAdapter(
        family="sd15",
        model=str(folder),
        resolution=size.resolution,
        lora=Lora() if lora else None,
        cache=None if cache is None else str(cache),
        draws=draws,
    )
    return adapter.open(seed=SEED, caching=caching)


def move_away(policy: DiffusionPolicy, distance: float = DISTANCE) -> None:
    """Move the policy a little from its reference, always by the same: at equality every loss is log 2, and proves little.

    Args:
        policy: just opened.
        distance: in standard deviations of each trained tensor; of a LoRA in its own units.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            lora = policy.settings.lora is not None
            scale = 1.0 if lora else float(parameter.std(correction=0))
            parameter += distance * scale * torch.randn(parameter.shape, generator=generator)


def our_batches(policy: DiffusionPolicy, examples: Sequence[Example], size: Size) -> list[Any]:
    """Collated micro-batches, draw after draw."""
    groups = [examples[i : i + size.batch_size] for i in range(0, len(examples), size.batch_size)]
    return [policy.collate([policy.item(one, draw) for one in group]) for draw in range(size.draws) for group in groups]


def public_batches(policy: DiffusionPolicy, collated: Sequence[Any]) -> list[PublicBatch]:
    """The same micro-batches in the public script's form, with the very draws that `policy` makes."""
    out = []
    for batch in collated:
        pixels = dict(zip(batch["names"], batch["pixels"], strict=True))
        columns = zip(*batch["images"], strict=True)  # chosen names, rejected names
        draws = draws_of(policy, batch)
        out.append(
            PublicBatch(
                pixels=torch.stack([pixels[name] for column in columns for name in column]).float() / 127.5 - 1,
                tokens=policy.pipe.tokenizer(
                    batch["prompt"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
                ).input_ids,
                timestep=policy.settings.timesteps.build(draws.u, policy.schedule.num_timesteps)[:, 0],
                noise=draws.noise[:, 0],
                posterior=draws.posterior.transpose(0, 1).flatten(0, 1),
            )
        )
    return out


def draws_of(policy: DiffusionPolicy, batch: Any) -> Draws:
    """The very numbers that `policy` draws for a batch."""
    settings = policy.settings
    ways = {"prompt_dropout": settings.prompt_dropout, "timestep": settings.timestep, "noise": settings.noise}
    return drawn(batch, policy.latent_shape, seed=policy.seed, **ways)


def cycle(items: Sequence[Any]) -> Iterator[Any]:
    """The same items over and over."""
    while True:
        yield from items


def answer_of(loss: float, parameters: dict[str, Any]) -> Answer:
    """The loss and the gradients, which are taken away from the parameters."""
    gradient = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return Answer(loss, {name: torch.zeros(()) if value is None else value for name, value in gradient.items()})


def held_tensors(networks: Sequence[Any], optimiser: Any) -> list[Tensor]:
    """Weights, buffers and optimiser state."""
    held = [t for network in networks if network is not None for t in (*network.parameters(), *network.buffers())]
    held += [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    return held
