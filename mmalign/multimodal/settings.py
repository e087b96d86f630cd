"""Settings of processors: which there are, and sizes in pixels under the names that every version takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmalign.errors import UserError
from mmalign.records.rows import nearest

PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # the names in `size` of what Qwen's processors bound


def processor_settings(processor: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for calls of a processor of these settings.

    Args:
        processor: of transformers; it passes over what it does not know.
        told: names of its processors of images and videos; `min_pixels` and `max_pixels` bound the area of images where its
            `size` is of areas (Qwen's).
    Raises:
        UserError: a name that neither knows.
    """
    known: set[str] = set()
    for maker in (processor.image_processor, getattr(processor, "video_processor", None)):
        known |= set(getattr(getattr(maker, "valid_kwargs", None), "__annotations__", ()))
    strange = next((name for name in told if known and name not in known), None)
    if strange is not None:
        raise UserError(
            f"adapter.processor: got {strange}, which {type(processor).__name__} does not know.{nearest(strange, known)} "
            f"Known: {', '.join(sorted(known))}."
        )
    bounds = {PIXELS[name]: value for name, value in told.items() if name in PIXELS}
    rest = {name: value for name, value in told.items() if name not in PIXELS}
    if not bounds:
        return rest
    size = {name: getattr(processor.image_processor.size, name, None) for name in PIXELS.values()}
    if "size" in rest or None in size.values():
        raise UserError(f"adapter.processor: got {', '.join(told)} for {type(processor).__name__}, want size alone.")
    return {**rest, "images_kwargs": {"size": {**size, **bounds}}}
