"""A tiny random language model of a real class, with a real tokenizer: for smoke runs and tests, without a download."""

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

TINY = "tiny"  # as `adapter.model`
_VERSION = 1  # of the recipe; another one is another folder
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML, with the system message where there is one.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A Qwen2Tokenizer of 256 byte characters and the marks of turns: no merges. It puts nothing before a text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    entries = [*sorted(ByteLevel.alphabet()), *MARKS]
    vocab = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=list(MARKS[1:]), model_max_length=4096)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(tokenizer: Any, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Any:
    """A LlamaForCausalLM with 2 layers of width 32.

    Args:
        tokenizer: its vocabulary is the model's.
        changes: of the config.
        seed: of the weights; the global generator is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{**shape, "num_key_value_heads": 2, "max_position_embeddings": 4096, **ids, **(changes or {})},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_folder(changes: Mapping[str, Any] | None = None) -> Path:
    """The folder of the tiny model and its tokenizer in the user's cache, written at the first call."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmalign" / "tiny"
    kind = sha256(json.dumps(dict(changes or {}), sort_keys=True).encode()).hexdigest()[:8]
    folder = root / f"text-{kind}-{_VERSION}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=".text-"))
        try:
            tokenizer = tiny_tokenizer()
            tiny_model(tokenizer, changes).save_pretrained(scratch / "model")
            tokenizer.save_pretrained(scratch / "model")
            os.replace(scratch / "model", folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
