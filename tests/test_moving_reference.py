"""A reference that follows the policy, and a penalty that keeps the policy's outputs near the reference's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import final_weights, metrics_of, train
from torch import nn

from mmalign.errors import UserError
from mmalign.likelihoods import DenoisingInputs
from mmalign.moving_reference import Following, MovingReference


def parameters(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value, 2 * value])) for value in values]


def test_the_reference_is_the_mean_that_its_decay_says_and_moves_only_when_due() -> None:
    trained = parameters(1.0, 3.0)
    moving = MovingReference(trained, Following(decay=0.75, every=2))
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
        moving.follow(trained)
        if step == 1:
            assert torch.equal(moving.weights[0], torch.tensor([1.0, 2.0]))
    # 1 -> 0.75 * 1 + 0.25 * 3 = 1.5 -> 0.75 * 1.5 + 0.25 * 5 = 2.375
    assert torch.equal(moving.weights[0], torch.tensor([2.375, 3.375]))


def test_inside_the_block_the_network_has_the_reference_weights_and_after_a_fault_its_own_again() -> None:
    network = nn.Linear(2, 1, bias=False)
    trained = list(network.parameters())
    moving = MovingReference(trained, Following())
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="inside"), moving.reference(trained, network) as reference:
        assert torch.equal(reference.weight, before)
        raise RuntimeError("inside")
    assert torch.equal(network.weight, before + 1)
    assert torch.equal(moving.weights[0], before)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}])
def test_a_reference_that_would_never_move_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        Following(**settings)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_copy_at_every_step_makes_each_loss_ln_2(tmp_path: Path, lora: Any) -> None:
    train(tmp_path / "out", adapter={"lora": lora}, training={"steps": 3, "moving_reference": {"decay": 0.0}})
    losses = [row["loss"] for row in metrics_of(tmp_path / "out")]
    assert losses == pytest.approx([0.693147] * 3, abs=1e-6)


def test_a_run_with_a_moving_reference_goes_on_bit_for_bit(tmp_path: Path) -> None:
    following = {"moving_reference": {"decay": 0.5, "every": 1}, "checkpoint_every": 2}
    train(tmp_path / "whole", training={"steps": 4, **following})
    train(tmp_path / "cut", training={"steps": 2, **following})
    train(tmp_path / "cut", training={"steps": 4, **following}, resume="latest")
    expected, got = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def inputs() -> DenoisingInputs:
    generator = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(2, 3, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    return DenoisingInputs(noisy=noisy, timestep=torch.zeros(3, 2), target=target)


def test_drift_is_the_mean_squared_distance_of_policy_and_reference_outputs() -> None:
    _, kept = inputs().refer(lambda noisy, timestep: 0.5 * noisy, drift=True)
    measured = kept.measures(lambda noisy, timestep: 0.75 * noisy)
    torch.testing.assert_close(measured["drift"], 0.0625 * kept.noisy.square().flatten(2).mean(2))
    assert "drift" not in inputs().measures(lambda noisy, timestep: noisy)


def test_the_reference_pass_gives_the_logps_of_logps() -> None:
    measured, _ = inputs().refer(lambda noisy, timestep: 0.5 * noisy)
    assert torch.equal(measured["policy"], inputs().logps(lambda noisy, timestep: 0.5 * noisy))


@pytest.mark.parametrize("at_once", [None, 1])
def test_the_output_anchor_holds_the_policy_back_also_one_candidate_at_a_time(tmp_path: Path, at_once: int | None) -> None:
    def drift(name: str, weight: float) -> float:
        loss = [{"name": "dpo", "beta": 5000.0}, {"name": "output_anchor", "weight": weight}]
        training = {"steps": 8, "candidate_microbatch": at_once}
        train(tmp_path / name, loss=loss, training=training)
        return float(metrics_of(tmp_path / name)[-1]["drift/chosen"])

    free, held = drift("free", 0.0), drift("held", 1e6)
    assert 0 < held < 0.8 * free


def test_the_joint_gradient_of_logps_and_drift_is_that_of_one_candidate_at_a_time(tmp_path: Path) -> None:
    loss = [{"name": "dpo", "beta": 500.0}, {"name": "output_anchor", "weight": 10.0}]
    weights = []
    for at_once in (None, 1):
        training = {"steps": 3, "candidate_microbatch": at_once}
        train(tmp_path / str(at_once), loss=loss, training=training)
        weights.append(final_weights(tmp_path / str(at_once)))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["sft", "mapo"])
def test_a_moving_reference_that_no_loss_asks_for_is_refused(tmp_path: Path, loss: str) -> None:
    view = {"view": "best"} if loss == "sft" else {}
    with pytest.raises(UserError, match=f"training.moving_reference: {loss} asks for no reference"):
        train(tmp_path / "out", loss={"name": loss}, data=view, training={"steps": 1, "moving_reference": {"decay": 0.5}})


def test_a_moving_reference_with_a_bank_of_reference_logps_is_refused(tmp_path: Path) -> None:
    settings = {"cache": str(tmp_path / "cache"), "draws": 2}
    with pytest.raises(UserError, match=r"adapter\.draws: got 2, a bank of reference logps, with a moving reference"):
        train(tmp_path / "out", adapter=settings, training={"steps": 1, "moving_reference": {"decay": 0.5}})
