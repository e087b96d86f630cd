"""The other side of the method benchmarks: micro-steps as the public scripts are built, written here from their description."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusion_variants import LEARNING_RATE, MAX_GRAD_NORM, answer_of, cycle, held_tensors
from measuring import Answer
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, relu

from mmalign.adapters.diffusion_policy import DiffusionPolicy

Condition = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PublicBatch:
    """What a public script's loader gives, and the draws of the step, made outside so that both sides see the same.

    Args:
        pixels: float32 in [-1, 1], a candidate at a time: all chosen images, then all rejected ones.
        tokens: of the prompts, for each tokenizer.
        sizes: what the network is told of each image beside the prompt, in the order of `pixels`.
        timestep: one a prompt. noise, posterior: one an image, in the order of `pixels`.
        scores: of each candidate, one row a prompt.
    """

    pixels: Tensor
    tokens: tuple[Tensor, ...]
    sizes: Condition
    timestep: Tensor
    noise: Tensor
    posterior: Tensor
    scores: Tensor | None


@dataclass(frozen=True, kw_only=True)
class PublicReplay:
    """A micro-batch of Diffusion-DRO, with the draws of its sampling.

    Args:
        experts: images and prompts.
        first: of an update, where the sampling policy becomes what the policy is.
        noise: x at the first timestep of each row.
        visited: timesteps of each row, the least noisy first.
        own: the part of the schedule whose state is kept.
    """

    experts: PublicBatch
    first: bool
    noise: Tensor
    visited: Tensor
    own: Tensor


@dataclass(frozen=True, kw_only=True)
class PublicTransitions:
    """Pairs of successors of one x_t each, as SPO's sampling leaves them: with their prompts already encoded.

    Args:
        noisy, better, worse: x_t and the two successors.
        timestep, previous: where the step starts and ends.
        condition, unconditional: of each pair.
    """

    noisy: Tensor
    better: Tensor
    worse: Tensor
    timestep: Tensor
    previous: Tensor
    condition: Condition
    unconditional: Condition


class PublicStep:
    """A micro-step of a public script, clip and AdamW. What it holds and computes follows the published structure.

    `reference`: `none` (MaPO), `own` (a frozen copy; with LoRA the adapter switched off) or `copy` (always a second network).
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        folder: Path,
        batches: Sequence[Any],
        loss: Callable[[PublicStep, Any], Tensor],
        *,
        reference: str,
        fault: float = 1.0,
    ) -> None:
        """Start from the weights of `policy`, in its mode (full or LoRA).

        Args:
            policy: ours, already moved away from its reference.
            folder: the pipeline.
            batches: used in turn; a list is the micro-batches of one update.
            loss: (this, micro-batch) -> loss with a graph.
            reference: see the class.
            fault: other than 1 plants a wrong factor in the loss, which the gate must find.
        """
        from peft import LoraConfig

        self.pipe = policy.family.pipeline_class().from_pretrained(folder)
        for name in policy.family.encoders:
            getattr(self.pipe, name).requires_grad_(False)
        self.family = policy.family.name
        self.network: Any = policy.family.core(self.pipe)
        lora = policy.settings.lora
        self.copy: Any = None
        self.sampling_copy: Any = None  # of Diffusion-DRO's sampler
        if reference == "copy" or (reference == "own" and lora is None):
            self.copy = copy.deepcopy(self.network).requires_grad_(False)
        if lora is not None:
            self.network.requires_grad_(False)
            targets = list(policy.family.lora_targets)
            self.network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets))
        self.network.load_state_dict(policy.denoiser.core.state_dict())
        self.network.train()
        self.noise = Noise(self.pipe)
        self.batches = cycle([one if isinstance(one, list) else [one] for one in batches])
        self.loss, self.fault = loss, fault
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(list(self.parameters.values()), lr=LEARNING_RATE, weight_decay=0.01)

    # --- what the gate and the clock ask for ----------------------------------------------------------------------

    def answer(self) -> Answer:
        """Loss and gradients of the next batch; the weights stay."""
        return answer_of(self.micro_step(), self.parameters)

    def micro_step(self) -> float:
        """Gradients of the next batch; returns its loss, which is read for the log as there."""
        parts, total = next(self.batches), 0.0
        for part in parts:
            loss = self.fault * self.loss(self, part) / len(parts)
            loss.backward()
            total += loss.item()
        return total

    def micro_step_of_next(self) -> None:
        """Gradients of the next batch, which stay."""
        self.micro_step()

    def drop_gradients(self) -> None:
        """As after a step."""
        self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step."""
        self.micro_step()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), MAX_GRAD_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """All that is held between steps."""
        parts = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return held_tensors([*parts, self.network, self.copy, self.sampling_copy], self.optimiser)

    # --- what the losses ask for ----------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pixels: Tensor, posterior: Tensor) -> Tensor:
        """A sample of the VAE's posterior, scaled; all images in one pass."""
        found, config = self.pipe.vae.encode(pixels).latent_dist, self.pipe.vae.config
        sample: Tensor = found.mean + found.std * posterior
        return (sample - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def text(self, tokens: Sequence[Tensor]) -> Condition:
        """The condition of each prompt, as the family's training scripts encode it."""
        if self.family == "sd15":
            return {"encoder_hidden_states": self.pipe.text_encoder(tokens[0])[0]}
        clips = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.pipe.text_encoder, self.pipe.text_encoder_2), tokens, strict=False)
        ]
        embeds = torch.cat([clip.hidden_states[-2] for clip in clips], -1)
        if self.family == "sdxl":
            return {"encoder_hidden_states": embeds, "text_embeds": clips[1][0]}
        t5 = self.pipe.text_encoder_3(tokens[2])[0]
        whole = torch.cat([pad(embeds, (0, t5.shape[-1] - embeds.shape[-1])), t5], -2)
        return {"encoder_hidden_states": whole, "pooled_projections": torch.cat([clip[0] for clip in clips], -1)}

    def predict(self, network: Any, noisy: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """One pass of the stock network."""
        condition = dict(condition)
        if self.family == "sd3":
            output: Tensor = network(hidden_states=noisy, timestep=timestep, **condition).sample
            return output
        embeds = condition.pop("encoder_hidden_states")
        added = {"added_cond_kwargs": condition} if condition else {}
        sample: Tensor = network(noisy, timestep, encoder_hidden_states=embeds, **added).sample
        return sample

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The second network, or the first with its adapter switched off; without a graph."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
            else:
                self.network.disable_adapters()
                yield self.network
                self.network.enable_adapters()


class Noise:
    """The training noise of a pipeline by the stock scheduler of its kind; timesteps are indices, noisier upwards."""

    def __init__(self, pipe: Any) -> None:
        from diffusers import DDPMScheduler

        self.flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
        self.scheduler = pipe.scheduler if self.flow else DDPMScheduler.from_config(pipe.scheduler.config)

    def added(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, what the network is given for the timestep, and what it should say."""
        if not self.flow:
            return self.scheduler.add_noise(clean, noise, timestep), timestep, noise
        falling = self.scheduler.config.num_train_timesteps - 1 - timestep
        sigma = self.scheduler.sigmas[falling].reshape(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise, self.scheduler.timesteps[falling], noise - clean

    def kept(self, timestep: Tensor) -> Tensor:
        """Cumulative product of the alphas, in double precision."""
        return self.scheduler.alphas_cumprod.double()[timestep].reshape(-1, 1, 1, 1)


def mapo_loss(side: PublicStep, batch: PublicBatch, scale: float) -> Tensor:
    """MaPO: encode both images and the prompt, one policy pass on the pair, no reference.

    mean(e_w) - 0.1 mean log sigma(scale (phi(e_w) - phi(e_l))),  phi(e) = s e / (exp(s e) - 1),  s = 1/2

    phi in double precision, where the published code loses the gate's last digits in float32; it costs no time.
    Source: Hong et al. 2024, arXiv v1, and the public code's structure as described.
    """
    count = len(batch.pixels) // len(batch.timestep)
    clean = side.latents(batch.pixels, batch.posterior)
    noisy, given, target = side.noise.added(clean, batch.noise, batch.timestep.repeat(count))
    condition = {name: value.repeat(count, *([1] * (value.ndim - 1))) for name, value in side.text(batch.tokens).items()}
    output = side.predict(side.network, noisy, given, {**condition, **batch.sizes})
    error = (output.float() - target.float()).square().mean((1, 2, 3)).double()
    phi = 0.5 * error / torch.expm1(0.5 * error)
    won, lost = phi.chunk(2)
    return error.chunk(2)[0].mean() - 0.1 * logsigmoid(scale * (won - lost)).mean()


def rank_dpo_loss(side: PublicStep, batch: PublicBatch, beta: float) -> Tensor:
    """RankDPO as a loop over the k images: encode, policy, reference, one after another; then the loss over all pairs.

    sum over i preferred to j of |G_i - G_j| |1/D_i - 1/D_j| -log sigma(-beta/2 (s_i - s_j)),  s = e - e_ref

    Source: Karthik et al. 2024, eq. 9; there is no public code, so the structure is the plain one of its algorithm.
    """
    assert batch.scores is not None
    rows = len(batch.timestep)
    text = side.text(batch.tokens)
    gaps = []
    for place in range(batch.scores.shape[1]):
        own = slice(place * rows, (place + 1) * rows)
        clean = side.latents(batch.pixels[own], batch.posterior[own])
        noisy, given, target = side.noise.added(clean, batch.noise[own], batch.timestep)
        condition = {**text, **{name: value[own] for name, value in batch.sizes.items()}}
        error = (side.predict(side.network, noisy, given, condition) - target).square().mean((1, 2, 3))
        with side.reference() as network:
            before = (side.predict(network, noisy, given, condition) - target).square().mean((1, 2, 3))
        gaps.append(error - before)
    s, scores = torch.stack(gaps, 1), batch.scores
    rank = 1 + (scores[:, None, :] > scores[:, :, None]).sum(2)  # scores of a list all differ here
    gain, discount = 2**scores - 1, 1 / torch.log(1 + rank)
    total = torch.zeros(())
    for i in range(scores.shape[1]):
        for j in range(scores.shape[1]):
            weight = ((gain[:, i] - gain[:, j]) * (discount[:, i] - discount[:, j])).abs() * (scores[:, i] > scores[:, j])
            total = total - (weight * logsigmoid(-0.5 * beta * (s[:, i] - s[:, j]))).mean()
    return total


def spo_loss(side: PublicStep, batch: PublicTransitions, guidance_scale: float) -> Tensor:
    """SPO's training phase: each branch goes through policy and reference, with guidance, though both share x_t.

    -log sigma(10 (log c_w - log c_l)),  c = clamp(exp(logp - logp_ref), 0.9, 1.1),  logp: mean log density of the DDIM step

    Source: Liang et al. 2024 and the public code's structure as described; DDIM of Song et al. 2020, eq. 12 and 16, eta 1.
    """
    ratios = []
    for successor in (batch.better, batch.worse):
        logp = _step_logp(side, side.network, batch, successor, guidance_scale)
        with side.reference() as network:
            before = _step_logp(side, network, batch, successor, guidance_scale)
        ratios.append((logp - before).exp().clamp(0.9, 1.1).log())
    return -logsigmoid(10 * (ratios[0] - ratios[1])).mean()


def _step_logp(side: PublicStep, network: Any, batch: PublicTransitions, successor: Tensor, guidance_scale: float) -> Tensor:
    both = {name: torch.cat([batch.unconditional[name], batch.condition[name]]) for name in batch.condition}
    output = side.predict(network, batch.noisy.repeat(2, 1, 1, 1), batch.timestep.repeat(2), both)
    plain, prompted = output.chunk(2)
    noise = plain + guidance_scale * (prompted - plain)
    now, after = side.noise.kept(batch.timestep), side.noise.kept(batch.previous)
    variance = (1 - after) / (1 - now) * (1 - now / after)  # eq. 16
    clean = (batch.noisy - (1 - now).sqrt().float() * noise) / now.sqrt().float()
    mean = after.sqrt().float() * clean + (1 - after - variance).sqrt().float() * noise  # eq. 12
    std = variance.sqrt().float()
    density = -((successor - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return density.mean((1, 2, 3))


class DroSampler:
    """The online part of Diffusion-DRO as published: a whole trajectory for each state, and one scheduler object a sample.

    DPM-Solver++(2M) of diffusers on the sample's own jittered timesteps, without guidance, by a copy of the policy that follows
    it once an update. One state of each trajectory, and what the policy says there, is kept.

    Source: Wu et al. 2025, algorithm 1, and the public code's structure as described.
    """

    def __init__(self) -> None:
        """Not copied yet."""
        self.network: Any = None

    @torch.no_grad()
    def __call__(self, side: PublicStep, given: PublicReplay, condition: Condition) -> tuple[Tensor, Tensor]:
        """States and outputs, one a row."""
        from diffusers import DPMSolverMultistepScheduler

        if self.network is None:
            side.sampling_copy = self.network = copy.deepcopy(side.network).requires_grad_(False)
        if given.first:
            self.network.load_state_dict(side.network.state_dict())
        self.network.eval()
        solvers, config = [], side.noise.scheduler.config
        for row in given.visited:
            solver = DPMSolverMultistepScheduler.from_config(config, lower_order_final=False)
            solver.set_timesteps(timesteps=row.flip(0).tolist())
            solvers.append(solver)
        current, states, outputs = given.noise, [], []
        for place in range(given.visited.shape[1] - 1, -1, -1):
            now = given.visited[:, place]
            said = side.predict(self.network, current, now, condition)
            states.append(current)
            outputs.append(said)
            rows = zip(solvers, said, now, current, strict=True)
            stepped = [solver.step(one[None], t, x[None], return_dict=False)[0] for solver, one, t, x in rows]
            current = torch.cat(stepped)
        kept = given.visited.shape[1] - 1 - given.own
        rows_of = torch.arange(len(kept))
        return torch.stack(states)[kept, rows_of], torch.stack(outputs)[kept, rows_of]


def dro_loss(side: PublicStep, given: PublicReplay, sampler: DroSampler) -> Tensor:
    """Diffusion-DRO, a micro-step: sample anew, encode the experts, one pass of policy and reference on experts and own states.

    mean max((e_expert - e_ref_expert) - (e_own - e_ref_own) + 0.001, 0)

    Source: Wu et al. 2025, and the public code's structure as described.
    """
    batch = given.experts
    text = side.text(batch.tokens)
    state, said = sampler(side, given, text)
    clean = side.latents(batch.pixels, batch.posterior)
    noisy, told, target = side.noise.added(clean, batch.noise, batch.timestep)
    both = {name: value.repeat(2, 1, 1) for name, value in text.items()}
    inputs = torch.cat([noisy, state]), told.repeat(2), both
    target = torch.cat([target, said])
    error = (side.predict(side.network, *inputs) - target).square().mean((1, 2, 3))
    with side.reference() as network:
        before = (side.predict(network, *inputs) - target).square().mean((1, 2, 3))
    expert, own = (error - before).chunk(2)
    return relu(expert - own + 0.001).mean()
