"""The benchmark of the diffusion step, at a size of seconds: it refuses wrong numbers, and it reports what it says."""

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
def step() -> Iterator[Any]:
    """The benchmark, importable as it is when its file is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("diffusion_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def side(step: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All variants of the tiny toy with LoRA, on a filled cache."""
    work = tmp_path_factory.mktemp("benchmark")
    step.prepare(step.SIZES["tiny"], work)
    return step.Side("lora", step.SIZES["tiny"], work)


@pytest.fixture(scope="module")
def rows(step: Any, side: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one round gives."""
    data = step.data_rows(step.SIZES["tiny"], tmp_path_factory.mktemp("data"), 1)
    return [*side.rows(side.check(), 1), *data]


def test_caching_changes_no_bit_and_every_variant_agrees_with_the_public_step(step: Any, side: Any) -> None:
    answers = {name: variant.answer() for name, variant in side.variants.items()}
    for name in (step.CACHED, step.REFERENCE):
        assert answers[name].loss == answers[step.ONLINE].loss
        for key, gradient in answers[name].gradient.items():
            assert torch.equal(gradient, answers[step.ONLINE].gradient[key])
    assert abs(answers[step.PEER].loss - 0.6931) > 0.01, "at policy = reference the comparison would prove little"
    for name, answer in answers.items():
        assert abs(answer.loss - answers[step.PEER].loss) < 1e-5, name


def test_our_micro_step_waits_for_nothing_and_caching_saves_floating_point_operations(
    step: Any, rows: list[dict[str, Any]]
) -> None:
    counted = {row["variant"]: row for row in rows if row["suite"] == "step"}
    assert counted[step.PEER]["host_syncs"] == 5
    for name in (step.ONLINE, step.CACHED, step.PARTS, step.REFERENCE):
        assert counted[name]["host_syncs"] == counted[name]["collectives"] == 0, counted[name]["host_syncs_at"]
    flops = {name: row["flops"] for name, row in counted.items()}
    assert flops[step.REFERENCE] < flops[step.CACHED] < flops[step.ONLINE] == flops[step.PEER]
    assert counted[step.PARTS]["step_peak_bytes"] < 0.7 * counted[step.CACHED]["step_peak_bytes"]


def test_every_row_is_shown_and_written_with_its_gate_ratio_limit_and_memory(
    step: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    step.write(rows, "tiny", 1, tmp_path / "results" / "fine.json")
    written = json.loads((tmp_path / "results" / "fine.json").read_text())
    assert {"benchmark", "size", "rounds", "clock", "versions", "disclosed", "rows"} <= written.keys()
    assert {row["suite"] for row in written["rows"]} == {"step", "store", "loading"}
    for row in written["rows"]:
        assert {"variant", "peer", "goal", "ratio", "low", "high", "spread", "reliable", "cpu_seconds"} <= row.keys()
    steps = [row for row in written["rows"] if row["suite"] == "step"]
    ours = {step.ONLINE, step.CACHED, step.PARTS, step.REFERENCE}
    assert {row["variant"] for row in steps} == {step.PEER, step.AGAIN, step.JOINT} | ours
    for row in steps:
        assert {"mode", "gate", "flops", "flop_limit", "attained_of_limit", "held_bytes", "step_peak_bytes"} <= row.keys()
        assert row["gate"]["loss_gap"] <= 1e-5 and row["gate"]["gradient_gap"] <= 5e-5
    shown: list[str] = []
    step.print_rows(rows, step.DISCLOSED, shown.append)
    assert all(row["variant"] in "\n".join(shown) for row in rows), "also where mmalign loses"


def test_a_beta_of_the_peer_that_is_wrong_by_a_thousandth_is_refused_and_nothing_timed(step: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    command = ["--size", "tiny", "--modes", "lora", "--rounds", "1", "--out", str(tmp_path / "refused.json")]
    assert step.main([*command, "--plant-fault"], show=shown.append) == 1
    assert len(shown) == 1 and "the gate refuses" in shown[0] and "Nothing is timed" in shown[0]
    assert not (tmp_path / "refused.json").exists()


def test_live_bytes_are_those_of_the_tensors_alive_at_once(step: Any) -> None:
    weight = torch.ones(1000)
    with step.LiveBytes() as live:
        first = weight + 1  # 4000 bytes
        view = first[10:]
        del first
        kept = view * 2  # 3960 bytes; the storage under the view lives
        del view
        last = kept + 1  # the 4000 are gone
    assert (live.peak, live.live) == (4000 + 3960, 2 * 3960)
    assert last.shape == (990,)


def test_rounds_that_disagree_make_no_claim(step: Any) -> None:
    steady = step.timing(step.Ratio(median=1.4, low=1.2, high=1.7, seconds=1.0))
    shaken = step.timing(step.Ratio(median=1.4, low=1.0, high=1.6, seconds=1.0))
    assert (steady["reliable"], shaken["reliable"]) == (True, False)
