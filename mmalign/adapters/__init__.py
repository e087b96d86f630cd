"""Modality adapters: from examples to the inputs of a step. A table of settings classes whose `open` loads the model."""

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.adapters.step_reward import StepRewardAdapter

ADAPTERS: dict[str, type[DiffusionAdapter] | type[StepRewardAdapter]] = {
    "diffusion": DiffusionAdapter,
    "step_reward": StepRewardAdapter,
}

__all__ = ["ADAPTERS"]
