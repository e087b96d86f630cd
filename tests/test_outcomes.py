"""Every diffusion method from one pretrained base, by outcome: what it was told is learnt, its opposite as well, noise is not.

A bare win rate cannot catch a broken pairwise loss (fine-tuning on the winners alone passes .9), so a judge that had no part in
the labels decides. Recipes: benchmarks/method_outcomes.py; `python benchmarks/methods.py` prints the same numbers as a table.
"""

import importlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import SEED, one_process_at_a_time
from PIL import Image

from mmalign import train
from mmalign.config import read_config
from mmalign.digits import CAPTIONS, IMAGE_SIDE, Base, scans
from mmalign.experiment import TrainConfig, read_examples
from mmalign.models.step_scorers import step_aware
from mmalign.quickstart import on_cpu
from mmalign.records import Comparison, Content, Media, write

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest_plugins = ("digits_base",)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the recipes stand in the repository, not in the package"),
]

METHODS = ("dpo", "rank_dpo", "spo", "mapo", "dro", "kto", "flow_dpo")
LEAST_GAIN, MOST_DIVERSITY_CHANGE = 0.08, 0.20
Outcomes = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def recipes() -> Iterator[Any]:
    """The module of the recipes, importable also by the address of a scorer."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("method_outcomes")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def outcome(recipes: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """(method, labels) -> what it led to; every run is made once, whichever worker of pytest-xdist asks first."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "outcomes"

    def bed(kind: str) -> Any:
        base: Base = request.getfixturevalue({"unet": "digits_base", "flow": "digits_flow_base"}[kind])
        folder = shared / kind
        with one_process_at_a_time(folder):
            if (folder / "complete").is_file():
                return recipes.Bed(base=base, kind=recipes.KINDS[kind], folder=folder, seed=SEED)
            made = recipes.make_bed(base, kind, folder, SEED)
            (folder / "complete").touch()
            return made

    def of(name: str, labels: str) -> Any:
        folder = shared / f"{name}-{labels}"
        with one_process_at_a_time(folder), on_cpu():
            if not (folder / "outcome.json").is_file():
                method = recipes.METHODS[name]
                found = recipes.run(bed(method.kind), method, folder, labels=labels)
                (folder / "outcome.json").write_text(json.dumps(asdict(found)))
        return recipes.Outcome(**json.loads((folder / "outcome.json").read_text()))

    return of


@pytest.mark.parametrize("method", METHODS)
def test_the_held_out_judge_sees_the_gain_and_diversity_stays(method: str, outcome: Outcomes) -> None:
    found = outcome(method, "true")
    assert found.win_rate > 0.6
    assert found.gain >= LEAST_GAIN
    assert abs(found.diversity_change) <= MOST_DIVERSITY_CHANGE


@pytest.mark.parametrize("method", METHODS)
def test_flipped_labels_end_below_the_base(method: str, outcome: Outcomes) -> None:
    assert outcome(method, "flipped").gain < 0


@pytest.mark.parametrize("method", METHODS)
def test_true_labels_end_above_random_ones(method: str, outcome: Outcomes) -> None:
    assert outcome(method, "true").correct_after > outcome(method, "random").correct_after


@pytest.mark.parametrize("method", ["dpo", "rank_dpo", "spo", "dro"])
def test_it_ends_above_fine_tuning_on_the_winners(method: str, outcome: Outcomes) -> None:
    assert outcome(method, "true").correct_after > outcome("sft", "true").correct_after


def test_every_recipe_is_tested(recipes: Any) -> None:
    assert {*METHODS, "sft"} == set(recipes.METHODS)


# The step-aware preference model of SPO

TIMESTEPS = (100, 400, 700)
TRAINED, HELD_OUT = slice(0, 1200), slice(1200, None)  # rows of the scans


def test_the_step_aware_model_learns_to_judge_noisy_latents(digits_base: Base, tmp_path: Path) -> None:
    """Held-out pairs, the bolder scan first: far above the base at every timestep, and below one half if thin was taught."""
    exam = pairs_of_scans(tmp_path / "exam.parquet", HELD_OUT, 80, bolder_first=True)

    def taught(name: str, *, bolder: bool) -> list[float]:
        lesson = pairs_of_scans(tmp_path / f"{name}.parquet", TRAINED, 200, bolder_first=bolder)
        config = step_reward_config(digits_base, lesson, tmp_path / name, seed=SEED, timesteps={"name": "uniform"})
        return marks(train.main(config).output / "reward")

    def marks(judge: Path | str) -> list[float]:
        return [accuracy(digits_base, exam, judge, timestep) for timestep in TIMESTEPS]

    with on_cpu():
        base, bold, thin = marks("tiny"), taught("bold", bolder=True), taught("thin", bolder=False)
    assert min(bold) > 0.8, (base, bold, thin)
    assert all(after > before + 0.1 for after, before in zip(bold, base, strict=True)), (base, bold, thin)
    assert max(thin) < 0.3, (base, bold, thin)


def pairs_of_scans(file: Path, rows: slice, count: int, *, bolder_first: bool) -> Path:
    """Comparisons of two scans of the digit that the prompt names; the better one has more ink, or less."""
    pixels, digits = (part[rows] for part in scans())
    ink = pixels.mean((1, 2, 3))
    generator = random.Random(SEED)
    found = []
    for number in range(count):
        digit = generator.randrange(len(CAPTIONS))
        same = (digits == digit).nonzero()[:, 0].tolist()
        order = sorted(generator.sample(same, 2), key=lambda place: float(ink[place]), reverse=bolder_first)
        found.append(
            Comparison(
                id=str(number),
                prompt=Content(text=CAPTIONS[digit]),
                candidates=tuple(Content(images=(png(pixels[place]),)) for place in order),
                ranks=(1.0, 2.0),
            )
        )
    return write(found, file)


def png(pixels: torch.Tensor) -> Media:
    levels = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "PNG")
    return Media(data=file.getvalue())


def step_reward_config(base: Base, rows: Path, output: Path, *, seed: int, timesteps: dict[str, Any]) -> TrainConfig:
    """A short training of the tiny step-aware CLIP on what the digits base guesses."""
    settings = {
        "output": str(output),
        "seed": seed,
        "adapter.name": "step_reward",
        "adapter.family": "sd15",
        "adapter.model": str(base.folder),
        "adapter.resolution": IMAGE_SIDE,
        "adapter.timesteps": timesteps,
        "adapter.reward": {"name": "step_aware", "clip": "tiny", "guidance_scale": 1.0},
        "data.importer": {"name": "comparisons", "path": str(rows)},
        "data.view": "pair",
        "loss": "bradley_terry",
        "training.steps": 40,
        "training.batch_size": 16,
        "training.warmup_steps": 5,
        "training.mixed_precision": "no",
        "training.checkpoint_every": None,
        "training.optimiser": {"name": "adamw", "learning_rate": 4e-3},
    }
    return read_config(TrainConfig, None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def accuracy(base: Base, rows: Path, judge: Path | str, timestep: int) -> float:
    """Share of pairs in noise at this timestep whose better image a judge scores higher, as SPO asks it."""
    config = step_reward_config(base, rows, rows, seed=SEED + 1, timesteps={"name": "fixed", "values": [timestep]})
    policy = config.adapter.build().open(seed=config.seed)  # other noise than in training
    examples = list(read_examples(config.data)[0])
    noised = policy.images.noised(policy.collate([policy.item(example, 0) for example in examples]))
    scores = step_aware(policy.images, path=str(judge), batch_size=len(examples))(
        prompts=[example.samples[0].prompt.text for example in examples for _ in range(2)],
        noisy=noised.noisy.flatten(0, 1),
        clean=policy.images.guesses(noised, guidance_scale=1.0).flatten(0, 1),
        timestep=noised.timestep.flatten(),
    ).view(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).double().mean())
