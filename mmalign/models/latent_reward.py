"""A latent reward model: the diffusion UNet's own features of a noisy latent against its prompt; nothing is decoded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mmalign.checkpoints import write_folder
from mmalign.errors import UserError
from mmalign.families import Family
from mmalign.scorers.checkpoints import load_checked, read_checkpoint

ARCHITECTURE = "mmalign latent reward"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
LOGIT_SCALE = 2.6592  # ln(1 / 0.07), CLIP's


class LatentReward(nn.Module):
    """exp(logit_scale) cos(W_image features(x_t, t, prompt), W_text text), on the first half of a UNet.

    features: the mean over the latent's area of the last layer of each down block, before it halves the area, and of the
    middle block, side by side (SD 1.5: 320 + 640 + 1280 + 1280 + 1280). text: the pooled prompt of a family that has one
    (SDXL), else the last token, which has read the whole prompt.

    Source: Zhang et al. 2025 (LPO), as in the published code. There the text is the text encoder's pooled output, the
    text projection starts as CLIP's, and UNet and text encoder are trained too; here the text encoder is frozen, and the UNet
    is where `tuned` says so.
    """

    def __init__(
        self, family: Family, half: Any, *, text_width: int, dim: int = 768, tuned: bool = False, seed: int = 0
    ) -> None:
        """Put a head on half a UNet.

        Args:
            family: of the UNet.
            half: as `first_half` gives it.
            text_width: of a token, or of the pooled prompt.
            dim: of the space where image and prompt meet. Published: 768.
            tuned: whether the half UNet belongs to this model, is trained and saved with it.
            seed: of the first weights of the head.
        """
        super().__init__()
        check_unet(family, half)
        self.family, self.tuned = family, tuned
        widths = (*half.config.block_out_channels, half.config.block_out_channels[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_projection = nn.Linear(sum(widths), dim, bias=False)
            self.text_projection = nn.Linear(text_width, dim, bias=False)
            nn.init.normal_(self.image_projection.weight, std=0.02)
            nn.init.normal_(self.text_projection.weight, std=text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self._borrowed: tuple[Any, ...] = ()  # in a tuple, so that it is no part of this module
        if tuned:
            self.core = half
        else:
            self._borrowed = (half,)

    def forward(
        self, noisy: Float[Tensor, "batch k c h w"], timestep: Shaped[Tensor, "batch k"], **condition: Tensor
    ) -> Float[Tensor, "batch k"]:
        """Scores of k noisy latents a prompt.

        Args:
            noisy: x_t.
            timestep: as the UNet is given it (`Schedule.network_timestep`).
            condition: of each prompt, by the keywords of the family's forward.
        """
        k = noisy.shape[1]
        repeated = {name: value.repeat_interleave(k, dim=0) for name, value in condition.items()}
        with torch.set_grad_enabled(self.tuned and torch.is_grad_enabled()):
            features = self.features(noisy.flatten(0, 1), timestep.flatten(0, 1), repeated)
        image = self.image_projection(features.to(self.image_projection.weight.dtype))
        text = self.text_projection(text_summary(condition).to(self.text_projection.weight.dtype))
        cosine = torch.cosine_similarity(image.float(), text.float().repeat_interleave(k, dim=0), dim=-1)
        return (self.logit_scale.exp() * cosine).view(-1, k)

    def features(
        self, noisy: Float[Tensor, "n c h w"], timestep: Shaped[Tensor, " n"], condition: Mapping[str, Tensor]
    ) -> Float[Tensor, "n features"]:
        """Pooled features of every down block and of the middle block."""
        half = self.core if self.tuned else self._borrowed[0]
        with _kept_outputs(half) as kept:
            middle = self.family.forward(half, noisy, timestep, **condition)
        levels = [*(kept[number] for number in range(len(half.down_blocks))), middle]
        return torch.cat([level.float().mean((2, 3)) for level in levels], dim=1)


def first_half(unet: Any) -> Any:
    """The UNet up to and with its middle block, whose output is what it returns; weights are shared, not copied."""
    half = copy.copy(unet)
    half._modules = dict(unet._modules)
    half._compiled_call_impl = None  # torch.compile's, of the whole UNet
    half.up_blocks, half.conv_norm_out, half.conv_out = nn.ModuleList(), None, nn.Identity()
    return half


def check_unet(family: Family, core: Any) -> None:
    """Refuse what has no down blocks and middle block.

    Raises:
        UserError: a transformer.
    """
    if family.network != "unet" or getattr(core, "mid_block", None) is None:
        raise UserError(
            f"latent reward: got the family {family.name}, want one with a UNet (sd15, sd2, sdxl), whose features it reads. "
            "Use the step_aware or image reward."
        )


def text_summary(condition: Mapping[str, Tensor]) -> Float[Tensor, "n width"]:
    """The pooled prompt where there is one, else its last token."""
    if "text_embeds" in condition:
        return condition["text_embeds"]
    return condition["encoder_hidden_states"][:, -1]


def save_latent_reward(model: LatentReward, folder: Path | str) -> Path:
    """Write the head, and the half UNet where it is tuned, as a folder that `open_latent_reward` reads; whole or not at all.

    Returns: the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    config = {
        "architecture": ARCHITECTURE,
        "family": model.family.name,
        "dim": model.image_projection.out_features,
        "text_width": model.text_projection.in_features,
        "tuned": model.tuned,
    }
    with write_folder(folder) as scratch:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def open_latent_reward(folder: Path | str, family: Family, core: Any, *, place: str = "folder") -> LatentReward:
    """Read a saved latent reward model, to score latents of this UNet's family.

    Args:
        folder: as `save_latent_reward` wrote it.
        family, core: the UNet whose features it reads; a tuned one has a UNet of its own, of the same config.
        place: the setting that a message names: `source.scorer.path`.
    Returns: the frozen model.
    Raises:
        UserError: no such folder, another family, or weights that do not fit, listed.
    """
    folder = Path(folder).expanduser()
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{place}: got {folder}, which is no latent reward model ({fault}), want a folder that training saved: `reward` in "
            "the output of a run with adapter: step_reward and reward: latent."
        ) from fault
    if config.get("architecture") != ARCHITECTURE or config.get("family") != family.name:
        kind = config.get("architecture", "another model")
        got = f"{kind} of family {config['family']}" if config.get("family") else kind
        raise UserError(
            f"{place}: got {folder}, which is {got}, want a latent reward of {family.name}. Name the folder of one."
        )
    check_unet(family, core)
    half = first_half(core)
    if config["tuned"]:
        half = first_half(type(core).from_config(core.config)).to(core.device)
    model = LatentReward(family, half, text_width=config["text_width"], dim=config["dim"], tuned=config["tuned"])
    whole = f"{place} ({folder})"
    load_checked(model, read_checkpoint(folder, file=WEIGHTS, place=whole), place=whole)
    return model.requires_grad_(False).eval().to(core.device)


@contextmanager
def _kept_outputs(half: Any) -> Iterator[dict[int, Tensor]]:
    """The last feature map of each down block at its own area, by number, for one forward."""
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(block: Any, arguments: Any, output: Any) -> None:
            maps = output[1]
            kept[number] = maps[-2] if block.downsamplers is not None else maps[-1]

        return hook

    handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(half.down_blocks)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
