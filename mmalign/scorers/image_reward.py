"""ImageReward v1: a BLIP that reads image and prompt together, with a linear head; differentiable to the pixels."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.checkpoints import first_line, load_checked, read_checkpoint
from mmalign.scorers.clip import PixelPreprocess, check_lengths, check_pixels

logger = logging.getLogger(__name__)

MAX_TOKENS = 35  # [CLS] and [SEP] included
RAW_MEAN, RAW_STD = 0.16717362830052426, 1.0333394966054072  # of the raw head, over the authors' data
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BLIP_TOKENS = ("[DEC]", "[ENC]")  # rows 30522 and 30523 of BLIP's embedding, after BERT's own words

# Salesforce's names on the left, transformers' on the right; the text encoder's are the same in both.
VISION_NAMES = (
    (r"cls_token", r"embeddings.class_embedding"),
    (r"pos_embed", r"embeddings.position_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"post_layernorm.\1"),
)
# BLIP's projections for contrastive search and a buffer of positions: in the published file, not part of the score.
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


@dataclass(frozen=True, kw_only=True)
class BlipSizes:
    """Sizes of the network; the defaults are the published ones, BLIP-large with its text encoder of BERT-base's shape."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 30524
    max_positions: int = 512
    head_widths: tuple[int, ...] = (1024, 128, 64, 16, 1)


class RewardNetwork(nn.Module):
    """ViT, text encoder with cross attention to its output, and five linear layers on the first token.

    The layer norms' epsilons are Salesforce's: 1e-6 in the ViT (transformers' default is 1e-5), 1e-12 in the text encoder.
    """

    def __init__(self, sizes: BlipSizes) -> None:
        """Random weights; `load_image_reward` fills them."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            encoder_hidden_size=sizes.vision_width,
            vocab_size=sizes.vocab_size,
            max_position_embeddings=sizes.max_positions,
            layer_norm_eps=1e-12,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # transformers' name for "has cross attention"; the forward stays bidirectional
        )
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        widths = (sizes.text_width, *sizes.head_widths)
        layers = [nn.Linear(widths[i], widths[i + 1]) for i in range(len(sizes.head_widths))]
        # Dropout has no effect here, but it counts in the published numbering: 0, 2, 4, 6, 7.
        dropouts = [nn.Dropout(rate) for rate in (0.2, 0.2, 0.1)]
        mixed = [layer for pair in zip(layers, dropouts, strict=False) for layer in pair]
        self.mlp = nn.Sequential(*mixed, *layers[len(dropouts) :])

    def forward(
        self, pixels: Float[Tensor, "n 3 size size"], tokens: Int[Tensor, "n seq"], mask: Int[Tensor, "n seq"]
    ) -> Float[Tensor, " n"]:
        """The raw score, before it is standardised."""
        image = self.vision(pixels).last_hidden_state
        hidden = self.text(tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        raw: Tensor = self.mlp(hidden[:, 0]).squeeze(-1)
        return raw


@dataclass(kw_only=True)
class ImageReward:
    """A frozen reward network as a scorer (see `image_reward`)."""

    name: str = "image_reward"
    batch_size: int
    device: torch.device
    network: RewardNetwork
    tokenizer: Any
    preprocess: PixelPreprocess
    _told: bool = field(default=False, init=False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i. On the CPU, float32."""
        check_lengths(self.name, prompts, len(images))
        scores = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores.append(self._score(prompts[part], self.preprocess.of_images(images[part])).cpu())
        return torch.cat(scores)

    def score_pixels(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The same score of pixels in [0, 1], with a gradient: for training through the scorer. One forward, not split."""
        check_pixels(self.name, prompts, pixels)
        return self._score(prompts, self.preprocess(pixels.to(self.device, torch.float32)))

    def _score(self, prompts: Sequence[str], pixels: Float[Tensor, "n 3 size size"]) -> Float[Tensor, " n"]:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        self._tell_of_cuts(prompts)
        inputs = (pixels, tokens.input_ids, tokens.attention_mask)
        raw: Tensor = self.network(*(value.to(self.device) for value in inputs))
        return (raw - RAW_MEAN) / RAW_STD

    def _tell_of_cuts(self, prompts: Sequence[str]) -> None:
        whole = self.tokenizer(list(prompts), truncation=True, max_length=MAX_TOKENS + 1).input_ids
        num_cut = sum(len(tokens) > MAX_TOKENS for tokens in whole)
        if num_cut and not self._told:
            self._told = True
            logger.warning(
                "%s: %d of %d prompts are longer than %d tokens; what lies beyond is not read, here and in later prompts. "
                "Put what matters first.",
                self.name,
                num_cut,
                len(prompts),
                MAX_TOKENS,
            )


def image_reward(
    *,
    checkpoint: str = "zai-org/ImageReward",
    file: str = "ImageReward.pt",
    revision: str | None = None,
    tokenizer: str = "google-bert/bert-base-uncased",
    batch_size: int = 32,
    device: str = "auto",
) -> ImageReward:
    """ImageReward v1: how people would rate the image for the prompt.

    (w(h) - 0.16717362830052426) / 1.0333394966054072,  h = text encoder(prompt, cross attention to ViT(image))[first token],
    w: linear layers 768 -> 1024 -> 128 -> 64 -> 16 -> 1 without activation

    Source: Xu et al. (2023), ImageReward; BLIP-large (Li et al. 2022). The weights and the authors' code are Apache-2.0.
    Typical values with real weights: -2 to 2, standardised over the authors' data.

    Images: RGB, 224 pixels bicubic on the shorter side, centre crop, CLIP's mean and standard deviation. The authors convert
    to RGB after resizing, which differs for palette and transparent images only. Prompts: BERT's uncased words with [DEC]
    and [ENC] added, padded and cut to 35 tokens, end token kept; the first cut is logged. The first token is [CLS]: the
    authors do not replace it by [ENC], as BLIP's own matching head does.

    Args:
        checkpoint: `ImageReward.pt` as published, or its folder or hub id; names as in Salesforce's BLIP.
        file: its name in a folder or hub id.
        revision: hub branch, tag or commit.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
        batch_size: images per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no such file or tokenizer, or a checkpoint whose keys or shapes are not those of the network, all listed.
    """
    state = read_checkpoint(checkpoint, file=file, revision=revision, place="image_reward.checkpoint")
    return load_image_reward(RewardNetwork(BlipSizes()), state, tokenizer=tokenizer, batch_size=batch_size, device=device)


def load_image_reward(
    network: RewardNetwork, state: dict[str, Tensor], *, tokenizer: str, batch_size: int = 32, device: str = "auto"
) -> ImageReward:
    """An ImageReward scorer of weights in the published naming, for a network of any size.

    Args:
        network: gets the weights.
        state: `blip.visual_encoder.*`, `blip.text_encoder.*` and `mlp.layers.*`.
        tokenizer, batch_size, device: as for `image_reward`.

    Raises:
        UserError: keys or shapes do not fit, or a tokenizer that is not there or has another number of words.
    """
    where = torch_device(device)
    words = _tokenizer(tokenizer, network.text.config.vocab_size)
    load_checked(network, state, place="image_reward.checkpoint", rename=transformers_name)
    size = network.vision.config.image_size
    return ImageReward(
        batch_size=batch_size,
        device=where,
        network=network.to(where).eval().requires_grad_(False),
        tokenizer=words,
        preprocess=PixelPreprocess(size=(size, size), resize="shortest", interpolation="bicubic", mean=CLIP_MEAN, std=CLIP_STD),
    )


def transformers_name(key: str) -> str | None:
    """The network's name of a published key; None for what the score does not use, the key itself if it is unknown."""
    if UNUSED.fullmatch(key):
        return None
    room, _, rest = key.partition(".")
    part, _, name = rest.partition(".")
    if room == "mlp" and part == "layers":
        return f"mlp.{name}"
    if room == "blip" and part == "text_encoder":
        return f"text.{name}"
    if room == "blip" and part == "visual_encoder":
        for pattern, replacement in VISION_NAMES:
            if re.fullmatch(pattern, name):
                return "vision." + re.sub(pattern, replacement, name)
    return key


def _tokenizer(name: str, vocab_size: int) -> Any:
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image_reward.tokenizer: got {name!r}, want a folder or hub id with BERT's uncased tokenizer "
            f"({first_line(error)}). Save it there with save_pretrained, or check the name and the connection."
        ) from error
    tokenizer.add_tokens(list(BLIP_TOKENS), special_tokens=True)
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"image_reward.tokenizer: got {name!r} with {len(tokenizer)} words, {', '.join(BLIP_TOKENS)} among them, want "
            f"{vocab_size}. ImageReward reads the words of bert-base-uncased; where there are few, they were not to be had: "
            "check the name and the connection."
        )
    return tokenizer
