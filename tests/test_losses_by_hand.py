"""Identities between losses, values worked out by hand, and the limit where MaPO's formula is 0/0."""

import inspect
import math
from typing import Any

import mpmath
import pytest
import torch
from loss_inputs import call, data, settings_of, tensor

from mmalign.losses import (
    LOSSES,
    STATISTICS,
    bradley_terry,
    dpo,
    dro,
    hinge,
    ipo,
    kto,
    mapo,
    output_anchor,
    rank_dpo,
    robust,
    sft,
    spo,
)

LN2 = math.log(2)


# Identities


@pytest.mark.parametrize("loss", [dpo, robust, spo])
def test_an_untrained_policy_costs_ln_2(loss: Any) -> None:
    policy = -torch.rand(5, 2, dtype=torch.float64)
    torch.testing.assert_close(loss(policy, policy).losses, torch.full((5,), LN2, dtype=torch.float64), rtol=1e-15, atol=0)


REFERENCE_FREE = {
    "mapo",
    "sft",
    "nll",
    "bradley_terry",
    "gpm",
    "tpo",
    "output_anchor",
    "rationale",
    "selm",
    "dckd",
    "adpa",
    *("slic", "simpo", "alphapo", "cpo", "orpo", "asft"),
    *("dove", "tpo_visual"),  # they ask for another measure of the reference
}


def test_mapo_and_what_else_is_reference_free_never_asks_for_a_reference() -> None:
    assert all("reference" not in inspect.signature(LOSSES[name]).parameters for name in REFERENCE_FREE)
    assert all("reference" in inspect.signature(LOSSES[name]).parameters for name in set(LOSSES) - REFERENCE_FREE)


@pytest.mark.parametrize(
    ("scores", "prob", "expected"),
    [
        ((2.0, 0.0), None, 0.1269280110429726),  # ln(1 + e^-2)
        ((2.0, 0.0), 0.0, 2.1269280110429726),  # ln(1 + e^2)
        ((1.0, 0.0), 0.5, 0.8132616875182228 - LN2),  # 1/2 ln(1 + e^-1) + 1/2 ln(1 + e) - ln 2
        ((-3.0, -3.0), 0.5, 0.0),
        ((1.0, 0.0), 0.25, 0.25 * 0.3132616875182228 + 0.75 * 1.3132616875182228),  # no tie: nothing is taken off
    ],
)
def test_bradley_terry_by_hand(scores: tuple[float, float], prob: float | None, expected: float) -> None:
    soft = None if prob is None else tensor(prob)
    result = bradley_terry(tensor(list(scores)), soft)
    assert result.losses.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert result.rewards.tolist() == [list(scores)]


def test_bradley_terry_is_dpo_on_scores_and_a_tie_costs_ln_2_more_where_it_is_not_taken_off() -> None:
    scores, prob, weight = tensor([2.0, 0.0], [0.3, 0.9], [1.0, 1.0]), tensor(1.0, 0.5, 0.5), tensor(1.0, 3.0, 0.5)
    whole = bradley_terry(scores, prob, weight, ties_at_zero=False).losses
    torch.testing.assert_close(whole, dpo(scores, 0 * scores, prob, weight, beta=1.0).losses, rtol=1e-15, atol=0)
    torch.testing.assert_close(whole - bradley_terry(scores, prob, weight).losses, LN2 * tensor(0.0, 3.0, 0.5))


def test_dro_is_hinge_with_other_defaults() -> None:
    values = data("dro", batch=20)
    other = call("hinge", values, beta=2.0, margin=0.001)
    assert torch.equal(dro(**values).losses, other.losses) and torch.equal(dro(**values).rewards, other.rewards)
    assert 0 < (other.losses > 0).sum() < 20  # some pairs on each side of the hinge
    assert settings_of("dro") == {"beta": 2.0, "margin": 0.001}
    assert {name: settings_of("hinge")[name] for name in ("beta", "margin")} == {"beta": 0.1, "margin": 1.0}


@pytest.mark.parametrize(
    ("log", "constant"),
    [
        # Scores 1 and 0: gains 1 and 0, discounts of ranks 1 and 2; 1/ln 2 - 1/ln 3 and 1/log2 2 - 1/log2 3.
        ("natural", 1.4426950408889634 - 0.9102392266268373),
        ("log2", 1.0 - 0.6309297535714575),
    ],
)
@pytest.mark.parametrize("rank_by", ["label", "model"])
def test_rank_dpo_of_two_candidates_is_a_constant_times_dpo(log: str, constant: float, rank_by: str) -> None:
    values = data("dpo", batch=10)
    ranked = rank_dpo(**values, scores=tensor([1.0, 0.0]).expand(10, 2), beta=5000.0, discount=log, rank_by=rank_by)
    paired = dpo(**values, beta=5000.0)
    torch.testing.assert_close(ranked.losses, constant * paired.losses, rtol=1e-12, atol=0)
    assert torch.equal(ranked.rewards, paired.rewards)


def test_rank_dpo_does_not_mind_the_order_of_the_candidates() -> None:
    values = data("rank_dpo")
    values["scores"][1, 2] = values["scores"][1, 3]  # a tie too
    order = [2, 0, 3, 1]
    shuffled = {key: value[:, order] for key, value in values.items()}
    for rank_by in ("label", "model"):
        one, other = call("rank_dpo", values, rank_by=rank_by), call("rank_dpo", shuffled, rank_by=rank_by)
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-12, atol=0)
        assert torch.equal(one.rewards[:, order], other.rewards)


def test_rank_dpo_leaves_out_pairs_of_equal_score() -> None:
    values = data("rank_dpo")
    values["scores"] = torch.full((3, 4), 0.5, dtype=torch.float64)
    assert (call("rank_dpo", values).losses == 0).all()


def test_rank_dpo_gives_equal_scores_their_mean_rank() -> None:
    # Scores 1, 1/2, 1/2, 0: ranks 1, 2.5, 2.5, 4; or, in list order, 1, 2, 3, 4. All rewards 0: each pair costs weight * ln 2.
    zeros, scores = torch.zeros(1, 4, dtype=torch.float64), tensor([1.0, 0.5, 0.5, 0.0])

    def expected(ranks: list[float]) -> float:
        gain = [1.0, math.sqrt(2) - 1, math.sqrt(2) - 1, 0.0]
        inverse = [1 / math.log(1 + rank) for rank in ranks]
        ordered = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
        return LN2 * sum((gain[i] - gain[j]) * (inverse[i] - inverse[j]) for i, j in ordered)

    for ties, ranks in {"average": [1, 2.5, 2.5, 4], "stable": [1, 2, 3, 4]}.items():
        loss = rank_dpo(zeros, zeros, scores, ties=ties).losses.item()
        assert loss == pytest.approx(expected(ranks), rel=1e-12)


def test_rank_dpo_ranks_by_the_implicit_reward_when_asked() -> None:
    # Two candidates ranked wrongly by the model and a third last: ranks by label 1, 2, 3, by model 2, 1, 3.
    reference, scores = torch.zeros(1, 3, dtype=torch.float64), tensor([1.0, 0.5, 0.0])
    policy = tensor([1.0, 2.0, 0.0])
    gain = [1.0, math.sqrt(2) - 1, 0.0]
    for rank_by, ranks in {"label": [1, 2, 3], "model": [2, 1, 3]}.items():
        inverse = [1 / math.log(1 + rank) for rank in ranks]
        expected = sum(
            (gain[i] - gain[j]) * abs(inverse[i] - inverse[j]) * math.log1p(math.exp(-margin))
            for i, j, margin in [(0, 1, -1.0), (0, 2, 1.0), (1, 2, 2.0)]
        )
        loss = rank_dpo(policy, reference, scores, beta=1.0, rank_by=rank_by).losses.item()
        assert loss == pytest.approx(expected, rel=1e-12)


def test_robust_without_noise_is_dpo() -> None:
    values = data("dpo")
    torch.testing.assert_close(robust(**values, label_smoothing=0.0).losses, dpo(**values).losses, rtol=1e-15, atol=0)


def test_robust_is_unbiased_under_the_label_noise_it_is_told() -> None:
    # The average of robust over labels flipped with probability e is plain dpo on the true label.
    values = data("dpo")
    flipped = {key: value.flip(1) for key, value in values.items()}
    settings = {"beta": 30.0, "label_smoothing": 0.3}
    expected = 0.7 * robust(**values, **settings).losses + 0.3 * robust(**flipped, **settings).losses
    torch.testing.assert_close(expected, dpo(**values, beta=30.0).losses, rtol=1e-12, atol=0)


def test_label_smoothing_is_a_soft_label() -> None:
    values = data("dpo")
    smoothed = dpo(**values, beta=50.0, label_smoothing=0.1).losses
    soft = dpo(**values, beta=50.0, prob=torch.full((3,), 0.9, dtype=torch.float64)).losses
    torch.testing.assert_close(smoothed, soft, rtol=1e-14, atol=0)


def test_scale_free_ipo_is_ipo_times_beta_squared() -> None:
    values = {**data("ipo"), "margin": tensor(0.0, 0.1, 0.4)}
    free, plain = ipo(**values, beta=500.0, scale_free=True), ipo(**values, beta=500.0)
    torch.testing.assert_close(free.losses, 500.0**2 * plain.losses, rtol=1e-12, atol=0)


def test_kto_without_an_anchor_takes_the_clamped_mean_of_the_batch() -> None:
    reference = torch.zeros(4, 1, dtype=torch.float64)
    labels = tensor(1, 0, 1, 0)
    for shift, anchor in [(0.0, 0.25), (-1.0, 0.0)]:
        policy = tensor([1.0], [0.5], [0.0], [-0.5]) + shift
        given = kto(policy, reference, labels, torch.tensor(anchor, dtype=torch.float64))
        assert torch.equal(kto(policy, reference, labels).losses, given.losses)


def test_ktos_anchor_statistic_gives_the_batch_mean_and_carries_no_gradient() -> None:
    values = data("kto", batch=5)
    values["policy"].requires_grad_()
    statistic = STATISTICS["anchor"].values(values["policy"], values["reference"])
    assert not statistic.requires_grad
    del values["anchor"]
    given = kto(**values, anchor=statistic.mean()).losses
    assert torch.equal(kto(**values).losses, given)


def test_ktos_anchor_has_no_gradient() -> None:
    # d/dt of 1 - sigma(beta (t - anchor)) with the anchor held fixed, although it was computed from t.
    policy = tensor([0.6], [0.2]).requires_grad_()
    kto(policy, torch.zeros(2, 1, dtype=torch.float64), tensor(1, 1), beta=2.0).losses.sum().backward()
    s = [1 / (1 + math.exp(-2.0 * (t - 0.4))) for t in (0.6, 0.2)]
    expected = tensor(*[[-2.0 * value * (1 - value)] for value in s])
    torch.testing.assert_close(policy.grad, expected, rtol=1e-12, atol=0)


def test_an_anchor_given_with_a_graph_gets_no_gradient() -> None:
    anchor = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    policy = tensor([0.6]).requires_grad_()
    kto(policy, tensor([0.0]), tensor(1), anchor).losses.sum().backward()
    assert anchor.grad is None and policy.grad.item() != 0


def test_a_positive_anchor_is_used_and_a_negative_one_is_clamped() -> None:
    values = data("kto")
    del values["anchor"]
    at_zero = kto(**values, anchor=torch.tensor(0.0, dtype=torch.float64)).losses
    below = kto(**values, anchor=torch.tensor(-3.0, dtype=torch.float64)).losses
    above = kto(**values, anchor=torch.tensor(3.0, dtype=torch.float64)).losses
    assert torch.equal(below, at_zero) and (above > at_zero).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_kto_reads_labels_of_any_kind(dtype: torch.dtype) -> None:
    values = data("kto")
    values["labels"] = tensor(1, 0, 1)
    assert torch.equal(call("kto", {**values, "labels": values["labels"].to(dtype)}).losses, call("kto", values).losses)


def test_sft_is_the_negative_logp_of_the_best_candidate_only() -> None:
    policy = tensor([-1.0, -5.0], [-2.5, -7.0]).requires_grad_()
    result = sft(policy)
    result.losses.sum().backward()
    assert result.losses.tolist() == [1.0, 2.5]
    assert policy.grad.tolist() == [[-1.0, 0.0], [-1.0, 0.0]]


# Worked out by hand. One pair: policy -1, -2; reference -1.5, -1. So delta = 0.5 - (-1) = 1.5 nats.

POLICY, REFERENCE = [-1.0, -2.0], [-1.5, -1.0]
# ln(1 + e^-3) and ln(1 + e^3); ln(1 + e^-2.5)
SOFTPLUS_MINUS_3, SOFTPLUS_3, SOFTPLUS_MINUS_2_5 = 0.04858735157374196, 3.048587351573742, 0.07888973429254963


def by_hand(loss: Any, prob: float | None = None, margin: float | None = None, **settings: Any) -> float:
    side = {"prob": prob, "margin": margin}
    side = {key: tensor(value) for key, value in side.items() if value is not None}
    return loss(tensor(POLICY), tensor(REFERENCE), **side, **settings).losses.item()


@pytest.mark.parametrize(
    ("loss", "settings", "expected"),
    [
        (dpo, {"beta": 2.0}, SOFTPLUS_MINUS_3),
        (dpo, {"beta": 2.0, "margin": 0.5}, SOFTPLUS_MINUS_2_5),
        (dpo, {"beta": 2.0, "prob": 0.0}, SOFTPLUS_3),
        (dpo, {"beta": 2.0, "prob": 0.75}, 0.75 * SOFTPLUS_MINUS_3 + 0.25 * SOFTPLUS_3),
        # cDPO: the target is 1 - 0.1
        (dpo, {"beta": 2.0, "label_smoothing": 0.1}, 0.9 * SOFTPLUS_MINUS_3 + 0.1 * SOFTPLUS_3),
        # both: q = 0.75 * 0.9 + 0.25 * 0.1 = 0.7
        (dpo, {"beta": 2.0, "prob": 0.75, "label_smoothing": 0.1}, 0.7 * SOFTPLUS_MINUS_3 + 0.3 * SOFTPLUS_3),
        (robust, {"beta": 2.0, "label_smoothing": 0.1}, (0.9 * SOFTPLUS_MINUS_3 - 0.1 * SOFTPLUS_3) / 0.8),
        (robust, {"beta": 2.0, "label_smoothing": 0.1, "prob": 0.0}, (0.9 * SOFTPLUS_3 - 0.1 * SOFTPLUS_MINUS_3) / 0.8),
        # 1/(2 beta) = 0.25: (1.5 - 0.25)^2
        (ipo, {"beta": 2.0}, 1.5625),
        # less margin / beta = 0.25 more: (1.5 - 0.5)^2
        (ipo, {"beta": 2.0, "margin": 0.5}, 1.0),
        # (3 - 1/2)^2
        (ipo, {"beta": 2.0, "scale_free": True}, 6.25),
        (hinge, {"beta": 0.1}, 0.85),
        (hinge, {"beta": 2.0}, 0.0),
        (hinge, {"beta": 2.0, "prob": 0.25}, 0.75 * 4.0),
        (dro, {}, 0.0),
        (dro, {"prob": 0.0}, 3.001),
        # ratios e^0.5 and e^-1 are clamped to 1.1 and 0.9: z = 10 ln(11/9) = 2.006706954621511; ln(1 + e^-z)
        (spo, {}, 0.126130879912549),
        # clip 0.9: 1.9 is above e^0.5 and 0.1 below e^-1, so z = 2 * 1.5
        (spo, {"beta": 2.0, "clip": 0.9}, SOFTPLUS_MINUS_3),
    ],
)
def test_pairwise_losses_give_the_values_worked_out_by_hand(loss: Any, settings: dict[str, Any], expected: float) -> None:
    assert by_hand(loss, **settings) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_rewards_are_beta_times_the_log_ratio() -> None:
    for loss in (dpo, robust, ipo, hinge, dro):
        assert loss(tensor(POLICY), tensor(REFERENCE), beta=2.0).rewards.tolist() == [[1.0, -2.0]]
    clamped = spo(tensor(POLICY), tensor(REFERENCE)).rewards
    torch.testing.assert_close(clamped, tensor([10 * math.log(1.1), 10 * math.log(0.9)]), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("label", "settings", "expected"),
    [
        # ratio 0.4, anchor 0.1: 1 - sigma(0.3) and 1 - sigma(-0.3)
        (1, {"beta": 1.0}, 0.425557483188341),
        (0, {"beta": 1.0}, 0.574442516811659),
        (1, {"beta": 1.0, "desirable_weight": 1.33}, 1.33 * 0.425557483188341),
        (0, {"beta": 1.0, "undesirable_weight": 0.7}, 0.7 * 0.574442516811659),
        # the weight of the other class does not matter
        (0, {"beta": 1.0, "desirable_weight": 9.0}, 0.574442516811659),
        # beta 10: 1 - sigma(3)
        (1, {"beta": 10.0}, 0.04742587317756678),
    ],
)
def test_kto_gives_the_values_worked_out_by_hand(label: int, settings: dict[str, float], expected: float) -> None:
    result = kto(tensor([-0.6]), tensor([-1.0]), tensor(label), torch.tensor(0.1, dtype=torch.float64), **settings)
    assert result.losses.item() == pytest.approx(expected, rel=1e-12)
    assert result.rewards.item() == pytest.approx(0.4 * settings["beta"], rel=1e-12)


def test_diffusion_kto_at_beta_1000_on_errors_is_beta_2000_here() -> None:
    # g = -e + e_ref = 0.002 without the half; sigma(1000 * 0.002) = sigma(2) = 0.8807970779778823
    result = kto(tensor([-0.1 / 2]), tensor([-0.102 / 2]), tensor(1), torch.tensor(0.0, dtype=torch.float64), beta=2000.0)
    assert result.losses.item() == pytest.approx(1 - 0.8807970779778823, rel=1e-9)


def test_mapo_gives_the_values_worked_out_by_hand() -> None:
    # errors 2 ln 2 and 4 ln 2 at snr 1/2: phi(x) = x / (e^x - 1) is ln 2 / 1 and 2 ln 2 / 3; with scale 3, z = ln 2,
    # sigma(ln 2) = 2/3, so the loss is 2 ln 2 + beta ln(3/2).
    policy = -tensor([2 * LN2, 4 * LN2]) / 2
    result = mapo(policy, beta=0.1, snr=0.5, scale=3.0)
    assert result.losses.item() == pytest.approx(2 * LN2 + 0.1 * math.log(1.5), rel=1e-12)
    torch.testing.assert_close(result.rewards, tensor([3 * LN2, 2 * LN2]), rtol=1e-12, atol=0)
    # errors ln 2 and 2 ln 2, beta 1: phi is ln 2 and 2 ln 2 / 3; z = ln 2 / 3, e^-z = 2^(-1/3)
    result = mapo(policy / 2, beta=1.0, parametrisation="aaai")
    assert result.losses.item() == pytest.approx(LN2 + math.log(1 + 2 ** (-1 / 3)), rel=1e-12)
    torch.testing.assert_close(result.rewards, tensor([LN2, 2 * LN2 / 3]), rtol=1e-12, atol=0)
    # beta 2: phi is ln^2 2 and 4 ln^2 2 / 9; z = 5 ln^2 2 / 9
    result = mapo(policy / 2, beta=2.0, parametrisation="aaai")
    assert result.losses.item() == pytest.approx(LN2 + math.log(1 + math.exp(-5 * LN2**2 / 9)) / 2, rel=1e-12)


# MaPO where the published formula is 0/0


def exact_mapo(best: float, worst: float, parametrisation: str, beta: float) -> Any:
    """The loss as a function of both errors, in 60 digits, written from the paper's formula."""

    def phi(error: Any) -> Any:
        x = mpmath.mpf("0.5") * error if parametrisation == "v1" else error
        odds = mpmath.mpf(1) if x == 0 else x / mpmath.expm1(x)
        return 1000 * odds if parametrisation == "v1" else odds**beta

    strength = mpmath.mpf(beta) if parametrisation == "v1" else 1 / mpmath.mpf(beta)
    return best + strength * mpmath.log(1 + mpmath.exp(-(phi(best) - phi(worst))))


@pytest.mark.parametrize(("parametrisation", "beta"), [("v1", 0.1), ("aaai", 8.0), ("aaai", 1024.0)])
@pytest.mark.parametrize("best", [0.0, 1e-12, 1e-8, 1e-4, 0.0499, 0.0501, 0.0999, 0.1001, 1.0])
@pytest.mark.parametrize("worst", [0.0, 1e-8, 0.002])
def test_mapo_value_and_gradient_are_exact_down_to_an_error_of_zero(
    parametrisation: str, beta: float, best: float, worst: float
) -> None:
    policy = (-tensor([best, worst]) / 2).requires_grad_()
    result = mapo(policy, beta=beta, parametrisation=parametrisation)
    result.losses.sum().backward()
    with mpmath.workdps(60):
        errors = (mpmath.mpf(best), mpmath.mpf(worst))

        def loss(first: Any, second: Any) -> Any:
            return exact_mapo(first, second, parametrisation, beta)

        value = float(loss(*errors))
        slopes = [float(mpmath.diff(loss, errors, order, h=mpmath.mpf(10) ** -25)) for order in ((1, 0), (0, 1))]
    assert result.losses.item() == pytest.approx(value, rel=1e-12)
    assert policy.grad[0].tolist() == pytest.approx([-2 * slope for slope in slopes], rel=1e-9)


def test_mapo_starts_with_slope_minus_one_half() -> None:
    # phi(e) = 1 - e/2 + ...: at e = 0, z = 0 the loss e_w - ln sigma(phi_w - phi_l) moves by 1 + 1/4 and -1/4.
    policy = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    result = mapo(policy, beta=1.0, parametrisation="aaai")
    result.losses.sum().backward()
    assert result.losses.item() == pytest.approx(LN2, rel=1e-15)
    torch.testing.assert_close(policy.grad, -2 * tensor([1.25, -0.25]), rtol=1e-15, atol=0)


# Faults of other code that concern a loss


def test_the_log_sigmoid_is_of_each_pair_not_of_the_batch_mean() -> None:
    # margins +3 and -3: the mean of the pairs' losses, not -log sigma(0)
    policy, reference = tensor([3.0, 0.0], [0.0, 3.0]), torch.zeros(2, 2, dtype=torch.float64)
    assert dpo(policy, reference, beta=1.0).losses.mean().item() == pytest.approx(
        (SOFTPLUS_MINUS_3 + SOFTPLUS_3) / 2, rel=1e-12
    )


def test_a_tie_never_trains_towards_the_first_image() -> None:
    policy = torch.full((1, 2), -0.05, dtype=torch.float64, requires_grad=True)
    dpo(policy, policy.detach(), tensor(0.5), beta=5000.0).losses.sum().backward()
    assert policy.grad.tolist() == [[0.0, 0.0]]


def test_dpo_on_summed_errors_with_the_converted_beta_is_dpo_on_mean_errors() -> None:
    num_elements = 4 * 64 * 64
    values = data("dpo")
    summed = {key: value * num_elements for key, value in values.items()}
    torch.testing.assert_close(
        dpo(**summed, beta=5000.0 / num_elements).losses, dpo(**values, beta=5000.0).losses, rtol=1e-10, atol=0
    )


def test_robust_refuses_a_flip_probability_of_one_half() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        robust(tensor(POLICY), tensor(REFERENCE), label_smoothing=0.5)


def test_the_output_anchor_is_the_mean_drift_of_the_candidates() -> None:
    drift = tensor([0.5, 0.25], [0.0, 1.0])
    result = output_anchor(drift, weight=tensor(1.0, 3.0).squeeze(0))
    torch.testing.assert_close(result.losses, tensor(0.375, 1.5).squeeze(0), rtol=1e-15, atol=0)
    assert torch.equal(result.rewards, -drift)
