"""Modality adapters: from examples to the inputs of a step. A table of settings classes whose `open` loads the model."""

from mmalign.adapters.diffusion import DiffusionAdapter

ADAPTERS = {"diffusion": DiffusionAdapter}

__all__ = ["ADAPTERS"]
