"""Low-rank weights on a denoiser: add, switch off for the reference, save for stock diffusers, load to go on."""

import contextlib
import copy
import difflib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.checkpoints import move_into_place
from mmalign.errors import UserError
from mmalign.families import Family
from mmalign.models.denoiser import Denoiser
from mmalign.models.peft_adapter import PEFT_CONFIG_FILE, PEFT_FILE, first_misfit, read_adapter, write_adapter
from mmalign.models.pipeline_folder import opening_code
from mmalign.models.quiet import quiet_libraries

logger = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "default"
# What a saved LoRA consists of, by `Family.lora_format`; the weights come last, so that they stand for a whole one.
LORA_FILES = {"diffusers": (LORA_FILE,), "peft": (PEFT_CONFIG_FILE, PEFT_FILE)}


def add_lora(
    denoiser: Denoiser,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freeze the network and put trainable low-rank weights beside its target layers: W x + (alpha / rank) B A x.

    A is Gaussian (std 1 / rank), B is zero, so that the policy starts as the reference. A and B are float32 whatever the
    dtype of the network: a bfloat16 weight near 1 cannot take a step below 0.004.
    Source: Hu et al., arXiv 2106.09685, eq. 3; initialisation as in the diffusers training scripts (which leave A and
    B in bfloat16 under bfloat16).
    Args:
        rank: published 4 to 64; diffusers' Diffusion-DPO scripts 4 (default) and 8 (README).
        alpha: None: the rank, which makes the factor 1.
        targets: names of layers, matched at the end of the module path; those of them whose output the network never uses
            (`Family.unused`) are left out. None: those of the family.
        dropout: on the input of A. Policy and reference then differ at the start: keep 0 for preference training.
        seed: of A; the global generator is left as it was.
    Raises:
        UserError: a rank below 1, a target that no layer bears, or targets that are never used alone.
        ValueError: the denoiser has LoRA already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if denoiser.lora_layers:
        raise ValueError("add_lora: the denoiser has LoRA already. Open the pipeline anew.")
    if rank < 1:
        raise UserError(f"adapter.lora.rank: got {rank}, want 1 or more.")
    names = tuple(denoiser.family.lora_targets if targets is None else targets)
    layers = _target_layers(denoiser.core, names)
    used = sorted(set(layers) - denoiser.unused_layers())
    if not used:
        raise UserError(f"adapter.lora.targets: got {', '.join(layers)}, whose output is never used. Name other layers.")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        # By full name where some are left out: diffusers warns of layers that the targets end and the file lacks.
        target_modules=list(names) if len(used) == len(layers) else used,
        lora_dropout=dropout,
    )
    denoiser.core.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if denoiser.family.lora_format == "peft":
            inject_adapter_in_model(config, denoiser.core, ADAPTER_NAME)
        else:
            denoiser.core.add_adapter(config, adapter_name=ADAPTER_NAME)
    _take_up(denoiser)


def load_lora(denoiser: Denoiser, folder: Path | str) -> None:
    """Freeze the network and go on training the LoRA that `save_lora` or a stock diffusers script wrote.

    Rank, alpha and targets come from the file. The reference (LoRA off) is the base model, not the loaded LoRA.
    Raises:
        UserError: no such file, or its layers do not fit this network.
        ValueError: the denoiser has LoRA already.
    """
    if denoiser.lora_layers:
        raise ValueError("load_lora: the denoiser has LoRA already. Open the pipeline anew.")
    if denoiser.family.lora_format == "peft":
        read_adapter(denoiser.core, Path(folder), ADAPTER_NAME)
    else:
        _load_into_diffusers(denoiser, Path(folder))
    _take_up(denoiser)
    if not denoiser.lora_layers:
        raise UserError(f"{folder}: got a LoRA without layers for the network, want one of {denoiser.family.name}.")


@contextlib.contextmanager
def lora_off(denoiser: Denoiser) -> Iterator[None]:
    """The reference: inside the block the network runs without its LoRA. Switched on again whatever happens inside.

    Raises:
        ValueError: the denoiser has no LoRA, so that the policy would pass for its own reference.
    """
    if not denoiser.lora_layers:
        raise ValueError("lora_off: the denoiser has no LoRA. For full fine-tuning use frozen_copy as the reference.")
    # The switch that `disable_adapters` reads, alone: `enable_adapters` also walks all weights to set requires_grad, and leaves
    # weights trainable that were not.
    try:
        for layer in denoiser.lora_layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in denoiser.lora_layers:
            layer._disable_adapters = False


def save_lora(family: Family, denoiser: Denoiser, folder: Path | str) -> Path:
    """Write a LoRA as stock code reads it: see `loading_code`.

    diffusers: `pytorch_lora_weights.safetensors`, with rank and alpha in the file's metadata. The keys are PEFT's: diffusers'
    `convert_state_dict_to_diffusers` renames those of attention only, and loading such a mixture drops them. PEFT:
    `adapter_config.json` and `adapter_model.safetensors`. Written beside, brought to disk and renamed, so that no half-written
    file can stand.
    Returns: the path of the weights.
    """
    if not denoiser.lora_layers:
        raise ValueError("save_lora: the denoiser has no LoRA. Use save_full.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = LORA_FILES[family.lora_format]
    umask = os.umask(0)
    os.umask(umask)
    with _scratch(folder / names[-1]) as scratch:
        if family.lora_format == "peft":
            write_adapter(denoiser.core, ADAPTER_NAME, scratch)
        else:
            _write_for_diffusers(family, denoiser, scratch)
        for name in names:
            (scratch / name).chmod(0o666 & ~umask)  # safetensors keeps its files to their owner
            move_into_place(scratch / name, folder / name)
    return folder / names[-1]


def loading_code(family: Family, base: Path | str, folder: Path | str) -> str:
    """Lines of stock Python that load a saved LoRA into its base model as `pipe`; they need `import diffusers`.

    Args:
        family: of the model.
        base: the base model, a folder or hub id.
        folder: where `save_lora` wrote to.
    """
    opened = opening_code(family, base)
    if family.lora_format == "peft":
        network = f"pipe.{family.network}"
        return f'{opened}\nimport peft\n{network} = peft.PeftModel.from_pretrained({network}, "{folder}")'
    return f'{opened}\npipe.load_lora_weights("{folder}")'


def save_full(pipe: Any, denoiser: Denoiser, folder: Path | str) -> Path:
    """Write the whole pipeline, with the denoiser's network in it, as a folder for `from_pretrained`.

    Written beside, brought to disk and renamed. Replaces a pipeline that stands there, which is not removed before.
    Raises:
        ValueError: the denoiser has LoRA: use save_lora.
        UserError: the folder holds something that is no pipeline.
    """
    if denoiser.lora_layers:
        raise ValueError("save_full: the denoiser has LoRA. Use save_lora.")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: got a folder with other files, want an empty or absent one. Name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder) as scratch:
        parts = {**pipe.components, denoiser.family.network: denoiser.core}
        with quiet_libraries():
            type(pipe)(**parts, **_pipeline_flags(pipe)).save_pretrained(scratch)
        move_into_place(scratch, folder)
    return folder


def frozen_copy(denoiser: Denoiser) -> Denoiser:
    """The reference for full fine-tuning: a copy that takes no gradient. It costs the memory of a second network."""
    twin = copy.deepcopy(denoiser).requires_grad_(False).eval()
    twin.core.disable_gradient_checkpointing()
    return twin


def trainable_parameters(denoiser: Denoiser) -> list[nn.Parameter]:
    """The parameters to optimise and to clip, as a list: an iterator would be empty when clipping comes."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def training_plan(denoiser: Denoiser) -> str:
    """One line for the log: what is trained, and how much of the network that is."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(denoiser))
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    share = f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)"
    if not denoiser.lora_layers:
        return f"{denoiser.family.name}, full fine-tuning: {share}"
    config = denoiser.core.peft_config[ADAPTER_NAME]
    paths = {name for name, _ in denoiser.core.named_modules()}
    targets = ", ".join(sorted({_leaf(target) if target in paths else target for target in config.target_modules}))
    layers = f"{len(denoiser.lora_layers)} layers ({targets})"
    return f"{denoiser.family.name}, LoRA rank {config.r} alpha {config.lora_alpha:g} on {layers}: {share}"


def _write_for_diffusers(family: Family, denoiser: Denoiser, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(denoiser.core, adapter_name=ADAPTER_NAME)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    metadata = _metadata(denoiser.core.peft_config[ADAPTER_NAME])
    family.pipeline_class().save_lora_weights(
        folder, **{f"{family.network}_lora_layers": weights, f"{family.network}_lora_adapter_metadata": metadata}
    )


def _load_into_diffusers(denoiser: Denoiser, folder: Path) -> None:
    if not (folder / LORA_FILE).is_file():
        raise UserError(f"{folder}: got no {LORA_FILE}, want a folder that mmalign or diffusers saved a LoRA to.")
    family = denoiser.family
    # (weights, metadata), and between them alphas where the pipeline's kind has files with some.
    state, *alphas, metadata = family.pipeline_class().lora_state_dict(
        str(folder), weight_name=LORA_FILE, local_files_only=True, return_lora_metadata=True
    )
    try:
        denoiser.core.load_lora_adapter(
            state,
            prefix=family.network,
            network_alphas=alphas[0] if alphas else None,
            metadata=metadata,
            adapter_name=ADAPTER_NAME,
        )
    except (RuntimeError, ValueError) as fault:
        text = f"{folder / LORA_FILE}: its layers do not fit this {family.name} network ({first_misfit(fault)})."
        raise UserError(f"{text} Load it into the base model it was trained on.") from fault


def _take_up(denoiser: Denoiser) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    denoiser.lora_layers = [module for module in denoiser.core.modules() if isinstance(module, BaseTunerLayer)]
    unused = denoiser.unused_layers()
    for name, parameter in denoiser.core.named_parameters():
        low_rank = ".lora_" in name
        parameter.requires_grad_(low_rank and name.rpartition(".")[0] not in unused)
        if low_rank:
            parameter.data = parameter.data.float()


def _target_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers that the targets end."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({_leaf(name) for name in layers})
            near = difflib.get_close_matches(target, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise UserError(f"adapter.lora.targets: got {target!r}, which ends no layer's name. {remedy}")
    if not targets:
        raise UserError("adapter.lora.targets: got an empty list, want at least one layer name.")
    return [name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)]


def _leaf(name: str) -> str:
    """The end of a module path from its last word on: `...attn1.to_out.0` is `to_out.0`."""
    words = name.split(".")
    start = max((index for index, word in enumerate(words) if not word.isdigit()), default=0)
    return ".".join(words[start:])


@contextlib.contextmanager
def _scratch(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, removed at the end; after a kill `checkpoints.remove_leftovers` knows it by its name."""
    folder = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _metadata(config: Any) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _pipeline_flags(pipe: Any) -> dict[str, Any]:
    """The settings of a pipeline that are no component (SD: requires_safety_checker; SDXL: zeros for no prompt; Wan 2.2)."""
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt", "boundary_ratio", "expand_timesteps")
    return {name: pipe.config[name] for name in names if name in pipe.config}
