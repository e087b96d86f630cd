"""What surrounds a step: launchers' settings, float16 overflow, memory formats, the order of saving, other people's files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, final_weights, forget_accelerate, largest_difference, metrics_of, train, tree

from mmalign.adapters.diffusion_policy import DiffusionPolicy
from mmalign.checkpoints import latest
from mmalign.errors import UserError
from mmalign.train import main


def test_accumulation_told_to_the_launcher_does_not_divide_the_gradient_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = train(tmp_path / "told")
    assert [row["grad_norm"] for row in metrics_of(told)] == [row["grad_norm"] for row in metrics_of(plain)]


class OverflowingScaler(torch.amp.GradScaler):
    """A real scaler of the CPU whose first scale is beyond float32."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=3e38, growth_interval=1000, backoff_factor=1e-36)


def test_a_step_that_overflows_under_loss_scaling_moves_neither_rate_nor_average_nor_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    original = Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.scaler, self.native_amp = OverflowingScaler(), True
        self.state._mixed_precision = "fp16"

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    run = train(tmp_path / "run", training={"steps": 4, "schedule": "linear", "ema_decay": 0.9})
    rows = metrics_of(run)
    assert "grad_norm" not in rows[0]  # the overflow
    assert rows[0]["learning_rate"] == 1e-3
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3 / 4)  # three steps of four were taken


def test_float16_without_a_scaler_and_sharded_training_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="fp16 without a GPU"):
        train(tmp_path / "half", training={"mixed_precision": "fp16"})
    from accelerate import Accelerator, DistributedType

    forget_accelerate()
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="FSDP"):
        train(tmp_path / "sharded")
    forget_accelerate()


def test_a_missing_tracker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed.*trackers"):
        train(tmp_path / "run", training={"trackers": ["wandb"]})


@pytest.mark.parametrize("lora", [None, {"rank": 2, "targets": ["conv1", "to_q"]}], ids=["full", "lora"])
def test_channels_last_weights_are_saved_and_resumed(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    changes: dict[str, Any] = {"adapter": {"channels_last": True, "lora": lora}}
    whole = train(tmp_path / "whole", training={"steps": 2, "checkpoint_every": 1}, **changes)
    part = train(tmp_path / "part", training={"steps": 1, "checkpoint_every": 1}, **changes)
    resumed = train(part, training={"steps": 2, "checkpoint_every": 1}, resume="latest", **changes)
    assert largest_difference(final_weights(whole), final_weights(resumed)) == 0


def test_a_fault_in_the_last_validation_costs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(self: DiffusionPolicy, folder: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DiffusionPolicy, "validate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert latest(tmp_path / "run") is not None  # checkpoints are on by default


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds other files"):
            main(config_of(tree(tmp_path, **changes)))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_run_resumed_into_another_folder_is_whole_there(tmp_path: Path) -> None:
    first = train(tmp_path / "first", training={"steps": 1, "checkpoint_every": 1})
    second = train(tmp_path / "second", training={"steps": 2}, resume=str(first / "checkpoint-1"))
    assert (second / "config.yaml").exists()
    assert (second / "environment.json").exists()
    (first / "checkpoint-1" / "optimizer.bin").unlink()
    with pytest.raises(UserError, match=r"incomplete.*optimizer\.bin is missing"):
        train(tmp_path / "third", training={"steps": 2}, resume=str(first / "checkpoint-1"))


def test_another_precision_than_that_of_an_earlier_run_of_the_process_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "first", training={"steps": 1})
    changed = config_of(tree(tmp_path / "second", training={"steps": 1, "mixed_precision": "bf16"}))
    with pytest.raises(UserError, match=r"training\.mixed_precision: got bf16 in a process whose earlier run had another one"):
        main(changed)


@pytest.mark.parametrize(("loss", "view"), [("kto", "unpaired"), ("aot", "pair")])
def test_a_loss_of_whole_batches_needs_more_than_one_example(tmp_path: Path, loss: str, view: str) -> None:
    with pytest.raises(UserError, match=f"got 1 on one process with loss {loss}, .* want 2 or more"):
        train(tmp_path / "run", loss={"name": loss}, data={"view": view}, training={"batch_size": 1})


def test_a_mean_over_all_batches_grows_by_one_example_at_a_time(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"loss": {"name": "bco"}, "data": {"view": "unpaired"}}
    assert train(tmp_path / "run", **changes, training={"batch_size": 1, "steps": 2}).is_dir()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"name": "robust", "label_smoothing": 0.6}, r"loss\.robust\.label_smoothing: got 0\.6"),
        ({"name": "spo", "clip": 1.0}, r"loss\.spo\.clip"),
        ({"name": "dpo", "beta": -5}, r"loss\.dpo\.beta: got -5"),
        ({"name": "ipo", "beta": 0}, r"loss\.ipo\.beta"),
    ],
)
def test_a_setting_that_a_loss_refuses_is_told_before_anything_is_written(
    tmp_path: Path, loss: dict[str, Any], told: str
) -> None:
    values = tree(tmp_path / "run")
    values["loss"] = loss
    with pytest.raises(UserError, match=told):
        main(config_of(values))
    assert not (tmp_path / "run").exists()


def test_soft_labels_that_no_loss_takes_are_refused(tmp_path: Path) -> None:
    values = tree(tmp_path / "run", data={"view": {"name": "pair", "ties": "soft"}})
    values["loss"] = {"name": "sft"}
    with pytest.raises(UserError, match=r"prob .*pass over"):
        main(config_of(values))


def test_the_tuned_weights_are_as_readable_as_the_rest_of_the_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    assert (run / "pytorch_lora_weights.safetensors").stat().st_mode == (run / "README.md").stat().st_mode


def test_the_plan_of_a_float16_recipe_is_told_without_a_gpu(tmp_path: Path) -> None:
    forget_accelerate()
    plan = main(config_of(tree(tmp_path / "run", training={"mixed_precision": "fp16"}, dry_run=True))).plan
    forget_accelerate()
    assert "examples of 2 per step" in plan
    assert not (tmp_path / "run").exists()
