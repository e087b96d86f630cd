"""Runs killed at any moment and resumed end as an uninterrupted run; another run's checkpoint is refused."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import config_of, final_weights, forget_accelerate, largest_difference, metrics_of, preference_data, train, tree
from safetensors.torch import load_file

from mmalign.config import read_config
from mmalign.config.writing import write_resolved
from mmalign.errors import UserError
from mmalign.experiment import TrainConfig
from mmalign.train import main

# Forks runs that kill themselves with SIGKILL just before their n-th file operation in the output folder, and resumes each.
KILLED_RUNS = """
import json, os, random, signal, sys, traceback
from pathlib import Path
import runs

root, changes, num_kills = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def forked(output, kill_at=None, tell=None, **more):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in WATCHED and str(arguments[0]).startswith(str(output)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        runs.train(output, **{**changes, **more})
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without the clean-up of the parent's files
    if tell is not None:
        tell.write_text(str(count))
    os._exit(0)


runs.preference_data(), runs.tiny_folder("sd15")
assert forked(root / "whole", tell=root / "count") == 0
total = int((root / "count").read_text())
rng = random.Random(0)
for number in range(num_kills):
    output = root / f"killed-{number}"
    moments = [1 + number * total // num_kills + rng.randrange(total // num_kills), 1 + rng.randrange(total)]
    codes, more = [], {}
    for kill_at in (*moments, None):
        codes.append(forked(output, kill_at, **more))
        more = {"resume": "latest"} if (output / "config.yaml").exists() else {}
    print(json.dumps([output.name, moments, codes]), flush=True)
"""

VALIDATION = {"prompts": ["a red 1"], "steps": 1, "guidance_scale": 1.0}
TRAINING = {"steps": 4, "accumulation": 2, "batch_size": 1, "checkpoint_every": 2, "validate_every": 2, "warmup_steps": 2}
LORA = {"rank": 2, "dropout": 0.1}
KINDS = {
    "lora_with_average": {"adapter": {"lora": LORA, "validation": VALIDATION}, "training": {**TRAINING, "ema_decay": 0.5}},
    "full": {"adapter": {"lora": None}, "training": TRAINING, "loss": {"name": "dpo", "beta": "auto"}},
}


def contents(output: Path) -> dict[str, str]:
    """Name -> hash of the final weights (safetensors writes its metadata in any order) and the validation images."""
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if "checkpoint-" not in str(path)}
    weights = {name: weights_hash(path) for name, path in files.items() if path.suffix == ".safetensors"}
    images = {name: path for name, path in files.items() if path.suffix == ".png"}
    return weights | {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in images.items()}


def weights_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def numbers(output: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("throughput", "memory"))} for row in metrics_of(output)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_moment_and_resumed_ends_bit_for_bit_as_if_uninterrupted(tmp_path: Path, kind: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED_RUNS, str(tmp_path), json.dumps(KINDS[kind]), "5"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(here)})
    assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "whole"
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(killed) == 5
    for name, moments, codes in killed:
        output = tmp_path / name
        assert codes[0] == -9 and codes[2] == 0, f"killed before operations {moments}: {codes}\n{done.stderr[-3000:]}"
        assert contents(output) == contents(whole), f"killed before operations {moments}"
        assert [row["step"] for row in metrics_of(output)] == [1, 2, 3, 4], f"killed before operations {moments}"
        assert numbers(output) == numbers(whole), f"killed before operations {moments}"
        assert sorted(p.name for p in output.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        assert not [path for path in output.rglob("*") if path.name.startswith(".")]


def test_an_older_checkpoint_gives_the_same_end(tmp_path: Path) -> None:
    training = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4}
    output = train(tmp_path / "out", training=training)
    before, numbers_before = contents(output), numbers(output)
    train(output, training=training, resume=str(output / "checkpoint-2"))
    assert contents(output) == before
    assert numbers(output) == numbers_before


def test_rotation_keeps_the_last_checkpoints(tmp_path: Path) -> None:
    output = train(tmp_path / "out", training={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 3})
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": {"name": "dpo", "beta": 100}}, r"loss\.0\.beta: was 500.*is now 100"),
    "batch": ({"training": {"batch_size": 1}}, r"training\.batch_size: was 2, is now 1"),
    "seed": ({"seed": 5}, r"seed: was 0, is now 5"),
    "lora": ({"adapter": {"lora": {"rank": 4}}}, r"adapter\.lora\.rank: was 2, is now 4"),
    "several": (
        {"seed": 5, "training": {"accumulation": 3}},
        r"seed: was 0, is now 5.*training\.accumulation: was 1, is now 3",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("finished") / "out", training={"steps": 2, "checkpoint_every": 1})


def everything(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_config_is_refused_with_the_keys_that_differ(finished: Path, change: str) -> None:
    changes, message = CHANGES[change]
    training = {"steps": 2, "checkpoint_every": 1, **changes.get("training", {})}
    before = everything(finished)
    with pytest.raises(UserError, match=rf"(?s)checkpoint-2: is of another run.*{message}.*Resume with the same config"):
        train(finished, resume="latest", **{**changes, "training": training})
    assert everything(finished) == before


def test_a_checkpoint_of_other_data_is_refused_though_the_config_is_the_same(tmp_path: Path) -> None:
    rows = tmp_path / "data.parquet"
    rows.write_bytes(preference_data(8).read_bytes())
    training = {"steps": 2, "checkpoint_every": 1}
    output = train(tmp_path / "out", rows=rows, training=training)
    rows.write_bytes(preference_data(6).read_bytes())
    with pytest.raises(UserError, match=r"another run.*examples: was 8, is now 6"):
        train(output, rows=rows, training=training, resume="latest")


def test_the_config_that_a_run_leaves_is_the_run(tmp_path: Path) -> None:
    output = train(tmp_path / "out", training={"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3})
    before = contents(output)
    forget_accelerate()
    main(read_config(TrainConfig, output / "config.yaml", [f"resume={output / 'checkpoint-1'}"]))
    assert contents(output) == before


def test_what_is_only_reported_may_change_on_resume(tmp_path: Path) -> None:
    training = {"steps": 4, "checkpoint_every": 2}
    output = train(tmp_path / "out", training=training)
    before = contents(output)
    more = {"log_every": 2, "keep_checkpoints": 5, "checkpoint_every": 1}
    train(
        output, training={**training, **more}, source={"name": "offline", "num_workers": 1}, resume=str(output / "checkpoint-2")
    )
    assert contents(output) == before
    assert [row["step"] for row in metrics_of(output)] == [1, 2, 4]


def test_a_folder_with_a_run_is_refused_and_overwritten_only_when_asked(finished: Path, tmp_path: Path) -> None:
    before = everything(finished)
    with pytest.raises(UserError, match=r"output: .* holds a run already.*resume=latest.*overwrite=true"):
        train(finished)
    assert everything(finished) == before
    output = train(tmp_path / "out", seed=3, training={"steps": 3, "checkpoint_every": 1, "ema_decay": 0.5})
    train(output, training={"steps": 2, "checkpoint_every": 1}, overwrite=True)
    assert largest_difference(final_weights(output), final_weights(finished)) == 0
    assert [row["step"] for row in metrics_of(output)] == [1, 2]
    assert sorted(everything(output)) == sorted(before)


def test_overwriting_leaves_no_weights_of_the_old_run_beside_a_new_one_that_failed(tmp_path: Path) -> None:
    output = train(tmp_path / "out")
    with pytest.raises(UserError, match="NaN"):
        train(output, training={"optimiser": {"learning_rate": 1e30}}, overwrite=True)
    assert not list(output.glob("*.safetensors"))
    assert not (output / "README.md").exists()


def test_latest_without_a_run_is_refused_and_with_a_run_killed_early_starts_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"resume: got latest.*no checkpoint"):
        train(tmp_path / "out", resume="latest")
    assert not (tmp_path / "out").exists()
    early = train(tmp_path / "early", training={"checkpoint_every": None})
    (
        early / "pytorch_lora_weights.safetensors"
    ).unlink()  # as if killed after the last step: no checkpoint_every, no checkpoint
    with pytest.raises(UserError, match=r"another run.*seed: was 0, is now 1"):
        train(early, seed=1, resume="latest", training={"checkpoint_every": None})
    with caplog.at_level(logging.INFO, logger="mmalign"):
        train(early, resume="latest", training={"checkpoint_every": None})
    assert "without a checkpoint yet" in caplog.text
    assert largest_difference(final_weights(early), final_weights(train(tmp_path / "other"))) == 0
    assert [row["step"] for row in metrics_of(early)] == [1, 2]


def test_no_new_run_gets_past_the_checks_of_its_config_by_resuming(tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    refused = {"loss": "tr_dpo"}  # without training.moving_reference
    for more in ({}, {"dry_run": True}):
        with pytest.raises(UserError, match="incomplete checkpoint"):
            train(output, resume=str(other), **refused, **more)
    assert not output.exists()
    output.mkdir()
    write_resolved(config_of(tree(output, resume="latest", **refused)), output)  # as of a run that was killed at once
    with pytest.raises(UserError, match=r"tr_dpo.*training\.moving_reference"):
        train(output, resume="latest", **refused)
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "environment.json"]
