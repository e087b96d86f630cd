"""Rollouts, replay in two processes of `accelerate launch`, which train the weights of one through checkpoints and kills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import final_weights, largest_difference, merged, metrics_of, train, tree, write_config
from test_resume import KILLED_RUNS, contents, numbers
from test_ring import SEVERAL, launch

SOURCES: dict[str, dict[str, Any]] = {
    "rollouts": {
        "loss": {"name": "spo"},
        "data": {"view": "prompts"},
        "source": {
            "name": "rollouts",
            "scorer": {"name": "image", "scorer": "brightness"},
            "num_steps": 3,
            "num_candidates": 2,
            "prompts_per_round": 3,
            "sampling_batch": 2,
            "inner_steps": 1,
            "threshold": 0.0,
        },
    },
    "replay": {
        "loss": {"name": "dro"},
        "data": {"view": "best"},
        "source": {"name": "replay", "num_steps": 3, "refresh_every": 3},
    },
}
TRAINING = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 3, "log_every": 1}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` process with batches of 2, `two` with batches of 1, and `on`, which goes on from a checkpoint of `two`."""
    folder = tmp_path_factory.mktemp("online")
    jobs = []
    for name, changes in SOURCES.items():
        train(folder / f"{name}-one", **merged(changes, {"training": {**TRAINING, "batch_size": 2}}))
        for kind, more in (("two", {}), ("on", {"resume": str(folder / f"{name}-two" / "checkpoint-2")})):
            values = tree(folder / f"{name}-{kind}", **merged(changes, {"training": {**TRAINING, "batch_size": 1}, **more}))
            config = write_config(folder / f"{name}-{kind}.yaml", values)
            jobs.append({"verb": "train", "words": ["--config", str(config)]})
    (folder / "several.py").write_text(SEVERAL)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch(folder, str(folder / "several.py"), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "replay-on" / "metrics.jsonl").exists(), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_two_processes_train_the_weights_of_one(outputs: Path, name: str) -> None:
    one, two = outputs / f"{name}-one", outputs / f"{name}-two"
    assert largest_difference(final_weights(one), final_weights(two)) < 2e-5
    moved = max(float(value.abs().max()) for key, value in final_weights(two).items() if "lora_B" in key)
    assert moved > 1e-3
    for first, second in zip(metrics_of(one), metrics_of(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3, abs=1e-6)
        if name == "rollouts":
            assert first["rollout/valid"] == second["rollout/valid"]
            assert first["rollout/score"] == pytest.approx(second["rollout/score"], rel=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_a_checkpoint_of_two_processes_goes_on_bit_for_bit(outputs: Path, name: str) -> None:
    two, on = outputs / f"{name}-two", outputs / f"{name}-on"
    assert largest_difference(final_weights(two), final_weights(on)) == 0
    assert [row["loss"] for row in metrics_of(on)] == [row["loss"] for row in metrics_of(two)][2:]


def test_the_checkpoint_keeps_what_both_processes_had_not_used_yet(outputs: Path) -> None:
    def states(name: str) -> list[dict[str, Any]]:
        files = sorted((outputs / f"{name}-two" / "checkpoint-2").glob("custom_checkpoint_*.pkl"))
        return [torch.load(file, weights_only=True) for file in files]

    (replay,) = [state for state in states("replay") if "buffers" in state]
    first, second = replay["buffers"]
    assert len(first) == len(second) == 1 and not torch.equal(first[0]["noisy"], second[0]["noisy"])
    (rollouts,) = [state for state in states("rollouts") if "pool" in state]
    assert rollouts["pool"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_killed_run_that_goes_on_ends_bit_for_bit_as_if_uninterrupted(tmp_path: Path, name: str) -> None:
    here = Path(__file__).parent
    changes = merged(SOURCES[name], {"training": {"steps": 3, "checkpoint_every": 1, "batch_size": 2}})
    command = [sys.executable, "-c", KILLED_RUNS, str(tmp_path), json.dumps(changes), "2"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(here)})
    assert done.returncode == 0, done.stderr[-3000:]
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(killed) == 2
    for name, moments, codes in killed:
        assert codes[0] == -9 and codes[2] == 0, f"killed before operations {moments}: {codes}\n{done.stderr[-3000:]}"
        assert contents(tmp_path / name) == contents(tmp_path / "whole"), moments
        assert numbers(tmp_path / name) == numbers(tmp_path / "whole"), moments
