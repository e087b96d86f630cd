"""Tiny random models that see, of real classes, with real processors and tokenizers: for smoke runs and tests, offline."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import UserError
from mmalign.records.rows import nearest

_VERSION = 1  # of the recipe; another one is another folder
DEFAULT = "llava"
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
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


def template(image: str, video: str = "", *, begin: str = "") -> str:
    """ChatML with parts: what stands for an image or a video is written where it stands in a message."""
    return (
        begin + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def byte_tokenizer(named: Mapping[str, str], others: tuple[str, ...] = (), *, begins: bool = False) -> Any:
    """A tokenizer of 256 byte characters and special tokens, without merges.

    Args:
        named: special tokens that a processor asks for by name (`image_token`).
        others: further special tokens.
        begins: whether a text begins with a token, `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [*MARKS, *dict.fromkeys([*named.values(), *others])]
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    backend = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if begins:
        first = entries.index(MARKS[0])
        backend.post_processor = processors.TemplateProcessing(single=f"{MARKS[0]} $A", special_tokens=[(MARKS[0], first)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=MARKS[0],
        eos_token=MARKS[2],
        pad_token=MARKS[0],
        extra_special_tokens=dict(named),
        model_max_length=4096,
    )


def _llava(text: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    tokenizer = byte_tokenizer({"image_token": "<image>"}, begins=True)
    side = vision["image_size"]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **_ids(tokenizer), **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], tuple[Any, Any]]] = {"llava": _llava}


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


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _sharpen(model: Any) -> None:
    """Weights of std GAIN / sqrt(fan_in), whatever the class made them; norms, biases and tables of one row a token stay."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2 and not isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(weight, std=GAIN / weight[0].numel() ** 0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=GAIN)
