"""Terms and reward-model losses: TRL's numbers from logits, values by hand, what they become."""

import math
from typing import Any

import pytest
import torch
from loss_inputs import tensor
from text_golden import arrays, assert_equal, case, leaf, pairs, token_logps

from mmalign.losses import LOSSES, bco, dpo, ipo, sft
from mmalign.losses.reward_models import bradley_terry, gpm, mean_skew_scores, prompt_gate, skew_score
from mmalign.losses.terms import adpa, chosen_anchor, chosen_guard, dckd, nll, rationale, selm, tpo

# NLL


@pytest.mark.parametrize(
    ("name", "shares"),
    [("sft", (0.0, 0.0, 1.0)), ("rpo_sigmoid1_sft1", (1.0, 0.0, 1.0)), ("mpo_0.8_0.2_1.0", (0.8, 0.2, 1.0))],
)
def test_sft_rpo_and_mpo_repeat_trl_from_logits(name: str, shares: tuple[float, float, float]) -> None:
    expected = case("trl116_terms", name)
    logits = leaf(arrays("inputs_tok")["logits"])
    policy, lengths = token_logps(logits)
    reference, _ = token_logps(arrays("inputs_tok")["ref_logits"])
    terms = (
        dpo(policy, reference).losses,
        bco(policy, reference).losses,
        nll(policy, mean_length=lengths[:, 0].mean(), reduction="token").losses,
    )
    loss = sum(share * losses.mean() for share, losses in zip(shares, terms, strict=True))
    loss.backward()
    assert_equal(loss, expected["loss"])
    assert_equal(logits.grad, expected["grad_logits"])


def test_nll_by_token_is_the_same_however_the_rows_are_split_and_trls_is_not() -> None:
    policy, lengths = token_logps(arrays("inputs_tok")["logits"])
    whole = -policy[:, 0].sum() / lengths[:, 0].sum()
    assert len(set(lengths[:, 0].tolist())) > 1
    mean_length = lengths[:, 0].mean()
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    split = sum(nll(policy[p], mean_length=mean_length, reduction="token").losses.sum() for p in parts) / 4
    assert_equal(split, whole)
    of_micro_batches = sum(nll(policy[p], mean_length=lengths[p][:, 0].mean(), reduction="token").losses.sum() for p in parts)
    assert abs(of_micro_batches / 4 - whole) > 1e-3  # each micro-batch by its own mean: a token's weight depends on the split
    assert_equal(nll(policy, mean_length=mean_length.expand(4), reduction="token").losses.mean(), whole)


def test_nll_by_sequence_weighs_every_response_the_same_and_the_sum_is_sft() -> None:
    policy, lengths = tensor([-6.0, -1.0], [-2.0, -1.0]), tensor([3.0, 9.0], [4.0, 9.0])
    assert nll(policy, lengths).losses.tolist() == [2.0, 0.5]
    assert torch.equal(nll(policy, reduction="sum").losses, sft(policy).losses)
    assert nll(policy, lengths, weight=tensor(0.0, 3.0)).losses.tolist() == [0.0, 1.5]


def test_nll_refuses_to_divide_by_lengths_it_has_not() -> None:
    with pytest.raises(ValueError, match=r"nll\.reduction: got sequence without lengths, want lengths. Choose sum"):
        nll(tensor([-1.0]))
    with pytest.raises(ValueError, match=r"nll\.reduction: got token without mean_length"):
        nll(tensor([-1.0]), tensor([3.0]), reduction="token")


# Guards of the chosen response


def test_the_guard_costs_what_the_chosen_response_has_lost() -> None:
    policy, reference = leaf(tensor([-5.0, -9.0], [-2.0, -9.0])), tensor([-3.0, 0.0], [-3.0, 0.0])
    result = chosen_guard(policy, reference)
    result.losses.sum().backward()
    assert result.losses.tolist() == [2.0, 0.0]
    assert policy.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
    assert result.rewards.tolist() == [[-2.0, -9.0], [1.0, -9.0]]


def test_the_anchor_is_dpo_against_a_candidate_that_stays_with_the_reference() -> None:
    policy, reference = pairs()
    still = torch.stack([policy[:, 0], reference[:, 1]], 1)
    torch.testing.assert_close(chosen_anchor(policy, reference).losses, dpo(still, reference).losses, rtol=1e-12, atol=0)
    margin = tensor(*[0.4] * 8)
    shifted = dpo(still, reference, margin=margin, beta=0.3).losses
    torch.testing.assert_close(chosen_anchor(policy, reference, beta=0.3, margin=0.4).losses, shifted, rtol=1e-12, atol=0)


# Further completions


def test_rationale_is_logistic_or_linear_in_its_logp() -> None:
    logps = tensor([-20.0], [0.0])
    assert rationale(logps).losses.tolist() == pytest.approx([math.log1p(math.exp(2.0)), math.log(2)], rel=1e-14)
    assert rationale(logps, gamma=1.0, link="linear").losses.tolist() == [20.0, 0.0]
    assert rationale(logps, tensor(2.0, 1.0), link="linear").losses.tolist() == [4.0, 0.0]


def test_selm_pays_for_leaving_what_the_reference_would_say() -> None:
    explored, reference = leaf(tensor([-10.0], [-4.0])), tensor([-6.0], [-6.0])
    result = selm(explored, reference)
    result.losses.sum().backward()
    torch.testing.assert_close(result.losses, 1e-3 * 0.01 * tensor(-4.0, 2.0))
    torch.testing.assert_close(explored.grad, torch.full_like(explored, 1e-5))  # a step down this slope lowers the logp
    torch.testing.assert_close(result.rewards, 0.01 * tensor([-4.0], [2.0]))


@pytest.mark.parametrize("name", ["tpo_sigmoid_a1", "tpo_l_a1", "tpo_ipo_a0"])
def test_tpo_repeats_trl_from_logits(name: str) -> None:
    expected = case("trl116_terms", name)
    completions = torch.tensor([*range(8), 3, 2, 1, 0])  # chosen, rejected, and gold: the chosen ones in reversed order
    logits = leaf(arrays("inputs_tok")["logits"][completions])
    logps, lengths = token_logps(logits, completions)
    policy, gold = logps[:, :2], logps[:, 2:]
    mean = lengths[:, 2:].mean().expand(4, 1)  # TRL's mean over tokens
    if name == "tpo_ipo_a0":
        loss = ipo(policy / lengths[:, :2], torch.zeros_like(policy)).losses.mean()
    else:
        loss = tpo(policy, gold, mean, lengths[:, :2], beta=0.1, normalised=name == "tpo_l_a1").losses.mean()
    loss.backward()
    assert_equal(loss, expected["loss"])
    assert_equal(logits.grad, expected["grad_logits"])


def test_without_its_gold_response_tpo_is_dpo_without_a_reference() -> None:
    policy, _ = pairs()
    gold, prob = policy[:, :1], torch.linspace(0, 1, 8, dtype=torch.float64)
    contrast = tpo(policy, gold, gold.abs(), prob=prob, beta=0.1, alpha=0.0).losses
    torch.testing.assert_close(contrast, dpo(policy, 0 * policy, prob).losses, rtol=1e-13, atol=0)


def test_tpo_refuses_to_normalise_without_lengths() -> None:
    with pytest.raises(ValueError, match=r"tpo\.normalised: got true without lengths"):
        tpo(tensor([-1.0, -2.0]), tensor([-1.0]), tensor([2.0]), normalised=True)


# Distillation


def test_dckd_and_adpa_by_hand() -> None:
    divergence = tensor([0.5, 0.25], [1.0, 0.0])
    assert dckd(divergence).losses.tolist() == [0.75, 1.0]
    assert dckd(divergence, rejected_weight=2.0).losses.tolist() == [1.0, 1.0]
    assert dckd(divergence, tensor(0.0, 2.0), rejected_weight=0.0).losses.tolist() == [0.0, 2.0]
    assert adpa(divergence).losses.tolist() == [-0.25, 0.0]
    assert adpa(divergence, tensor(2.0, 1.0), which="chosen").losses.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("loss", "data", "settings", "message"),
    [
        (dckd, (tensor([1.0, 1.0]),), {"chosen_weight": 0.0, "rejected_weight": 0.0}, "dckd: got chosen_weight 0.0 and"),
        (dckd, (tensor([1.0, 1.0]),), {"chosen_weight": -1.0}, "want none negative, one positive"),
        (selm, (tensor([1.0]), tensor([1.0])), {"alpha": 0.0}, r"selm\.alpha: got 0.0"),
        (selm, (tensor([1.0]), tensor([1.0])), {"beta": 0.0}, r"selm\.beta: got 0.0"),
        (rationale, (tensor([1.0]),), {"gamma": -0.1}, r"rationale\.gamma: got -0.1"),
        (chosen_anchor, (tensor([1.0]), tensor([1.0])), {"beta": 0.0}, r"chosen_anchor\.beta"),
        (tpo, (tensor([1.0, 1.0]), tensor([1.0]), tensor([1.0])), {"alpha": -1.0}, r"tpo\.alpha: got -1.0"),
        (bradley_terry, (tensor([1.0, 1.0]),), {"centring": -0.1}, r"bradley_terry\.centring: got -0.1"),
        (gpm, (tensor([1.0]),), {"tau": 0.0}, r"gpm\.tau: got 0.0"),
        (gpm, (tensor([1.0]),), {"target": 0.0}, r"gpm\.target: got 0.0"),
    ],
)
def test_settings_without_meaning_are_refused(
    loss: Any, data: tuple[torch.Tensor, ...], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(*data, **settings)


@pytest.mark.parametrize("name", ["rationale", "selm", "dckd", "adpa", "output_anchor"])
def test_terms_without_logps_give_one_loss_a_row_a_weight_factor_and_the_derivative(name: str) -> None:
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    columns = 2 if name in ("dckd", "adpa", "output_anchor") else 1
    values = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    more = (torch.randn(3, 1, generator=generator, dtype=torch.float64),) if name == "selm" else ()
    result = loss(leaf(values), *more)
    assert result.losses.shape == (3,) and result.losses.requires_grad and not result.rewards.requires_grad
    weight = tensor(0.0, 1.0, 2.5)
    torch.testing.assert_close(loss(values, *more, weight=weight).losses, weight * result.losses.detach(), rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(lambda one: loss(one, *more).losses, leaf(values))


# Reward models


def test_bradley_terry_with_a_margin_is_a_shift_of_the_scores() -> None:
    scores, margin, prob = tensor([1.3, 0.4], [-0.2, 0.9]), tensor(0.5, -1.0), tensor(0.9, 0.3)
    shifted = scores - torch.stack([margin, 0 * margin], 1)
    torch.testing.assert_close(
        bradley_terry(scores, prob, margin=margin).losses, bradley_terry(shifted, prob).losses, rtol=1e-13, atol=0
    )
    by_hand = [math.log1p(math.exp(-(0.9 - 0.5))), math.log1p(math.exp(1.1 - 1.0))]
    assert bradley_terry(scores, margin=margin).losses.tolist() == pytest.approx(by_hand, rel=1e-12)


def test_centring_costs_the_square_of_the_sum_of_the_scores() -> None:
    scores = leaf(tensor([1.5, 0.5], [2.0, -2.0]))
    added = bradley_terry(scores, centring=0.01).losses - bradley_terry(scores).losses
    torch.testing.assert_close(added, tensor(0.04, 0.0))
    weighted = bradley_terry(scores, weight=tensor(3.0, 1.0), centring=0.01).losses
    torch.testing.assert_close(weighted, tensor(3.0, 1.0) * bradley_terry(scores, centring=0.01).losses)
    assert torch.autograd.gradcheck(lambda one: bradley_terry(one, centring=0.3).losses, scores)


def test_strengths_scale_bradley_terry_as_a_weight() -> None:
    scores, strength = tensor([1.0, 0.0], [0.0, 1.0]), tensor(3.0, 1.0)
    expected = [3 * math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))]
    assert bradley_terry(scores, weight=strength).losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_tree_plv_is_bradley_terry_with_a_row_for_each_growing_prefix() -> None:
    better, worse = [0.1, 0.4, 0.9], [0.2, -0.1, 0.3]
    by_hand = sum(math.log1p(math.exp(-(b - w))) for b, w in zip(better, worse, strict=True))
    rows = tensor(*[[b, w] for b, w in zip(better, worse, strict=True)])
    assert bradley_terry(rows).losses.sum().item() == pytest.approx(by_hand, rel=1e-12)


def test_gpm_by_hand() -> None:
    scores = tensor([0.05], [-0.1])
    assert gpm(scores).losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(1.0))], rel=1e-12)
    assert gpm(scores).rewards.tolist() == [[0.5], [-1.0]]
    assert gpm(scores, form="regression").losses.tolist() == pytest.approx([9.5**2 / 2, 11**2 / 2], rel=1e-12)
    assert gpm(scores, tau=1.0, form="regression", target=1.0).losses.tolist() == pytest.approx([0.95**2 / 2, 1.1**2 / 2])


@pytest.mark.parametrize("form", ["logistic", "regression"])
def test_gpm_averages_over_soft_labels_and_its_gradient_is_the_derivative(form: str) -> None:
    scores, prob = tensor([0.3], [-0.2], [0.1]), tensor(0.0, 0.25, 0.5)
    won, lost = gpm(scores, form=form).losses, gpm(-scores, form=form).losses
    torch.testing.assert_close(gpm(scores, prob, form=form).losses, prob * won + (1 - prob) * lost, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda one: gpm(one, prob, form=form).losses, leaf(scores))


def test_gpm_of_one_block_with_a_constant_second_entry_is_bradley_terry() -> None:
    rewards = tensor([0.7, -0.4], [0.1, 0.3])
    embeddings = torch.stack([rewards, torch.ones_like(rewards)], -1)
    score = skew_score(embeddings[:, 0], embeddings[:, 1], normalised=False)
    torch.testing.assert_close(gpm(score[:, None], tau=1.0).losses, bradley_terry(rewards).losses, rtol=1e-13, atol=0)


def test_skew_scores_by_hand() -> None:
    first, second = tensor([3.0, 4.0, 0.0, 0.0]), tensor([0.0, 2.0, 0.0, 0.0])
    assert skew_score(first, second).item() == pytest.approx(0.6)  # the sine between them
    assert skew_score(first, second, normalised=False).item() == 6.0
    wide = tensor([1.0, 2.0, 3.0, 4.0]), tensor([5.0, 6.0, 7.0, 8.0])
    assert skew_score(*wide, normalised=False).item() == (1 * 6 - 2 * 5) + (3 * 8 - 4 * 7)
    assert skew_score(*wide, tensor([2.0, 0.5]), normalised=False).item() == 2 * (6 - 10) + 0.5 * (24 - 28)


def test_skew_scores_are_antisymmetric_and_nothing_is_preferred_to_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    gate = prompt_gate(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    there, back = skew_score(first, second, gate), skew_score(second, first, gate)
    torch.testing.assert_close(there, -back, rtol=1e-14, atol=0)
    assert (skew_score(first, first, gate) == 0).all() and (there.abs() <= 3).all()
    with pytest.raises(ValueError, match="got embeddings of dimension 5, want an even one"):
        skew_score(first[:, :5], second[:, :5])


def test_the_gate_has_mean_one_unless_it_follows_the_inference_example() -> None:
    logits = tensor([0.0, math.log(3.0)])
    torch.testing.assert_close(prompt_gate(logits), tensor([0.5, 1.5]))
    torch.testing.assert_close(prompt_gate(logits, scaled=False), tensor([0.25, 0.75]))


def test_a_cycle_has_skew_scores_and_no_mean_ones() -> None:
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    following = skew_score(embeddings, embeddings.roll(-1, 0))
    torch.testing.assert_close(following, torch.full((3,), math.sqrt(3) / 2, dtype=torch.float64))  # a over b over c over a
    mean = mean_skew_scores(embeddings[None])
    torch.testing.assert_close(mean, torch.zeros(1, 3, dtype=torch.float64), rtol=0, atol=1e-15)


def accuracy_on_circles(dim: int, tau: float, *, normalised: bool, seed: int) -> float:
    """Of twelve items, each preferred to the five that follow it in a circle, whose features have much in common."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 16, generator=draw) + 3 * torch.randn(1, 16, generator=draw)
    weights = (torch.randn(16, dim, generator=draw) / 4).requires_grad_()
    first = torch.arange(12).repeat_interleave(5)
    second = (first + torch.arange(1, 6).repeat(12)) % 12
    optimiser = torch.optim.Adam([weights], lr=0.05)
    for _ in range(300):
        embeddings = features @ weights
        scores = skew_score(embeddings[first], embeddings[second], normalised=normalised)
        optimiser.zero_grad()
        gpm(scores[:, None], tau=tau).losses.mean().backward()
        optimiser.step()
    return float((scores > 0).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_circles_are_learnt_by_embeddings_that_are_not_normalised_and_not_by_two_normalised_dimensions(seed: int) -> None:
    assert accuracy_on_circles(2, 1.0, normalised=False, seed=seed) > 0.85
    assert accuracy_on_circles(2, 0.1, normalised=True, seed=seed) < 0.65


def test_mean_skew_scores_average_over_the_other_candidates() -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    gate = prompt_gate(torch.randn(2, 3, generator=generator, dtype=torch.float64))
    got = mean_skew_scores(embeddings, gate)
    for row in range(2):
        for i in range(4):
            others = [skew_score(embeddings[row, i], embeddings[row, j], gate[row]) for j in range(4) if j != i]
            torch.testing.assert_close(got[row, i], torch.stack(others).mean(), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="got 1 candidates a prompt, want at least 2"):
        mean_skew_scores(embeddings[:, :1])
