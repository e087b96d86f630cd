"""SPO's sampling phase on both sides: branches, guesses, decoding, a step-aware CLIP, and the pairs that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from method_peers import Condition, PublicStep
from torch import Tensor

from mmalign.cache import content_key
from mmalign.families.parts import tiny_text_config, tiny_tokenizer
from mmalign.models.step_aware import ClipInputs, StepAwareCLIP, save_step_aware
from mmalign.sources.rollouts import RolloutStream

# By FLOPs a score costs about half a UNet pass of SD 1.5's toy, as PickScore's CLIP does of SD 1.5; its text tower less.
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 4}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
SIDE = 64
TEXT_WIDTH = 64


def save_scorer(folder: Path) -> Path:
    """A random step-aware CLIP, as `open_step_aware` reads it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    text = {**tiny_text_config(TEXT_WIDTH).to_dict(), **TEXT}
    config = CLIPConfig(text_config=text, vision_config={**VISION, "image_size": SIDE, "patch_size": 8}, projection_dim=64)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CLIPModel(config).eval().requires_grad_(False)
    processor = CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=tiny_tokenizer())
    reads = ClipInputs(processor=processor, side=SIDE, max_tokens=config.text_config.max_position_embeddings)
    return save_step_aware(StepAwareCLIP(network, seed=0), reads, folder)


@dataclass(frozen=True, kw_only=True)
class PublicRound:
    """What a round of sampling is given, on both sides.

    Args:
        prompts: sampled at once.
        timesteps, previous: the sampler's steps.
        alone: number of steps before the first branching.
        start: x_T. stepped: noise of each step alone. branched: noise of the branches of each later step.
        chosen: which branch of each prompt goes on, of each later step.
        condition, unconditional: of each prompt, encoded ahead.
    """

    prompts: list[str]
    timesteps: Tensor
    previous: Tensor
    alone: int
    start: Tensor
    stepped: list[Tensor]
    branched: list[Tensor]
    chosen: list[Tensor]
    condition: Condition
    unconditional: Condition


def save_small_decoder(folder: Path, channels: int) -> Path:
    """A random `AutoencoderTiny` with TAESD's blocks, made for latents of an eighth of the pixels' sides.

    Args:
        folder: where to.
        channels: of each of its levels. TAESD: 64.
    """
    from diffusers import AutoencoderTiny

    wide = {name: (channels,) * 4 for name in ("encoder_block_out_channels", "decoder_block_out_channels")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderTiny(**wide).save_pretrained(folder)
    return folder


def public_round(stream: RolloutStream, prompts: list[str], keys: Sequence[str]) -> PublicRound:
    """The draws that `stream` makes for these prompts, one key each."""
    generators = [torch.Generator().manual_seed(int(content_key(key)[:15], 16)) for key in keys]
    shape, count = stream.policy.latent_shape, stream.settings.num_candidates

    def drawn(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=one) for one in generators])

    start = drawn(*shape)
    stepped = [drawn(*shape) for _ in stream.segments.alone]
    branched, chosen = [], []
    for _ in stream.segments.parts:
        branched.append(drawn(count, *shape))
        chosen.append(torch.tensor([int(torch.randint(count, (), generator=one)) for one in generators]))
    return PublicRound(
        prompts=prompts,
        timesteps=stream.grid.timesteps,
        previous=stream.grid.previous,
        alone=len(stream.segments.alone),
        start=start,
        stepped=stepped,
        branched=branched,
        chosen=chosen,
        condition=stream.policy.conditions(prompts),
        unconditional=stream.policy.unconditional(len(prompts)),
    )


class SpoSampler:
    """SPO's sampling phase as published: all branches of all prompts decoded together, their prompts read for each image.

    Source: Liang et al. 2024, section 3, and the public code's structure as described; DDIM of Song et al. 2020, eta 1.
    """

    def __init__(self, given: PublicRound, scorer: StepAwareCLIP, reads: ClipInputs, guidance_scale: float) -> None:
        """Args:
        given: the round.
        scorer, reads: the step-aware CLIP.
        guidance_scale: of every pass.
        """
        self.given, self.scorer, self.reads, self.guidance_scale = given, scorer, reads, guidance_scale

    @torch.no_grad()
    def __call__(self, side: PublicStep) -> tuple[Tensor, Tensor]:
        """x_t and the better and the worse successor of every pair: step by step, prompt by prompt."""
        given, last = self.given, len(self.given.timesteps) - 1
        current, states, successors = given.start, [], []
        said = self._said(side, current, given.timesteps[0])
        rows = torch.arange(len(current))
        for place in range(last + 1):
            following = given.timesteps[min(place + 1, last)]
            if place < given.alone:
                current = self._stepped(side, place, current, said, given.stepped[place])
                said = self._said(side, current, following)
                continue
            number = place - given.alone
            noise = given.branched[number]
            branches = torch.stack([self._stepped(side, place, current, said, one) for one in noise.unbind(1)], 1)
            flat = branches.flatten(0, 1)
            outputs = None if place == last else self._said(side, flat, following)
            clean = flat if outputs is None else self._clean(side, flat, outputs, following)
            scores = self._scores(side, clean, following * (place < last)).view(len(rows), -1)
            best, worst = scores.argmax(1), scores.argmin(1)
            states.append(current)
            successors.append(torch.stack([branches[rows, best], branches[rows, worst]], 1))
            current = branches[rows, given.chosen[number]]
            said = said if outputs is None else outputs.view_as(branches)[rows, given.chosen[number]]
        return torch.cat(states), torch.cat(successors)

    def _said(self, side: PublicStep, noisy: Tensor, timestep: Tensor) -> Tensor:
        count = len(noisy) // len(self.given.prompts)
        both = {
            name: torch.cat([self.given.unconditional[name], value]).repeat_interleave(count, 0)
            for name, value in self.given.condition.items()
        }
        output = side.predict(side.network, noisy.repeat(2, 1, 1, 1), timestep.expand(2 * len(noisy)), both)
        plain, prompted = output.chunk(2)
        return plain + self.guidance_scale * (prompted - plain)

    def _clean(self, side: PublicStep, noisy: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        now = side.noise.kept(timestep)
        return (noisy - (1 - now).sqrt().float() * noise) / now.sqrt().float()

    def _stepped(self, side: PublicStep, place: int, noisy: Tensor, said: Tensor, noise: Tensor) -> Tensor:
        now, after = (side.noise.kept(times[place]) for times in (self.given.timesteps, self.given.previous))
        variance = (1 - after) / (1 - now) * (1 - now / after)
        clean = self._clean(side, noisy, said, self.given.timesteps[place])
        mean = after.sqrt().float() * clean + (1 - after - variance).sqrt().float() * said
        return mean + variance.sqrt().float() * noise

    def _scores(self, side: PublicStep, clean: Tensor, timestep: Tensor) -> Tensor:
        count = len(clean) // len(self.given.prompts)
        vae = side.pipe.vae
        pixels = (vae.decode(clean / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        image = self.scorer.image_features(self.reads.pixels(pixels, resize="shortest"), timestep.expand(len(pixels)))
        text = self.scorer.text_features(self.reads.tokens([p for p in self.given.prompts for _ in range(count)]))
        return self.scorer.score(image, text)


def our_round(stream: RolloutStream, prompts: Sequence[str], keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The same pairs by mmalign, whose scorer has not seen the prompts yet."""
    scorer: Any = stream.scorer
    scorer.text.rows.clear()
    pairs, _ = stream._sampled(list(prompts), list(keys))
    return torch.cat([pair.noisy for pair in pairs]), torch.stack([pair.next_noisy for pair in pairs])
