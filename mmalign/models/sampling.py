"""Sampling with the stock pipeline: one seed an image, so that an image does not depend on what else is in its batch."""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmalign.errors import UserError
from mmalign.families import Family
from mmalign.models.lora import LORA_FILE, LORA_FILES
from mmalign.models.peft_adapter import first_misfit, read_adapter
from mmalign.models.quiet import quiet_libraries

SAMPLING_ADAPTER = "mmalign"


def image_seed(seed: int, prompt: int, candidate: int) -> int:
    """The seed of one image, from the seed of the run and the numbers of prompt and candidate: 63 bits of a sha256."""
    digest = hashlib.sha256(f"{seed}:{prompt}:{candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_images(
    family: Family,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    sources: Sequence[Image.Image] = (),
    batch_size: int = 4,
) -> Iterator[Any]:
    """Yield one image for each prompt with its seed, in order, `batch_size` at a time; of a video the list of its frames.

    Noise is drawn on the CPU, so that every device starts from the same. Batch size changes an image by rounding only.
    Args:
        family: of the pipeline, which knows its keywords.
        pipe: a stock pipeline; its scheduler is the sampler.
        steps: sampler steps. Published evaluations: 50.
        guidance_scale: 1 is no guidance. Published: 7.5 (SD 1.x), 5 (SDXL).
        size: (height, width) in pixels, multiples of the family's `size_multiple`. None: the model's own.
        frames: of a video. None: the pipeline's own number, or an image.
        sources: for a family that edits, one image a prompt, of any size. Edits are made one at a time, because
            the stock pipelines size a batch by its first source.
    Raises:
        UserError: a size that the family cannot make.
    """
    if any(side % family.size_multiple for side in size or ()):
        raise UserError(f"size: got {list(size or ())}, want multiples of {family.size_multiple} for {family.name}.")
    batch_size = 1 if sources else batch_size
    length = {} if frames is None else {"num_frames": frames}
    height, width = size or family.default_size(pipe)
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        edited = {"image": list(sources[start : start + batch_size])} if sources else {}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
        made = pipe(
            prompt=batch,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=generators,
            output_type="pil",
            **length,
            **edited,
            **family.call_options(guidance_scale, negative_prompt, len(batch)),
        )
        yield from getattr(made, family.output)


def set_scheduler(pipe: Any, name: str) -> None:
    """Put another diffusers sampler in, on the model's own noise schedule.

    Raises:
        UserError: no such sampler for this model.
    """
    known = sorted(kind.__name__ for kind in pipe.scheduler.compatibles)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        raise UserError(f"scheduler: got {name!r}, which this model cannot be sampled with. {remedy}")
    import diffusers

    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


def lora_file(lora: Path | str) -> Path:
    """The file itself, or the weights in a folder: `pytorch_lora_weights.safetensors` or `adapter_model.safetensors`."""
    place = Path(lora).expanduser()
    if place.is_file():
        return place
    found = [place / names[-1] for names in LORA_FILES.values() if (place / names[-1]).is_file()]
    return found[0] if found else place / LORA_FILE


def use_lora(family: Family, pipe: Any, lora: Path | str, *, scale: float = 1.0) -> None:
    """Load a LoRA for sampling as any user of stock diffusers would.

    Args:
        lora: folder with `pytorch_lora_weights.safetensors`, or a .safetensors file; for families of `lora_format` peft a PEFT
            adapter folder, or the weights in one.
        scale: 0 is the base model, 1 the trained one.
    Raises:
        UserError: no such file, or a LoRA of another model.
    """
    file = lora_file(lora)
    wanted = LORA_FILES[family.lora_format][-1]
    if not file.is_file() or (file != Path(lora).expanduser() and file.name != wanted):
        raise UserError(f"lora: got {str(lora)!r}, want a folder with {wanted} or a .safetensors file.")
    if family.lora_format == "peft":
        _use_peft_adapter(family.core(pipe), file.parent, scale)
        return
    try:
        with quiet_libraries():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=SAMPLING_ADAPTER)
    except (RuntimeError, ValueError, KeyError) as fault:
        raise UserError(
            f"{file}: its layers do not fit this model ({first_misfit(fault)}). Name the base it was trained on."
        ) from fault
    if SAMPLING_ADAPTER not in getattr(family.core(pipe), "peft_config", {}):
        raise UserError(f"{file}: got no layers for the network of this model, want a LoRA trained on it.")
    pipe.set_adapters([SAMPLING_ADAPTER], [scale])


def _use_peft_adapter(network: Any, folder: Path, scale: float) -> None:
    from peft.tuners.lora import LoraLayer

    read_adapter(network, folder, SAMPLING_ADAPTER)
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(SAMPLING_ADAPTER, scale)
