"""LoRA as a PEFT adapter folder, for networks whose stock pipeline has no LoRA loader of its own (PixArt)."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from mmalign.errors import UserError

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."  # what PeftModel puts before the names of the network it wraps


def write_adapter(network: Any, adapter_name: str, folder: Path) -> None:
    """Write what `PeftModel.from_pretrained(network, folder)` reads: rank, alpha and targets in a config, and the weights."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(network, adapter_name=adapter_name)
    weights = {f"{_PREFIX}{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(weights, folder / PEFT_FILE, metadata={"format": "pt"})
    config = copy.copy(network.peft_config[adapter_name])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def read_adapter(network: nn.Module, folder: Path, adapter_name: str) -> None:
    """Put the LoRA of a PEFT adapter folder beside the layers of a network, in place; its weights are frozen or not as before.

    Raises:
        UserError: no such folder, an adapter that is no LoRA, or one whose layers are not those of this network.
    """
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in (PEFT_FILE, PEFT_CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: got no {name}, want a PEFT adapter folder that mmalign or peft saved a LoRA to.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / PEFT_FILE)
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise UserError(f"{folder}: not readable as a PEFT adapter ({fault}). Save or copy it again.") from fault
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: got a PEFT adapter of type {config.peft_type}, want a LoRA.")
    config.inference_mode = False
    remedy = "Load it into the base model it was trained on."
    try:
        inject_adapter_in_model(config, network, adapter_name)
        loaded = set_peft_model_state_dict(
            network, {name.removeprefix(_PREFIX): value for name, value in weights.items()}, adapter_name
        )
    except (RuntimeError, ValueError) as fault:
        raise UserError(
            f"{folder / PEFT_FILE}: its layers do not fit this network ({first_misfit(fault)}). {remedy}"
        ) from fault
    strangers = [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)]
    if strangers:
        raise UserError(f"{folder / PEFT_FILE}: its layers do not fit this network (first: {strangers[0]}). {remedy}")


def first_misfit(fault: Exception) -> str:
    """The first layer of torch's long list of those that do not fit, and how many there are; else what the exception says."""
    heading, *layers = [line.strip() for line in str(fault).splitlines() if line.strip()] or [type(fault).__name__]
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"{layers[0].rstrip('.')}{more}" if layers else heading
