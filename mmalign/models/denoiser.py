"""The trained network of a pipeline, of whatever family, behind one forward."""

import functools
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.families import Family, find_family


class Denoiser(nn.Module):
    """The trained network of a pipeline behind the forward that all families share.

    Its `core` is the pipeline's own module: sampling with the pipeline samples from the policy.
    """

    def __init__(self, family: str | Family, core: Any) -> None:
        """Wrap the network of a pipeline; nothing is copied, frozen or moved."""
        super().__init__()
        self.family = find_family(family)
        self.core = core
        self.lora_layers: list[Any] = []  # set by add_lora, so that lora_off need not walk all modules at each step

    def forward(
        self, noisy: Float[Tensor, "n c *dims"], timestep: Shaped[Tensor, " n"], **condition: Tensor
    ) -> Float[Tensor, "n c *dims"]:
        """The network's prediction (noise, velocity or sample, as its schedule says), in the network's dtype."""
        output: Tensor = self.family.forward(self.core, noisy, timestep, **condition)
        return output

    def unused_layers(self) -> frozenset[str]:
        """Names, within the core, of the modules whose output is never used: see `Family.unused`."""
        names = {module: name for name, module in self.core.named_modules()}
        found: set[str] = set()
        for path in self.family.unused:
            layer = self.core
            for word in path.split("."):
                layer = layer[int(word)] if word.lstrip("-").isdigit() else getattr(layer, word)
            found.update(names[module] for module in layer.modules())
        return frozenset(found)

    def train_fully(self) -> None:
        """Make all weights trainable that ever get a gradient: DDP waits for that of each trained weight."""
        unused = self.unused_layers()
        for name, parameter in self.core.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] not in unused)

    def save_memory(
        self,
        *,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        """Choose how the network runs; none of these changes its numbers beyond rounding.

        Args:
            gradient_checkpointing: recompute activations in the backward pass: about a third slower, memory of one
                block. Works with LoRA on a frozen network (non-reentrant).
            channels_last: memory format that suits convolutions on tensor cores.
            compile: torch.compile in place, so that saved names stay stock. The first step takes minutes.
        """
        if self.family.network == "unet":
            from diffusers.models.attention_processor import AttnProcessor2_0

            self.core.set_attn_processor(AttnProcessor2_0())
        if channels_last:
            video = self.family.frame_multiple is not None
            self.core.to(memory_format=torch.channels_last_3d if video else torch.channels_last)
        if gradient_checkpointing:
            # Ours, because torch.compile cannot trace into diffusers' own choice of this very function.
            self.core.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
        else:
            self.core.disable_gradient_checkpointing()
        if compile:
            self.core.compile()
