"""`mmalign prepare`: training from the cache is training without it, and each thing is encoded once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import (
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
    write_rows,
)
from test_loop import counted_passes, numbers
from tiny import tiny_folder, tiny_pipeline
from torch import nn

from mmalign import prepare
from mmalign.errors import UserError
from mmalign.records import comparison, read


def fill(output: Path, **changes: Any) -> prepare.PreparedData:
    forget_accelerate()
    return prepare.main(config_of(tree(output, **changes)))


class Encoded:
    """Counts the images and prompts that VAE and text encoders are given inside the block."""

    def __enter__(self) -> "Encoded":
        self.images = self.prompts = 0
        self._handle = nn.modules.module.register_module_forward_hook(self._count)
        return self

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.prompts += type(module).__name__ == "CLIPTextModel"
        self.images += type(module).__name__ == "Encoder"

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flips": {"flip": True},
    "prompt_dropout": {"prompt_dropout": 0.5},
    "independent": {"noise": "independent", "timestep": "independent", "latents": "mean"},
    "full": {"lora": None, "flip": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_from_the_cache_is_training_without_it(tmp_path: Path, name: str) -> None:
    plain = train(tmp_path / "plain", adapter=SETTINGS[name], training={"steps": 5})
    changes = {"adapter": {**SETTINGS[name], "cache": str(tmp_path / "cache")}, "training": {"steps": 5}}
    prepared = fill(tmp_path / "cached", **changes)
    assert not (tmp_path / "cached").exists()
    flips = 2 if SETTINGS[name].get("flip") else 1
    assert (prepared.num_images, prepared.num_references) == (16 * flips, 0)
    assert prepared.num_prompts == 3 + ("prompt_dropout" in SETTINGS[name])
    cached = train(tmp_path / "cached", **changes)
    assert largest_difference(final_weights(plain), final_weights(cached)) == 0
    assert numbers(plain) == numbers(cached)


def test_sdxl_sizes_and_both_text_embeddings_come_back_from_the_cache(tmp_path: Path) -> None:
    changes = {"family": "sdxl", "adapter": {"flip": True, "cache": str(tmp_path / "cache")}, "training": {"steps": 3}}
    fill(tmp_path / "cached", **changes)
    cached = train(tmp_path / "cached", **changes)
    plain = train(tmp_path / "plain", family="sdxl", adapter={"flip": True}, training={"steps": 3})
    assert largest_difference(final_weights(plain), final_weights(cached)) == 0
    assert numbers(plain) == numbers(cached)


def test_each_image_and_prompt_is_encoded_once_ever(tmp_path: Path) -> None:
    shared = encoded(32, 32, seed=99)  # one image in two rows
    rows = write_rows(
        [comparison_of(n, [shared, encoded(32, 32, seed=n)], id=f"row{n}") for n in range(3)], tmp_path / "data.parquet"
    )
    changes = {"rows": rows, "adapter": {"cache": str(tmp_path / "cache")}, "training": {"epochs": 3, "batch_size": 1}}
    changes["training"]["steps"] = None
    with Encoded() as first:
        prepared = fill(tmp_path / "out", **changes)
    assert (prepared.num_images, prepared.num_prompts) == (4, 3)
    assert first.images == 4
    with Encoded() as again:
        fill(tmp_path / "out", **changes)
    with Encoded() as training:
        train(tmp_path / "out", **changes)
    assert (again.images, training.images) == (0, 0)
    assert training.prompts <= 1  # the shape of an embedding


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_cached_references_are_the_recomputed_ones_and_cost_no_pass(tmp_path: Path, lora: Any) -> None:
    # 8 examples, 4 a step: every second step begins an epoch; from the third epoch on the draws repeat.
    training = {"steps": 6, "batch_size": 4}
    changes = {"adapter": {"lora": lora, "draws": 2, "flip": True, "prompt_dropout": 0.3}, "training": training}
    with counted_passes() as plain_passes:
        plain = train(tmp_path / "plain", **changes)
    changes["adapter"] = {**changes["adapter"], "cache": str(tmp_path / "cache")}
    assert fill(tmp_path / "out", **changes).num_references == 8
    with counted_passes() as passes:
        cached = train(tmp_path / "out", **changes)
    assert len(plain_passes) == 12
    assert len(passes) == 6
    assert largest_difference(final_weights(plain), final_weights(cached)) <= 1e-5
    for ours, theirs in zip(numbers(cached), numbers(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_draws_repeat_after_their_number_of_epochs(tmp_path: Path) -> None:
    def readings(draws: int | None) -> list[float]:
        """The reference's error over each of three epochs of the same four rows."""
        training = {"steps": 3, "batch_size": 4}
        output = train(tmp_path / str(draws), adapter={"draws": draws}, data={"limit": 4}, training=training)
        return [row["mse/ref_chosen"] for row in metrics_of(output)]

    two, fresh = readings(2), readings(None)
    assert two[0] == pytest.approx(two[2], rel=1e-6)
    assert two[0] != pytest.approx(two[1], rel=1e-3)
    assert two[:2] == pytest.approx(fresh[:2], rel=1e-6)
    assert fresh[2] != pytest.approx(fresh[0], rel=1e-3)


def test_a_loss_without_a_reference_caches_none(tmp_path: Path) -> None:
    changes = {"adapter": {"cache": str(tmp_path / "cache"), "draws": 2}, "loss": {"name": "mapo"}}
    assert fill(tmp_path / "out", **changes).num_references == 0
    with counted_passes() as passes:
        train(tmp_path / "out", **changes)
    assert len(passes) == 2


def test_a_cache_that_was_stopped_is_gone_on_with(tmp_path: Path) -> None:
    changes = {"adapter": {"cache": str(tmp_path / "cache")}}
    fill(tmp_path / "out", data={"limit": 3}, **changes)
    with pytest.raises(UserError, match=r"cache.*absent.*mmalign prepare"):
        train(tmp_path / "out", **changes)
    with Encoded() as rest:
        fill(tmp_path / "out", **changes)
    assert rest.images == 10
    train(tmp_path / "whole", **changes)


def test_prepare_without_a_cache_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.cache: got none, want the folder"):
        fill(tmp_path / "out")


def test_training_from_a_cache_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.*got no cache, want one\. Run `mmalign prepare`"):
        train(tmp_path / "out", adapter={"cache": str(tmp_path / "absent")})
    assert not (tmp_path / "out").exists()


MADE = "the cache was made for something else"
MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "resolution": ({"adapter": {"resolution": 40}}, r"(images|frames): MADE.*resolution: got \[32, 32\], want \[40, 40\]"),
    "seed": ({"seed": 1}, r"references: MADE.*seed: got 0, want 1"),
    "draws": ({"adapter": {"draws": 3}}, r"references: MADE.*draws: got 2, want 3"),
    "timesteps": (
        {"adapter": {"timesteps": {"name": "range", "low": 0, "high": 9}}},
        r"references: MADE.*timesteps\.name: got",
    ),
}


PRECISION = r'images: MADE.*fields\.mean\.dtype: got "float16", want "float32".*Run `mmalign prepare` into another folder'


def test_a_cache_of_another_precision_is_refused_with_both(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    fill(tmp_path / "out", adapter={"cache": cache, "cache_dtype": "float16"})
    with pytest.raises(UserError, match=f"(?s){PRECISION.replace('MADE', MADE)}"):
        train(tmp_path / "out", adapter={"cache": cache})
    assert not (tmp_path / "out").exists()
    train(tmp_path / "same", adapter={"cache": cache, "cache_dtype": "float16"})


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    cache, other = str(tmp_path / "cache"), tmp_path / "other"
    fill(tmp_path / "out", family=family, adapter={"cache": cache})
    name = "tokenizer_2" if family == "sdxl" else "tokenizer"
    shutil.copytree(tiny_folder(family), other)
    file = other / name / "tokenizer.json"
    changed = json.loads(file.read_text())
    vocabulary = changed["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=f"(?s)prompts: {MADE}.*{name}: got"):
        train(tmp_path / "out", family=family, adapter={"model": str(other), "cache": cache})


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "cache"
    fill(folder.parent / "out", adapter={"cache": str(folder), "draws": 2})
    return folder


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_cache_of_something_else_is_refused_with_what_differs(tmp_path: Path, bank: Path, name: str) -> None:
    changes, message = MISMATCHES[name]
    adapter = {"cache": str(bank), "draws": 2, **changes.get("adapter", {})}
    with pytest.raises(UserError, match=f"(?s){message.replace('MADE', MADE)}.*prepare"):
        train(tmp_path / "out", **{**changes, "adapter": adapter})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("part", "message"), [("vae", "images: MADE.*vae: got"), ("unet", "references: MADE.*network: got")])
def test_a_cache_of_other_weights_is_refused(tmp_path: Path, bank: Path, part: str, message: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder("sd15"), other)
    shutil.rmtree(other / part)
    shutil.copytree(tiny_pipeline("sd15", tmp_path / "seed1", seed=1) / part, other / part)
    with pytest.raises(UserError, match=f"(?s){message.replace('MADE', MADE)}"):
        train(tmp_path / "out", adapter={"model": str(other), "cache": str(bank), "draws": 2})


def test_preference_data_is_what_these_tests_count_on() -> None:
    rows = [comparison(row) for row in read(preference_data())]
    assert len({media.key() for row in rows for one in row.candidates for media in one.images}) == 16
    assert len({row.prompt.text for row in rows}) == 3


def test_reference_logps_of_another_noise_schedule_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("sd15"), model)
    settings = {"adapter": {"model": str(model), "cache": str(tmp_path / "cache"), "draws": 2}}
    fill(tmp_path / "made", **settings)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
    with pytest.raises(UserError, match=r"schedule.*got"):
        train(tmp_path / "out", **settings)


def test_prepare_tells_how_many_reference_passes_its_bank_saves(tmp_path: Path) -> None:
    settings = {"cache": str(tmp_path / "cache"), "draws": 3}
    made = fill(tmp_path / "out", adapter=settings, training={"steps": 24, "batch_size": 2, "accumulation": 3})
    # 8 pairs x 3 draws in the bank; 24 steps x 2 x 3 pairs in a run
    assert (made.passes_made, made.passes_saved) == (2 * 8 * 3, 2 * 24 * 6)
    assert "48 passes of the reference are done and kept (one run would need 288, 6.0 times as many); no run" in str(made)
    once = fill(tmp_path / "out", adapter={**settings, "draws": 3}, training={"steps": 4, "batch_size": 2, "accumulation": 3})
    assert "(as many as one run needs)" in str(once)
    without = fill(tmp_path / "out", adapter={"cache": str(tmp_path / "other")})
    assert "saving" not in str(without)
