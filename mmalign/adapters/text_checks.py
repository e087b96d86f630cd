"""What adapters of language models refuse of their settings and of the data, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.errors import UserError
from mmalign.language.tiny import TINY


def check_settings(settings: Any) -> None:
    """Refuse settings without meaning, or that do not go together.

    Raises:
        ValueError: names the setting.
    """
    for name in ("max_prompt_length", "max_response_length"):
        value = getattr(settings, name)
        if value is not None and value < 2:
            raise ValueError(f"{name}: got {value}, want 2 or more, or null for no limit.")
    if settings.group_by_length < 1:
        raise ValueError(f"group_by_length: got {settings.group_by_length}, want 1 or more.")
    quantization = getattr(settings, "quantization", None)
    if quantization is not None and settings.lora is None:
        raise ValueError("quantization: got it without lora, and quantised weights cannot be trained. Set lora.")
    if settings.dtype != "auto" and settings.lora is None:
        raise ValueError(f"dtype: got {settings.dtype} without lora, and a full fine-tune keeps float32. Set it to auto.")
    if settings.model == TINY and (quantization is not None or getattr(settings, "gguf_file", None) is not None):
        raise ValueError("model: got tiny with quantization or gguf_file, which want a real one.")
    if settings.tiny is not None and settings.model != TINY:
        raise ValueError(f"tiny: got changes for model {settings.model}, which are for model: tiny.")


def check_blind(numbers: Mapping[int, str], adapter: str) -> None:
    """Refuse prompts with images where the model does not see.

    Args:
        numbers: as `records.Examples.sources` has them.
        adapter: its name.
    Raises:
        UserError: names the first such row.
    """
    for number, where in numbers.items():
        if number:
            raise UserError(f"{where}: got a prompt with {number} images, which adapter: {adapter} does not see.")


def check_texts(kinds: Mapping[tuple[int, tuple[int, ...]], str]) -> None:
    """Refuse examples whose candidates have images; `kinds` as `records.Examples` has them.

    Raises:
        UserError: names the first such row.
    """
    for (_, images), where in kinds.items():
        if any(images):
            raise UserError(f"{where}: got candidates with images, want texts. Choose adapter: diffusion.")
