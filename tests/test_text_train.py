"""Runs of `mmalign train` on texts: every loss, and runs that must end in the same weights."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from loss_inputs import OF_TEXTS
from runs import SGD, largest_difference, metrics_of, write_config
from test_ring import SEVERAL, launch
from text_runs import PAIRS, rows_file, text_tree, text_weights, train_text

from mmalign.errors import UserError
from mmalign.losses import LOSSES
from mmalign.objective import Objective, Term

LISTS = {"plackett_luce", "lipo", "exo_listwise", "gpo", "info_nca", "nca"}
FLAT = {"training": {"steps": 2, "batch_size": 4, "optimiser": SGD}}


def needs(name: str) -> dict[str, bool]:
    return Term(name=name, loss=LOSSES[name], settings={}).data


def data_for(name: str) -> dict[str, Any]:
    """Rows that have what a loss needs, and the view of them."""
    wanted = {one for one, required in needs(name).items() if required}
    if "labels" in wanted:
        return {"view": "unpaired"}
    margin = {"margin": 1.5} if name in ("odpo", "rpo") or "margin" in wanted else {}
    extras = {one: " cats" for one in ("rationale", "exploration", "gold") if one in needs(name)}
    ranked = name in LISTS or "scores" in wanted
    rows = [
        {
            "id": str(number),
            "prompt": prompt,
            "candidates": [best, worst, " hello"] if ranked else [best, worst],
            **({"scores": {"a": [3.0, 1.0, 0.5]}} if ranked else {"ranks": [1, 2]}),
            **margin,
            **({"extras": extras} if extras else {}),
        }
        for number, (prompt, best, worst) in enumerate(PAIRS)
    ]
    path = rows_file(rows, f"rows-{name}")
    return {"importer": {"name": "comparisons", "path": str(path)}, "view": {"name": "ranked"} if ranked else "pair"}


# --- every loss -------------------------------------------------------------------------------------------------------


# The guard is silent where policy and reference agree: test_text_objectives.py tells its gradient elsewhere.
@pytest.mark.parametrize("name", sorted({*OF_TEXTS} - {"chosen_guard"}))
def test_a_loss_trains_the_low_rank_weights(name: str, tmp_path: Path) -> None:
    output = train_text(tmp_path / "run", loss={"name": name}, data=data_for(name))
    assert all(math.isfinite(value) for row in metrics_of(output) for value in row.values())
    moved = [float(value.abs().max()) for key, value in text_weights(output).items() if "lora_B" in key]
    assert moved and max(moved) > 0
    referred = Objective([Term(name=name, loss=LOSSES[name], settings={})]).needs_reference
    assert ("logps/ratio_chosen" in metrics_of(output)[0]) == referred


@pytest.mark.parametrize("name", ["dpo", "ld_dpo"])
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_training_starts_at_ln_2_without_a_margin(name: str, lora: Any, tmp_path: Path) -> None:
    output = train_text(tmp_path / "run", adapter={"lora": lora}, loss={"name": name}, training={"steps": 1})
    first = metrics_of(output)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0


# --- equal runs -------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_runs_that_must_be_equal_are(what: str, lora: Any, tmp_path: Path) -> None:
    shared, change, tolerance = SAME[what]
    base = {**FLAT, **shared, "adapter": {"lora": lora}}
    one = train_text(tmp_path / "one", **base)
    merged = {
        key: {**base.get(key, {}), **value} if isinstance(base.get(key), dict) else value for key, value in change.items()
    }
    other = train_text(tmp_path / "other", **{**base, **merged})
    start = train_text(
        tmp_path / "start", **{**base, "training": {**FLAT["training"], "optimiser": {**SGD, "learning_rate": 0.0}}}
    )
    assert largest_difference(text_weights(one), text_weights(start)) > 1e-4
    assert largest_difference(text_weights(one), text_weights(other)) <= tolerance


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


# --- KTO's anchor -----------------------------------------------------------------------------------------------------


def test_ktos_anchor_needs_two_rows_in_a_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.batch_size: got 1"):
        train_text(tmp_path / "run", loss={"name": "kto"}, data={"view": "unpaired"}, training={"batch_size": 1})
