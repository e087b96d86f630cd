"""Runs on texts in two processes of `accelerate launch`, which train the weights of one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import SGD, largest_difference, metrics_of, write_config
from test_ring import SEVERAL, launch
from text_runs import text_tree, text_weights, train_text

FLAT: dict[str, Any] = {"training": {"steps": 2, "batch_size": 4, "optimiser": SGD}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes with batches of 2 under `two-NAME`, and the same of one with batches of 4 under `one-NAME`."""
    folder = tmp_path_factory.mktemp("processes")
    kinds = {
        "dpo": {"loss": {"name": "dpo"}},
        "bco": {"loss": {"name": "bco"}, "data": {"view": "unpaired"}},
        "full": {"loss": {"name": "aot"}, "adapter": {"lora": None}},
        "kto": {"loss": {"name": "kto"}, "data": {"view": "unpaired"}, "adapter": {"mismatched": False}},
        "shifted": {"loss": {"name": "kto"}, "data": {"view": "unpaired"}},
    }
    jobs = []
    for name, changes in kinds.items():
        if name != "shifted":
            train_text(folder / f"one-{name}", **FLAT, **changes)
        values = text_tree(folder / f"two-{name}", **{**changes, "training": {**FLAT["training"], "batch_size": 2}})
        config = write_config(folder / f"two-{name}.yaml", values)
        jobs.append({"verb": "train", "words": ["--config", str(config)]})
    (folder / "several.py").write_text(SEVERAL)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch(folder, str(folder / "several.py"), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "two-shifted" / "metrics.jsonl").exists(), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["dpo", "bco", "full", "kto"])
def test_two_processes_train_the_weights_of_one(two: Path, name: str) -> None:
    one, other = text_weights(two / f"one-{name}"), text_weights(two / f"two-{name}")
    assert largest_difference(one, other) <= 1e-6
    losses = [[row["loss"] for row in metrics_of(two / f"{kind}-{name}")] for kind in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_two_processes_take_ktos_anchor_on_answers_of_other_prompts(two: Path) -> None:
    assert all(math.isfinite(row["loss"]) for row in metrics_of(two / "two-shifted"))
    weights = text_weights(two / "two-shifted")
    assert largest_difference(weights, text_weights(two / "one-kto")) > 0
