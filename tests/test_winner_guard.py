"""The safeguard that scales the loser's gradient so that the winner's error does not rise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.likelihoods import DenoisingInputs, winner_guard
from mmalign.losses import dpo, dro, hinge, ipo, mapo, spo

DIMS = (2, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(prediction: Tensor) -> Callable[..., Tensor]:
    return lambda noisy, timestep, **condition: prediction.flatten(0, 1)


def residuals(*pairs: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float64)


def test_winner_guard_gives_the_scales_worked_out_by_hand() -> None:
    residual = residuals(
        ((3.0, 4.0), (10.0, 5.0)),  # (1 - 0.9) * 25 / 50 = 0.05
        ((3.0, 4.0), (0.3, 0.1)),  # 2.5 / 1.3, clipped to 1
        ((3.0, 4.0), (-1.0, 0.0)),  # gradients point apart: 1
        ((3.0, 4.0), (4.0, -3.0)),  # orthogonal: 1
        ((0.0, 0.0), (1.0, 2.0)),  # a perfect winner: inner product 0, so 1
    )
    expected = torch.tensor([[1, 0.05], [1, 1], [1, 1], [1, 1], [1, 1]], dtype=torch.float64)
    torch.testing.assert_close(winner_guard(residual), expected, rtol=1e-14, atol=0)


def test_winner_guard_takes_mu_from_keeping_everything_to_keeping_nothing() -> None:
    residual = residuals(((3.0, 4.0), (10.0, 5.0)))
    scales = [winner_guard(residual, mu=mu)[0, 1].item() for mu in (0.0, 0.6, 0.9, 1.0)]
    assert scales == pytest.approx([0.5, 0.2, 0.05, 0.0], rel=1e-12, abs=1e-15)
    assert winner_guard(residuals(((3.0, 4.0), (3.0, 4.0))), mu=0.0)[0, 1].item() == 1.0


def test_winner_guard_per_batch_takes_one_scale_from_the_summed_products() -> None:
    # squared norms 25 + 1, inner products 50 - 4: 0.1 * 26 / 46 for both, although the second pair needs no guard
    residual = residuals(((3.0, 4.0), (10.0, 5.0)), ((1.0, 0.0), (-4.0, 9.0)))
    scale = winner_guard(residual, per="batch")
    torch.testing.assert_close(scale[:, 1], torch.full((2,), 2.6 / 46, dtype=torch.float64), rtol=1e-14, atol=0)
    assert (scale[:, 0] == 1).all()
    apart = residuals(((3.0, 4.0), (1.0, 0.0)), ((1.0, 0.0), (-4.0, 9.0)))  # 3 - 4 < 0
    assert (winner_guard(apart, per="batch") == 1).all()


def test_winner_guard_flattens_every_dimension_of_the_candidate() -> None:
    residual = normal(5, 2, *DIMS)
    assert torch.equal(winner_guard(residual), winner_guard(residual.flatten(2)))


GUARDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda policy, reference: dpo(policy, reference, beta=50.0).losses,
    "ipo": lambda policy, reference: ipo(policy, reference, beta=0.1).losses,
    "hinge": lambda policy, reference: hinge(policy, reference, beta=1.0).losses,
    "dro": lambda policy, reference: dro(policy, reference, margin=5.0).losses,
    "mapo": lambda policy, reference: mapo(policy, beta=50.0, scale=10.0).losses,
    "spo": lambda policy, reference: spo(policy, reference, clip=0.9).losses,
}


def guarded_pair(safeguard: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient by the predictions, residuals; the loser's residual is longer and points the winner's way."""
    target = normal(4, 2, *DIMS, seed=1)
    residual = 0.3 * normal(4, 1, *DIMS, seed=2) * torch.tensor([1.0, 1.5], dtype=torch.float64).view(1, 2, 1, 1, 1)
    residual = residual + 0.05 * normal(4, 2, *DIMS, seed=3)
    prediction = (target + residual).requires_grad_()
    inputs = DenoisingInputs(
        noisy=torch.zeros_like(target), timestep=torch.zeros(4, 2).long(), target=target, safeguard=safeguard
    )
    policy = inputs.logps(stored(prediction))
    reference = policy.detach() + 1e-3 * normal(4, 2, seed=4)
    losses = loss(policy, reference)
    losses.sum().backward()
    return losses.detach(), prediction.grad, residual


@pytest.mark.parametrize("per", ["pair", "batch"])
@pytest.mark.parametrize("name", GUARDED)
def test_winner_guard_keeps_the_loss_and_scales_exactly_the_losers_gradient(name: str, per: str) -> None:
    guard = partial(winner_guard, mu=0.9, per=per)
    plain_loss, plain_gradient, residual = guarded_pair(None, GUARDED[name])
    loss, gradient, _ = guarded_pair(guard, GUARDED[name])
    scale = guard(residual)[:, 1]
    assert ((scale > 0) & (scale < 1)).all()
    assert torch.equal(loss, plain_loss)
    torch.testing.assert_close(gradient[:, 0], plain_gradient[:, 0], rtol=1e-13, atol=0)
    scaled = scale[:, None, None, None] * plain_gradient[:, 1]
    torch.testing.assert_close(gradient[:, 1], scaled, rtol=1e-12, atol=1e-18)
    assert (plain_gradient[:, 1] != 0).all()


@pytest.mark.parametrize("name", GUARDED)
def test_winner_guard_keeps_the_winners_error_from_rising_where_the_plain_loss_raises_it(name: str) -> None:
    # Both candidates come from one network: an output moved for the loser moves the winner's too. First order:
    # d error_w = <2/D residual_w, -step * (gradient_w + gradient_l)>.
    slopes = {}
    for guard in (None, winner_guard):
        _, gradient, residual = guarded_pair(guard, GUARDED[name])
        slopes[guard] = -(residual[:, 0] * gradient.sum(1)).flatten(1).sum(1)
    assert (slopes[None] > 0).all()
    assert (slopes[winner_guard] < 0).all()


def test_a_small_step_with_the_guard_lowers_the_winners_error_and_without_it_raises_it() -> None:
    changes = {}
    for guard in (None, partial(winner_guard, mu=0.9)):
        _, gradient, residual = guarded_pair(guard, GUARDED["dpo"])
        moved = residual[:, 0] - 1e-6 * gradient.sum(1)
        changes[guard is None] = (moved.square() - residual[:, 0].square()).flatten(1).mean(1)
    assert (changes[True] > 0).all() and (changes[False] < 0).all()


def test_the_guard_holds_for_errors_that_are_weighed_differently() -> None:
    """A step along the guarded gradient does not raise the winner's error, whatever the timestep weights."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[0.01, 1.0]], dtype=torch.float64)
    shift = torch.zeros(4, 4, 4, dtype=torch.float64, requires_grad=True)
    inputs = DenoisingInputs(
        noisy=torch.zeros_like(target),
        timestep=torch.zeros(1, 2),
        target=target + 1.0,  # the two residuals point the same way
        error_weight=weights,
        safeguard=partial(winner_guard, mu=0.5),
    )

    def error() -> float:
        return float((shift.detach() - inputs.target[0, 0]).square().mean())

    logps = inputs.logps(lambda noisy, timestep: noisy + shift)
    (logps[0, 1] - logps[0, 0]).backward()
    before = error()
    with torch.no_grad():
        shift -= 1e-3 * shift.grad
    assert error() <= before
