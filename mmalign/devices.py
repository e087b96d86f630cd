"""Where a model runs when nothing else is said. Training asks accelerate instead, which knows of its processes."""

import torch

from mmalign.errors import UserError


def default_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU ...), else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def torch_device(device: str) -> torch.device:
    """`auto` is the default device; anything else is torch's own name of one.

    Raises:
        UserError: not a name that torch knows, or a device that is not there.
    """
    if device == "auto":
        return default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise UserError(f"device: got {device!r}, want auto, cpu, cuda or cuda:N. Use auto to take what is there.") from error
