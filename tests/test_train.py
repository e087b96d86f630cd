"""`mmalign train` as it is run: several processes, both command lines, trackers, the plan, and a loss that is not finite."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from judging_processes import free_port
from runs import (
    SGD,
    comparison_of,
    config_of,
    encoded,
    final_weights,
    forget_accelerate,
    largest_difference,
    metrics_of,
    preference_data,
    train,
    tree,
    write_config,
    write_rows,
)
from safetensors.torch import load_file
from test_resume import everything

from mmalign import cli
from mmalign.checkpoints import latest
from mmalign.errors import UserError
from mmalign.train import main
from mmalign.training import start

HERE = Path(__file__).parent

# Each run in a fork, with a meeting point of its own, so that the imports are paid once. Run by `accelerate launch`.
SEVERAL_RUNS = """
import json, os, sys, traceback
from pathlib import Path
import accelerate, datasets, diffusers, peft, runs
from diffusers import DDPMScheduler, StableDiffusionPipeline
from mmalign.train import main

for number, values in enumerate(json.loads(Path(sys.argv[1]).read_text()), 1):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.environ.update(MASTER_PORT=str(int(os.environ["FIRST_PORT"]) + number), TORCHELASTIC_USE_AGENT_STORE="False")
    try:
        main(runs.config_of(values))
    except BaseException:
        traceback.print_exc()
    os._exit(0)
"""
SPLIT: dict[str, dict[str, Any]] = {
    "dpo": {},
    "accumulated_full": {"adapter": {"lora": None}, "training": {"accumulation": 2}},
    "one_at_a_time": {"adapter": {"winner_guard": {"mu": 0.9}}, "training": {"candidate_microbatch": 1, "accumulation": 2}},
    "kto": {
        "loss": {"name": "kto", "beta": 500},
        "data": {"view": "unpaired"},
        "source": {"name": "offline", "wanted": 0.8},
    },
    "auto_beta": {"loss": {"name": "dpo", "beta": "auto"}},
    "average": {"training": {"ema_decay": 0.5, "checkpoint_every": 2, "schedule": "linear"}},
}


def launch(*words: str, num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    several = ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []  # on CPUs, with the variable below
    command = [*accelerate, "--dynamo_backend", "no", "--num_processes", str(num_processes), *several, *words]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "FIRST_PORT": str(free_port())}
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment)


def split(output: Path, name: str, num_processes: int) -> dict[str, Any]:
    """A run of four examples a step (twice that when accumulating), in this many processes."""
    values = tree(output, **SPLIT[name])
    sizes = {"batch_size": 4 // num_processes, "steps": 3}
    values["training"] |= {**sizes, "optimiser": {**SGD, "learning_rate": 0.03}}
    return values


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script, jobs = folder / "several_runs.py", folder / "jobs.json"
    script.write_text(SEVERAL_RUNS)
    poisoned = tree(folder / "poisoned", rows=poisoned_rows(folder), loss={"name": "runs:nan_at_margin_7"})
    jobs.write_text(json.dumps([*(split(folder / name, name, 2) for name in SPLIT), poisoned]))
    done = launch(str(script), str(jobs), num_processes=2)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.mark.parametrize("name", SPLIT)
def test_two_processes_are_one(tmp_path: Path, two_processes: Path, name: str) -> None:
    forget_accelerate()
    main(config_of(split(tmp_path / "one", name, 1)))
    two = two_processes / name
    assert two.exists(), (two_processes / "stderr").read_text()[-3000:]
    assert largest_difference(final_weights(tmp_path / "one"), final_weights(two)) <= 1e-6
    assert max(float(v.abs().max()) for k, v in final_weights(two).items() if "lora_A" not in k) > 1e-4
    rows = metrics_of(tmp_path / "one"), metrics_of(two)
    assert [row["step"] for row in rows[1]] == [1, 2, 3]
    for one, other in zip(*rows, strict=True):
        assert other["epoch"] == one["epoch"]
        for key in one.keys() - {"throughput/examples_per_s", "memory/peak_gb"}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = config_of(tree(tmp_path / "out")).training
    forget_accelerate()
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # some job systems set it for a single process
    start(training, tmp_path / "out")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"got 2 processes.*ACCELERATE_USE_CPU=1"):
        start(training, tmp_path / "out")


def poisoned_rows(folder: Path) -> Path:
    rows = [
        comparison_of(n, [encoded(32, 32, 2 * n), encoded(32, 32, 2 * n + 1)], margin=7.0 if n == 3 else 0.0) for n in range(4)
    ]
    return write_rows(rows, folder / "poisoned.parquet")


def test_not_a_number_on_one_of_two_processes_stops_both_with_its_sample(two_processes: Path) -> None:
    said = (two_processes / "stderr").read_text()
    assert re.search(r"UserError: step 1: the loss is NaN or infinite for row3\. There is no checkpoint yet", said)
    assert not (two_processes / "poisoned" / "pytorch_lora_weights.safetensors").exists()


def test_not_a_number_stops_with_step_and_sample_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    rows = poisoned_rows(tmp_path)
    training = {"steps": 8, "batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 9}
    loss = {"name": "runs:nan_at_margin_7"}
    with pytest.raises(UserError) as told:
        train(tmp_path / "out", rows=rows, loss=loss, training=training)
    last = latest(tmp_path / "out")
    step = 1 if last is None else int(last.name.removeprefix("checkpoint-")) + 1
    assert 2 <= step <= 4  # the seed's order does not begin with the poisoned row
    assert re.match(rf"step {step}: the loss is NaN or infinite for row3\. The last checkpoint is .*{last}\. ", str(told.value))
    assert "learning_rate" in str(told.value)
    assert last is not None and all(value.isfinite().all() for value in load_file(last / "trainable.safetensors").values())
    assert [row["step"] for row in metrics_of(tmp_path / "out")] == list(range(1, step))
    with pytest.raises(UserError, match=f"step {step}: .*row3"):
        train(tmp_path / "out", rows=rows, loss=loss, training=training, resume="latest")


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d: the (gradient|loss) is NaN or infinite"):
        train(tmp_path / "out", training={"steps": 4, "optimiser": {"learning_rate": 1e30}})


def test_accelerate_launch_and_mmalign_train_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "config.yaml", tree(tmp_path / "unused"))
    overrides = ["loss.beta=200", "training.steps=3", "seed=4"]
    done = launch("-m", "mmalign.train", "--config", str(config), *overrides, f"output={tmp_path / 'launched'}")
    assert done.returncode == 0, done.stderr[-3000:]
    forget_accelerate()
    assert cli.main(["train", str(config), *overrides, f"output={tmp_path / 'called'}"]) == 0
    launched, called = tmp_path / "launched", tmp_path / "called"
    assert largest_difference(final_weights(launched), final_weights(called)) == 0
    configs = [(run / "config.yaml").read_text().replace(run.name, "") for run in (launched, called)]
    assert configs[0] == configs[1]
    assert "load_lora_weights" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()


def test_trackers_write_into_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for patience in ("WANDB_X_SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):  # of a machine that does other things
        monkeypatch.setenv(patience, "600")
    output = train(tmp_path / "out", training={"trackers": ["tensorboard", "wandb"]})
    assert [path for path in (output / "tensorboard").rglob("events.out.tfevents.*") if path.stat().st_size > 1000]
    assert list((output / "wandb").rglob("*.wandb"))
    assert not list((tmp_path / "elsewhere").iterdir())
    train(output, overwrite=True)
    assert not (output / "tensorboard").exists() and not (output / "wandb").exists()


def dry_run(output: Path, **changes: Any) -> str:
    forget_accelerate()
    return str(main(config_of(tree(output, dry_run=True, **changes))))


def test_a_dry_run_prints_the_arithmetic_and_writes_nothing(tmp_path: Path) -> None:
    plan = dry_run(tmp_path / "out", training={"steps": 5, "batch_size": 2, "accumulation": 3})
    for line in (
        r"data +8 rows: 8 examples",
        r"batch +1 devices x 2 x 3 accumulated = 6 examples of 2 per step",
        r"length +5 steps = 30 examples = 3\.75 epochs",
        r"trained +sd15, LoRA rank 2 .* parameters trained",
        # 4 x 8 x 8 latents: 256 elements.
        r"beta +dpo: 500 \(mean, with 1/2\), 250 \(mean, without 1/2\), 1\.953 \(sum, with 1/2\), 0\.9766 \(sum, without 1/2\)",
        r"memory +about 0\.\d+ GB",
    ):
        assert re.search(rf"(?m)^{line}", plan), f"{line}\n{plan}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (2, 4), (0.3, 1), (1.5, 3), (2.25, 5)])
def test_epochs_are_counted_in_whole_steps(tmp_path: Path, epochs: float, steps: int) -> None:
    training = {"steps": None, "epochs": epochs, "batch_size": 2, "accumulation": 2}
    assert re.search(rf"length +{steps} steps", dry_run(tmp_path / "out", training=training))


def test_a_dry_run_beside_a_run_leaves_it_alone(tmp_path: Path) -> None:
    output = train(tmp_path / "out")
    before = everything(output)
    assert "length" in dry_run(output)
    assert everything(output) == before


def test_an_automatic_beta_is_told_followed_logged_and_kept_on_resume(tmp_path: Path) -> None:
    loss = {"loss": {"name": "dpo", "beta": "auto"}, "auto_beta": {"target": 0.3, "maximum": 1e6}}
    assert re.search(
        r"beta +dpo: auto, so that the mean gradient factor is 0\.3; 1e\+06 until", dry_run(tmp_path / "o", **loss)
    )
    training = {"steps": 6, "checkpoint_every": 3}
    output = train(tmp_path / "out", **loss, training=training)
    betas = [row["dpo/beta"] for row in metrics_of(output)]
    assert betas[0] == 1e6
    assert len(set(betas[1:])) > 1
    train(output, **loss, training=training, resume=str(output / "checkpoint-3"))
    assert [row["dpo/beta"] for row in metrics_of(output)] == betas


def test_the_model_card_tells_base_loss_data_and_use(tmp_path: Path) -> None:
    output = train(tmp_path / "out", loss=[{"name": "dpo", "beta": 500, "weight": 0.5}, {"name": "sft"}])
    card = (output / "README.md").read_text()
    for text in ("base_model:", "0.5 * dpo + 1 * sft", str(preference_data()), "load_lora_weights", "8 examples", "lora"):
        assert text in card
    assert json.loads((output / "environment.json").read_text())["packages"]["torch"] == metadata.version("torch")


def test_training_lowers_the_loss_and_raises_the_accuracy(tmp_path: Path) -> None:
    training = {"steps": 25, "batch_size": 8, "optimiser": {"learning_rate": 3e-3}}
    rows = metrics_of(train(tmp_path / "out", adapter={"draws": 1, "lora": {"rank": 8}}, training=training))
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[-1]["loss"] < 0.4
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["rewards/margins"] > 0 == rows[0]["rewards/margins"]
    assert rows[-1]["rewards/saturation"] < 0.35
