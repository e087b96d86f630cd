"""Families of diffusion and flow models. FAMILIES maps a name to what is particular to it; a family is one file here."""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmalign.config.schema import nearest
from mmalign.errors import UserError
from mmalign.families.family import Family, weight_dtype
from mmalign.families.flux import FLUX
from mmalign.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from mmalign.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS
from mmalign.families.sana import SANA
from mmalign.families.sd3 import SD3
from mmalign.families.unet import SD2, SD15, SDXL
from mmalign.families.wan import WAN
from mmalign.families.z_image import Z_IMAGE

__all__ = ["FAMILIES", "Family", "encode_prompt", "find_family", "unconditional", "weight_dtype"]


def find_family(family: str | Family) -> Family:
    """The entry of FAMILIES, or the object at an address `your_package.module:thing`.

    Raises:
        UserError: no such name, with the nearest known one.
    """
    if isinstance(family, Family):
        return family
    if family in FAMILIES:
        return FAMILIES[family]
    if ":" in family:
        module, _, name = family.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as fault:
            raise UserError(f"family: got {family!r}, which cannot be imported ({fault}).") from fault
        if not isinstance(found, Family):
            raise UserError(f"family: got {family!r}, a {type(found).__name__}, want a mmalign Family.")
        return found
    remedy = nearest(family, FAMILIES) or f" Known: {', '.join(FAMILIES)}, or your_package.module:thing."
    raise UserError(f"family: got {family!r}, an unknown name.{remedy}")


def encode_prompt(family: str | Family, pipe: Any, prompts: Sequence[str], *sources: Tensor) -> dict[str, Tensor]:
    """The condition of each prompt, by the keywords of the forward, (n, ...) each.

    A prompt that is dropped in training is the empty one, `encode_prompt(family, pipe, [""])`, as in the published
    Diffusion-DPO code. A family that edits also takes the source images of the prompts.
    """
    return find_family(family).encode_prompt(pipe, prompts, *sources)


def unconditional(family: str | Family, pipe: Any, count: int, *sources: Tensor) -> dict[str, Tensor]:
    """What classifier-free guidance pushes away from in the stock pipeline's call, as `encode_prompt` gives conditions.

    That is not always the empty prompt: SDXL's are zeros, Qwen-Image's is a space.
    Args:
        count: rows.
        sources: of a family that edits: the source images.
    """
    found = find_family(family)
    if found.unconditional is None:
        return found.encode_prompt(pipe, [""] * count, *sources)
    return found.unconditional(pipe, count, *sources)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(SD15, SD2, SDXL, SD3, FLUX),
        *(PIXART_ALPHA, PIXART_SIGMA, SANA),
        *(QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_PLUS, Z_IMAGE, WAN),
    )
}
