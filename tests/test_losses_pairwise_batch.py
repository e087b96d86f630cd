"""Losses that look at the whole batch: AOT over processes, beta-DPO's beta and choice; the statistics that losses ask for."""

import math

import pytest
import torch
from loss_inputs import data, tensor
from text_golden import assert_equal, case, leaf, pairs
from torch import Tensor

from mmalign.losses import LOSSES, STATISTICS, aot, aot_unpaired, beta_dpo, dpo
from mmalign.objective import Objective, Term

# AOT


def processes(rows: Tensor, of: int) -> list[Tensor]:
    """What each of the processes sees of (2, n, 2) rows: its own first."""
    parts = rows.chunk(of, dim=1)
    return [torch.cat([parts[own], *(parts[other] for other in range(of) if other != own)], 1) for own in range(of)]


@pytest.mark.parametrize("name", ["aot_b0.1", "aot_b0.1_e0.1", "aot_unpaired_b0.1"])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_aot_on_several_processes_is_aot_on_the_whole_batch(name: str, num_processes: int) -> None:
    # TRL sorts the rows of each process by themselves: its objective depends on the layout.
    expected = case("trl116_dpo_seq", name)
    loss, settings = (aot_unpaired if "unpaired" in name else aot), {"label_smoothing": 0.1} if "e0.1" in name else {}
    policy, reference = pairs()
    logps = leaf(policy)
    rows = torch.stack([policy, reference])
    seen = processes(rows, num_processes)
    num_own = len(policy) // num_processes
    losses = torch.cat(
        [
            loss(logps[own], reference[own], everyone, **settings).losses
            for everyone, own in zip(seen, torch.arange(8).split(num_own), strict=True)
        ]
    )
    losses.mean().backward()
    assert_equal(losses.mean(), expected["loss"])
    assert_equal(logps.grad[:, 0], expected["grad_chosen_logps"])
    assert_equal(logps.grad[:, 1], expected["grad_rejected_logps"])
    by_themselves = torch.cat(
        [loss(*both, **settings).losses for both in zip(policy.chunk(4), reference.chunk(4), strict=True)]
    )
    assert abs(by_themselves.mean() - expected["loss"]) > 1e-4


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_everyone_of_one_process_is_what_it_takes_without(loss: type) -> None:
    policy, reference = pairs()
    everyone = STATISTICS["everyone"].values(policy, reference)
    assert torch.equal(loss(policy, reference, everyone).losses, loss(policy, reference).losses)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_a_pair_by_itself_meets_itself_which_is_dpo(loss: type) -> None:
    policy, reference = (logps[:1] for logps in pairs())
    torch.testing.assert_close(loss(policy, reference).losses, dpo(policy, reference).losses, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_the_gradient_of_the_whole_batch_is_the_derivative_of_its_loss(loss: type) -> None:
    policy, reference = pairs()
    assert torch.autograd.gradcheck(lambda logps: loss(logps, reference).losses.sum(), leaf(policy), eps=1e-7)


def test_aot_by_hand() -> None:
    # policy margins 3, 1, 2; reference margins 5, -1, 0 sorted to -1, 0, 5: they meet 5, -1, 0
    policy = tensor([0.0, -3.0], [-1.0, -2.0], [-2.0, -4.0])
    reference = tensor([0.0, -5.0], [-1.0, 0.0], [-2.0, -2.0])
    expected = [math.log1p(math.exp(-z)) for z in (3 - 5, 1 + 1, 2 - 0)]
    assert aot(policy, reference, beta=1.0).losses.tolist() == pytest.approx(expected, rel=1e-12)
    # log-ratios of the preferred 0, 0, 0 and of the others 2, -2, -2: ties rank in their order
    expected = [math.log1p(math.exp(-z)) for z in (2.0, 2.0, -2.0)]
    assert aot_unpaired(policy, reference, beta=1.0).losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_aot_never_takes_the_same_partner_twice_where_margins_are_equal(loss: type) -> None:
    reference = tensor([0.0, 1.0], [0.0, 2.0], [0.0, 4.0])
    tied = torch.zeros(3, 2, dtype=torch.float64)
    losses = loss(tied, reference, beta=1.0).losses
    assert len({round(value, 9) for value in losses.tolist()}) == 3


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_aot_takes_neither_weights_nor_soft_labels(loss: type) -> None:
    policy, reference = pairs()
    for name in ("weight", "prob"):
        with pytest.raises(TypeError, match=name):
            loss(policy, reference, **{name: torch.ones(8, dtype=torch.float64)})


# beta-DPO: deltas 0, 1, 2, 3, 9; mean 2, spread 1

DELTAS = tensor([0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [9.0, 0.0])
STILL = {"reference": torch.zeros(5, 2, dtype=torch.float64)}
EMA = {"gap_mean": torch.tensor(2.0, dtype=torch.float64), "gap_std": torch.tensor(1.0, dtype=torch.float64)}
HALF = torch.full((5,), 0.5, dtype=torch.float64)


def test_beta_dpo_leaves_out_the_unusual_pair_and_follows_the_mean_of_the_others() -> None:
    # 4 of 5 are kept, mean 1.5: beta = 0.1 (1 + 0.6 (1.5 - 2)) = 0.07
    result = beta_dpo(DELTAS, **STILL, **EMA, draw=HALF)
    expected = [math.log1p(math.exp(-0.07 * delta)) * 5 / 4 for delta in (0, 1, 2, 3)]
    assert result.losses.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert result.rewards[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.9], rel=1e-12)
    # their mean over the batch is the mean over the kept
    assert result.losses.mean().item() == pytest.approx(sum(expected) / 5, rel=1e-12)


def test_an_unusual_pair_can_still_be_drawn() -> None:
    # log weight of the delta 9 is -24.5; -log(-log(1 - 1e-14)) is 32.2
    draw = tensor(0.5, 0.5, 0.5, 1e-30, 1 - 1e-14)
    kept = beta_dpo(DELTAS, **STILL, **EMA, draw=draw).losses > 0
    assert kept.tolist() == [True, True, True, False, True]


def test_pairs_are_kept_as_often_as_their_weights_say() -> None:
    # one of three: exp(-d^2 / 2) at d = -1, 0, 1.5
    weights = [math.exp(-(d**2) / 2) for d in (-1, 0, 1.5)]
    policy = tensor([1.0, 0.0], [2.0, 0.0], [3.5, 0.0])
    draws = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = torch.stack([beta_dpo(policy, 0 * policy, **EMA, draw=draw, rho=0.6).losses > 0 for draw in draws])
    assert (kept.sum(1) == 1).all()
    for share, weight in zip(kept.double().mean(0).tolist(), weights, strict=True):
        expected = weight / sum(weights)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


def test_beta_dpo_never_goes_below_a_thousandth() -> None:
    # all kept: 0.1 (1 + 0.6 (3 - 50)) is negative
    far = {**EMA, "gap_mean": torch.tensor(50.0, dtype=torch.float64)}
    result = beta_dpo(DELTAS, **STILL, **far, draw=HALF, rho=0.0)
    torch.testing.assert_close(result.losses, dpo(DELTAS, **STILL, beta=1e-3).losses, rtol=1e-12, atol=0)


def test_beta_dpo_that_neither_follows_nor_chooses_is_dpo() -> None:
    policy, reference = pairs()
    draw = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = beta_dpo(policy, reference, **EMA, draw=draw, alpha=0.0, rho=0.0)
    torch.testing.assert_close(result.losses, dpo(policy, reference).losses, rtol=1e-12, atol=0)


def test_the_beta_of_a_batch_and_its_choice_carry_no_gradient() -> None:
    policy = leaf(DELTAS)
    beta_dpo(policy, **STILL, **EMA, draw=HALF).losses.sum().backward()
    expected = [-0.07 / (1 + math.exp(0.07 * delta)) * 5 / 4 for delta in (0, 1, 2, 3)]
    assert policy.grad[:, 0].tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


@pytest.mark.parametrize("spread", [0.0, math.nan])
def test_without_a_spread_every_pair_is_as_likely_and_one_pair_is_always_kept(spread: float) -> None:
    # the spread of a single pair is 0, or not a number
    alone = {"gap_mean": torch.tensor(1.0, dtype=torch.float64), "gap_std": torch.tensor(spread, dtype=torch.float64)}
    policy = tensor([2.0, 0.0])
    loss = beta_dpo(policy, 0 * policy, **alone, draw=tensor(0.0)).losses
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.16 * 2)), rel=1e-12)  # 0.1 (1 + 0.6 (2 - 1))
    kept = beta_dpo(DELTAS, **STILL, **alone, draw=tensor(0.1, 0.2, 0.9, 0.3, 0.4)).losses > 0
    assert kept.tolist() == [False, True, True, True, True]


def test_beta_dpo_refuses_to_leave_everything_out() -> None:
    with pytest.raises(ValueError, match=r"beta_dpo.rho: got 1.0, want at least 0 and below 1\."):
        beta_dpo(DELTAS, **STILL, **EMA, draw=HALF, rho=1.0)


def test_batches_of_one_pair_leave_the_spread_as_it_was() -> None:
    objective = Objective([Term(name="beta_dpo", loss=beta_dpo, settings={})])

    def step(policy: Tensor) -> Tensor:
        side = {"draw": torch.full((len(policy),), 0.5, dtype=torch.float64)}
        return objective({"policy": policy}, {"policy": 0 * policy}, side).losses

    assert step(DELTAS[1:2]).isfinite().all() and "gap_std" not in objective.memory
    step(DELTAS)
    before = objective.memory["gap_std"].clone()
    assert step(DELTAS[1:2]).isfinite().all() and torch.equal(objective.memory["gap_std"], before)
    assert before[0].item() == pytest.approx(3.5355339059327378, rel=1e-12)  # sqrt(50 / 4)


# Statistics


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_known_to_a_loss_and_carry_no_gradient(name: str) -> None:
    values = data("dpo", batch=4)
    contributed = STATISTICS[name].values(leaf(values["policy"]), leaf(values["reference"]))
    assert not contributed.requires_grad
    assert any(name in loss.__annotations__ for loss in LOSSES.values())


def test_statistics_give_what_the_losses_expect() -> None:
    policy, reference = tensor([-1.0, -2.0], [-3.0, -1.0]), tensor([-1.5, -1.0], [-3.0, -2.0])
    given = {name: one.values(policy, reference).tolist() for name, one in STATISTICS.items()}
    assert given["anchor"] == given["shift"] == [0.5, -1.0, 0.0, 1.0]
    assert given["gap_mean"] == given["gap_std"] == [1.5, -1.0]
    assert given["everyone"] == [policy.tolist(), reference.tolist()]
    assert {name: (one.reduce, one.memory) for name, one in STATISTICS.items()} == {
        "anchor": ("mean", None),
        "shift": ("mean", "running"),
        "gap_mean": ("mean", 0.9),
        "gap_std": ("std", 0.9),
        "everyone": ("all", None),
    }
