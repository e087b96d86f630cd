"""The benchmark of the methods' steps, at a size of seconds: it refuses wrong numbers, and it reports what it says."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks stand in the repository, not in the package")


@pytest.fixture(scope="module")
def steps() -> Iterator[Any]:
    """The benchmark, importable as it is when its file is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("method_steps")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("method", "family", "lora"), [("mapo", "sd3", True), ("rank_dpo", "sdxl", True), ("spo", "sd15", True)]
)
def test_mmalign_computes_what_the_public_structure_computes(
    steps: Any, tmp_path: Path, method: str, family: str, lora: bool
) -> None:
    case = steps.Case(method=method, family=family, lora=lora)
    side = steps.SIDES[method](steps.opening(case, steps.TOYS["tiny"], tmp_path))
    checked = steps.check(case, side)
    assert {steps.PEER, steps.OURS} < checked.keys()
    for gaps in checked.values():
        assert gaps["loss_gap"] <= 2e-5 and gaps["gradient_gap"] <= 5e-5
    if method == "spo":
        assert abs(checked[steps.PEER]["loss"] - 0.6931) > 1e-3, "at policy = reference the comparison would prove little"
        assert 0 < checked[steps.OURS]["states_gap"] <= 5e-5, "the pairs of a whole round of sampling"


@pytest.fixture(scope="module")
def dro(steps: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Case and side of Diffusion-DRO."""
    case = steps.Case(method="dro", family="sd15", lora=False)
    return case, steps.SIDES["dro"](steps.opening(case, steps.TOYS["tiny"], tmp_path_factory.mktemp("dro")))


def test_own_states_of_the_same_draws_are_the_same_though_mmalign_stops_early(steps: Any, dro: tuple[Any, Any]) -> None:
    case, side = dro
    checked = steps.check(case, side)
    assert 0 < checked[steps.OURS]["states_gap"] <= 5e-5
    (row,) = [row for row in steps.apart_rows(case, side, 1) if row["variant"] == steps.OURS]
    num_steps = steps.TOYS["tiny"]["sd15"].num_steps
    assert row["flop_limit"] == pytest.approx(2 * num_steps / (num_steps + 1), rel=0.05), "draws stop where draws do"


def test_own_states_that_are_off_are_refused(steps: Any, dro: tuple[Any, Any]) -> None:
    state, output = dro[1].apart["sampling"][steps.PEER]()
    with pytest.raises(steps.GateError, match=r"own states off by .* Nothing is timed"):
        steps.gate_states("off", (state, output * 1.001), (state, output))
    with pytest.raises(steps.GateError, match="own states"):
        steps.gate_states("damaged", (state, torch.full_like(output, torch.nan)), (state, output))


def test_the_quick_mode_shows_and_writes_every_row_with_gate_ratio_limit_and_memory(steps: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    command = ["--quick", "--methods", "spo", "--families", "sd15", "--out", str(tmp_path / "results" / "fine.json")]
    assert steps.main(command, show=shown.append) == 0
    written = json.loads((tmp_path / "results" / "fine.json").read_text())
    assert {"benchmark", "size", "rounds", "clock", "versions", "machine", "disclosed", "rows"} <= written.keys()
    timed = {row["variant"]: row for row in written["rows"] if row["suite"] == "spo"}
    sampled = {row["variant"]: row for row in written["rows"] if row["suite"] == "spo sampling"}
    assert sampled.keys() == {steps.PEER, steps.OURS} and 1 < sampled[steps.OURS]["flop_limit"] < 1.1
    assert timed.keys() == {steps.PEER, "public structure, the same twice", steps.OURS}
    for row in timed.values():
        assert {"goal", "ratio", "low", "high", "spread", "reliable", "cpu_seconds", "flop_limit", "gate"} <= row.keys()
        assert row["variant"] in "\n".join(shown)
    assert timed[steps.PEER]["flops"] == 2 * timed[steps.OURS]["flops"], "each branch was forwarded on its own"
    assert timed[steps.OURS]["host_syncs"] == 0


def test_an_iteration_trains_on_the_pairs_that_the_public_structure_samples(steps: Any, tmp_path: Path) -> None:
    case = steps.Case(method="spo_iteration", family="sd15", lora=True)
    side = steps.SIDES["spo_iteration"](steps.opening(case, steps.TOYS["tiny"], tmp_path))
    checked = steps.check(case, side)
    assert checked.keys() == {steps.PEER, "public structure, the same twice", steps.OURS, steps.APPROXIMATE, steps.LATENT}
    for gaps in checked.values():
        assert gaps["loss_gap"] <= 2e-5 and gaps["gradient_gap"] <= 5e-5
    assert 0 < checked[steps.OURS]["states_gap"] <= 5e-5
    noisy, successors = side.variants[steps.OURS].pairs()
    assert len(noisy) == len(successors) == 16 and not torch.equal(successors[:, 0], successors[:, 1])
    assert not torch.allclose(side.variants[steps.LATENT].pairs()[1], successors), "another judge chooses other pairs"


def test_rows_of_other_cases_stay_in_the_file(steps: Any, tmp_path: Path) -> None:
    def row(suite: str, mode: str, ratio: float) -> dict[str, Any]:
        return {"suite": suite, "mode": mode, "ratio": ratio}

    out, old = tmp_path / "all.json", [row("spo", "sd15 toy, LoRA", 1.0), row("spo", "sdxl toy, LoRA", 2.0)]
    assert steps.kept_rows(out, old, "tiny") == []
    out.write_text(json.dumps(steps.document(old, "tiny", 1)))
    assert steps.kept_rows(out, [row("spo", "sd15 toy, LoRA", 3.0)], "tiny") == old[1:]
    assert steps.kept_rows(out, [row("spo", "sd15 toy, LoRA", 3.0)], "full") == []


def test_the_goal_of_a_step_is_of_the_case_that_it_was_set_on(steps: Any) -> None:
    assert steps.GOALS["spo", "sd15", steps.OURS] == 1.95 and ("spo", "sdxl", steps.OURS) not in steps.GOALS


def test_one_candidate_at_a_time_is_flat_in_the_number_of_candidates(steps: Any, tmp_path: Path) -> None:
    rows = steps.memory_rows(steps.TOYS["tiny"], tmp_path)
    shown: list[str] = []
    steps.print_memory(rows, shown.append)
    assert steps.PARTS in "\n".join(shown)
    held = {(row["variant"], row["num_candidates"]): row["step_peak_bytes"] - row["gradient_bytes"] for row in rows}
    assert held[steps.PARTS, 8] < 1.3 * held[steps.PARTS, 2]
    assert held[steps.OURS, 8] > 3 * held[steps.PARTS, 8]


def test_a_loss_of_the_peer_that_is_wrong_by_a_thousandth_is_refused_and_nothing_timed(steps: Any, tmp_path: Path) -> None:
    for method in ("mapo", "dro"):
        shown: list[str] = []
        command = ["--quick", "--methods", method, "--families", "sd15", "--out", str(tmp_path / "refused.json")]
        assert steps.main([*command, "--plant-fault"], show=shown.append) == 1
        assert len(shown) == 1 and "the gate refuses" in shown[0] and "Nothing is timed" in shown[0]
        assert not (tmp_path / "refused.json").exists()
