"""Pairwise losses against the numbers of TRL, from summed logps and from logits, and values worked out by hand."""

import math
from typing import Any

import pytest
import torch
from loss_inputs import tensor
from text_golden import arrays, assert_equal, case, leaf, lists, pairs, token_logps

from mmalign.losses import LOSSES, ld_dpo, orpo, sppo, wpo

LENGTHS = torch.stack([arrays("inputs_seq")["chosen_len"], arrays("inputs_seq")["rejected_len"]], 1).double()
BY_LENGTH: dict[str, Any] = {"lengths": LENGTHS}

# TRL's case: the loss, its settings and data, and how many times ours TRL's number is.
SUMMED: dict[str, tuple[str, dict[str, Any], float]] = {
    "sigmoid_b0.1": ("dpo", {}, 1),
    "sigmoid_b0.5": ("dpo", {"beta": 0.5}, 1),
    "hinge_b0.1": ("hinge", {}, 1),
    "hinge_b0.5": ("hinge", {"beta": 0.5}, 1),
    "ipo_b0.1": ("ipo", BY_LENGTH, 1),
    "robust_b0.1": ("robust", {}, 1),
    "robust_b0.5_e0.3": ("robust", {"beta": 0.5, "label_smoothing": 0.3}, 1),
    "exo_pair_b0.1": ("exo", {"beta": 0.1}, 1),
    "discopop_b0.1": ("discopop", {"beta": 0.1}, 1),
    "discopop_b0.5": ("discopop", {"beta": 0.5}, 1),
    "sppo_hard_b0.1": ("sppo", {"beta": 0.1}, 2),
    "sppo_hard_b0.001": ("sppo", {}, 2),
    "aot_b0.1": ("aot", {}, 1),
    "aot_b0.1_e0.1": ("aot", {"label_smoothing": 0.1}, 1),
    "aot_unpaired_b0.1": ("aot_unpaired", {}, 1),
    "apo_zero_b0.1": ("apo_zero", {}, 1),
    "apo_down_b0.1": ("apo_down", {}, 1),
    "sigmoid_norm_b0.1": ("ln_dpo", {"beta": 0.1, **BY_LENGTH}, 1),
    "sigmoid_norm_b2": ("ln_dpo", {"beta": 2.0, **BY_LENGTH}, 1),
}
for theirs, ours in {"forward_kl": "forward_kl", "js_divergence": "js"}.items():
    SUMMED[f"sigmoid_{theirs}_b0.1"] = ("dpo", {"divergence": ours}, 1)
    SUMMED[f"hinge_{theirs}_b0.1"] = ("hinge", {"divergence": ours}, 1)
    SUMMED[f"ipo_{theirs}_b0.1"] = ("ipo", {"divergence": ours, "normalise": "length", **BY_LENGTH}, 1)
    SUMMED[f"sigmoid_norm_{theirs}_b0.1"] = ("ln_dpo", {"divergence": ours, "beta": 0.1, **BY_LENGTH}, 1)
for coefficient in (0.5, 0.9, 1.0, 2.0):  # TRL's coefficient is 1 - alpha; its code is float32 only
    settings = {"divergence": "alpha", "divergence_alpha": 1 - coefficient}
    SUMMED[f"sigmoid_alpha{coefficient}_b0.1_f32"] = ("dpo", settings, 1)


@pytest.mark.parametrize("name", SUMMED)
def test_losses_of_summed_logps_repeat_trl_with_their_gradients(name: str) -> None:
    expected, (loss, given, times) = case("trl116_dpo_seq", name), SUMMED[name]
    policy, reference = pairs()
    logps = leaf(policy)
    result = LOSSES[loss](policy=logps, reference=reference, **given)
    (times * result.losses.mean()).backward()
    rtol = 1e-6 if name.endswith("f32") else 1e-9
    if "per_sample" in expected:
        assert_equal(times * result.losses, expected["per_sample"].double(), rtol)
    assert_equal(times * result.losses.mean(), expected["loss"].double(), rtol)
    assert_equal(logps.grad[:, 0], expected["grad_chosen_logps"].double(), rtol)
    assert_equal(logps.grad[:, 1], expected["grad_rejected_logps"].double(), rtol)


@pytest.mark.parametrize("name", ["sigmoid_b0.5", "hinge_b0.1", "exo_pair_b0.1", "sppo_hard_b0.1", "aot_b0.1", "apo_down_b0.1"])
def test_rewards_of_untransformed_log_ratios_are_trls(name: str) -> None:
    expected, (loss, given, _) = case("trl116_dpo_seq", name), SUMMED[name]
    policy, reference = pairs()
    rewards = LOSSES[loss](policy=policy, reference=reference, **given).rewards
    assert_equal(rewards[:, 0].mean(), expected["metric_reward_chosen"])
    assert_equal(rewards[:, 1].mean(), expected["metric_reward_rejected"])
    assert_equal((rewards[:, 0] - rewards[:, 1]).mean(), expected["metric_reward_margin"])
    assert_equal((rewards[:, 0] > rewards[:, 1]).double().mean(), expected["metric_reward_accuracy"])


# Without a reference: TRL's CPO trainer leaves the likelihood term to its caller

REFERENCE_FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "cpo_sigmoid": ("cpo", {"nll_weight": 0.0}),
    "cpo_sigmoid_ls0.1": ("cpo", {"nll_weight": 0.0, "label_smoothing": 0.1}),
    "simpo_b2_g0.5": ("simpo", {}),
    "simpo_b2_g1_ls0.1": ("simpo", {"gamma": 1.0, "label_smoothing": 0.1}),
    "alphapo_a0.25_b2": ("alphapo", {}),
    "alphapo_a-0.5_b2": ("alphapo", {"alpha": -0.5}),
    "cpo_hinge": ("hinge", {}),
    "cpo_ipo": ("ipo", {"normalise": "length"}),
}


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_losses_without_a_reference_repeat_trl_with_their_gradients(name: str) -> None:
    expected, (loss, settings) = case("trl116_cpo_orpo", name), REFERENCE_FREE[name]
    policy, _ = pairs()
    given: dict[str, Any] = {"reference": torch.zeros_like(policy)} if loss in ("hinge", "ipo") else {}
    if loss in ("simpo", "alphapo", "ipo"):
        given["lengths"] = LENGTHS
    logps = leaf(policy)
    result = LOSSES[loss](logps, **given, **settings)
    result.losses.mean().backward()
    # TRL averages over tokens before the loss, and its gradient is by the mean.
    gradient = logps.grad * (LENGTHS if "lengths" in given else 1)
    assert_equal(result.losses, expected["per_sample"])
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(gradient[:, 0], expected["grad_chosen"])
    assert_equal(gradient[:, 1], expected["grad_rejected"])
    assert_equal(result.rewards[:, 0], expected["chosen_rewards"])
    assert_equal(result.rewards[:, 1], expected["rejected_rewards"])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_odds_ratio_term_of_orpo_repeats_trl(beta: float) -> None:
    expected = case("trl116_cpo_orpo", f"orpo_b{beta}")
    logps = leaf(pairs()[0] / LENGTHS)
    result = orpo(logps, torch.ones_like(LENGTHS), beta=beta)
    odds_ratio = result.losses + logps[:, 0]  # without the likelihood term
    odds_ratio.mean().backward()
    assert_equal(-odds_ratio, expected["beta_log_sigmoid"].double(), 1e-6)
    assert_equal(odds_ratio.mean(), expected["loss_or"].double(), 1e-6)
    assert_equal(logps.grad[:, 0], expected["grad_chosen"], 1e-6)
    assert_equal(logps.grad[:, 1], expected["grad_rejected"], 1e-6)
    assert_equal(result.rewards[:, 0], expected["chosen_rewards"].double(), 1e-6)
    assert_equal(result.rewards[:, 1], expected["rejected_rewards"].double(), 1e-6)


# From logits


def token_sums(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the first min(n_w, n_l) tokens, and WPO's agreement, of the four golden pairs."""
    stored = arrays("inputs_tok")
    mask = stored["completion_mask"][:, 1:].double()
    scored = logits[:, :-1].log_softmax(-1)
    tokens = scored.gather(2, stored["input_ids"][:, 1:, None])[..., 0] * mask
    lengths = mask.sum(1)
    both = torch.minimum(*lengths.chunk(2)).repeat(2)
    shared = (tokens * (mask.cumsum(1) <= both[:, None])).sum(1)
    agreement = ((tokens - (2 * scored).logsumexp(-1)) * mask).sum(1) / lengths
    return {"shared": torch.stack(shared.chunk(2), 1), "agreement": torch.stack(agreement.chunk(2), 1)}


def test_the_golden_pairs_have_tails_of_their_own() -> None:
    _, lengths = token_logps(arrays("inputs_tok")["logits"])
    assert (lengths[:, 0] != lengths[:, 1]).any()


FROM_LOGITS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "ipo": ("ipo", {}),
    "sigmoid_norm": ("ln_dpo", {"beta": 2.0}),
    "ld_alpha0.0": ("ld_dpo", {"alpha": 0.0}),
    "ld_alpha0.5": ("ld_dpo", {}),
    "ld_alpha1.0": ("ld_dpo", {"alpha": 1.0}),
    "wpo": ("wpo", {"beta": 0.1, "clamp": False}),
}


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_losses_of_logits_repeat_trl_with_their_gradients(name: str) -> None:
    expected, (loss, settings) = case("trl116_dpo_tok", name), FROM_LOGITS[name]
    stored = arrays("inputs_tok")
    logits = leaf(stored["logits"])
    (policy, lengths), sums = token_logps(logits), token_sums(logits)
    reference, _ = token_logps(stored["ref_logits"])
    given: dict[str, Any] = {"policy": policy, "reference": reference}
    if loss in ("ipo", "ln_dpo"):
        given["lengths"] = lengths
    if loss == "ld_dpo":
        given |= {"shared": sums["shared"], "reference_shared": token_sums(stored["ref_logits"])["shared"]}
    if loss == "wpo":
        given["agreement"] = sums["agreement"]
    value = LOSSES[loss](**given, **settings).losses.mean()
    value.backward()
    assert_equal(value, expected["loss"])
    assert_equal(logits.grad, expected["grad_logits"])


def test_the_weights_of_wpo_never_exceed_one_where_trls_do() -> None:
    stored = arrays("inputs_tok")
    policy, _ = token_logps(stored["logits"])
    reference, _ = token_logps(stored["ref_logits"])
    agreement = token_sums(stored["logits"])["agreement"] + tensor([2.0], [0.0], [0.0], [0.0])
    assert agreement.sum(1)[0] > 0 > agreement.sum(1)[1]
    plain, free = (wpo(policy, reference, agreement, clamp=clamp).losses for clamp in (True, False))
    unweighted = LOSSES["dpo"](policy, reference, beta=0.01).losses
    assert plain[0] == unweighted[0] < free[0]
    assert torch.equal(plain[1:], free[1:]) and (plain[1:] < unweighted[1:]).all()


def test_sppo_of_a_list_repeats_the_derived_numbers() -> None:
    policy, reference, _ = lists()
    expected = case("derived_list", "sppo_K4_b0.1")
    logps = leaf(policy[:1])
    result = sppo(logps, reference[:1], scores=expected["p_mean"][None], beta=0.1, target="scores")
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), expected["loss"])
    assert_equal(result.losses[0], expected["per_response"].mean())
    assert_equal(logps.grad[0], expected["grad"])


# Worked out by hand. Policy -1, -2; reference -1.5, -1: log-ratios 0.5 and -1, delta 1.5. beta 2: rewards 1 and -2, z = 3.

LN2, LN3 = math.log(2), math.log(3)
# ln(1 + e^-3), ln(1 + e^3), ln(1 + e^-2.5), ln(1 + e^-4), ln(1 + e^-2), ln(1 + e^-1.5), ln(1 + e^0.5)
SP_M3, SP_3, SP_M25 = 0.04858735157374196, 3.048587351573742, 0.07888973429254963
SP_M4, SP_M2, SP_M15, SP_05 = 0.01814992791780973, 0.1269280110429726, 0.2014132779827524, 0.9740769841801067
SIGMA_M1, SIGMA_M2, SIGMA_M3 = 0.2689414213699951, 0.11920292202211755, 0.04742587317756678

REFERRED = {"policy": tensor([-1.0, -2.0]), "reference": tensor([-1.5, -1.0])}
ALONE = {"policy": tensor([-1.0, -2.0])}
# Mean log-probs -ln 2 and -ln 4: probabilities 1/2 and 1/4, log-odds 0 and -ln 3.
ODDS = {"policy": tensor([-2 * LN2, -6 * LN2]), "lengths": tensor([2.0, 3.0])}
TAILED = {**REFERRED, "shared": tensor([-0.5, -1.0]), "reference_shared": tensor([-1.0, -0.25])}


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        ("dpo", {**REFERRED, "beta": 1.0, "beta_scale": tensor(2.0)}, SP_M3),
        # (0.5 / 1 - (-1) / 4) - 1/4: 0.5
        ("ipo", {**REFERRED, "beta": 2.0, "normalise": "length", "lengths": tensor([1.0, 4.0])}, 0.25),
        ("ipo", {**REFERRED, "beta": 2.0, "lengths": tensor([1.0, 4.0])}, 0.25),
        # (1.5 - 0.25)^2, as on data without lengths
        ("ipo", {**REFERRED, "beta": 2.0, "normalise": "none", "lengths": tensor([1.0, 4.0])}, 1.5625),
        ("ipo", {**REFERRED, "beta": 2.0}, 1.5625),
        # log-ratio over |reference|: 1/3 and -1, times 3
        ("davir_dpo", {**REFERRED, "beta": 3.0}, SP_M4),
        # z + 0.1 (5 - 15)
        ("length_dpo", {**REFERRED, "beta": 2.0, "alpha": 0.1, "lengths": tensor([5.0, 15.0])}, SP_M2),
        # 0.5 / 1 + 1 / 4, times 2
        ("ln_dpo", {**REFERRED, "lengths": tensor([1.0, 4.0]), "beta": 2.0}, SP_M15),
        # policy -0.75, -1.5; reference -1.25, -0.625: 0.5 + 0.875 = 1.375
        ("ld_dpo", {**TAILED, "beta": 4 / 1.375}, SP_M4),
        # the reference in full: 0.75 - (-0.5)
        ("ld_dpo", {**TAILED, "beta": 2.0, "alpha_reference": 1.0}, SP_M25),
        # ln(gap): ln(e) / 2; ln(5 - 3)
        ("odpo", {**REFERRED, "beta": 2.0, "alpha": 0.5, "margin": tensor(math.e)}, SP_M25),
        ("odpo", {**REFERRED, "beta": 2.0, "scores": tensor([5.0, 3.0])}, math.log1p(2 * math.exp(-3))),
        # the preferred one rose: no penalty; and where it fell by 1: 2 (-1.5 - 4) = -11
        ("dpop", {**REFERRED, "beta": 2.0}, SP_M3),
        (
            "dpop",
            {"policy": tensor([-2.0, -1.0]), "reference": tensor([-1.0, -1.5]), "beta": 2.0, "penalty": 4.0},
            11.00001670156,
        ),
        # sigma(ln 3) = 3/4
        (
            "rpo",
            {**REFERRED, "beta": 2.0, "margin": tensor(LN3)},
            0.75 * (math.log(0.75) + SP_M3) + 0.25 * (math.log(0.25) + SP_3),
        ),
        (
            "rpo",
            {**REFERRED, "beta": 2.0, "scores": tensor([LN3, 0.0]), "distance": "forward_kl"},
            (1 - SIGMA_M3) * (-SP_M3 - math.log(0.75)) + SIGMA_M3 * (-SP_3 - math.log(0.25)),
        ),
        ("rpo", {**REFERRED, "beta": 2.0, "margin": tensor(2.0), "reward_scale": 0.5, "distance": "square"}, 4.0),
        # ln(1 + e^-1.5) + (0.5 - 5)^2 + (-1 + 5)^2
        ("cal_dpo", REFERRED, SP_M15 + 36.25),
        ("asft", ODDS, LN2 + LN2 + math.log(4 / 3)),
        ("asft", {**ODDS, "beta": 0.5}, LN2 + 0.5 * LN2 + 0.5 * math.log(4 / 3)),
        # the odds ratio is 3: sigma(ln 3) = 3/4
        ("orpo", ODDS, LN2 + 0.1 * math.log(4 / 3)),
        ("slic", ALONE, 0.1),
        ("slic", {**ALONE, "delta": 2.0}, 1.1),
        ("slic", {**ALONE, "prob": tensor(0.0)}, 2.2),
        ("cpo", {**ALONE, "beta": 2.0, "lengths": tensor([4.0, 1.0])}, SP_M2 + 0.25),
        ("cpo", {**ALONE, "beta": 2.0, "normalise": "none", "nll_weight": 0.5}, SP_M2 + 0.5),
        # equal means
        ("simpo", {**ALONE, "lengths": tensor([2.0, 4.0])}, SP_05),
        # each order must reach gamma: so does the other one
        ("simpo", {**ALONE, "lengths": tensor([2.0, 4.0]), "prob": tensor(0.3)}, SP_05),
        # 1 - 1/p: -1 and -3; 2 * 2 - 1/2, and a quarter off twice that
        ("alphapo", {**ODDS, "alpha": 1.0, "gamma": 0.0}, SP_M4),
        ("alphapo", {**ODDS, "alpha": 1.0, "gamma": 1.5}, SP_M25),
        ("apo_zero", {**REFERRED, "beta": 2.0}, SIGMA_M1 + SIGMA_M2),
        ("apo_down", {**REFERRED, "beta": 2.0}, 1 - SIGMA_M1 + SIGMA_M3),
        # 1/2 [(0.5 - 5)^2 + (-1 + 5)^2]; P = 3/4: 1/2 [(0.5 - 2.5)^2 + (-1 + 2.5)^2]
        ("sppo", {**REFERRED, "beta": 0.1}, 18.125),
        ("sppo", {**REFERRED, "beta": 0.1, "prob": tensor(0.75)}, 3.125),
        ("sppo", {**REFERRED, "beta": 0.1, "scores": tensor([0.75, 0.25]), "target": "scores"}, 3.125),
        # targets 0.9 and 0.1; P = 3/4: 0.75 * 0.9 + 0.25 * 0.1 = 0.7
        (
            "exo",
            {**REFERRED, "beta": 2.0, "label_smoothing": 0.1},
            (1 - SIGMA_M3) * (-SP_M3 - math.log(0.9)) + SIGMA_M3 * (-SP_3 - math.log(0.1)),
        ),
        (
            "exo",
            {**REFERRED, "beta": 2.0, "label_smoothing": 0.1, "prob": tensor(0.75)},
            (1 - SIGMA_M3) * (-SP_M3 - math.log(0.7)) + SIGMA_M3 * (-SP_3 - math.log(0.3)),
        ),
        # s = 1/2 at z = 0; s = 1 - 1e-26 at z = 3
        ("discopop", {"policy": tensor([-1.0, -2.0]), "reference": tensor([-1.0, -2.0])}, (LN2 + 1) / 2),
        ("discopop", {**REFERRED, "beta": 2.0}, math.exp(-3)),
        ("wpo", {**REFERRED, "beta": 2.0, "agreement": tensor([-LN2, 0.0])}, SP_M3 / 2),
        ("wpo", {**REFERRED, "beta": 2.0, "agreement": tensor([-LN2, 2 * LN2])}, SP_M3),
        ("wpo", {**REFERRED, "beta": 2.0, "agreement": tensor([-LN2, 2 * LN2]), "clamp": False}, 2 * SP_M3),
        ("dove", {"joint": REFERRED["policy"], "reference_joint": REFERRED["reference"], "beta": 2.0}, SP_M3),
        ("tr_dpo", {**REFERRED, "beta": 2.0, "margin": tensor(0.5)}, SP_M25),
    ],
)
def test_losses_give_the_values_worked_out_by_hand(loss: str, given: dict[str, Any], expected: float) -> None:
    assert LOSSES[loss](**given).losses.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        ("ln_dpo", {**REFERRED, "beta": 2.0, "lengths": tensor([1.0, 4.0])}, [1.0, -0.5]),
        ("ipo", {**REFERRED, "beta": 2.0, "normalise": "length", "lengths": tensor([1.0, 4.0])}, [1.0, -0.5]),
        ("davir_dpo", {**REFERRED, "beta": 3.0}, [1.0, -3.0]),
        ("ld_dpo", {**TAILED, "beta": 2.0}, [1.0, -1.75]),
        ("simpo", {**ALONE, "lengths": tensor([2.0, 4.0])}, [-1.0, -1.0]),
        ("alphapo", {**ODDS, "alpha": 1.0}, [-2.0, -6.0]),
        ("slic", ALONE, [-1.0, -2.0]),
        ("dpo", {**REFERRED, "beta_scale": tensor(3.0), "beta": 2.0}, [3.0, -6.0]),
    ],
)
def test_rewards_are_in_the_units_that_the_loss_compares(loss: str, given: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(LOSSES[loss](**given).rewards, tensor(expected), rtol=1e-12, atol=0)


def test_ld_dpo_desensitises_the_policy_alone_when_told() -> None:
    # alpha 0 and the reference in full: shared -0.5, -1 against -1.5, -1
    result = ld_dpo(**TAILED, beta=2.0, alpha=0.0, alpha_reference=1.0)
    assert result.rewards.tolist() == [[2.0, 0.0]]
