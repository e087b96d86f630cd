"""Runs of `mmalign train` on prompts with images: every loss, equal runs, stopped runs, what is trained and what loads."""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_text_runs import data_of, seen_tree, seen_weights, train_seen
from multimodal import picture
from runs import SGD, config_of, forget_accelerate, largest_difference, metrics_of, write_config
from test_ring import SEVERAL, launch

from mmalign.errors import UserError
from mmalign.experiment import build_objective, read_examples
from mmalign.multimodal.tiny import tiny_folder
from mmalign.train import main

FLAT: dict[str, Any] = {"steps": 2, "batch_size": 4, "optimiser": SGD}
NOISE, CROP = {"degradation": {"name": "noise"}}, {"degradation": {"name": "crop"}}
LOSSES: dict[str, tuple[dict[str, Any], float]] = {  # changes, and how many logistic terms the loss starts with
    "blind_bpo": ({"data": data_of("blind", "blind")}, 2),
    "mdpo": ({"adapter": CROP}, 3),
    "re_align": ({"adapter": {"degradation": {"name": "swap"}}}, 2),
    "chip": ({"adapter": {**NOISE, "token_weights": {"name": "changed_segments", "gamma": 4, "average": False}}}, 2),
    "svco": ({"data": data_of("crossed pairs", "crossed")}, 4),
    "symmpo": ({"data": data_of("crossed", "crossed")}, 4),
    "ddpo": ({"adapter": {"token_weights": {"name": "changed_segments"}}}, 1),
    "povid": ({"adapter": NOISE}, 1),
    "vdpo": ({"adapter": {"degradation": {"name": "blank"}}}, 1),
    "tpo_visual": ({"adapter": NOISE}, 1),
    "opa_dpo": (
        {"data": data_of("scored", {"name": "ranked"}), "adapter": {"degradation": {"name": "pixel_mask"}}},
        2 * 2.2,
    ),
}


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_starts_where_policy_and_reference_agree_and_trains_the_low_rank_weights(name: str, tmp_path: Path) -> None:
    changes, terms = LOSSES[name]
    output = train_seen(tmp_path / "run", loss={"name": name}, **changes)
    first = metrics_of(output)[0]
    symmetric = name == "symmpo"  # whose margins do not begin at 0: half of the symmetric terms, and the regulariser
    if name != "vdpo" and not symmetric:
        assert first["loss"] == pytest.approx(terms * math.log(2), abs=1e-5)
    assert all(math.isfinite(value) for row in metrics_of(output) for value in row.values())
    assert max(float(value.abs().max()) for key, value in seen_weights(output).items() if "lora_B" in key) > 0


# --- equal runs -----------------------------------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "loss": [{"name": name} for name in ("mdpo", "chip", "povid", "tpo_visual", "vdpo")],
    "training": FLAT,
    "adapter": NOISE,
}
SAME: dict[str, tuple[dict[str, Any], float]] = {
    "accumulated": ({"training": {"batch_size": 1, "accumulation": 4}}, 1e-6),
    "padded": ({"adapter": {"pack": False}}, 1e-5),
    "one candidate at a time": ({"training": {"candidate_microbatch": 1}}, 1e-6),
    "checkpointed": ({"adapter": {"gradient_checkpointing": True}}, 1e-6),
    "with features on disk": ({"adapter": {"features": "features"}}, 1e-6),
}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others must equal."""
    return train_seen(tmp_path_factory.mktemp("joint") / "run", **ALL)


@pytest.mark.parametrize("what", SAME)
def test_runs_that_must_be_equal_are(what: str, joint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, tolerance = SAME[what]
    other = train_seen(tmp_path / "run", **{**ALL, **{key: {**ALL[key], **value} for key, value in change.items()}})
    assert largest_difference(seen_weights(joint), seen_weights(other)) <= tolerance
    assert max(float(value.abs().max()) for key, value in seen_weights(joint).items() if "lora_B" in key) > 1e-4
    assert bool(list(tmp_path.glob("features/*/*/*.safetensors"))) == ("features" in what)


def test_mdpo_as_released_shows_the_reference_another_crop(tmp_path: Path) -> None:
    def first(variant: str, degradation: str) -> float:
        changes = {"loss": {"name": "mdpo", "variant": variant}, "adapter": {"degradation": {"name": degradation}}}
        return metrics_of(train_seen(tmp_path / f"{variant}-{degradation}", **changes, training=FLAT))[0]["loss"]

    assert first("paper", "crop") == pytest.approx(3 * math.log(2), abs=1e-5)
    assert abs(first("released", "crop") - 3 * math.log(2)) > 1e-4, "policy and reference agree, on other images"
    assert first("released", "blank") == pytest.approx(3 * math.log(2), abs=1e-5), "of which there is one draw"


def test_opa_dpo_trains_as_released_and_one_candidate_at_a_time(tmp_path: Path) -> None:
    changes, _ = LOSSES["opa_dpo"]
    released = {**changes, "loss": {"name": "opa_dpo", "variant": "released"}}
    whole = train_seen(tmp_path / "whole", **released, training=FLAT)
    assert metrics_of(whole)[0]["loss"] == pytest.approx((2 + 2 * 0.2 + 4) * math.log(2), abs=1e-5)
    parts = train_seen(tmp_path / "parts", **released, training={**FLAT, "candidate_microbatch": 1})
    assert largest_difference(seen_weights(whole), seen_weights(parts)) <= 1e-6
    plain = train_seen(tmp_path / "paper", **changes, loss={"name": "opa_dpo"}, training=FLAT)
    assert largest_difference(seen_weights(whole), seen_weights(plain)) > 1e-5


def test_re_align_trains_as_released_and_one_candidate_at_a_time(tmp_path: Path) -> None:
    released = {"loss": {"name": "re_align", "variant": "released"}, "adapter": {"degradation": {"name": "swap"}}}
    whole = train_seen(tmp_path / "whole", **released, training=FLAT)
    first = metrics_of(whole)[0]
    assert first["loss"] == pytest.approx(2 * math.log(2), abs=1e-5) and "degraded_rival/chosen" in first
    parts = train_seen(tmp_path / "parts", **released, training={**FLAT, "candidate_microbatch": 1})
    assert largest_difference(seen_weights(whole), seen_weights(parts)) <= 1e-6
    plain = train_seen(tmp_path / "paper", **{**released, "loss": {"name": "re_align"}}, training=FLAT)
    assert largest_difference(seen_weights(whole), seen_weights(plain)) > 1e-5 and "rival/chosen" not in metrics_of(plain)[0]
    with pytest.raises(UserError, match=r"adapter\.cache: got one with a loss of degraded_rival"):
        train_seen(tmp_path / "cached", **{**released, "adapter": {**released["adapter"], "cache": str(tmp_path / "bank")}})


def test_a_degraded_image_is_another_one_in_the_next_epoch(tmp_path: Path) -> None:
    still = {"training": {"epochs": 2, "batch_size": 8, "optimiser": {**SGD, "learning_rate": 0.0}}, "loss": {"name": "mdpo"}}
    drawn = metrics_of(
        train_seen(tmp_path / "drawn", adapter=CROP, **{**still, "training": {**still["training"], "steps": None}})
    )
    assert drawn[0]["degraded/chosen"] != drawn[1]["degraded/chosen"]


# --- stopped runs -----------------------------------------------------------------------------------------------------------


def _kill_at_the_second_checkpoint(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.mkdir" and "checkpoint-4" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("povid", {"rank": 2}), ("mdpo", None)], ids=["lora", "full"])
def test_a_killed_run_goes_on_bit_for_bit_as_if_uninterrupted(name: str, lora: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "loss": {"name": name},
        "adapter": {**(CROP if name == "mdpo" else NOISE), "lora": lora},
        "training": {"steps": 4, "checkpoint_every": 2},
    }
    whole = train_seen(tmp_path / "whole", **changes)
    output = tmp_path / "stopped"
    child = os.fork()
    if not child:
        try:
            sys.addaudithook(_kill_at_the_second_checkpoint)
            train_seen(output, **changes)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert (output / "checkpoint-2").is_dir() and not (output / "checkpoint-4").exists()
    train_seen(output, **changes, resume="latest")
    assert largest_difference(seen_weights(whole), seen_weights(output)) == 0
    losses = [[row["loss"] for row in metrics_of(run)] for run in (whole, output)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"loss": {"name": "mdpo"}, "adapter": CROP},
    "projector": {"adapter": {"lora": None}},  # its rows: some batches of a process show no image
    "tower": {"adapter": {"lora": None, "tower": True}},
    "blind": {"loss": {"name": "blind_bpo"}, "data": data_of("blind", "blind"), "adapter": {"lora": None}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes with batches of 1 under `two-NAME`, and the same of one with batches of 2 under `one-NAME`."""
    folder = tmp_path_factory.mktemp("processes")
    training = {"steps": 4, "batch_size": 2, "optimiser": SGD}
    jobs = []
    for name, changes in KINDS.items():
        train_seen(folder / f"one-{name}", **changes, training=training)
        values = seen_tree(folder / f"two-{name}", **changes, training={**training, "batch_size": 1})
        jobs.append({"verb": "train", "words": ["--config", str(write_config(folder / f"two-{name}.yaml", values))]})
    (folder / "several.py").write_text(SEVERAL)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch(folder, str(folder / "several.py"), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_the_weights_of_one(two: Path, name: str) -> None:
    one, other = seen_weights(two / f"one-{name}"), seen_weights(two / f"two-{name}")
    assert largest_difference(one, other) <= 1e-6
    losses = [[row["loss"] for row in metrics_of(two / f"{kind}-{name}")] for kind in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4


# --- what is trained, and what loads ------------------------------------------------------------------------------------


def logits_of(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(text=["<image>\nwhat?"], images=[[picture(3).open()]], return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_lora_lies_on_the_language_model_alone_and_loads_in_stock_transformers_and_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    output = train_seen(tmp_path / "run")
    assert all(".language_model." in name for name in seen_weights(output))
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder(None))
    processor = AutoProcessor.from_pretrained(output)
    before = logits_of(base, processor)
    tuned = logits_of(AutoModelForImageTextToText.from_pretrained(output), processor)
    assert float((tuned - before).abs().max()) > 1e-3
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, output), processor), tuned)


def test_full_fine_tuning_moves_projector_and_language_model_and_leaves_the_tower(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    output = train_seen(tmp_path / "run", adapter={"lora": None})
    base = AutoModelForImageTextToText.from_pretrained(tiny_folder(None)).state_dict()
    tuned = AutoModelForImageTextToText.from_pretrained(output / "model").state_dict()
    moved = {name: not torch.equal(value, base[name]) for name, value in tuned.items()}
    assert not any(there for name, there in moved.items() if "vision_tower" in name)
    assert all(there for name, there in moved.items() if "multi_modal_projector" in name or "lm_head" in name)
    AutoProcessor.from_pretrained(output / "model")


@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=["lora", "full"])
def test_the_tower_is_trained_where_that_is_asked(lora: Any, tmp_path: Path) -> None:
    output = train_seen(tmp_path / "run", adapter={"lora": lora, "tower": True})
    weights = {name: value for name, value in seen_weights(output).items() if "vision_tower" in name}
    if lora:
        assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 0
    else:
        from transformers import AutoModelForImageTextToText

        base = AutoModelForImageTextToText.from_pretrained(tiny_folder(None)).state_dict()
        tuned = AutoModelForImageTextToText.from_pretrained(output / "model").state_dict()
        assert any(not torch.equal(value, base[name]) for name, value in tuned.items() if "vision_tower" in name)


def test_the_plan_tells_what_is_trained(tmp_path: Path) -> None:
    forget_accelerate()
    told = main(config_of({**seen_tree(tmp_path / "run"), "dry_run": True})).plan
    assert "LoRA rank 2 on 14 layers" in told and "projector frozen" in told and "vision tower frozen" in told
    assert "packed rows, prompts shared" in told


# --- what is refused ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no degradation": ({"loss": {"name": "mdpo"}}, r"row\d: has no degraded image.*Set adapter.degradation"),
    "crossed without prompts": (
        {"loss": {"name": "svco"}, "data": data_of("pairs", "crossed")},
        "one prompt for all candidates",
    ),
    "too long": ({"adapter": {"max_prompt_length": 50}}, r"got a prompt of .* tokens, .* of text and 16 of 1 images"),
    "a moving reference": (
        {"loss": {"name": "chip"}, "adapter": NOISE, "training": {"moving_reference": {"decay": 0.5}}},
        "training.moving_reference: got one with a loss of divergence",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        train_seen(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_has_no_effect_on_the_losses_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def told(**changes: Any) -> list[str]:
        caplog.clear()
        config = config_of(seen_tree(tmp_path / "run", **changes))
        build_objective(config, read_examples(config.data)[0])
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert told() == told(loss={"name": "mdpo"}, adapter=CROP) == []
    (message,) = told(adapter=CROP)
    assert message.startswith("adapter.degradation: got crop, which no loss asks for (dpo). Set it to null")
    (message,) = told(loss={"name": "ddpo"})
    assert message == "loss ddpo is dpo where all tokens weigh alike. Set adapter.token_weights: changed_segments (gamma: 5)."
    assert told(loss={"name": "ddpo"}, adapter={"token_weights": {"name": "changed_segments"}}) == []


def test_a_degradation_that_means_nothing_is_refused_with_the_config(tmp_path: Path) -> None:
    for settings, message in (
        ({"name": "noise", "t": 1000}, r"adapter\.degradation\.t: got 1000, want 0 to 999"),
        ({"name": "pixel_mask", "p": 0.0}, r"adapter\.degradation\.p: got 0\.0, want more than 0"),
        ({"name": "crop", "least": 0.5}, r"adapter\.degradation\.least, most: got 0\.5 and 0\.2"),
        ({"name": "clips", "clips": 1}, r"adapter\.degradation\.clips: got 1, want 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(seen_tree(tmp_path / "run", loss={"name": "mdpo"}, adapter={"degradation": settings}))
