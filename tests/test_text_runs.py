"""Runs on texts that must end in the same weights: however they are split, packed or stopped."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import SGD, largest_difference, metrics_of
from text_runs import PAIRS, rows_file, text_weights, train_text

FLAT: dict[str, Any] = {"training": {"steps": 2, "batch_size": 4, "optimiser": SGD}}


# --- split and packed -------------------------------------------------------------------------------------------------------

SAME: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "accumulated": ({}, {"training": {"batch_size": 1, "accumulation": 4}}, 1e-6),
    "one candidate at a time": ({}, {"training": {"candidate_microbatch": 1}}, 1e-6),
    "one candidate at a time, with further measures": (
        {"loss": [{"name": "wpo"}, {"name": "ld_dpo"}]},
        {"training": {"candidate_microbatch": 1}},
        1e-6,
    ),
    "padded": ({}, {"adapter": {"pack": False}}, 1e-5),
    "padded, with further measures": ({"loss": [{"name": "wpo"}, {"name": "ld_dpo"}]}, {"adapter": {"pack": False}}, 1e-5),
    "checkpointed": ({}, {"adapter": {"gradient_checkpointing": True}}, 1e-6),
    "checkpointed and padded": ({}, {"adapter": {"gradient_checkpointing": True, "pack": False}}, 1e-5),
}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that others must equal, trained once for each of its settings."""
    folder, known = tmp_path_factory.mktemp("joint"), {}

    def run(**settings: Any) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = train_text(folder / str(len(known)), **settings)
        return known[key]

    return run


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_runs_that_must_be_equal_are(what: str, lora: Any, joint: Callable[..., Path], tmp_path: Path) -> None:
    shared, change, tolerance = SAME[what]
    base = {**FLAT, **shared, "adapter": {"lora": lora}}
    one = joint(**base)
    merged = {key: {**base.get(key, {}), **value} for key, value in change.items()}
    other = train_text(tmp_path / "other", **{**base, **merged})
    assert largest_difference(text_weights(one), text_weights(other)) <= tolerance


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_the_steps_of_these_runs_are_larger_than_their_differences(
    lora: Any, joint: Callable[..., Path], tmp_path: Path
) -> None:
    for shared in ({}, {"loss": [{"name": "wpo"}, {"name": "ld_dpo"}]}):
        still = {"training": {**FLAT["training"], "steps": 1, "optimiser": {**SGD, "learning_rate": 0.0}}}
        start = train_text(tmp_path / str(len(shared)), adapter={"lora": lora}, **still)
        moved = joint(**FLAT, **shared, adapter={"lora": lora})
        assert largest_difference(text_weights(moved), text_weights(start)) > 1e-3


def test_a_term_on_a_further_completion_goes_candidate_by_candidate(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "prompt": p, "candidates": [a, b], "ranks": [1, 2], "extras": {"rationale": " cats"}}
        for n, (p, a, b) in enumerate(PAIRS)
    ]
    data = {"importer": {"name": "comparisons", "path": str(rows_file(rows, "rationales"))}}
    loss = [{"name": "dpo"}, {"name": "rationale"}]
    one = train_text(tmp_path / "one", **FLAT, data=data, loss=loss)
    other = train_text(tmp_path / "other", data=data, loss=loss, training={**FLAT["training"], "candidate_microbatch": 1})
    assert largest_difference(text_weights(one), text_weights(other)) <= 1e-6


# --- killed and resumed -----------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "bco": {"loss": {"name": "bco"}, "data": {"view": "unpaired"}},
    "beta_dpo": {"loss": {"name": "beta_dpo"}},
    "kto": {"loss": {"name": "kto"}, "data": {"view": "unpaired"}},
    "moving lora": {"training": {"moving_reference": {"decay": 0.5}}},
    "moving full": {"training": {"moving_reference": {"decay": 0.0, "every": 2}}, "adapter": {"lora": None}},
    "average": {"training": {"ema_decay": 0.5}},
}


def _kill_at_the_second_checkpoint(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.mkdir" and "checkpoint-4" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_for_bit_as_if_uninterrupted(name: str, tmp_path: Path) -> None:
    changes = RESUMED[name]
    training = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 3, **changes.get("training", {})}
    whole = train_text(tmp_path / "whole", **{**changes, "training": training})
    output = tmp_path / "stopped"
    child = os.fork()
    if not child:
        try:
            sys.addaudithook(_kill_at_the_second_checkpoint)
            train_text(output, **{**changes, "training": training})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert (output / "checkpoint-2").is_dir() and not (output / "checkpoint-4").exists()
    train_text(output, **{**changes, "training": training}, resume="latest")
    assert largest_difference(text_weights(whole), text_weights(output)) == 0
    kept = [
        [{k: v for k, v in row.items() if not k.startswith(("throughput", "memory"))} for row in metrics_of(one)]
        for one in (whole, output)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 4


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_a_reference_that_is_copied_at_every_step_makes_each_loss_ln_2(lora: Any, tmp_path: Path) -> None:
    training = {"steps": 3, "moving_reference": {"decay": 0.0}}
    moving = train_text(tmp_path / "moving", adapter={"lora": lora}, training=training)
    assert [row["loss"] for row in metrics_of(moving)] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    fixed = train_text(tmp_path / "fixed", adapter={"lora": lora}, training={"steps": 3})
    assert abs(metrics_of(fixed)[2]["loss"] - math.log(2)) > 1e-4
