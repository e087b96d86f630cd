"""Pairwise losses that are the same function, what they refuse, and faults of TRL 1.16 that ours must not have."""

import inspect
import math
from typing import Any

import pytest
import torch
from loss_inputs import call, data, settings_of, tensor
from text_golden import arrays, assert_equal, case, leaf, pairs

from mmalign.errors import UserError
from mmalign.losses import LOSSES, OF_DIFFERENCES, dpo, exo, hinge, kto, nll, of_differences, robust, rpo, simpo, slic, wpo
from mmalign.objective import Objective, Term

LENGTHS = torch.stack([arrays("inputs_seq")["chosen_len"], arrays("inputs_seq")["rejected_len"]], 1).double()
NO_REFERENCE = torch.zeros(8, 2, dtype=torch.float64)


def same(one: Any, other: Any, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(one.losses, other.losses, rtol=rtol, atol=1e-14)


# The logistic loss on another score


def test_losses_that_differ_in_their_score_alone_are_dpo_on_that_score() -> None:
    policy, reference = pairs()
    scaled = {"policy": policy / LENGTHS, "reference": reference / LENGTHS}
    same(LOSSES["ln_dpo"](policy, reference, LENGTHS, beta=2.0), dpo(**scaled, beta=2.0))
    relative = {"policy": policy / reference.abs(), "reference": reference / reference.abs()}
    same(LOSSES["davir_dpo"](policy, reference, beta=2.0), dpo(**relative, beta=2.0))
    same(LOSSES["dove"](policy, reference), dpo(policy, reference))
    same(LOSSES["tr_dpo"](policy, reference, label_smoothing=0.1), dpo(policy, reference, label_smoothing=0.1))
    same(LOSSES["cpo"](policy, nll_weight=0.0), dpo(policy, NO_REFERENCE))
    shared = {"shared": 0.6 * policy, "reference_shared": 0.7 * reference}
    same(LOSSES["ld_dpo"](policy, reference, **shared, alpha=1.0), dpo(policy, reference))
    same(LOSSES["ld_dpo"](policy, reference, **shared, alpha=0.0), dpo(0.6 * policy, 0.7 * reference))
    same(LOSSES["dpop"](policy, reference, penalty=0.0), dpo(policy, reference, beta=0.3))


def test_losses_that_differ_in_a_margin_are_dpo_with_that_margin() -> None:
    policy, reference = pairs()
    half = torch.full((8,), 0.5, dtype=torch.float64)
    same(simpo(policy, LENGTHS), dpo(policy / LENGTHS, NO_REFERENCE, margin=half, beta=2.0))
    longer = LENGTHS[:, 0] - LENGTHS[:, 1]
    same(LOSSES["length_dpo"](policy, reference, LENGTHS, alpha=0.05), dpo(policy, reference, margin=-0.05 * longer))
    gap = torch.arange(1, 9, dtype=torch.float64)
    same(LOSSES["odpo"](policy, reference, gap, alpha=0.3), dpo(policy, reference, margin=0.3 * gap.log()))
    penalty = 0.3 * 5 * (reference - policy)[:, 0].clamp(min=0)
    assert (penalty > 0).any() and (penalty == 0).any()
    same(LOSSES["dpop"](policy, reference, penalty=5.0), dpo(policy, reference, margin=penalty, beta=0.3))


def test_wpo_is_weighted_dpo_and_a_scale_of_beta_is_another_beta_for_each_pair() -> None:
    policy, reference = pairs()
    agreement = -0.1 * torch.arange(16, dtype=torch.float64).reshape(8, 2)
    same(wpo(policy, reference, agreement, beta=0.1), dpo(policy, reference, weight=agreement.sum(1).exp()))
    scale = torch.linspace(0.5, 4, 8, dtype=torch.float64)
    result = dpo(policy, reference, beta_scale=scale)
    for row, factor in enumerate(scale.tolist()):
        alone = dpo(policy[row : row + 1], reference[row : row + 1], beta=0.1 * factor)
        torch.testing.assert_close(result.losses[row : row + 1], alone.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.rewards[row : row + 1], alone.rewards, rtol=1e-12, atol=0)


def test_alphapo_without_a_bend_is_simpo_and_a_slight_bend_is_near_it() -> None:
    policy, _ = pairs()
    same(LOSSES["alphapo"](policy, LENGTHS, alpha=0.0), simpo(policy, LENGTHS))
    same(LOSSES["alphapo"](policy, LENGTHS, alpha=1e-9), simpo(policy, LENGTHS), rtol=1e-7)


def test_slic_without_its_likelihood_term_is_the_hinge_without_a_reference() -> None:
    policy, _ = pairs()
    same(slic(policy, nll_weight=0.0), hinge(policy, NO_REFERENCE, beta=1.0))


# Other links


def test_robust_is_the_logistic_loss_with_a_probability_above_one() -> None:
    # its affine relation to conservative DPO: p = (1 - e) / (1 - 2 e)
    policy, reference = pairs()
    p = 0.9 / 0.8
    won, lost = dpo(policy, reference).losses, dpo(policy.flip(1), reference.flip(1)).losses
    torch.testing.assert_close(robust(policy, reference).losses, p * won + (1 - p) * lost, rtol=1e-12, atol=1e-14)
    conservative = dpo(policy, reference, label_smoothing=0.1).losses
    affine = conservative + (p - 0.9) * (won - lost)
    torch.testing.assert_close(robust(policy, reference).losses, affine, rtol=1e-12, atol=1e-14)


def test_apo_zero_is_kto_without_an_anchor_on_both_candidates() -> None:
    policy, reference = pairs()
    zero = torch.tensor(0.0, dtype=torch.float64)
    labels = torch.ones(8)
    halves = [kto(policy[:, [k]], reference[:, [k]], labels - k, zero).losses for k in range(2)]
    torch.testing.assert_close(LOSSES["apo_zero"](policy, reference).losses, halves[0] + halves[1], rtol=1e-14, atol=0)


def test_the_backward_kl_of_rpo_has_the_gradient_of_dpo_with_a_soft_label() -> None:
    policy, reference = pairs()
    gap = torch.linspace(0, 3, 8, dtype=torch.float64)
    one, other = leaf(policy), leaf(policy)
    rpo(one, reference, gap).losses.sum().backward()
    dpo(other, reference, torch.sigmoid(gap)).losses.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("distance", ["backward_kl", "forward_kl", "square"])
def test_rpo_costs_nothing_where_the_margin_is_the_rewards(distance: str) -> None:
    policy, reference = pairs()
    rewards = dpo(policy, reference).rewards
    result = rpo(policy, reference, scores=rewards / 2, reward_scale=2.0, distance=distance)
    torch.testing.assert_close(result.losses, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-15)


def test_exo_costs_nothing_where_the_model_prefers_as_the_label_does() -> None:
    policy = tensor([math.log(0.7 / 0.3), 0.0])
    loss = exo(policy, 0 * policy, tensor(0.75), label_smoothing=0.1).losses  # 0.75 * 0.9 + 0.25 * 0.1
    assert loss.item() == pytest.approx(0.0, abs=1e-15)


def test_soft_labels_of_sppo_pull_as_hard_ones_do_on_average() -> None:
    policy, reference = pairs()
    prob = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    soft, mixed = leaf(policy), leaf(policy)
    call("sppo", {"policy": soft, "reference": reference, "prob": prob}).losses.sum().backward()
    for sure in (0.0, 1.0):
        hard = call("sppo", {"policy": mixed, "reference": reference, "prob": torch.full_like(prob, sure)}).losses
        (hard * (prob if sure else 1 - prob)).sum().backward()
    torch.testing.assert_close(soft.grad, mixed.grad, rtol=1e-10, atol=1e-12)


# Settings that teach nothing, or the opposite


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dpo", {"divergence": "kl"}, r"dpo.divergence: got kl, want one of reverse_kl, forward_kl, js, alpha\."),
    ("hinge", {"divergence_alpha": math.inf}, r"hinge.divergence_alpha: got inf, want a finite number\."),
    ("exo", {"label_smoothing": 0.0}, r"exo.label_smoothing: got 0.0, want above 0 and below 0.5\."),
    ("discopop", {"tau": 0.0}, r"discopop.tau: got 0.0, want above 0 and at most 1\."),
    ("dpop", {"penalty": -1.0}, r"dpop.penalty: got -1.0, want zero or more\."),
    ("ld_dpo", {"alpha": 1.5}, r"ld_dpo.alpha: got 1.5, want 0 to 1\."),
    ("ld_dpo", {"alpha_reference": -0.1}, r"ld_dpo.alpha_reference: got -0.1, want 0 to 1\."),
    ("slic", {"nll_weight": -0.1}, r"slic.nll_weight: got -0.1, want zero or more\."),
    ("cpo", {"nll_weight": -1.0}, r"cpo.nll_weight: got -1.0, want zero or more\."),
    ("odpo", {"alpha": -1.0}, r"odpo.alpha: got -1.0, want zero or more\."),
    ("rpo", {"reward_scale": 0.0}, r"rpo.reward_scale: got 0.0, want a positive number\."),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_settings_without_a_meaning_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    values = data(name)
    with pytest.raises(ValueError, match=message):
        if name in ("dpo", "hinge"):
            # past the type, as a hand-written call without type checks would
            inspect.unwrap(LOSSES[name])(**values, **settings)
        else:
            call(name, values, **settings)


@pytest.mark.parametrize("name", ["ipo", "cpo", "odpo", "rpo", "sppo"])
def test_data_that_a_setting_asks_for_and_the_view_does_not_give_are_a_users_fault(name: str) -> None:
    settings: dict[str, Any] = {"ipo": {"normalise": "length"}, "sppo": {"target": "scores"}}.get(name, {})
    objective = Objective([Term(name=name, loss=LOSSES[name], settings=settings)])
    objective.check((), 2)
    with pytest.raises(UserError, match=rf"loss\.{name}.*: got .*, want"):
        objective.try_out({}, 2)


def test_sppo_does_not_pass_over_scores_that_its_target_leaves_aside() -> None:
    pairs, scores, prob = tensor([-1.0, -2.0]), tensor([0.75, 0.25]), tensor(0.75)
    pairs, scores, prob = pairs.reshape(1, 2), scores.reshape(1, 2), prob.reshape(1)
    with pytest.raises(
        ValueError, match=r"sppo.target: got prob on data with scores and no prob, want scores, or data without"
    ):
        LOSSES["sppo"](pairs, pairs, scores=scores)
    by_scores = LOSSES["sppo"](pairs, pairs, scores=scores, target="scores").losses
    assert torch.equal(LOSSES["sppo"](pairs, pairs, prob=prob, scores=scores).losses, by_scores)
    objective = Objective([Term(name="sppo", loss=LOSSES["sppo"], settings={})])
    objective.try_settings()
    objective.try_out({}, 2)
    with pytest.raises(UserError, match=r"loss\.sppo\.target: got prob on data with scores"):
        objective.try_out({"scores": (9.0, 4.0)}, 2)


def test_sppo_of_a_list_asks_for_its_scores() -> None:
    lists = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sppo.target: got prob for 4 candidates, want scores\."):
        LOSSES["sppo"](lists, lists)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_weights_that_aot_would_pass_over_are_refused(name: str) -> None:
    objective = Objective([Term(name=name, loss=LOSSES[name], settings={})])
    objective.check((), 2)
    with pytest.raises(UserError, match=f"the data have weight .*{name} would pass over"):
        objective.check(("weight",), 2)


@pytest.mark.parametrize("name", ["dpo", "dove", "simpo", "aot"])
def test_losses_of_pairs_refuse_lists(name: str) -> None:
    objective = Objective([Term(name=name, loss=LOSSES[name], settings={})])
    objective.check(("lengths",), 2)
    with pytest.raises(UserError, match=rf"loss.{name}: got 4 candidates a prompt, want 2\."):
        objective.check(("lengths",), 4)


# Odds where the likelihood is certain


@pytest.mark.parametrize("name", ["orpo", "asft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_odds_stay_finite_where_a_candidate_is_certain_or_impossible(name: str, dtype: torch.dtype) -> None:
    policy = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [-1e4, -1e-9]], dtype=dtype).requires_grad_()
    result = call(name, {"policy": policy, "lengths": torch.ones(4, 2, dtype=dtype)})
    result.losses.sum().backward()
    assert result.losses.isfinite().all() and policy.grad.isfinite().all()


def test_an_empty_candidate_has_a_mean_of_zero() -> None:
    policy, lengths = leaf(tensor([-1.0, 0.0])), tensor([2.0, 0.0])
    loss = simpo(policy, lengths).losses
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-12) and policy.grad.isfinite().all()


# Losses of a difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OF_DIFFERENCES))
def test_gradients_of_losses_of_a_difference_are_exactly_opposite_and_a_common_beginning_cancels(
    name: str, dtype: torch.dtype
) -> None:
    values = data(name, batch=7, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    known = inspect.signature(LOSSES[name]).parameters
    more = {side: torch.rand(7, generator=generator).to(dtype) for side in ("prob", "weight", "margin", "beta_scale")}
    values |= {side: value for side, value in more.items() if side in known and not (name == "hinge" and side == "margin")}
    measured = [one for one in ("policy", "shared") if one in values]
    leaves = {one: values[one].clone().requires_grad_() for one in measured}
    settings = {"normalise": "none"} if name == "ipo" else {}
    losses = call(name, {**values, **leaves}, **settings).losses
    losses.sum().backward()
    for leaf_of in leaves.values():
        assert torch.equal(leaf_of.grad[:, 0], -leaf_of.grad[:, 1]) and bool((leaf_of.grad[:, 0] != 0).any())
    if dtype == torch.float64:
        begun = {
            one: values[one] - 3.0 for one in (*measured, *(f"reference_{m}" for m in measured), "reference") if one in values
        }
        torch.testing.assert_close(call(name, {**values, **begun}, **settings).losses, losses, rtol=1e-9, atol=1e-12)


def test_losses_that_know_more_than_a_difference_are_told_apart() -> None:
    assert of_differences("dpo", settings_of("dpo")) and of_differences("ipo", {"normalise": "none"})
    assert not of_differences("ipo", settings_of("ipo")) and not of_differences("dpo", {"divergence": "js"})
    assert not any(of_differences(name, settings_of(name)) for name in LOSSES.keys() - OF_DIFFERENCES)
    terms = [Term(name=name, loss=LOSSES[name], settings={}) for name in ("dpo", "robust", "nll")]
    assert Objective(terms[:2]).of_differences and not Objective(terms).of_differences
    assert not Objective([Term(name="dpo", loss=nll, settings={})]).of_differences


# Faults of TRL 1.16


def test_label_smoothing_changes_dpo() -> None:
    # TRL's sigmoid loss passes it over.
    expected = case("trl116_dpo_seq", "sigmoid_b0.1")["per_sample"]
    policy, reference = pairs()
    smoothed = dpo(policy, reference, label_smoothing=0.1).losses
    flipped = dpo(policy.flip(1), reference.flip(1)).losses
    assert_equal(smoothed, 0.9 * expected + 0.1 * flipped)
    assert (smoothed - expected).abs().max() > 0.01


def test_the_weights_of_wpo_and_a_likelihood_term_go_together() -> None:
    # TRL raises RuntimeError, as it multiplies the likelihood term by the weights too.
    policy, reference = pairs()
    agreement = -torch.ones(8, 2, dtype=torch.float64)
    terms = [Term(name="wpo", loss=wpo, settings={}), Term(name="nll", loss=nll, settings={}, weight=0.5)]
    logps = leaf(policy)
    result = Objective(terms)({"policy": logps, "agreement": agreement}, {"policy": reference}, {"lengths": LENGTHS})
    result.losses.mean().backward()
    expected = math.exp(-2) * dpo(policy, reference, beta=0.01).losses - 0.5 * (policy / LENGTHS)[:, 0]
    torch.testing.assert_close(result.losses, expected, rtol=1e-12, atol=0)
    assert logps.grad.isfinite().all()


def test_the_alpha_divergence_works_in_float64() -> None:
    # TRL raises KeyError.
    policy, reference = pairs()
    logps = leaf(policy)
    result = dpo(logps, reference, divergence="alpha")
    result.losses.sum().backward()
    assert result.losses.dtype == torch.float64 and logps.grad.isfinite().all()


def test_the_weight_of_wpo_never_passes_one() -> None:
    # TRL's has no limit: a pair that the policy is sure of would weigh e^4 here.
    policy, reference = pairs()
    agreement = torch.full((8, 2), 2.0, dtype=torch.float64)
    plain = dpo(policy, reference, beta=0.01).losses
    torch.testing.assert_close(wpo(policy, reference, agreement).losses, plain, rtol=1e-14, atol=0)
    free = wpo(policy, reference, agreement, clamp=False).losses
    torch.testing.assert_close(free, math.exp(4) * plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", [0.5, 0.7])
def test_robust_refuses_labels_that_say_nothing_or_the_opposite(noise: float) -> None:
    # TRL gives NaN at 0.5 and warns above.
    policy, reference = pairs()
    with pytest.raises(ValueError, match=f"robust.label_smoothing: got {noise}, want at least 0 and below 0.5"):
        robust(policy, reference, label_smoothing=noise)


# A candidate without any probability


@pytest.mark.parametrize("name", ["dpo", "exo", "nca", "info_nca", "plackett_luce", "hinge", "apo_zero", "discopop"])
def test_a_rejected_candidate_that_cannot_be_written_at_all_costs_the_limit_and_has_no_gradient(name: str) -> None:
    reference = tensor([-3.0, -4.0])
    far, never = (tensor([-3.0, -4.0 - distance]).requires_grad_() for distance in (1e6, math.inf))
    loss, limit = (LOSSES[name](policy, reference, beta=0.1) for policy in (never, far))
    same(loss, limit)
    (gradient,) = torch.autograd.grad(loss.losses.sum(), never)
    (expected,) = torch.autograd.grad(limit.losses.sum(), far)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
