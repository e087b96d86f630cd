"""A small real text-to-image pipeline, pretrained here on real scanned digits: the base model of `mmalign quickstart`.

The data are the 1797 scans of scikit-learn's `load_digits`; every part is the stock diffusers or transformers class, 1.7
million parameters in all, and the folder that is saved opens like any other Stable Diffusion folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.scorers.digits import DIGIT_WORDS, SCAN_MAXIMUM

logger = logging.getLogger(__name__)

IMAGE_SIDE = 32
CAPTION = "a handwritten digit {}"
CAPTIONS = tuple(CAPTION.format(word) for word in DIGIT_WORDS)
MAX_TOKENS = 16
NUM_TIMESTEPS = 1000
SCHEDULE = {"num_train_timesteps": NUM_TIMESTEPS, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLER_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How long the base is trained. The rest of the recipe is measured for these numbers and stands in the code.

    Args:
        vae_steps: of 8 scans.
        unet_steps: of 32 scans, with the text encoder.
    """

    vae_steps: int = 450
    unet_steps: int = 500

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        for name in ("vae_steps", "unet_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained pipeline: its folder, and whether it stood there already."""

    folder: Path
    reused: bool


def default_cache() -> Path:
    """The user's cache folder for mmalign: $XDG_CACHE_HOME/mmalign, else ~/.cache/mmalign."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign"


def fingerprint(pretraining: Pretraining, seed: int) -> str:
    """A hash of everything that decides the weights: settings, seed and the text of this file."""
    recipe = json.dumps({**asdict(pretraining), "seed": seed}, sort_keys=True)
    return hashlib.sha256(recipe.encode() + Path(__file__).read_bytes()).hexdigest()[:12]


def pretrained(pretraining: Pretraining, *, seed: int, cache: Path) -> Base:
    """The pretrained pipeline of this recipe and seed, from the cache or trained now.

    Raises:
        UserError: the cache cannot be written.
    """
    return kept(cache / f"digits-{fingerprint(pretraining, seed)}", lambda: pretrain(pretraining), seed=seed)


def kept(folder: Path, build: Callable[[], Any], *, seed: int) -> Base:
    """The pipeline in this folder of a cache, or the one that `build` makes now, under this seed.

    It is written beside and renamed: a folder that stands is complete, whatever was killed.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = folder.parent
    if (folder / "model_index.json").is_file():
        return Base(folder=folder, reused=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".digits-"))
    except OSError as fault:
        raise UserError(f"cache: got {cache}, which cannot be written ({fault}). Name another folder with cache=...") from fault
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build().save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "model_index.json").is_file():  # else another process was quicker with the same weights
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Base(folder=folder, reused=False)


def pretrain(pretraining: Pretraining) -> Any:
    """Train autoencoder, then UNet with text encoder, on the scans; returns a `StableDiffusionPipeline` in eval mode."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pixels, digits = scans()
    vae = _trained_vae(pixels, pretraining.vae_steps)
    latents = _scaled_latents(vae, pixels)
    tokenizer = caption_tokenizer()
    unet, text_encoder = _trained_unet(latents, digits, tokenizer, pretraining.unet_steps)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def scans() -> tuple[Float[Tensor, "n 3 side side"], Int[Tensor, " n"]]:
    """All scans of `load_digits` as pixels in [-1, 1], bicubically enlarged from 8 x 8, and the digits they show."""
    from sklearn.datasets import load_digits

    flat, digits = load_digits(return_X_y=True)
    small = torch.from_numpy(flat).float().reshape(-1, 1, 8, 8) / (SCAN_MAXIMUM / 2) - 1
    large = nn.functional.interpolate(small, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", align_corners=False)
    return large.clamp(-1, 1).repeat(1, 3, 1, 1), torch.from_numpy(digits)


def caption_tokenizer() -> Any:
    """A `CLIPTokenizer` with one token for each word of the captions; other words fall back to their bytes.

    The merges of a word are those that byte-pair encoding still lacks to spell it, so that no word breaks an earlier one.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for caption in CAPTIONS for word in caption.split()):
        pieces = _encoded([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    entries = [*characters, *(character + "</w>" for character in characters), *(left + right for left, right in merges)]
    vocab = {entry: index for index, entry in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _encoded(pieces: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: always the earliest merge that applies."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        found = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not found:
            return pieces
        _, place = min(found)
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2 :]]


def _trained_vae(pixels: Float[Tensor, "n 3 side side"], steps: int) -> Any:
    """L1 + MSE + 1e-6 KL; a small posterior variance to start with lets reconstruction lead."""
    from diffusers import AutoencoderKL

    channels = (16, 32, 32)
    vae: Any = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIDE,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.98), fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 30, 1.0) * (1 - step / steps) ** 0.8)
    for _ in progress(steps, "autoencoder"):
        batch = pixels[torch.randint(len(pixels), (8,))]
        posterior = vae.encode(batch).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        loss = nn.functional.l1_loss(rebuilt, batch) + nn.functional.mse_loss(rebuilt, batch) + 1e-6 * posterior.kl().mean()
        descend(loss, optimiser, rate, list(vae.parameters()))
    return vae


@torch.no_grad()
def _scaled_latents(vae: Any, pixels: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n c h w"]:
    """The latents of all scans at unit variance, which becomes the autoencoder's scaling factor."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(pixels, 64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def _trained_unet(latents: Float[Tensor, "n c h w"], digits: Int[Tensor, " n"], tokenizer: Any, steps: int) -> tuple[Any, Any]:
    """Denoising with epsilon prediction, a tenth of the captions dropped; returns UNet and text encoder, averaged."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    text_encoder, unet = _text_encoder(tokenizer), _unet()
    schedule: Any = DDPMScheduler(**SCHEDULE)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.995)
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 50, 1.0, 2 * (1 - step / steps)))
    texts = [*CAPTIONS, ""]
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    for _ in progress(steps, "UNet and text encoder"):
        picked = torch.randint(len(latents), (32,))
        caption = torch.where(torch.rand(32) < 0.1, len(CAPTIONS), digits[picked])
        noise, timestep = torch.randn_like(latents[picked]), torch.randint(NUM_TIMESTEPS, (32,))
        noisy = schedule.add_noise(latents[picked], noise, timestep)
        states = text_encoder(tokens).last_hidden_state[caption]
        loss = nn.functional.mse_loss(unet(noisy, timestep, states).sample, noise)
        descend(loss, optimiser, rate, parameters)
        average.step(parameters)
    average.copy_to(parameters)
    return unet, text_encoder


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet() -> Any:
    """Attention at 4 x 4 only, which is why it is quick."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIDE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def descend(loss: Tensor, optimiser: Any, rate: Any, parameters: list[nn.Parameter]) -> None:
    """One step against the gradient of the loss, clipped at norm 1."""
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    rate.step()


def progress(steps: int, what: str) -> Any:
    """The numbers of so many steps, shown as a bar."""
    from tqdm import tqdm

    return tqdm(range(steps), desc=what)
