"""Tiny random models that see, of real classes, with real processors and tokenizers: for smoke runs and tests, offline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import UserError
from mmalign.multimodal.tiny_families import BUILDERS
from mmalign.records.rows import nearest

_VERSION = 1  # of the recipe; another one is another folder
DEFAULT = "llava"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GAIN = 0.6  # weights of std GAIN / sqrt(fan_in): with transformers' 0.02 attention hardly matters, and a wrong mask would pass


def tiny_parts(changes: Mapping[str, Any] | None = None, seed: int = 0) -> tuple[Any, Any]:
    """A tiny random model and its processor.

    Args:
        changes: `family`, of BUILDERS; keys that begin with `vision_`, and `image_size` and `patch_size`, change the config of
            the vision tower, others that of the language model.
        seed: of the weights; the global generator is left as it was.
    Raises:
        UserError: no such family.
    """
    from transformers import AutoModelForImageTextToText

    told = dict(changes or {})
    family = told.pop("family", DEFAULT)
    if family not in BUILDERS:
        raise UserError(
            f"adapter.tiny.family: got {family}, want one of {', '.join(BUILDERS)}.{nearest(str(family), BUILDERS)}"
        )
    seen = {name for name in told if name.startswith("vision_") or name in ("image_size", "patch_size")}
    vision = VISION | {name.removeprefix("vision_"): told[name] for name in seen}
    text = TEXT | {name: value for name, value in told.items() if name not in seen}
    config, processor = BUILDERS[family](text, vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).eval()
        _sharpen(model)
    return model, processor


def tiny_folder(changes: Mapping[str, Any] | None = None) -> Path:
    """The folder of a tiny model and its processor in the user's cache, written at the first call."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign" / "tiny"
    kind = sha256(json.dumps(dict(changes or {}), sort_keys=True).encode()).hexdigest()[:8]
    folder = root / f"image-text-{(changes or {}).get('family', DEFAULT)}-{kind}-{_VERSION}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=".image-text-"))
        try:
            model, processor = tiny_parts(changes)
            model.save_pretrained(scratch / "model")
            processor.save_pretrained(scratch / "model")
            os.replace(scratch / "model", folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _sharpen(model: Any) -> None:
    """Weights of std GAIN / sqrt(fan_in) and open gates, whatever the class made them; norms and biases stay."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=GAIN)
        elif isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=GAIN / weight[0].numel() ** 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's projector, which is zero at first
            torch.nn.init.normal_(parameter, std=GAIN / parameter.shape[0] ** 0.5)
        if name.endswith("gate") and parameter.numel() == 1:  # Mllama's are shut at first, and it sees nothing
            torch.nn.init.constant_(parameter, 0.5)
