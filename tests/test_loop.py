"""The loop: one run, however it is split, cached, checkpointed in memory or averaged, has the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SGD, final_weights, largest_difference, metrics_of, preference_data, train
from safetensors.torch import load_file
from tiny import tiny_folder

from mmalign.errors import UserError
from mmalign.models.diffusion import Denoiser

TIMING = ("throughput/examples_per_s", "memory/peak_gb")


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """The batch size of every call of a denoiser inside the block."""
    sizes: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Denoiser):
            sizes.append(len(output))

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


def numbers(output: Path) -> list[dict[str, float]]:
    """Metrics without what a clock or the machine decides."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in metrics_of(output)]


def moved(output: Path, family: str = "sd15") -> float:
    """By how much training moved the weights: LoRA's B starts at zero."""
    weights = final_weights(output)
    start = {} if any("lora" in name for name in weights) else base_weights(family)
    return max(float((value - start.get(name, 0)).abs().max()) for name, value in weights.items() if "lora_A" not in name)


def base_weights(family: str = "sd15") -> dict[str, torch.Tensor]:
    return load_file(tiny_folder(family) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_four_accumulated_examples_are_one_batch_of_four(tmp_path: Path, lora: Any) -> None:
    runs = [
        train(
            tmp_path / str(size),
            adapter={"lora": lora},
            training={"batch_size": size, "accumulation": 4 // size, "steps": 3, "optimiser": SGD},
        )
        for size in (1, 2, 4)
    ]
    whole = final_weights(runs[-1])
    assert moved(runs[-1]) > 1e-3
    for run in runs[:-1]:
        assert largest_difference(final_weights(run), whole) <= 1e-6
        for ours, theirs in zip(numbers(run), numbers(runs[-1]), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


GUARD = {"mu": 0.9, "per": "pair"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"batch_size": 2, "accumulation": 2}},
        {"adapter": {"winner_guard": GUARD}},
        {"adapter": {"winner_guard": {"mu": 0.9, "per": "batch"}, "lora": None}, "training": {"accumulation": 2}},
        {"loss": {"name": "mapo"}},
        {"loss": {"name": "rank_dpo", "beta": 500}, "data": {"view": "ranked"}},
        {"adapter": {"gradient_checkpointing": True, "noise": "independent"}},
    ],
    ids=["pairs", "accumulated", "winner_guard", "guard_per_batch_full", "no_reference", "three_candidates", "checkpointing"],
)
def test_candidates_one_at_a_time_give_the_joint_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = preference_data(num_candidates=3) if "data" in changes else None
    training = {"steps": 3, "optimiser": SGD, **changes.get("training", {})}
    joint, alone = (
        train(tmp_path / str(number), rows=rows, **{**changes, "training": {**training, "candidate_microbatch": number}})
        for number in (None, 1)
    )
    assert moved(joint) > 1e-3
    assert largest_difference(final_weights(joint), final_weights(alone)) <= 1e-6
    for one, other in zip(numbers(joint), numbers(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_the_winner_guard_changes_the_weights(tmp_path: Path) -> None:
    guarded = train(tmp_path / "guarded", adapter={"winner_guard": GUARD}, training={"optimiser": SGD})
    plain = train(tmp_path / "plain", training={"optimiser": SGD})
    assert largest_difference(final_weights(guarded), final_weights(plain)) > 1e-5


def test_a_candidate_at_a_time_is_refused_where_dropout_would_make_the_passes_differ(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"candidate_microbatch.*dropout.*lora\.dropout"):
        train(tmp_path / "out", adapter={"lora": {"dropout": 0.1}}, training={"candidate_microbatch": 1})


def test_lora_off_is_a_frozen_copy_at_every_step(tmp_path: Path) -> None:
    low_rank = train(tmp_path / "lora", training={"steps": 4})
    full = train(tmp_path / "full", adapter={"lora": None}, training={"steps": 4})
    for one, other in zip(numbers(low_rank), numbers(full), strict=True):
        for name in ("logps/ref_chosen", "logps/ref_rejected"):
            assert one[name] == other[name]
    assert numbers(low_rank)[-1]["logps/chosen"] != numbers(low_rank)[-1]["logps/ref_chosen"]
    assert numbers(full)[-1]["logps/chosen"] != numbers(full)[-1]["logps/ref_chosen"]


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_gradient_checkpointing_changes_no_weight(tmp_path: Path, lora: Any) -> None:
    changes = {"lora": lora}
    plain = train(tmp_path / "off", adapter=changes)
    saving = train(tmp_path / "on", adapter={**changes, "gradient_checkpointing": True})
    assert moved(saving) > 1e-4
    assert largest_difference(final_weights(plain), final_weights(saving)) <= 1e-7
    assert numbers(plain) == numbers(saving)


def test_one_step_is_one_pass_of_the_policy_and_one_of_the_reference(tmp_path: Path) -> None:
    with counted_passes() as sizes:
        train(tmp_path / "out", training={"steps": 3, "batch_size": 2})
    assert sizes == [4] * 6  # two pairs; policy and reference, three times


def update_norm(output: Path) -> float:
    start, end = base_weights(), final_weights(output)
    return float(sum(((end[name] - start[name]).double() ** 2).sum() for name in start).sqrt())


def test_clipping_bounds_the_update_and_without_it_the_update_is_the_gradient(tmp_path: Path) -> None:
    once = {"steps": 1, "optimiser": {**SGD, "learning_rate": 1.0}}
    free = train(tmp_path / "free", adapter={"lora": None}, training={**once, "max_grad_norm": None})
    clipped = train(tmp_path / "clipped", adapter={"lora": None}, training={**once, "max_grad_norm": 1e-2})
    norm = metrics_of(free)[0]["grad_norm"]
    assert norm > 0.1
    assert metrics_of(clipped)[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert update_norm(free) == pytest.approx(norm, rel=1e-4)
    assert update_norm(clipped) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant_with_warmup", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]),
        ("constant", [1.0] * 6),
    ],
)
def test_the_learning_rate_takes_one_step_of_its_schedule_an_optimiser_step(
    tmp_path: Path, schedule: str, expected: list[float]
) -> None:
    training = {"steps": 6, "batch_size": 1, "accumulation": 2, "schedule": schedule, "warmup_steps": 4}
    output = train(tmp_path / "out", training=training)
    assert [row["learning_rate"] / 1e-3 for row in metrics_of(output)] == pytest.approx(expected)


def averaged_by_hand(output: Path, decay: float) -> dict[str, torch.Tensor]:
    """The moving average of the weights in `checkpoint-1 ...`: its decay at step t is min(decay, t / (t + 9)), 0 at first."""
    average = load_file(output / "checkpoint-1" / "trainable.safetensors")
    for number, step in enumerate(sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))[1:], 2):
        weights, share = load_file(output / f"checkpoint-{step}" / "trainable.safetensors"), min(decay, number / (number + 9))
        average = {name: share * old + (1 - share) * weights[name] for name, old in average.items()}
    return average


def image_of(folder: Path, **settings: Any) -> np.ndarray:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe("a red 1", generator=torch.Generator().manual_seed(3), **settings).images[0])


def test_the_moving_average_is_what_is_saved_and_validated_with_the_last_weights_beside(tmp_path: Path) -> None:
    validation = {"prompts": ["a red 1"], "seed": 3, "steps": 2, "guidance_scale": 2.0}
    output = train(
        tmp_path / "out",
        adapter={"lora": None, "validation": validation},
        training={
            "steps": 4,
            "ema_decay": 0.15,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "optimiser": {"learning_rate": 0.02},
        },
    )
    raw = load_file(output / "raw" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    last = load_file(output / "checkpoint-4" / "trainable.safetensors")
    by_hand = averaged_by_hand(output, 0.15)
    assert largest_difference({f"core.{name}": value for name, value in raw.items()}, last) == 0
    saved = {f"core.{name}": value for name, value in final_weights(output).items()}
    assert largest_difference(saved, by_hand) <= 1e-6
    assert largest_difference(saved, last) > 1e-3
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}
    shown = np.asarray(Image.open(output / "validation" / "step-4" / "000.png"))
    assert np.array_equal(shown, image_of(output / "pipeline", **settings))
    assert not np.array_equal(shown, image_of(output / "raw" / "pipeline", **settings))


def test_validation_does_not_change_the_run(tmp_path: Path) -> None:
    validation = {"prompts": ["a red 1"], "steps": 2, "guidance_scale": 1.0}
    quiet = train(tmp_path / "quiet", training={"steps": 3})
    shown = train(tmp_path / "shown", adapter={"validation": validation}, training={"steps": 3, "validate_every": 1})
    assert len(list((shown / "validation").glob("step-*/000.png"))) == 3
    assert largest_difference(final_weights(quiet), final_weights(shown)) == 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": {"limit": 5}}])
def test_seed_and_data_change_the_run_and_the_same_run_repeats_bit_for_bit(tmp_path: Path, change: dict[str, Any]) -> None:
    first, again, other = (
        train(tmp_path / name, adapter={"lora": {"dropout": 0.2}}, **kw) for name, kw in (("a", {}), ("b", {}), ("c", change))
    )
    assert largest_difference(final_weights(first), final_weights(again)) == 0
    assert numbers(first) == numbers(again)
    assert largest_difference(final_weights(first), final_weights(other)) > 1e-4
