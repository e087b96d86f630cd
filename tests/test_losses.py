"""Every loss of LOSSES obeys the same rules; the lawful exceptions are tabled."""

import inspect
from typing import Any

import pytest
import torch
from loss_inputs import ON_LOGPS, call, data, rows, settings_of, swapped, tensor

from mmalign.losses import LOSSES, MEASURES, STATISTICS, mapo, rank_dpo

PAIRWISE = [
    *("dpo", "robust", "ipo", "hinge", "dro", "mapo", "spo", "bradley_terry", "bco", "info_nca", "nca"),
    *("tr_dpo", "exo", "discopop", "dpop", "wpo", "ln_dpo", "ld_dpo", "davir_dpo", "length_dpo"),
    *("slic", "simpo", "alphapo", "cpo", "orpo", "asft", "apo_zero", "apo_down", "sppo", "cal_dpo", "ddpo"),
]

# Lawful exceptions to the common rules, each with its reason.
RISES_PAST_TARGET = {
    "ipo": "a square pulls the margin to 1/(2 beta); the rule holds below that, and is broken above",
    "sppo": "a square pulls each log-ratio to its target",
    "cal_dpo": "squares pull each log-ratio to its target",
    "exo": "the margin's probability is pulled to 1 - label_smoothing",
}
TARGET_IN_REACH: dict[str, Any] = {"sppo": {"beta": 0.1}}
RISES_WITH_BEST = {
    "apo_down": "lowers the preferred candidate by design: only the margin grows",
    "discopop": "rises between two stationary points near a margin of zero, as it was found",
    "beta_dpo": "beta follows the margins, and with them which pairs are kept",
}
ON_THE_BATCH = {"aot", "aot_unpaired", "beta_dpo"}  # sorted, or chosen, among all rows
WITHOUT_WEIGHT = {"aot", "aot_unpaired"}  # a candidate meets those of other rows
# The loss of a row is its preferred candidate's; the gradient also that of its other one (test_losses_pairwise_batch.py).
BORROWED_GRADIENT = {"aot_unpaired"}
SOFT_TARGET = {"exo", "sppo"}  # prob is the target itself: the same best policy, another constant
# Scores, rankings, labels, and what looks at the chosen response alone know no P(first beats second).
RANKED = {"rank_dpo", "lipo", "plackett_luce", "exo_listwise", "gpo"}
NO_SOFT_LABEL = {
    *RANKED,
    *WITHOUT_WEIGHT,
    "odpo",
    "rpo",
    "kto",
    "apo_zero_unpaired",
    "sft",
    "nll",
    "chosen_guard",
    "chosen_anchor",
    # The best response is also set against itself under another image: which one is best is not in doubt.
    *("blind_bpo", "bpo", "image_preference", "mdpo", "re_align", "chip", "svco", "symmpo", "povid", "opa_dpo"),
}
# One score a pair has no columns to swap; a gold response is imitated whatever the label; the order decides who is kept.
# Scores of a reward model and scores under other images stay where they are when the responses change places.
SOFT_ELSEWHERE = {"gpm", "tpo", "beta_dpo", "mmrlhf", "vdpo"}
# beta-DPO's beta follows the margins, without a gradient.
BETA_HELD: dict[str, Any] = {"beta_dpo": {"alpha": 0.0}}
# The weights of LiPO's pairs follow the policy's own ranks, and jump where two change places.
LIKE_LABELS: dict[str, Any] = {"lipo": {"rank_by": "label"}}


# Rules of the whole table


@pytest.mark.parametrize("name", LOSSES)
def test_data_stands_before_the_star_and_every_setting_has_its_published_default(name: str) -> None:
    references = {"reference", *(f"reference_{measure}" for measure in MEASURES)}
    side = {"scores", "labels", "prob", "weight", "margin", "mask", "draw", "beta_scale"}
    text = {"lengths", "mean_length", "gold_lengths"}
    known = {"policy", *MEASURES, *references, *STATISTICS, *side, *text}
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    positional = {one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert positional <= known and {"policy", *MEASURES} & positional
    assert all(default is not inspect.Parameter.empty for default in settings_of(name).values())


@pytest.mark.parametrize("name", ON_LOGPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_one_per_prompt_and_rewards_one_per_candidate_without_a_graph(name: str, dtype: torch.dtype) -> None:
    values = data(name, dtype=dtype)
    values["policy"].requires_grad_()
    result = call(name, values)
    assert result.losses.shape == (3,)
    assert result.rewards.shape == values["policy"].shape
    assert result.losses.requires_grad and not result.rewards.requires_grad


@pytest.mark.parametrize("name", ON_LOGPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_where_policy_equals_reference(name: str, dtype: torch.dtype) -> None:
    values = data(name, dtype=dtype)
    if "reference" in values:
        values["reference"] = values["policy"].clone()
    for measure in MEASURES & set(values):
        values[f"reference_{measure}"] = values[measure].clone()
    values = {key: value for key, value in values.items() if key in inspect.signature(LOSSES[name]).parameters}
    values["policy"].requires_grad_()
    result = call(name, values)
    result.losses.sum().backward()
    assert result.losses.isfinite().all() and result.rewards.isfinite().all()
    assert values["policy"].grad.isfinite().all()
    if "reference" in values:
        assert (result.rewards == 0).all()


@pytest.mark.parametrize("name", ON_LOGPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradient_are_finite_in_half_and_single_precision(name: str, dtype: torch.dtype) -> None:
    values = data(name, dtype=dtype)
    values["policy"].requires_grad_()
    result = call(name, values)
    result.losses.sum().backward()
    assert result.losses.isfinite().all() and result.rewards.isfinite().all()
    assert values["policy"].grad.isfinite().all()


@pytest.mark.parametrize("name", ON_LOGPS)
def test_float32_losses_agree_with_float64(name: str) -> None:
    exact = call(name, data(name))
    single = call(name, data(name, dtype=torch.float32))
    torch.testing.assert_close(single.losses.double(), exact.losses, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ON_LOGPS) - set(RISES_WITH_BEST)))
@pytest.mark.parametrize("step", [1e-5, 1e-3, 0.01])
def test_raising_the_best_logp_never_raises_the_loss(name: str, step: float) -> None:
    values = data(name, batch=16)
    better = {**values, "policy": values["policy"].clone()}
    better["policy"][:, 0] += step
    settings = LIKE_LABELS.get(name, {})
    before, after = call(name, values, **settings).losses, call(name, better, **settings).losses
    assert (after <= before).all()
    assert (after < before).any()


@pytest.mark.parametrize("name", PAIRWISE)
def test_only_a_loss_with_a_target_rises_past_it(name: str) -> None:
    values = data(name, batch=1)
    values["policy"] = tensor([0.0, -8.0])
    if "reference" in values:
        values["reference"] = tensor([0.0, 0.0]) - 2.0
    further = {**values, "policy": values["policy"] - tensor([0.0, 1.0])}
    settings = TARGET_IN_REACH.get(name, {})
    rises = bool(call(name, further, **settings).losses > call(name, values, **settings).losses)
    assert rises == (name in RISES_PAST_TARGET)


@pytest.mark.parametrize("name", sorted(set(ON_LOGPS) - ON_THE_BATCH))
def test_a_batch_of_two_is_two_batches_of_one(name: str) -> None:
    values = data(name, batch=2)
    together = call(name, values)
    alone = [call(name, rows(values, slice(row, row + 1))) for row in range(2)]
    torch.testing.assert_close(together.losses, torch.cat([one.losses for one in alone]), rtol=1e-14, atol=0)
    torch.testing.assert_close(together.rewards, torch.cat([one.rewards for one in alone]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", sorted(set(ON_LOGPS) - BORROWED_GRADIENT))
def test_gradient_is_the_derivative_of_the_loss(name: str) -> None:
    values = data(name)
    policy = values.pop("policy").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logps: call(name, {"policy": logps, **values}, **BETA_HELD.get(name, {})).losses, policy, eps=1e-7
    )


@pytest.mark.parametrize("parametrisation", ["v1", "aaai"])
def test_gradient_of_both_mapo_parametrisations_is_the_derivative_at_every_size_of_error(parametrisation: str) -> None:
    policy = -tensor([1e-3, 0.02], [0.0249, 0.0251], [0.05, 0.3], [2.0, 1.0]) / 2
    beta = 8.0 if parametrisation == "aaai" else 0.1
    assert torch.autograd.gradcheck(
        lambda logps: mapo(logps, beta=beta, parametrisation=parametrisation).losses, policy.requires_grad_(), eps=1e-7
    )


@pytest.mark.parametrize("rank_by", ["label", "model"])
@pytest.mark.parametrize("ties", ["average", "stable"])
def test_gradient_of_rank_dpo_is_the_derivative_in_every_setting(rank_by: str, ties: str) -> None:
    values = data("rank_dpo")
    values["scores"][0, 1] = values["scores"][0, 2]
    policy = values.pop("policy").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logps: rank_dpo(logps, **values, rank_by=rank_by, ties=ties).losses, policy, eps=1e-8
    )


@pytest.mark.parametrize("name", sorted(set(ON_LOGPS) - WITHOUT_WEIGHT))
def test_weight_multiplies_each_loss_and_leaves_rewards_alone(name: str) -> None:
    values = data(name)
    weight = tensor(0.0, 1.0, 2.5)
    plain, heavy = call(name, values), call(name, {**values, "weight": weight})
    torch.testing.assert_close(heavy.losses, weight * plain.losses, rtol=1e-14, atol=0)
    assert torch.equal(heavy.rewards, plain.rewards)


@pytest.mark.parametrize("name", ON_LOGPS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moved", ["policy", "reference"])
def test_loss_and_gradient_stay_finite_for_a_margin_of_ten_thousand(
    name: str, moved: str, sign: int, dtype: torch.dtype
) -> None:
    values = data(name, dtype=dtype)
    nats = 1e4 / settings_of(name).get("beta", 1.0)
    # The best or the worst candidate becomes less likely to one of the two: errors stay positive.
    if moved in values:
        values[moved][:, 0 if sign < 0 else -1] -= nats
    policy = values["policy"].requires_grad_()
    result = call(name, values)
    result.losses.sum().backward()
    assert result.losses.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("parametrisation", ["v1", "aaai"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_stays_finite_for_huge_errors(parametrisation: str, dtype: torch.dtype) -> None:
    policy = torch.tensor([[-1e4, -0.05], [-0.05, -1e4], [-1e4, -1e4]], dtype=dtype, requires_grad=True)
    result = mapo(policy, parametrisation=parametrisation)
    result.losses.sum().backward()
    assert result.losses.isfinite().all() and result.rewards.isfinite().all()
    assert policy.grad.isfinite().all()


# Soft labels and margins


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_tie_is_symmetric_in_the_two_candidates(name: str) -> None:
    values = data(name)
    flipped = swapped(values)
    tie = torch.full((3,), 0.5, dtype=torch.float64)
    one, other = call(name, {**values, "prob": tie}), call(name, {**flipped, "prob": tie})
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.rewards, other.rewards.flip(1), rtol=0, atol=0)
    assert not torch.allclose(call(name, values).losses, call(name, flipped).losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_certain_label_is_the_same_as_none(name: str) -> None:
    values = data(name)
    certain = call(name, {**values, "prob": torch.ones(3, dtype=torch.float64)})
    assert torch.equal(certain.losses, call(name, values).losses)


@pytest.mark.parametrize("name", sorted(set(PAIRWISE) - SOFT_TARGET))
def test_a_soft_label_is_the_expectation_over_hard_labels(name: str) -> None:
    values = data(name)
    flipped = swapped(values)
    prob = tensor(0.2, 0.7, 0.0)
    expected = prob * call(name, values).losses + (1 - prob) * call(name, flipped).losses
    torch.testing.assert_close(call(name, {**values, "prob": prob}).losses, expected, rtol=1e-12, atol=0)


def test_every_loss_without_a_soft_label_is_tabled() -> None:
    assert {
        name for name, loss in LOSSES.items() if name in ON_LOGPS and "prob" not in inspect.signature(loss).parameters
    } == NO_SOFT_LABEL
    assert set(PAIRWISE) | SOFT_ELSEWHERE | NO_SOFT_LABEL == set(ON_LOGPS)


TAKE_MARGIN = ["dpo", "robust", "ipo", "tr_dpo", "exo", "discopop", "wpo", "length_dpo", "ddpo"]


@pytest.mark.parametrize("name", [*TAKE_MARGIN, "dpop", "simpo", "cpo", "beta_dpo", "bradley_terry"])
def test_a_margin_of_zero_is_the_same_as_none(name: str) -> None:
    values = data(name)
    assert torch.equal(call(name, {**values, "margin": torch.zeros(3, dtype=torch.float64)}).losses, call(name, values).losses)


@pytest.mark.parametrize("name", TAKE_MARGIN)
def test_a_margin_is_taken_off_the_reward_margin_pair_by_pair(name: str) -> None:
    values = data(name)
    margin = tensor(0.3, 0.0, -0.2)
    beta = settings_of(name)["beta"]
    shifted = {**values, "policy": values["policy"].clone()}
    shifted["policy"][:, 0] -= margin / beta
    with_margin = call(name, {**values, "margin": margin})
    torch.testing.assert_close(with_margin.losses, call(name, shifted).losses, rtol=1e-12, atol=0)
    assert torch.equal(with_margin.rewards, call(name, values).rewards)


@pytest.mark.parametrize("name", ["hinge", "dro"])
def test_hinges_take_one_margin_for_all_or_one_for_each_pair(name: str) -> None:
    values = data(name)
    margins = [1.0, 0.25, 0.0]
    together = call(name, values, margin=tensor(*margins)).losses
    for row, margin in enumerate(margins):
        alone = call(name, rows(values, slice(row, row + 1)), margin=margin).losses
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-14, atol=0)


OF_IMAGES = {"dpo": 2, "robust": 2, "ipo": 2, "hinge": 2, "dro": 2, "spo": 2, "mapo": 2, "kto": 1}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_caller_without_shape_checks_is_told_of_candidates_too_many_or_too_few(name: str) -> None:
    wanted = OF_IMAGES[name]
    loss = inspect.unwrap(LOSSES[name])  # without the checks of the tests, as users call it
    pairs = {"policy": torch.zeros(3, wanted), "reference": torch.zeros(3, wanted), "labels": torch.ones(3)}
    taken = {key: value for key, value in pairs.items() if key in inspect.signature(loss).parameters}
    loss(**taken)
    for columns in (1, 2, 3):
        if columns != wanted:
            with pytest.raises(ValueError, match=rf"^{name}: got logps of shape \(3, {columns}\), want \(batch, {wanted}\)"):
                loss(**{**taken, "policy": torch.zeros(3, columns)})
    if "reference" in taken:
        with pytest.raises(ValueError, match=rf"^{name}: got reference logps of shape \(1, {wanted}\), want \(3, {wanted}\)"):
            loss(**{**taken, "reference": torch.zeros(1, wanted)})


def of_rows(name: str) -> int:
    """Candidates of a row that a loss's signature wants; 0: any number, or another thing than logps."""
    parameters = inspect.signature(inspect.unwrap(LOSSES[name])).parameters
    said = str(parameters["policy"].annotation) if "policy" in parameters else ""
    return next((count for count in (1, 2, 3) if f"'batch {count}'" in said or f'"batch {count}"' in said), 0)


@pytest.mark.parametrize("name", sorted(name for name in LOSSES if of_rows(name)))
def test_a_loss_for_rows_of_so_many_candidates_refuses_others(name: str) -> None:
    loss, wide = inspect.unwrap(LOSSES[name]), torch.zeros(4, of_rows(name) + 1)
    required = [one.name for one in inspect.signature(loss).parameters.values() if one.default is one.empty]
    with pytest.raises(ValueError, match=r"got logps of shape \(4, \d\), want \(batch, \d\)"):
        loss(**dict.fromkeys(required, wide))


def test_most_losses_tell_in_their_signature_how_many_candidates_a_row_has() -> None:
    assert sum(map(bool, map(of_rows, LOSSES))) > 35
