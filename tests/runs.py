"""Tiny training runs: preference data, config trees, and what a run left behind."""

import atexit
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE_SIZE, tiny_folder
from torch import Tensor

from mmalign.config import read_config
from mmalign.config.reading import dump
from mmalign.experiment import TrainConfig
from mmalign.losses import LOSSES, PreferenceLoss
from mmalign.records import Comparison, Content, Media, to_dataset, write
from mmalign.train import main

SIZES = ((40, 36), (33, 64), (32, 32))  # (width, height) of the candidates of a row


def encoded(width: int, height: int, seed: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """An image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def comparison_of(number: int, images: Sequence[bytes], **changes: Any) -> Comparison:
    """One row; the first candidate is the best in odd rows, the last in even ones."""
    ranks = tuple(float(place) for place in range(1, len(images) + 1))
    values = {
        "id": f"row{number}",
        "prompt": Content(text=f"a red {number % 3}"),
        "candidates": tuple(Content(images=(Media(data=one),)) for one in images),
        "ranks": ranks if number % 2 else ranks[::-1],
    }
    return Comparison(**{**values, **changes})


def write_rows(rows: Sequence[Comparison], path: Path) -> Path:
    write(to_dataset(list(rows)), path)
    return path


@functools.cache
def preference_data(num_rows: int = 8, num_candidates: int = 2) -> Path:
    """A Parquet file of comparisons of differently sized images, made once per test process."""
    root = Path(tempfile.mkdtemp(prefix="mmalign-data-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    rows = [
        comparison_of(n, [encoded(*SIZES[place % 3], seed=10 * n + place) for place in range(num_candidates)])
        for n in range(num_rows)
    ]
    return write_rows(rows, root / "data.parquet")


def tree(output: Path, family: str = "sd15", rows: Path | None = None, **changes: Any) -> dict[str, Any]:
    """The config of a small run as plain values; `changes` are merged in: `tree(out, training={"steps": 1})`."""
    values = {
        "output": str(output),
        "adapter": {
            "name": "diffusion",
            "family": family,
            "model": str(tiny_folder(family)),
            "resolution": IMAGE_SIZE,
            "lora": {"rank": 2},
        },
        "data": {"importer": {"name": "comparisons", "path": str(rows or preference_data())}},
        "loss": {"name": "dpo", "beta": 500},
        "training": {"steps": 2, "batch_size": 2, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
    }
    return merged(values, changes)


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with `new` laid over it; mappings are merged unless the new one has a name, all else is replaced."""
    inner = {k: v for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict) and "name" not in v}
    return {**old, **new, **{k: merged(old[k], v) for k, v in inner.items()}}


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(dict(values)), encoding="utf-8")
    return path


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    with tempfile.TemporaryDirectory() as scratch:
        return read_config(TrainConfig, write_config(Path(scratch) / "config.yaml", values))


def forget_accelerate() -> None:
    """One process runs one training; tests run many, with different precisions."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(output: Path, family: str = "sd15", rows: Path | None = None, **changes: Any) -> Path:
    """Run `mmalign.train.main` and return its output folder."""
    forget_accelerate()
    return main(config_of(tree(output, family, rows, **changes))).output


def final_weights(output: Path) -> dict[str, Tensor]:
    """What the run saved as its result."""
    lora = output / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else output / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def metrics_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Over all entries; the names must be the same."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def sgd(parameters: list[torch.nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
    """Steps that are the gradient times a constant, so that weights tell gradients."""
    return torch.optim.SGD(parameters, lr=learning_rate)


SGD = {"name": "runs:sgd", "learning_rate": 0.1}


def nan_at_margin_7(policy: Tensor, reference: Tensor, margin: Tensor) -> PreferenceLoss:
    """DPO that is NaN for the rows whose margin is 7."""
    result = LOSSES["dpo"](policy, reference, beta=500.0)
    return PreferenceLoss(torch.where(margin == 7, torch.nan, result.losses), result.rewards)
