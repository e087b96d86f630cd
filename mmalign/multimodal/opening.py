"""Open, tune and save models that see, with transformers and peft: which parts are trained, and where low-rank weights go."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.errors import UserError
from mmalign.language import opening
from mmalign.language.tiny import TINY
from mmalign.multimodal.families import FAMILIES, Family
from mmalign.multimodal.seen import SeenImage
from mmalign.multimodal.tiny import tiny_folder
from mmalign.records.rows import nearest

logger = logging.getLogger(__name__)

EXTRAS = {"num2words": "smolvlm"}  # packages that processors import themselves -> the extra that brings them
OTHER_TOWERS = {"llava": ("pixtral",)}  # towers whose images are written and encoded otherwise than their family's


def open_processor(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, tiny: Mapping[str, Any] | None = None
) -> Any:
    """A processor of images and texts, with its tokenizer, which gets a padding token.

    Args:
        name: a folder, a hub id, or `tiny`.
        revision: of the hub's repository.
        trust_remote_code: run code that comes with it.
        tiny: see `tiny_parts`.
    Raises:
        UserError: no processor there, a tokenizer alone, or a package that it wants is missing.
    """
    if name == TINY:
        name = str(tiny_folder(tiny))
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ImportError as fault:
        said = str(fault).strip().splitlines()[0]
        extra = next((extra for package, extra in EXTRAS.items() if package in said), None)
        remedy = "Install it." if extra is None else f"Run: pip install mmalign[{extra}]"
        raise UserError(f"adapter.model: the processor of {name} wants a package that is missing ({said}). {remedy}") from fault
    except (OSError, ValueError) as fault:
        raise UserError(
            f"adapter.processor: cannot open {name} ({str(fault).strip().splitlines()[0]}). Name a folder or a hub id."
        ) from fault
    if not hasattr(processor, "image_processor"):
        raise UserError(f"adapter.processor: got {name}, which has no processor of images. Name that of a model that sees.")
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def open_sighted(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: opening.Quantization | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    tiny: Mapping[str, Any] | None = None,
) -> Any:
    """A model of images and texts, without dropout, in evaluation mode; arguments as of `language.opening.open_model`.

    Raises:
        UserError: no model there, or one of a family that is not known.
    """
    model = opening.open_model(
        str(tiny_folder(tiny)) if name == TINY else name,
        revision=revision,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        device=device,
        trust_remote_code=trust_remote_code,
        sees=True,
    )
    family_of(model)
    return model


def family_of(model: Any) -> Family:
    """The facts of a model's family.

    Raises:
        UserError: a family that is not known, or a tower that is not its own.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UserError(
            f"adapter.model: got a model of type {kind}, want one of {', '.join(FAMILIES)}.{nearest(kind, FAMILIES)}"
        )
    tower = getattr(model.config.vision_config, "model_type", "")
    if tower in OTHER_TOWERS.get(kind, ()):
        raise UserError(f"adapter.model: got a {kind} with a tower of type {tower}, which mmalign does not run. Name another.")
    return FAMILIES[kind]


def fit_processor(processor: Any, model: Any) -> None:
    """Tell a processor of LLaVA what old repositories leave to the model's config: patches, and which of them are features."""
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = model.config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy


def part_of(name: str, family: Family) -> str:
    """Which part a parameter or module of the model belongs to: language, projector or tower."""
    inner = name.removeprefix("base_model.model.").removeprefix("model.")
    for path in family.projectors:
        if inner == path or inner.startswith(f"{path}."):
            return "projector"
    return "tower" if inner == family.tower or inner.startswith(f"{family.tower}.") else "language"


def lora_targets(
    model: Any,
    targets: Sequence[str] | None = None,
    *,
    tower: bool = False,
    projector: bool = False,
    unused: Collection[str] = (),
) -> list[str]:
    """Full names of the layers that a LoRA tunes: linear ones of the language model, but not its output layer.

    Args:
        model: of a known family.
        targets: endings of names, as `language.opening.add_lora` takes them. None: every linear layer.
        tower, projector: whether layers of these parts are tuned too.
        unused: names of parameters whose layers are left out, see `passed_over`.
    Raises:
        UserError: a target that no layer of these parts bears.
    """
    family = family_of(model)
    wanted = {"language"} | {part for part, asked in (("tower", tower), ("projector", projector)) if asked}
    head = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and part_of(name, family) in wanted
        and f"{name}.weight" not in unused
    ]
    if targets is None:
        return found
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise UserError(
                f"adapter.lora.targets: got {target!r}, which ends no linear layer's name in {', '.join(sorted(wanted))}. "
                f"Known: {', '.join(known[:12])}.{nearest(target, known)}"
            )
    return [name for name in found if any(name == t or name.endswith(f".{t}") for t in targets)]


def passed_over(model: Any, images: Sequence[SeenImage]) -> frozenset[str]:
    """Names of the tower's parameters that the features do not depend on, so that no training moves them.

    LLaVA takes the states of the last layer but one: the last layer, and the norm behind it, are run for nothing.

    Args:
        model: of a known family, without LoRA.
        images: any one, as the encoder makes it.
    """
    family = family_of(model)
    tower = {name: p for name, p in model.named_parameters() if part_of(name, family) == "tower" and p.is_floating_point()}
    before = {name: parameter.requires_grad for name, parameter in tower.items()}
    device = next(iter(tower.values())).device
    with torch.enable_grad():
        for parameter in tower.values():
            parameter.requires_grad_(True)
        [found] = family.features(model, [image.to(device) for image in images[:1]])
        met = _leaves((found.tokens, *found.deep))
        for name, parameter in tower.items():
            parameter.requires_grad_(before[name])
    return frozenset(name for name, parameter in tower.items() if id(parameter) not in met)


def _leaves(tensors: Sequence[torch.Tensor]) -> set[int]:
    """Identities of the parameters that the graphs of tensors lead to."""
    left, seen, found = [tensor.grad_fn for tensor in tensors], set(), set()
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    return found


def train_parts(model: Any, *, tower: bool = False, projector: bool = True, unused: Collection[str] = ()) -> None:
    """Full fine-tuning: the language model takes a gradient, the projector as published for LLaVA, the tower if asked.

    Args:
        model: of a known family.
        tower: published: frozen (BPO, SPA-VL, RLAIF-V).
        projector: published: trained (BPO, SPA-VL, RLAIF-V); frozen by LLaVA-Hound.
        unused: names of parameters that are frozen in any case, see `passed_over`: weight decay alone would move them.
    """
    family = family_of(model)
    trained = {"language": True, "tower": tower, "projector": projector}
    for name, parameter in model.named_parameters():
        wanted = trained[part_of(name, family)] and name not in unused
        parameter.requires_grad_(wanted and parameter.is_floating_point())


def load_weights(model: Any, folder: Path, *, tower: bool = False, projector: bool = True) -> None:
    """Go on from what a run left: its LoRA, or its full model, whose parts are trained as `train_parts` says.

    Raises:
        UserError: neither is there, or it does not fit.
    """
    whole = folder / "model"
    if (folder / opening.ADAPTER_FILES[0]).is_file() or not (whole / "config.json").is_file():
        opening.load_weights(model, folder)
        return
    saved = open_sighted(str(whole), dtype=model.dtype)  # the names of files are not those of the model's parameters
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as fault:
        raise UserError(f"{folder}: its weights do not fit the model ({str(fault).strip().splitlines()[0]}).") from fault
    train_parts(model, tower=tower, projector=projector)


def parts_note(model: Any) -> str:
    """How much of each part is trained, in words: the line of a plan."""
    family = family_of(model)
    counts = {part: [0, 0] for part in ("language", "projector", "tower")}
    for name, parameter in model.named_parameters():
        count = counts[part_of(name, family)]
        count[0] += parameter.numel() if parameter.requires_grad else 0
        count[1] += parameter.numel()
    names = {"language": "language model", "projector": "projector", "tower": "vision tower"}
    told = [
        f"{names[part]} {f'{trained:,} of {total:,} trained' if trained else f'frozen ({total:,})'}"
        for part, (trained, total) in counts.items()
    ]
    return ", ".join(told)


def loading_lines(folder: Path) -> str:
    """Stock code that loads a run's result, LoRA or whole model, from any folder."""
    place = folder.absolute()
    return (
        f'model = transformers.AutoModelForImageTextToText.from_pretrained("{place}")\n'
        f'processor = transformers.AutoProcessor.from_pretrained("{place}")'
    )
