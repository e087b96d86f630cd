"""The benchmark of the step on prompts with images, at a size of seconds: equal to TRL, or refused."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
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
        yield importlib.import_module("multimodal_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("data", "mode"), [("pairs", "full"), ("BPO triples", "lora")])
def test_mmalign_computes_what_trl_computes_and_sees_each_image_once(step: Any, data: str, mode: str, tmp_path: Path) -> None:
    counted = {row["variant"]: row for row in step.Side(data, mode, step.SIZES["tiny"], tmp_path).rows(1)}
    ours = {step.OURS} if mode == "full" else {step.OURS, step.FEATURES, step.CACHED}
    assert counted.keys() == {step.PEER, step.AGAIN, step.SHIPPED, *ours}
    for name in counted.keys() - {step.PEER}:
        gate = counted[name]["gate"]
        assert gate["loss_gap"] <= 1e-5 and gate["gradient_gap"] <= 5e-5
        assert abs(gate["loss"] - 0.6931) > 1e-4, "at policy = reference the comparison would prove little"
    for name in ours:
        waits = counted[name]["host_syncs_at"].keys() - {"features.py:get"}  # which reads a file
        assert not waits and counted[name]["collectives"] == 0, waits
    flops = {name: row["flops"] for name, row in counted.items()}
    assert flops[step.OURS] < flops[step.PEER] < flops[step.SHIPPED]
    if mode == "lora":
        assert flops[step.CACHED] < flops[step.FEATURES] < flops[step.OURS], "the tower, then the reference, are left out"


def test_a_run_writes_its_numbers(step: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    file = tmp_path / "results" / "fine.json"
    command = ["--size", "tiny", "--rounds", "1", "--data", "pairs", "--modes", "lora", "--out", str(file)]
    assert step.main(command, show=shown.append) == 0
    document = json.loads(file.read_text())
    assert document["size"]["name"] == "tiny" and document["versions"]["trl"] and document["disclosed"]
    assert all(row["variant"] in "\n".join(shown) for row in document["rows"])
    assert file.with_suffix(".png").stat().st_size > 0


def test_a_beta_of_the_peer_that_is_wrong_by_a_thousandth_is_refused_and_nothing_timed(step: Any, tmp_path: Path) -> None:
    shown: list[str] = []
    command = ["--size", "tiny", "--data", "BPO triples", "--modes", "lora", "--out", str(tmp_path / "no.json")]
    assert step.main([*command, "--plant-fault"], show=shown.append) == 1
    assert len(shown) == 1 and "the gate refuses" in shown[0] and "Nothing is timed" in shown[0]
    assert not (tmp_path / "no.json").exists()


def test_another_image_is_another_gradient_and_refused(step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate is for: tokens alike, and a wrong picture under them."""
    from multimodal_toy import examples_of

    size = step.SIZES["tiny"]
    shown = examples_of(size, 2, count=2)
    turned = [replace(shown[0], samples=tuple(moved(sample, shown[1]) for sample in shown[0].samples))]
    rows_of = step.rows_of
    monkeypatch.setattr(step, "rows_of", lambda examples: rows_of(turned))
    with pytest.raises(step.GateError, match="Nothing is timed"):
        step.Side("pairs", "lora", size, tmp_path).rows(1)


def moved(sample: Any, other: Any) -> Any:
    """The sample with the image of another example."""
    [message] = sample.prompt.messages
    images = other.samples[0].prompt.messages[0].images
    return replace(sample, prompt=replace(sample.prompt, messages=(replace(message, images=images),)))
