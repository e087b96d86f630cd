"""Modality adapters: from examples to the inputs of a step. A table of settings classes whose `open` loads the model."""

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.step_reward import StepRewardAdapter
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_reward import TextRewardAdapter

ADAPTERS: dict[
    str,
    type[DiffusionAdapter] | type[ImageTextAdapter] | type[StepRewardAdapter] | type[TextAdapter] | type[TextRewardAdapter],
] = {
    "diffusion": DiffusionAdapter,
    "image_text": ImageTextAdapter,
    "step_reward": StepRewardAdapter,
    "text": TextAdapter,
    "text_reward": TextRewardAdapter,
}

__all__ = ["ADAPTERS"]
