"""Tiny training runs on texts: models of the real classes with their tokenizer in a folder, rows, config trees, results."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import config_of, forget_accelerate, merged
from safetensors.torch import load_file
from text_tokenizers import tokenizer_of
from tiny_causal import tiny_causal
from torch import Tensor

from mmalign.train import main

PAIRS = (
    ("name a colour", " blue", " two is four"),
    ("say hello in", " French", " the cat ran"),
    ("two plus two is", " four", " eight or two or a mat"),
    ("the cat sat", " on the mat", " on"),
    ("the other cat", " ran too", " is a colour"),
    ("red is", " a colour", " hello in German"),
    ("four plus four", " is eight", " is"),
    ("the tongue of", " cats", " plus two plus two"),
)
LENGTHS = {"gpt2": "n_positions", "mamba": None}  # how a config calls the longest row it takes


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="mmalign-text-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def model_folder(name: str = "llama", template: str = "none", begins: bool = False) -> Path:
    """A float32 model of that name in `tiny_causal.MODELS`, with a tokenizer whose vocabulary is the model's."""
    import torch

    folder = _root() / f"{name}-{template}-{begins}"
    tokenizer = tokenizer_of(template, begins=begins)
    ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    longest = LENGTHS.get(name, "max_position_embeddings")
    model = tiny_causal(
        name, dtype=torch.float32, vocab_size=len(tokenizer), **ids, **({} if longest is None else {longest: 128})
    )
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_file(rows: Sequence[Mapping[str, Any]], name: str) -> Path:
    """Rows as TRL has them."""
    path = _root() / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@functools.cache
def pairs_file(chats: bool = False) -> Path:
    """The pairs above, as texts or as conversations."""
    if not chats:
        return rows_file([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS], "pairs")
    return rows_file(
        [
            {"prompt": [{"role": "user", "content": prompt}]}
            | {
                side: [{"role": "assistant", "content": words}]
                for side, words in zip(("chosen", "rejected"), both, strict=True)
            }
            for prompt, *both in PAIRS
        ],
        "chats",
    )


def text_tree(output: Path, **changes: Any) -> dict[str, Any]:
    """The config of a small run on the pairs as plain values, with `changes` merged in."""
    values = {
        "output": str(output),
        "adapter": {"name": "text", "model": str(model_folder()), "lora": {"rank": 2}},
        "data": {"importer": {"name": "trl", "path": str(pairs_file())}},
        "loss": {"name": "dpo"},
        "training": {"steps": 2, "batch_size": 2, "log_every": 1, "optimiser": {"name": "adamw", "learning_rate": 1e-2}},
    }
    return merged(values, changes)


def train_text(output: Path, **changes: Any) -> Path:
    """Run `mmalign.train.main` and return its output folder."""
    forget_accelerate()
    return main(config_of(text_tree(output, **changes))).output


def text_weights(output: Path) -> dict[str, Tensor]:
    """What the run saved as its result."""
    lora = output / "adapter_model.safetensors"
    return load_file(lora if lora.exists() else output / "model" / "model.safetensors")
