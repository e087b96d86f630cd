"""The step-aware preference model of SPO: a CLIP whose image tower knows the timestep, equal to the CLIP it starts from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu
from torch.utils.checkpoint import checkpoint

from mmalign.checkpoints import write_folder
from mmalign.errors import UserError
from mmalign.families.parts import tiny_text_config, tiny_tokenizer
from mmalign.models.quiet import quiet_libraries
from mmalign.models.tiny import TINY
from mmalign.scorers.checkpoints import first_line, load_checked, read_checkpoint
from mmalign.scorers.clip import load_transformers_clip

ARCHITECTURE = "mmalign step-aware CLIP"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
NUM_FREQUENCIES = 128
MAX_PERIOD = 10_000.0
TINY_SIDE = 16  # pixels of the tiny CLIP

# The name of a weight in the published checkpoints -> its name here.
PUBLISHED = (
    (re.compile(r"^model\.vision_model\.encoder\.layers\.(\d+)\.adaLN_modulation\.1\."), r"modulations.\1."),
    (re.compile(r"^model\.vision_model\.adaLN_modulation\.1\."), "final_modulation."),
    (re.compile(r"^model\.t_embedder\.mlp\."), "time_embedding."),
    (re.compile(r"^model\."), "clip."),
)


class StepAwareCLIP(nn.Module):
    """A `CLIPModel` with DiT's adaptive layer norm in each block of its image tower, driven by the timestep.

    score = exp(logit_scale) cos(image features of x0-hat at t, text features)
    block:  x + gate_1 attention(LN(x) (1 + scale_1) + shift_1), then the same around the MLP
    shift, scale, gate = Linear(SiLU(time embedding));  after the last layer norm one more shift and scale

    Built, it is its CLIP exactly, at every timestep: all modulation weights 0, gate biases 1, shift and scale biases 0. (The
    published class leaves all biases 1, which its training script repairs.) The text tower knows no time.

    Source: Liang et al. 2024 (SPO), section 3.2 and supplement, with the published code of its model.
    """

    def __init__(self, clip: Any, *, seed: int = 0) -> None:
        """Wrap a transformers `CLIPModel`, which is not copied.

        Args:
            clip: the model to start from; published: PickScore v1.
            seed: of the first weights of the time embedding.
        """
        super().__init__()
        width, depth = clip.config.vision_config.hidden_size, clip.config.vision_config.num_hidden_layers
        self.clip = clip
        self.gradient_checkpointing = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, second = nn.Linear(2 * NUM_FREQUENCIES, width), nn.Linear(width, width)
            for layer in (first, second):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.time_embedding = nn.Sequential(first, nn.SiLU(), second)
        modulations = [nn.Linear(width, 6 * width) for _ in range(depth)]
        self.final_modulation = nn.Linear(width, 2 * width)
        for modulation in (*modulations, self.final_modulation):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
        for modulation in modulations:
            with torch.no_grad():
                modulation.bias.view(6, width)[[2, 5]] = 1.0  # the gates
        self.modulations = nn.ModuleList(modulations)
        self.to(clip.device, clip.dtype)

    def forward(
        self,
        pixels: Float[Tensor, "batch k 3 height width"],
        timestep: Int[Tensor, "batch k"],
        tokens: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch k"]:
        """Scores of k images a prompt, each at its own timestep; one pass of the image tower, one of the text tower.

        Args:
            pixels: as `ClipInputs.pixels` gives them.
            timestep: index in the diffusion schedule, 0 ... 999; 0 is a clean image.
            tokens: as `ClipInputs.tokens` gives them.
        """
        image = self.image_features(pixels.flatten(0, 1), timestep.flatten(0, 1))
        text = self.text_features(tokens).repeat_interleave(pixels.shape[1], dim=0)
        return self.score(image, text).view(pixels.shape[:2])

    def score(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """exp(logit_scale) cos(image, text), in float32 at least."""
        image, text = (features.to(torch.promote_types(features.dtype, torch.float32)) for features in (image, text))
        scale: Tensor = self.clip.logit_scale.exp()
        return scale * torch.cosine_similarity(image, text, dim=-1)

    def text_features(self, tokens: Int[Tensor, "n seq"]) -> Float[Tensor, "n dim"]:
        """Of prompts; the tower is causal and read at the end token, so that padding needs no mask."""
        features: Tensor = self.clip.get_text_features(tokens).pooler_output
        return features

    def image_features(self, pixels: Float[Tensor, "n 3 height width"], timestep: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """Of pixels at a timestep, not normalised."""
        tower = self.clip.vision_model
        condition = silu(self.embed_time(timestep))
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.to(self.clip.dtype)))
        for layer, modulation in zip(tower.encoder.layers, self.modulations, strict=True):
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(modulated_block, layer, hidden, modulation(condition), use_reentrant=False)
            else:
                hidden = modulated_block(layer, hidden, modulation(condition))
        pooled = modulated_pooling(tower.post_layernorm, hidden, self.final_modulation(condition))
        features: Tensor = self.clip.visual_projection(pooled)
        return features

    def embed_time(self, timestep: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """The time embedding; frequencies and angles are float32 whatever the weights are (bfloat16 makes 751 to 752)."""
        embedded: Tensor = self.time_embedding(sinusoid(timestep).to(self.clip.dtype))
        return embedded


def sinusoid(timestep: Int[Tensor, " n"]) -> Float[Tensor, "n 256"]:
    """cos(t w_i) and then sin(t w_i), w_i = 10000^(-i / 128), i = 0 ... 127; float32.

    Source: Peebles & Xie 2023 (DiT), as in the published code.
    """
    exponent = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=timestep.device) / NUM_FREQUENCIES
    angles = timestep[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulated_block(
    layer: Any, hidden: Float[Tensor, "n seq dim"], modulation: Float[Tensor, "n six_dim"]
) -> Float[Tensor, "n seq dim"]:
    """One block of a CLIP image tower under (shift, scale, gate) of its attention and (shift, scale, gate) of its MLP."""
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unsqueeze(1).chunk(6, dim=2)
    attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden) * (1 + scale_1) + shift_1, attention_mask=None)
    hidden = hidden + gate_1 * attended
    widened: Tensor = layer.mlp(layer.layer_norm2(hidden) * (1 + scale_2) + shift_2)
    return hidden + gate_2 * widened


def modulated_pooling(
    norm: nn.Module, hidden: Float[Tensor, "n seq dim"], modulation: Float[Tensor, "n two_dim"]
) -> Float[Tensor, "n dim"]:
    """The class token through the last layer norm, under (shift, scale)."""
    shift, scale = modulation.chunk(2, dim=1)
    pooled: Tensor = norm(hidden[:, 0])
    return pooled * (1 + scale) + shift


@dataclass(frozen=True, kw_only=True)
class ClipInputs:
    """What a CLIP reads: its processor's tokens, and pixels of its size.

    Args:
        processor: a transformers `CLIPProcessor`.
        side: of the square that the image tower takes, in pixels.
        max_tokens: of a prompt; longer ones are cut, end token kept.
    """

    processor: Any
    side: int
    max_tokens: int

    def tokens(self, prompts: Sequence[str]) -> Int[Tensor, "n seq"]:
        """Token ids, padded and cut to the model's context."""
        tokens = self.processor.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids
        return ids

    def pixels(
        self, pixels: Float[Tensor, "n 3 h w"], *, resize: Literal["squash", "shortest"]
    ) -> Float[Tensor, "n 3 height width"]:
        """Of pixels in [0, 1]: bicubic without antialiasing, cut to [0, 1], normalised.

        Source: the published code of SPO's model, which resizes so, unlike the processor of its CLIP.
        Args:
            pixels: of any size.
            resize: squash: both sides to the model's (published in training); shortest: the shorter side, and a centre crop
                (published in scoring). The same for squares.
        """
        height, width = pixels.shape[-2:]
        scale = self.side / min(height, width)
        sides = (int(height * scale + 0.5), int(width * scale + 0.5))
        target = (self.side, self.side) if resize == "squash" else sides
        resized = interpolate(pixels, target, mode="bicubic", align_corners=False).clamp(0, 1)
        top, left = ((have - self.side) // 2 for have in target)
        cropped = pad(resized, (-left, left + self.side - target[1], -top, top + self.side - target[0]))
        kind = self.processor.image_processor
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (kind.image_mean, kind.image_std))
        return (cropped - mean) / std


def open_step_aware(
    clip: str,
    *,
    revision: str | None = None,
    processor: str | None = None,
    published: str | None = None,
    seed: int = 0,
    place: str = "clip",
) -> tuple[StepAwareCLIP, ClipInputs]:
    """A step-aware model on the CPU, in float32, and what it reads.

    Args:
        clip: a folder that `save_step_aware` wrote; or a CLIP to start from: a folder, a hub id such as
            `yuvalkirstain/PickScore_v1`, or `tiny` for a tiny random one.
        revision: of a hub id.
        processor: folder or hub id of the processor, where it does not lie with the model. PickScore v1:
            `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
        published: weights file that the authors' code wrote (`final_ckpt.bin`), which `clip` gives the shape for.
        seed: of the first weights of the time embedding.
        place: the setting that a message names: `source.scorer.path`.
    Raises:
        UserError: nothing there, or keys missing, unexpected or of another shape, listed.
    """
    if clip == TINY:
        network, own = _tiny_clip()
    elif (saved := _saved_config(Path(clip).expanduser())) is not None:
        return _load(Path(clip).expanduser(), saved, place)
    else:
        network, own = load_transformers_clip(place=place, model=clip, revision=revision, processor=processor, device="cpu")
    model = StepAwareCLIP(network, seed=seed)
    if published is not None:
        neighbour = ".".join([*place.split(".")[:-1], "published"])
        load_checked(model, read_checkpoint(published, place=neighbour), place=neighbour, rename=_published_name)
    return model, _inputs(model, own)


def save_step_aware(model: StepAwareCLIP, inputs: ClipInputs, folder: Path | str) -> Path:
    """Write weights, config and processor as a folder that `open_step_aware` reads; whole or not at all.

    Returns: the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    with write_folder(folder) as scratch:
        with quiet_libraries():
            inputs.processor.save_pretrained(scratch)
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        config = {"architecture": ARCHITECTURE, "clip": model.clip.config.to_dict()}
        (scratch / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    return folder


def _load(folder: Path, config: dict[str, Any], place: str) -> tuple[StepAwareCLIP, ClipInputs]:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    with quiet_libraries():
        network = CLIPModel(CLIPConfig.from_dict(config["clip"]))
        try:
            processor = CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError) as fault:
            raise UserError(
                f"{place}: got {folder}, which has no CLIP processor ({first_line(fault)}). Copy the folder again."
            ) from fault
    model = StepAwareCLIP(network.float().eval())
    whole = f"{place} ({folder})"
    load_checked(model, read_checkpoint(folder, file=WEIGHTS, place=whole), place=whole)
    return model.requires_grad_(False), _inputs(model, processor)


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """The config of a folder that `save_step_aware` wrote; None for any other place."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise UserError(f"{file}: not readable as JSON ({fault}). Copy or save the model again.") from fault
    return config if config.get("architecture") == ARCHITECTURE else None


def _inputs(model: StepAwareCLIP, processor: Any) -> ClipInputs:
    config = model.clip.config
    return ClipInputs(
        processor=processor,
        side=config.vision_config.image_size,
        max_tokens=config.text_config.max_position_embeddings,
    )


def _published_name(key: str) -> str | None:
    if key.endswith("position_ids"):
        return None
    for pattern, name in PUBLISHED:
        if pattern.match(key):
            return pattern.sub(name, key)
    return key


def _tiny_clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tiny_text_config(16).to_dict(),
        vision_config={**shape, "image_size": TINY_SIDE, "patch_size": 8},
        projection_dim=8,
    )
    size = {"size": {"shortest_edge": TINY_SIDE}, "crop_size": {"height": TINY_SIDE, "width": TINY_SIDE}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CLIPModel(config).eval().requires_grad_(False)
    return network, CLIPProcessor(image_processor=CLIPImageProcessor(**size), tokenizer=tiny_tokenizer())
