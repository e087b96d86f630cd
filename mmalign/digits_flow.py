"""The digits of `mmalign.digits` drawn by a small Stable Diffusion 3: rectified flow, joint attention, the same latents.

Autoencoder and tokenizer are those of a pretrained digits base; transformer and both text encoders, 0.8 million parameters of
the stock classes, are trained here. There is no T5, as in a Stable Diffusion 3 that was opened without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.digits import CAPTIONS, IMAGE_SIDE, MAX_TOKENS, NUM_TIMESTEPS, Base, descend, kept, progress, scans

SAMPLER_STEPS = 8
NUM_ZEROS = 256  # tokens that the stock pipeline puts in the place of a T5 that it lacks
TEXT_WIDTH = 32  # of each of the two text encoders


@dataclass(frozen=True, kw_only=True)
class FlowPretraining:
    """How long the flow base is trained.

    Args:
        steps: of 32 scans, with both text encoders.
    """

    steps: int = 500

    def __post_init__(self) -> None:
        """Refuse a number without meaning."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, want 1 or more.")


def flow_fingerprint(pretraining: FlowPretraining, base: Base, seed: int) -> str:
    """A hash of everything that decides the weights: settings, seed, the base that the autoencoder is from, this file."""
    recipe = json.dumps({**asdict(pretraining), "base": base.folder.name, "seed": seed}, sort_keys=True)
    return hashlib.sha256(recipe.encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def pretrained_flow(pretraining: FlowPretraining, base: Base, *, seed: int, cache: Path) -> Base:
    """The pretrained flow pipeline of this recipe and seed, from the cache or trained now; see `digits.pretrained`.

    Args:
        pretraining: how long.
        base: a digits base, whose autoencoder and tokenizer are taken.
        seed: of weights, order and noise.
        cache: folder of all bases.
    Raises:
        UserError: the cache cannot be written.
    """
    name = f"digits-flow-{flow_fingerprint(pretraining, base, seed)}"
    return kept(cache / name, lambda: pretrain_flow(pretraining, base), seed=seed)


def pretrain_flow(pretraining: FlowPretraining, base: Base) -> Any:
    """Train transformer and text encoders on the latents of the scans; returns a `StableDiffusion3Pipeline` in eval mode."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    vae: Any = AutoencoderKL.from_pretrained(base.folder / "vae")
    vae.register_to_config(shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(base.folder / "tokenizer")
    pixels, shown = scans()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(pixels, 64)])
    parts = _Parts(tokenizer)
    _train(parts, latents * vae.config.scaling_factor, shown, pretraining.steps)
    return StableDiffusion3Pipeline(
        transformer=parts.transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=1.0),
        vae=vae.eval(),
        text_encoder=parts.encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=parts.encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class _Parts(nn.Module):
    """What is trained, and what it says of noisy latents under some captions."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([_text_encoder(tokenizer) for _ in range(2)])
        self.transformer = _transformer()
        texts = [*CAPTIONS, ""]
        self.tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    def captions(self) -> tuple[Float[Tensor, "captions tokens width"], Float[Tensor, "captions pooled"]]:
        """Of all captions and the empty one: tokens, and pooled, as the stock pipeline joins two encoders; no zeros yet."""
        said = [encoder(self.tokens, output_hidden_states=True) for encoder in self.encoders]
        states = torch.cat([one.hidden_states[-2] for one in said], -1)
        return states, torch.cat([one.text_embeds for one in said], -1)


def _train(parts: _Parts, latents: Float[Tensor, "n c h w"], shown: Int[Tensor, " n"], steps: int) -> None:
    """Velocity noise - clean at logit-normal times, a tenth of the captions dropped; in the end the moving average."""
    from diffusers.training_utils import EMAModel

    parameters = list(parts.parameters())
    average = EMAModel(parameters, decay=0.995)
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 50, 1.0, 2 * (1 - step / steps)))
    with one_zero_for_all(parts.transformer):
        for _ in progress(steps, "flow transformer and text encoders"):
            picked = torch.randint(len(latents), (32,))
            caption = torch.where(torch.rand(32) < 0.1, len(CAPTIONS), shown[picked])
            clean = latents[picked]
            noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(32))
            states, pooled = parts.captions()
            said = parts.transformer(
                hidden_states=torch.lerp(clean, noise, sigma[:, None, None, None]),
                timestep=sigma * NUM_TIMESTEPS,
                encoder_hidden_states=nn.functional.pad(states, (0, 0, 0, 1))[caption],
                pooled_projections=pooled[caption],
            ).sample
            descend(nn.functional.mse_loss(said, noise - clean), optimiser, rate, parameters)
            average.step(parameters)
    average.copy_to(parameters)


@contextmanager
def one_zero_for_all(transformer: Any) -> Iterator[None]:
    """Inside, a last text token of zeros stands for the 256 of the stock pipeline, with the same result four times as fast.

    The zeros have no position, so that every layer says the same of all of them: to what they tell others, one key whose
    attention logit is raised by log 256 is equal.
    """
    stock = transformer.attn_processors
    transformer.set_attn_processor(_LastTokenManyTimes(NUM_ZEROS))
    try:
        yield
    finally:
        transformer.set_attn_processor(stock)


class _LastTokenManyTimes:
    """Joint attention of image tokens and text tokens, in which the last text token counts as `times` equal ones."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        def heads(value: Tensor) -> Tensor:
            return value.reshape(*value.shape[:2], attn.heads, -1).transpose(1, 2)

        of_image = [heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        of_text = [heads(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        for own, norms in ((of_image, (attn.norm_q, attn.norm_k)), (of_text, (attn.norm_added_q, attn.norm_added_k))):
            own[:2] = [value if norm is None else norm(value) for value, norm in zip(own[:2], norms, strict=True)]
        query, key, value = (torch.cat(two, 2) for two in zip(of_image, of_text, strict=True))
        count = key.shape[2]
        bias = torch.zeros(count).index_fill(0, torch.tensor(count - 1), math.log(self.times)).to(query)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(count, count))
        image, text = torch.split(mixed.transpose(1, 2).flatten(2), [hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), text if attn.context_pre_only else attn.to_add_out(text)


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _transformer() -> Any:
    """Four joint blocks of width 64 on single latents: 64 image tokens."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=IMAGE_SIDE // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIDE // 4,
        qk_norm="rms_norm",
    )
