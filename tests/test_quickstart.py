"""`mmalign quickstart`: the whole flow on a recipe of a few steps, and once at full length, where the gain must show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import changed_rows, tuned
from PIL import Image
from safetensors.torch import load_file

from mmalign import digits, quickstart
from mmalign.digits import CAPTIONS, Base, Pretraining, caption_tokenizer, default_cache, fingerprint, pretrained, scans
from mmalign.errors import UserError
from mmalign.quickstart import QuickstartConfig, Quickstarted, quiet_libraries, shortfalls
from mmalign.records import comparison, read
from mmalign.report import Evaluation, ScorerChange
from mmalign.statistics import win_rate

pytest_plugins = ("digits_base",)

SHORT = Pretraining(vae_steps=2, unet_steps=2)
KEYS = {"win_rate", "low", "high", "fidelity_before", "fidelity_after", "diversity_before", "diversity_after", "seconds"}
STAGES = ["pretrain", "generate", "score", "prepare", "train", "evaluate"]


def short(folder: Path, **changes: Any) -> QuickstartConfig:
    settings = {"groups": 2, "steps": 2, "pairs": 2, "pretraining": SHORT, "cache": folder / "cache"}
    return QuickstartConfig(**{**settings, "out": folder / "out", **changes})


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Quickstarted:
    return quickstart.main(short(tmp_path_factory.mktemp("short")))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# --- the flow, on a recipe of a few steps ---------------------------------------------------------------------------------


def test_the_folder_holds_results_report_grid_config_and_lora(short_run: Quickstarted) -> None:
    out, found = short_run.out, results(short_run.out)
    assert found.keys() >= KEYS
    assert list(found["seconds"]) == STAGES
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 500
    assert "<html" in (out / "report.html").read_text()
    assert (out / "config.yaml").read_text() == (out / "lora" / "config.yaml").read_text()
    assert (found["num_pairs"], found["num_prompts"], found["base_reused"]) == (20, 10, False)


def test_evaluation_seeds_are_not_those_of_the_candidates(short_run: Quickstarted) -> None:
    def seeds(name: str) -> set[int]:
        return {one["seed"] for row in read(str(short_run.out / name)) for one in comparison(row).provenance}

    assert len(seeds("candidates/comparisons.jsonl")) == 80
    assert seeds("before/comparisons.jsonl") == seeds("after/comparisons.jsonl")
    assert not seeds("candidates/comparisons.jsonl") & seeds("before/comparisons.jsonl")


def test_a_run_that_shows_no_gain_says_what_it_missed_and_ends_in_1(short_run: Quickstarted) -> None:
    assert short_run.exit_code == 1
    assert results(short_run.out)["missed"] == shortfalls(short_run.evaluation)
    assert str(short_run).count("MISSED: ") == len(shortfalls(short_run.evaluation)) > 0


def test_the_loading_lines_are_two_and_are_printed(short_run: Quickstarted) -> None:
    lines = results(short_run.out)["loading"].splitlines()
    assert len(lines) == 2
    assert str(short_run).splitlines()[-2:] == lines


def test_a_second_run_reuses_the_base_and_replaces_the_results(
    short_run: Quickstarted, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Path(results(short_run.out)["base"]).parent
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    with caplog.at_level("INFO", "mmalign"):
        again = quickstart.main(short(short_run.out.parent, cache=cache))
    assert "reused from an earlier run" in caplog.text
    assert results(again.out)["base_reused"] is True
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    for key in KEYS - {"seconds"}:
        assert results(again.out)[key] == short_run.evaluation.results()[key]


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        quickstart.main(short(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_libraries_talk_again_after_the_block() -> None:
    import datasets
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    def state() -> list[Any]:
        levels = [of_diffusers.get_verbosity(), of_transformers.get_verbosity()]
        return [*levels, of_diffusers.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()]

    before = state()
    with pytest.raises(RuntimeError), quiet_libraries():
        assert state() != before
        raise RuntimeError
    assert state() == before


# --- what it demands ------------------------------------------------------------------------------------------------------


def found(wins: int = 90, gain: float = 0.2, diversity: float = 1.0, ties: int = 0) -> Evaluation:
    """100 pairs of which `wins` are won and `ties` tied, by the annotator; a judge whose mean rises by `gain`."""
    difference = torch.tensor([1.0] * wins + [0.0] * ties + [-1.0] * (100 - wins - ties))
    change = ScorerChange(
        name="annotator",
        held_out=False,
        win_rate=win_rate(torch.zeros(100), difference, eps=0.0, interval="wilson"),
        eps=0.0,
        mean_before=0.0,
        mean_after=1.0,
        difference_low=0.0,
        difference_high=1.0,
        effect_size=None,
    )
    return Evaluation(
        num_pairs=100,
        num_prompts=10,
        interval="wilson",
        scorers=(change, replace(change, name="judge", held_out=True, mean_before=0.5, mean_after=0.5 + gain)),
        diversity_before=0.3,
        diversity_after=0.3 * diversity,
        contrast_before=0.1,
        contrast_after=0.1,
    )


def test_a_gain_with_diversity_kept_misses_nothing() -> None:
    assert shortfalls(found()) == []


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        (found(wins=70), "win rate"),
        (found(gain=0.07), "correctness"),
        (found(diversity=0.79), "diversity"),
        (found(diversity=1.21), "diversity"),
    ],
)
def test_each_demand_is_told_alone(evaluation: Evaluation, named: str) -> None:
    [missed] = shortfalls(evaluation)
    assert named in missed


# --- the base -------------------------------------------------------------------------------------------------------------


def test_each_word_of_a_caption_is_one_token_and_other_words_are_bytes() -> None:
    tokenizer = caption_tokenizer()
    tokens = tokenizer([*CAPTIONS]).input_ids
    assert {len(one) for one in tokens} == {6}, "begin, four words, end"
    assert len({one[4] for one in tokens}) == 10, "ten digits"
    assert len(tokenizer("cat").input_ids) == 5
    assert tokenizer.decode(tokenizer("one cat").input_ids, skip_special_tokens=True).strip() == "one cat"


def test_scans_are_enlarged_in_range_and_keep_their_ink() -> None:
    from sklearn.datasets import load_digits

    pixels, shown = scans()
    small = torch.from_numpy(load_digits().data).float().reshape(-1, 8, 8) / 8 - 1
    assert pixels.shape == (1797, 3, 32, 32) and pixels.abs().max() <= 1
    assert torch.bincount(shown).min() > 170
    averaged = torch.nn.functional.avg_pool2d(pixels[:, :1], 4).squeeze(1)
    assert (averaged - small).abs().mean() < 0.15


def test_the_fingerprint_tells_recipes_and_seeds_apart() -> None:
    recipes = [(Pretraining(), 0), (Pretraining(), 1), (Pretraining(vae_steps=3), 0), (Pretraining(unet_steps=3), 0)]
    assert len({fingerprint(*recipe) for recipe in recipes}) == 4
    assert fingerprint(Pretraining(), 0) == fingerprint(Pretraining(), 0)


def test_an_interrupted_pretraining_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def interrupted(self: Any, folder: Path) -> None:
        (folder / "model_index.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", interrupted)
        pretrained(SHORT, seed=5, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_xdg_and_else_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/mmalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "mmalign"


# --- the outcome, at full length ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_preference_is_learnt(digits_run: Path) -> None:
    shown = results(digits_run)
    assert shown["win_rate"] > 0.70 and shown["low"] > 0.55
    assert shown["fidelity_after"] - shown["fidelity_before"] >= 0.08
    assert abs(shown["diversity_after"] / shown["diversity_before"] - 1) <= 0.20
    assert shown["missed"] == []


@pytest.mark.slow
def test_the_printed_lines_load_the_whole_lora_in_stock_diffusers_with_the_same_images(digits_run: Path) -> None:
    names: dict[str, Any] = {}
    exec(results(digits_run)["loading"], names)
    pipe = names["pipe"]
    assert type(pipe).__module__.startswith("diffusers.")
    pipe.set_progress_bar_config(disable=True)
    after, before = (comparison(read(str(digits_run / name / "comparisons.jsonl"))[8]) for name in ("after", "before"))
    for number, one in enumerate(after.provenance[:3]):
        generator = torch.Generator().manual_seed(one["seed"])
        steps = digits.SAMPLER_STEPS
        drawn = pipe(after.prompt.text, num_inference_steps=steps, guidance_scale=1.0, generator=generator).images[0]
        tuned_image, base_image = (pixels(row.candidates[number].images[0].open()) for row in (after, before))
        assert np.abs(pixels(drawn) - tuned_image).max() <= 1
        assert np.abs(base_image - tuned_image).max() > 20, "the LoRA does something"
    in_file = load_file(digits_run / "lora" / "pytorch_lora_weights.safetensors")
    in_pipe = {name: weight for name, weight in pipe.unet.named_parameters() if ".lora_" in name}
    assert len(in_pipe) == len(in_file) > 100
    sizes = [sorted(weight.abs().sum().item() for weight in weights.values()) for weights in (in_pipe, in_file)]
    assert sizes[0] == pytest.approx(sizes[1])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.slow
def test_flipped_labels_push_the_model_below_its_base(digits_run: Path, digits_base: Base, tmp_path: Path) -> None:
    flipped = changed_rows(
        digits_run,
        tmp_path / "flipped.parquet",
        lambda row: replace(row, scores={judge: tuple(-score for score in scores) for judge, scores in row.scores.items()}),
    )
    evaluation = tuned(digits_run, digits_base, tmp_path / "run", f"data.importer.path={flipped}")
    judge = evaluation.held_out
    assert judge is not None
    assert evaluation.headline.win_rate.high < 0.5
    assert judge.mean_after < judge.mean_before - 0.05
