"""Losses on lists: derived and published numbers, what they become for a pair, padding that changes nothing."""

import math
from typing import Any

import pytest
import torch
from loss_inputs import tensor
from text_golden import assert_equal, case, leaf, lists, pairs
from torch import Tensor

from mmalign.losses import dpo, exo_listwise, info_nca, lipo, nca, plackett_luce, rank_dpo

SCORED = {
    rank_dpo: {"beta": 0.1},
    lipo: {},
    info_nca: {"beta": 0.1, "temperature": 0.7},
    nca: {"beta": 0.1, "temperature": 0.7},
    exo_listwise: {},
}


def call(loss: Any, policy: Tensor, reference: Tensor, scores: Tensor, **more: Any) -> Tensor:
    data = {"scores": scores} if loss in SCORED else {}
    return loss(policy, reference, **data, **{**SCORED.get(loss, {}), **more}).losses


# Golden numbers


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_plackett_luce_repeats_the_derived_numbers(beta: float) -> None:
    expected = case("derived_list", f"plackett_luce_K4_b{beta}")
    policy, reference, _ = lists()
    logps = leaf(policy)
    result = plackett_luce(logps, reference, beta=beta)
    result.losses.mean().backward()
    assert_equal(result.losses, expected["per_list"])
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(logps.grad, expected["grad"])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("k", [2, 3])
def test_plackett_luce_of_shorter_lists_repeats_the_derived_numbers_cut_or_masked(k: int, beta: float) -> None:
    expected = case("derived_list", f"plackett_luce_K{k}_b{beta}")["per_list"]
    policy, reference, _ = lists()
    assert_equal(plackett_luce(policy[:, :k], reference[:, :k], beta=beta).losses, expected)
    mask = (torch.arange(4) < k).expand(4, 4)
    assert_equal(plackett_luce(policy, reference, mask=mask, beta=beta).losses, expected)


@pytest.mark.parametrize("rank_by", ["score", "label"])
@pytest.mark.parametrize("log", ["ln", "log2"])
def test_lipo_repeats_the_derived_numbers(rank_by: str, log: str) -> None:
    expected = case("derived_list", f"lambda_dcg_rankby_{rank_by}_{log}")
    policy, reference, scores = lists()
    logps = leaf(policy)
    settings = {"rank_by": {"score": "model", "label": "label"}[rank_by], "discount": {"ln": "natural", "log2": "log2"}[log]}
    result = lipo(logps, reference, scores, **settings)
    result.losses.mean().backward()
    assert_equal(result.losses, expected["per_list"])
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(logps.grad, expected["grad"])
    if settings == {"rank_by": "model", "discount": "natural"}:
        assert torch.equal(lipo(policy, reference, scores).losses, result.losses)  # the defaults


def test_nca_of_pairs_repeats_trl() -> None:
    expected = case("trl116_dpo_seq", "nca_pair_b0.1")
    policy, reference = pairs()
    logps = leaf(policy)
    result = nca(logps, reference, beta=0.1)
    result.losses.mean().backward()
    assert_equal(result.losses, expected["per_sample"])
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(logps.grad[:, 0], expected["grad_chosen_logps"])
    assert_equal(logps.grad[:, 1], expected["grad_rejected_logps"])


# By hand


def test_info_nca_nca_and_exo_by_hand() -> None:
    policy, reference, scores = tensor([1.0, 0.0, 3.0]), tensor([0.0, 0.0, 4.0]), tensor([2.0, 1.0, 0.0])
    rewards = [0.5, 0.0, -0.5]  # beta = 0.5
    total, wanted = sum(map(math.exp, rewards)), sum(map(math.exp, (1.0, 0.5, 0.0)))  # temperature = 2
    p, q = [math.exp(r) / total for r in rewards], [math.exp(s) / wanted for s in (1.0, 0.5, 0.0)]
    settings = {"beta": 0.5, "temperature": 2.0}
    cross = -sum(a * math.log(b) for a, b in zip(q, p, strict=True))
    assert info_nca(policy, reference, scores, **settings).losses.item() == pytest.approx(cross, rel=1e-12)
    reverse = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert exo_listwise(policy, reference, scores, **settings).losses.item() == pytest.approx(reverse, rel=1e-12)
    absolute = sum(share * math.log1p(math.exp(-r)) + math.log1p(math.exp(r)) / 3 for share, r in zip(q, rewards, strict=True))
    assert nca(policy, reference, scores, **settings).losses.item() == pytest.approx(absolute, rel=1e-12)


def test_the_first_place_of_plackett_luce_is_the_best_against_all_others() -> None:
    policy, reference, _ = lists()
    first = plackett_luce(policy, reference, top_m=1).losses
    torch.testing.assert_close(first, info_nca(policy, reference, beta=0.1).losses, rtol=1e-13, atol=0)
    behind = plackett_luce(policy[:, 1:], reference[:, 1:], top_m=1).losses
    torch.testing.assert_close(plackett_luce(policy, reference, top_m=2).losses, first + behind, rtol=1e-13, atol=0)
    for top_m in (3, 4, 9):  # the last place is certain
        whole = plackett_luce(policy, reference).losses
        torch.testing.assert_close(plackett_luce(policy, reference, top_m=top_m).losses, whole, rtol=1e-13, atol=0)


def test_top_m_counts_candidates_that_are_there() -> None:
    policy, reference, _ = lists()
    mask = torch.tensor([False, True, True, True]).expand(4, 4)
    counted = plackett_luce(policy, reference, mask=mask, top_m=1).losses
    torch.testing.assert_close(counted, plackett_luce(policy[:, 1:], reference[:, 1:], top_m=1).losses, rtol=1e-13, atol=0)


@pytest.mark.parametrize("top_m", [1, 2, 3])
def test_with_top_m_candidates_of_equal_score_may_stand_in_any_order(top_m: int) -> None:
    policy, scores = torch.tensor([[-1.0, -2.0, -3.0, -2.5]]), torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    swapped = [1, 0, 2, 3]

    def loss(order: list[int], **more: Any) -> Tensor:
        given = policy[:, order]
        return plackett_luce(given, torch.zeros_like(given), scores=scores[:, order], beta=1.0, top_m=top_m, **more).losses

    torch.testing.assert_close(loss(swapped), loss([0, 1, 2, 3]))
    alone = [math.log(math.exp(one) + math.exp(-3.0) + math.exp(-2.5)) - one for one in (-1.0, -2.0)]
    third = math.log(1 + math.exp(-2.5 + 3.0)) if top_m == 3 else 0.0
    assert loss([0, 1, 2, 3]).item() == pytest.approx(sum(alone) + third, rel=1e-5)


def test_a_padded_pair_of_equal_scores_is_a_pair() -> None:
    policy, reference = torch.tensor([[1.0, 0.0, math.nan]]), torch.zeros(1, 3)
    mask, scores = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 1.0, math.nan]])
    padded = plackett_luce(policy, reference, mask=mask, scores=scores).losses
    torch.testing.assert_close(padded, dpo(policy[:, :2], reference[:, :2]).losses)


# What they become


def test_candidates_of_equal_score_are_not_ranked_among_themselves() -> None:
    policy = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)

    def loss(*scores: float) -> float:
        given = torch.tensor([scores], dtype=torch.float64)
        return plackett_luce(policy, torch.zeros_like(policy), scores=given, beta=1.0).losses.item()

    assert loss(1.0, 0.0, 0.0) == pytest.approx(math.log(math.e**2 + math.e + 1) - 2)
    assert loss(1.0, 1.0, 0.0) == pytest.approx(math.log(math.e**2 + 1) - 2 + math.log(math.e + 1) - 1)
    assert loss(3.0, 2.0, 1.0) == plackett_luce(policy, torch.zeros_like(policy), beta=1.0).losses.item()
    assert loss(1.0, 1.0, 1.0) == 0.0


def test_for_a_pair_plackett_luce_info_nca_and_unweighted_lipo_are_dpo() -> None:
    policy, reference = pairs()
    expected = dpo(policy, reference).losses
    scores = tensor([0.8, 0.1]).expand(8, 2)
    equal = torch.ones_like(policy)
    for losses in (
        plackett_luce(policy, reference).losses,
        plackett_luce(policy, reference, scores=scores).losses,
        plackett_luce(policy, reference, scores=equal, top_m=1).losses,  # something else ordered them
        plackett_luce(policy, reference, scores=scores.flip(1)).losses,
        info_nca(policy, reference, beta=0.1).losses,
        info_nca(policy, reference, scores, beta=0.1).losses,  # the published temperature leaves all to the best
        lipo(policy, reference, scores, gain="none", discount="none").losses,
    ):
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    soft = torch.linspace(0, 1, 8, dtype=torch.float64)
    torch.testing.assert_close(
        info_nca(policy, reference, prob=soft, beta=0.1).losses, dpo(policy, reference, soft).losses, rtol=1e-12, atol=0
    )


def test_weighted_lipo_of_a_pair_is_a_constant_times_dpo() -> None:
    policy, reference = pairs()
    scores = tensor([1.0, 0.0]).expand(8, 2)
    constant = 1 / math.log(2) - 1 / math.log(3)
    expected = constant * dpo(policy, reference).losses
    torch.testing.assert_close(lipo(policy, reference, scores).losses, expected, rtol=1e-12, atol=0)


def test_lipo_learns_from_the_first_step_on_where_all_rewards_are_tied() -> None:
    _, reference, scores = lists()
    logps = leaf(reference)
    lipo(logps, reference, scores).losses.sum().backward()
    assert (logps.grad[:, 0] < 0).all() and (logps.grad[:, -1] > 0).all()


def test_lipo_and_rank_dpo_differ_by_whose_ranks_they_take() -> None:
    policy, reference, scores = lists()
    by_label = lipo(policy, reference, scores, rank_by="label").losses
    assert torch.equal(by_label, rank_dpo(policy, reference, scores, beta=0.1).losses)
    assert not torch.allclose(by_label, lipo(policy, reference, scores).losses)


def test_equal_scores_share_the_target() -> None:
    policy, reference, _ = lists()
    tied = tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)
    first = torch.stack([info_nca(policy[:, order], reference[:, order]).losses for order in ([0, 1, 2, 3], [1, 0, 2, 3])])
    torch.testing.assert_close(info_nca(policy, reference, tied).losses, first.mean(0), rtol=1e-13, atol=0)


def test_exo_has_no_loss_where_the_rewards_are_the_scores() -> None:
    _, reference, scores = lists()
    matched = exo_listwise(reference + 4 * scores + 7.0, reference, scores)  # 1/2 * 4 = 1 / (1/2), and an offset is no matter
    torch.testing.assert_close(matched.losses, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (exo_listwise(reference - scores, reference, scores).losses > 0.1).all()


# Padding


@pytest.mark.parametrize("loss", [*SCORED, plackett_luce])
def test_padding_touches_neither_loss_nor_gradient_whatever_stands_in_it(loss: Any) -> None:
    policy, reference, scores = lists()
    lengths = [2, 3, 4, 3]
    mask = torch.stack([torch.arange(4) < n for n in lengths])
    for rubbish in (0.0, 1e4, math.nan, -math.inf):
        logps = leaf(policy.masked_fill(~mask, rubbish))
        padded = call(loss, logps, reference.masked_fill(~mask, rubbish), scores.masked_fill(~mask, rubbish), mask=mask)
        padded.sum().backward()
        assert (logps.grad[~mask] == 0).all()
        for row, n in enumerate(lengths):
            alone = leaf(policy[row : row + 1, :n])
            losses = call(loss, alone, reference[row : row + 1, :n], scores[row : row + 1, :n])
            losses.sum().backward()
            torch.testing.assert_close(padded[row], losses[0], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(logps.grad[row, :n], alone.grad[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [*SCORED, plackett_luce])
def test_gradients_of_padded_lists_are_derivatives(loss: Any) -> None:
    policy, reference, scores = lists()
    mask = torch.stack([torch.arange(4) < n for n in (2, 3, 4, 3)])
    assert torch.autograd.gradcheck(lambda logps: call(loss, logps, reference, scores, mask=mask), leaf(policy), eps=1e-7)


# Refusals


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (plackett_luce, {"top_m": 0}, r"plackett_luce\.top_m: got 0, want at least 1"),
        (plackett_luce, {"beta": -1.0}, r"plackett_luce\.beta"),
        (info_nca, {"temperature": 0.0}, r"info_nca\.temperature: got 0.0, want a positive number"),
        (nca, {"temperature": -1.0}, r"nca\.temperature"),
        (exo_listwise, {"temperature": 0.0}, r"exo_listwise\.temperature"),
        (exo_listwise, {"beta": 0.0}, r"exo_listwise\.beta"),
        (lipo, {"beta": 0.0}, r"lipo\.beta"),
    ],
)
def test_settings_without_meaning_are_refused(loss: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(loss, *lists(), **settings)


@pytest.mark.parametrize("loss", [info_nca, nca])
def test_one_target_at_a_time(loss: Any) -> None:
    policy, reference, scores = lists()
    with pytest.raises(ValueError, match="got both scores and prob, want one of them"):
        loss(policy, reference, scores, torch.ones(4))
    with pytest.raises(ValueError, match="got prob with 4 candidates, want 2"):
        loss(policy, reference, prob=torch.ones(4))
