"""The benchmark of the text step, at a size of seconds: it refuses wrong numbers, and it reports what it says."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks stand in the repository, not in the package"),
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is of the extra `benchmark` alone"),
    # TRL and transformers about their own settings.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def step() -> Iterator[Any]:
    """The benchmark, importable as it is when its file is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("text_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("ratio", "lora"), [("4:1", True), ("varied", False), ("varied-wide", False)])
def test_mmalign_computes_what_trl_computes_and_waits_for_nothing(step: Any, ratio: str, lora: bool) -> None:
    case = step.Case(vocab="small", ratio=ratio, lora=lora)
    counted = {row["variant"]: row for row in step.case_rows(case, step.SIZES["tiny"], 1)}
    assert counted.keys() == {
        step.PEER,
        step.PEER_CACHED,
        step.OURS,
        step.CACHED,
        *([step.SHIPPED] if ratio != step.WIDE else []),
    }
    for row in counted.values():
        assert row["gate"]["loss_gap"] <= 1e-5 and row["gate"]["gradient_gap"] <= 5e-5
        assert abs(row["gate"]["loss"] - 0.6931) > 1e-4, "at policy = reference the comparison would prove little"
    for name in (step.OURS, step.CACHED):
        assert counted[name]["host_syncs"] == counted[name]["collectives"] == 0, counted[name]["host_syncs_at"]
    assert counted[step.PEER]["host_syncs"] > 10 and counted[step.PEER]["collectives"] > 10
    flops = {name: row["flops"] for name, row in counted.items()}
    assert flops[step.CACHED] < flops[step.OURS] < flops[step.PEER] < flops.get(step.SHIPPED, float("inf"))
    assert flops[step.CACHED] < flops[step.PEER_CACHED] < flops[step.PEER]


def test_the_output_layer_and_the_token_ids_are_trls(step: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    command = ["--size", "tiny", "--rounds", "1", "--parts", "head", "tokenising", "--out", str(tmp_path / "fine.json")]
    assert step.main(command, show=shown.append) == 0
    rows = json.loads((tmp_path / "fine.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == {"head", "tokenising"}
    assert all(row["variant"] in "\n".join(shown) for row in rows)


def test_a_file_keeps_the_rows_of_other_cases(step: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "kept.json"
    rows = [{"suite": "step", "mode": mode, "variant": "one"} for mode in ("a", "b")]
    step.write(rows, "tiny", path)
    step.write([{"suite": "step", "mode": "b", "variant": "other"}], "tiny", path)
    assert [(row["mode"], row["variant"]) for row in json.loads(path.read_text())["rows"]] == [("a", "one"), ("b", "other")]
    step.write([rows[0]], "full", path)
    assert len(json.loads(path.read_text())["rows"]) == 1, "numbers of another size say nothing here"


def test_a_beta_of_the_peer_that_is_wrong_by_a_thousandth_is_refused_and_nothing_timed(step: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    command = ["--size", "tiny", "--modes", "lora", "--ratios", "1:1", "--parts", "step", "--out", str(tmp_path / "no.json")]
    assert step.main([*command, "--plant-fault"], show=shown.append) == 1
    assert len(shown) == 1 and "the gate refuses" in shown[0] and "Nothing is timed" in shown[0]
    assert not (tmp_path / "no.json").exists()
