"""A checkpoint's trained weights as stock diffusers files, so that a run can be sampled from while and after it trains."""

from pathlib import Path

import torch

from mmalign import checkpoints
from mmalign.errors import UserError
from mmalign.loop import TRAINABLE

PIPELINE = "pipeline"  # the folder of a full fine-tune's result


def weights_file(checkpoint: Path) -> Path:
    """The file of a checkpoint's trained weights."""
    return checkpoint / TRAINABLE


def is_checkpoint(place: Path | str) -> bool:
    """Whether this is a `checkpoint-N` of `mmalign train`, whose weights no other program reads."""
    return (Path(place).expanduser() / TRAINABLE).is_file()


def write_stock_weights(checkpoint: Path | str, folder: Path) -> bool:
    """Write a checkpoint's weights into `folder` as the run writes its result; returns whether they are a LoRA.

    They are the weights that were being trained, also where the run's result is their moving average.

    Raises:
        UserError: an incomplete checkpoint, one without its run's config.yaml beside it, or one of another network.
    """
    from safetensors.torch import load_file

    from mmalign.experiment import read_run

    place = Path(checkpoint).expanduser()
    checkpoints.check_complete(place)
    path = place.absolute().parent / "config.yaml"
    if not path.is_file():
        raise UserError(f"{place}: got no {path}, want the checkpoint in the folder of its run. Copy the run's config.yaml.")
    config = read_run(path)
    unused = {name: None for name in ("cache", "validation", "winner_guard") if name in config.adapter.settings}
    adapter = config.adapter.with_settings(**unused)
    policy = adapter.build().open(seed=config.seed, needs_reference=False)
    saved = load_file(place / TRAINABLE)
    trained = {name: parameter for name, parameter in policy.network.named_parameters() if parameter.requires_grad}
    shapes = [{name: tuple(one.shape) for name, one in weights.items()} for weights in (trained, saved)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in {**trained, **saved} if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(f"{place / TRAINABLE}: got other weights than those of {path} ({other[0]}). Name another checkpoint.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    policy.save(folder)
    return config.adapter.settings.get("lora") is not None


def stock_places(model: str, lora: str | None, scratch: Path) -> tuple[str, str | None]:
    """Model and LoRA as stock diffusers reads them: of a checkpoint, its weights are written into `scratch`.

    Raises:
        UserError: as `write_stock_weights`; or a checkpoint of all weights named as LoRA, or the reverse.
    """
    if is_checkpoint(model):
        if write_stock_weights(model, scratch / "model"):
            raise UserError(f"model: got {model}, which holds a LoRA only. Name it as lora, and its base as model.")
        model = str(scratch / "model" / PIPELINE)
    if lora is not None and is_checkpoint(lora):
        if not write_stock_weights(lora, scratch / "lora"):
            raise UserError(f"lora: got {lora}, which holds all weights. Name it as model.")
        lora = str(scratch / "lora")
    return model, lora
