"""The toy of the multimodal benchmark: a random LLaVA of real classes, and pairs and BPO triples about random images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from text_toy import LETTERS

from mmalign.multimodal.tiny import tiny_parts
from mmalign.multimodal.tiny_families import byte_tokenizer
from mmalign.records import Content, Example, Media, Message, Sample


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the toy is; a character is a token.

    Args:
        text, vision: changes of the configs of the language model and of the vision tower.
        image_size, patch_size: pixels; (image_size / patch_size) squared are the image tokens.
        prompt, answer: characters of the question and of each answer.
    """

    text: dict[str, int]
    vision: dict[str, int]
    image_size: int
    patch_size: int
    prompt: int
    answer: int


SIZES = {
    "tiny": Size(text={}, vision={}, image_size=32, patch_size=8, prompt=8, answer=8),
    "full": Size(
        text={
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 32_000,
        },
        vision={
            "vision_hidden_size": 192,
            "vision_intermediate_size": 768,
            "vision_num_hidden_layers": 8,
            "vision_num_attention_heads": 3,
        },
        image_size=128,
        patch_size=8,
        prompt=48,
        answer=96,
    ),
}


def save_model(size: Size, folder: Path) -> Path:
    """Write the random model and its processor as a transformers folder."""
    told = {**size.text, **size.vision, "image_size": size.image_size, "patch_size": size.patch_size}
    model, processor = tiny_parts(told)
    # TRL puts nothing before a conversation, mmalign what the tokenizer puts before every text: here that is nothing.
    processor.tokenizer = byte_tokenizer({"image_token": "<image>"})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # transformers' own scale: float32 then rounds both sides to the same five digits
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def examples_of(size: Size, num_answers: int, count: int = 1) -> list[Example]:
    """Questions about images of noise with so many answers, best first; each its own image."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        image = Media(data=_png(rng, size.image_size))
        prompt = Content(messages=(Message(role="user", text=_text(rng, size.prompt), images=(image,)),))
        answers = [Content(text=_text(rng, size.answer)) for _ in range(num_answers)]
        found.append(Example(id=f"row-{number}", samples=tuple(Sample(prompt=prompt, completion=one) for one in answers)))
    return found


def rows_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Pairs of the first answer with each other one, in TRL's format: as Blind PO's released recipe trains its triples."""
    rows = []
    for example in examples:
        best, *others = example.samples
        message = best.prompt.messages[0]
        for other in others:
            rows.append(
                {
                    "images": [message.images[0].open()],
                    "prompt": [{"role": "user", "content": message.text}],
                    "chosen": [{"role": "assistant", "content": best.completion.text}],
                    "rejected": [{"role": "assistant", "content": other.completion.text}],
                }
            )
    return rows


def _png(rng: np.random.Generator, size: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _text(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice([letter for letter in LETTERS if letter != " "], length))
