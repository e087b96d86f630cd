"""Tiny training runs on prompts with images: rows, config trees, results."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multimodal import picture
from runs import config_of, forget_accelerate, merged
from safetensors.torch import load_file
from text_runs import _root
from torch import Tensor

from mmalign.train import main

ANSWERS = (
    ("Red.", "A green one.", "Discs are of many kinds."),
    ("Blue.", "No.", "I do not know."),
    ("Two.", "Three!", "Some."),
)


def prompt_of(question: str, *images: str) -> dict[str, Any]:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts if images else question}]}


@functools.cache
def rows_file(kind: str = "blind") -> Path:
    """Eight rows of three answers, of which one row shows nothing and one two images; `crossed`: each answer has a prompt."""
    folder = _root()
    names = []
    for number in range(6):
        (folder / f"picture-{number}.png").write_bytes(picture(number, 30 + 4 * number, 40).read())
        names.append(f"picture-{number}.png")
    rows = []
    for number in range(8):
        shown = ((names[number % 6],), (), tuple(names[1:3]))[0 if number < 6 else number - 5]
        answers = ANSWERS[number % 3]
        row: dict[str, Any] = {
            "id": f"row{number}",
            "prompt": prompt_of(f"What is it, number {number}?", *shown),
            "candidates": list(answers),
            "ranks": [1, 2, 2],
            "provenance": [{}, {}, {"source": "blind"}],
        }
        if kind == "scored":
            row = {**row, "scores": {"judge": [2.0, 1.0, 0.5]}, "candidates": list(answers)}
            del row["ranks"]
        if kind == "crossed":
            both = [prompt_of(f"What is it, number {number}?", names[(number + n) % 6]) for n in (0, 3, 0)]
            row |= {"prompts": both, "prompt": both[0]}
        if kind == "pairs":
            row |= {"candidates": list(answers[:2]), "ranks": [1, 2], "provenance": [{}, {}]}
        if kind == "crossed pairs":
            both = [prompt_of(f"What is it, number {number}?", names[(number + n) % 6]) for n in (0, 3)]
            row |= {
                "prompts": both,
                "prompt": both[0],
                "candidates": list(answers[:2]),
                "ranks": [1, 2],
                "provenance": [{}, {}],
            }
        rows.append(row)
    path = folder / f"seen-{kind.replace(' ', '-')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_of(kind: str, view: Any = "pair") -> dict[str, Any]:
    return {"importer": {"name": "comparisons", "path": str(rows_file(kind))}, "view": view}


def seen_tree(output: Path, **changes: Any) -> dict[str, Any]:
    """The config of a small run as plain values, with `changes` merged in."""
    values = {
        "output": str(output),
        "adapter": {"name": "image_text", "model": "tiny", "lora": {"rank": 2}},
        "data": data_of("pairs"),
        "loss": {"name": "dpo"},
        "training": {"steps": 2, "batch_size": 2, "log_every": 1, "optimiser": {"name": "adamw", "learning_rate": 1e-2}},
    }
    return merged(values, changes)


def train_seen(output: Path, **changes: Any) -> Path:
    """Run `mmalign.train.main` and return its output folder."""
    forget_accelerate()
    return main(config_of(seen_tree(output, **changes))).output


def seen_weights(output: Path) -> Mapping[str, Tensor]:
    """What the run saved as its result."""
    lora = output / "adapter_model.safetensors"
    return load_file(lora if lora.exists() else output / "model" / "model.safetensors")
