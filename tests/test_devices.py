"""One rule for the device of everything but training."""

import pytest
import torch

from mmalign.devices import default_device, torch_device
from mmalign.errors import UserError
from mmalign.scorers import clip


def test_without_an_accelerator_the_default_is_the_cpu() -> None:
    found = torch.accelerator.is_available()
    assert (default_device().type == "cpu") == (not found)
    assert torch_device("auto") == default_device()


def test_a_named_device_is_taken_as_it_is_and_an_unknown_one_refused() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    for absent in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device: got '{absent}', want auto, cpu, cuda"):
            torch_device(absent)


def test_the_scorers_follow_that_rule() -> None:
    assert clip.torch_device is torch_device
