"""Losses of multimodal methods: the authors' numbers (tests/golden/mllm), hand-worked values, what they become."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_inputs import data, tensor
from torch import Tensor

from mmalign.errors import UserError
from mmalign.language.head import Head, slot_sums
from mmalign.losses import LOSSES, STATISTICS, bco, chosen_anchor, dpo, nll
from mmalign.losses.blind import blind_bpo
from mmalign.losses.image_contrasts import svco, symmpo
from mmalign.losses.image_scores import ddpo, mmrlhf, opa_dpo, opa_dpo_tokens, povid, tpo_visual, vdpo
from mmalign.losses.image_terms import chip, image_preference, mdpo, re_align
from mmalign.objective import Objective, Term

GOLDEN = Path(__file__).parent / "golden" / "mllm"
LN2 = math.log(2)


@cache
def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def assert_equal(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max()))


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def token_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels, 0 where there is none, and which places are scored; labels are not shifted."""
    scored = labels[:, 1:] != -100
    ids = labels[:, 1:].clamp(min=0)
    return logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0] * scored, scored


# Golden numbers


def blind_triples(stored: dict[str, Tensor], tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    names = ("chosen", "rejected", "blind")
    reference = torch.stack([stored[f"ref_{name}_token_logps"].sum(1) for name in names], 1)
    return torch.stack([one.sum(1) for one in tokens], 1), reference


@pytest.mark.parametrize(("reduction", "expected"), [("sum", "loss"), ("mean", "loss_concatenated_mean")])
def test_blind_bpo_repeats_the_papers_sum_and_the_released_mean(reduction: Any, expected: str) -> None:
    stored, names = golden("bpo_blind"), ("chosen", "rejected", "blind")
    tokens = [leaf(stored[f"policy_{name}_token_logps"]) for name in names]
    policy, reference = blind_triples(stored, tokens)
    result = blind_bpo(policy, reference, beta=float(stored["beta"]), reduction=reduction)
    result.losses.mean().backward()
    assert_equal(result.losses.mean(), stored[expected])
    share = 1.0 if reduction == "sum" else 0.5
    assert_equal(result.losses, share * stored["losses"])
    for name, one in zip(names, tokens, strict=True):
        assert_equal(one.grad, share * stored[f"grad_policy_{name}_token_logps"])
    margins = result.rewards[:, :1] - result.rewards[:, 1:]
    accuracies = [stored[f"accuracy_chosen_vs_{name}"] for name in names[1:]]
    assert_equal((margins > 0).double().mean(0), torch.stack(accuracies))


def test_blind_bpo_is_dpo_on_each_pair() -> None:
    stored = golden("bpo_blind")
    policy, reference = blind_triples(
        stored, [stored[f"policy_{name}_token_logps"] for name in ("chosen", "rejected", "blind")]
    )
    own, blind = (dpo(policy[:, [0, j]], reference[:, [0, j]]).losses for j in (1, 2))
    assert_equal(own.mean(), stored["loss_dpo_term"])
    assert_equal(blind.mean(), stored["loss_blind_term"])
    assert_equal(blind_bpo(policy, reference, blind_weight=0.25).losses, own + 0.25 * blind)
    assert_equal(blind_bpo(policy, reference, blind_weight=0.0).losses, own)


def test_dpo_repeats_the_trainer_that_blind_po_uses() -> None:
    stored, names = golden("dpo"), ("chosen", "rejected")
    tokens = [leaf(stored[f"policy_{name}_token_logps"]) for name in names]
    reference = torch.stack([stored[f"ref_{name}_token_logps"].sum(1) for name in names], 1)
    result = dpo(torch.stack([one.sum(1) for one in tokens], 1), reference, beta=float(stored["beta"]))
    result.losses.mean().backward()
    assert_equal(result.losses, stored["losses"])
    assert_equal(result.losses.mean(), stored["loss"])
    for name, one in zip(names, tokens, strict=True):
        assert_equal(one.grad, stored[f"grad_policy_{name}_token_logps"])


def test_responses_are_scored_token_by_token_as_the_authors_of_blind_po_gather_them() -> None:
    """Logits are hidden states of an output layer that is the identity; rows are padded on the left, responses end them."""
    stored = golden("response_logprobs")
    logits, ids, lengths = leaf(stored["logits"]), stored["input_ids"], stored["response_len"].tolist()
    places = [(row, at) for row, length in enumerate(lengths) for at in range(ids.shape[1] - length, ids.shape[1])]
    rows, at = torch.tensor(places).unbind(1)
    told = (ids[rows, at], rows, tuple(lengths))
    sums = slot_sums(logits[rows, at - 1], Head(weight=torch.eye(logits.shape[2], dtype=torch.float64)), *told)["logps"]
    assert_equal(sums, stored["sum_logps"])
    sums.sum().backward()
    assert_equal(logits.grad, stored["grad_logits_of_sum"])
    with torch.no_grad():
        each = (told[0], torch.arange(len(rows)), (1,) * len(rows))
        found = slot_sums(logits[rows, at - 1], Head(weight=torch.eye(logits.shape[2], dtype=torch.float64)), *each)["logps"]
    for own, expected, length in zip(found.split(lengths), stored["token_logps"], lengths, strict=True):
        assert_equal(own, expected[:length])


def test_mdpo_repeats_its_published_code() -> None:
    stored = golden("mdpo")
    policy = leaf(torch.stack([stored[f"policy_{one}_logps"] for one in ("chosen", "rejected")], 1))
    reference = torch.stack([stored[f"reference_{one}_logps"] for one in ("chosen", "rejected")], 1)
    degraded = leaf(stored["policy_imageless_chosen_logps"][:, None])
    known = stored["reference_imageless_chosen_logps"][:, None]
    result = mdpo(policy, reference, degraded, known, beta=float(stored["beta"]))
    result.losses.mean().backward()
    assert_equal(result.losses, stored["losses"])
    assert_equal(result.rewards, torch.stack([stored["chosen_rewards"], stored["rejected_rewards"]], 1))
    assert_equal(policy.grad, torch.stack([stored[f"grad_policy_{one}_logps"] for one in ("chosen", "rejected")], 1))
    assert_equal(degraded.grad[:, 0], stored["grad_policy_imageless_chosen_logps"])
    two = re_align(policy, reference, degraded, known).losses
    assert_equal(two + chosen_anchor(policy, reference).losses, stored["losses"])
    assert_equal(dpo(policy, reference).losses + image_preference(policy, reference, degraded, known).losses, two)


@pytest.mark.parametrize(("name", "average"), [("ddpo_rlhfv_sum", False), ("ddpo_rlhfv_avg", True)])
def test_ddpo_repeats_rlhf_v_from_logits(name: str, average: bool) -> None:
    stored = golden(name)
    logits = leaf(stored["logits"])

    def scores(values: Tensor) -> Tensor:
        logps, scored = token_logps(values, stored["labels"])
        weights = stored["token_weight"] * scored
        total = (weights * logps).sum(1)
        return (total / weights.sum(1) if average else total)[None]

    policy, reference = scores(logits), scores(stored["ref_logits"])
    assert_equal(policy[0], stored["weighted_logps"])
    result = ddpo(policy, reference, beta=float(stored["beta"]))
    result.losses.mean().backward()
    assert_equal(result.losses, stored["losses"])
    assert_equal(result.rewards[0], torch.cat([stored["chosen_rewards"], stored["rejected_rewards"]]))
    assert_equal(logits.grad, stored["grad_logits"])


def terms(*entries: dict[str, Any]) -> Objective:
    """The loss of a config that lists these."""
    plain = [{key: value for key, value in one.items() if key not in ("name", "weight")} for one in entries]
    return Objective(
        [
            Term(name=one["name"], loss=LOSSES[one["name"]], settings=settings, weight=one.get("weight", 1.0))
            for one, settings in zip(entries, plain, strict=True)
        ]
    )


def test_llava_hound_is_a_list_of_dpo_and_nll() -> None:
    stored = golden("llava_hound_dpo_sft")
    both = [leaf(stored[f"{name}_logits"]) for name in ("chosen", "rejected")]

    def sums(logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        found = [token_logps(one, stored[f"{name}_labels"]) for one, name in zip(logits, ("chosen", "rejected"), strict=True)]
        return torch.stack([logps.sum(1) for logps, _ in found], 1), torch.stack([s.double().sum(1) for _, s in found], 1)

    policy, lengths = sums(both)
    reference, _ = sums([stored[f"ref_{name}_logits"] for name in ("chosen", "rejected")])
    objective = terms({"name": "dpo"}, {"name": "nll", "weight": float(stored["gamma"]), "reduction": "token"})
    mean_length = lengths[:, 0].mean().expand(3)
    result = objective({"policy": policy}, {"policy": reference}, {"mean_length": mean_length})
    result.losses.mean().backward()
    assert_equal(dpo(policy, reference).losses, stored["dpo_losses"])
    assert_equal(nll(policy, mean_length=mean_length, reduction="token").losses.mean(), stored["sft_loss"])
    assert_equal(result.losses.mean(), stored["loss"])
    for one, name in zip(both, ("chosen", "rejected"), strict=True):
        assert_equal(one.grad, stored[f"grad_{name}_logits"])


def test_mpo_is_a_list_of_dpo_shifted_bco_and_nll_over_three_steps() -> None:
    stored = golden("mpo_internvl")
    shares = {name: float(stored[f"w_{letter}"]) for name, letter in (("dpo", "p"), ("bco", "q"), ("nll", "g"))}
    objective = terms(
        {"name": "dpo", "weight": shares["dpo"]},
        {"name": "bco", "weight": shares["bco"]},
        {"name": "nll", "weight": shares["nll"], "reduction": "token"},
    )
    for step in range(int(stored["n_steps"])):
        policy, reference = (
            torch.stack([stored[f"{part}_{one}_logps_{step}"] for one in ("chosen", "rejected")], 1)
            for part in ("policy", "reference")
        )
        policy = leaf(policy)
        likelihood = -policy[:, 0].detach().sum() / stored[f"nll_{step}"]  # the stored NLL is a constant: its length is made up
        side = {"mean_length": (likelihood / 6).expand(6)}
        result = objective({"policy": policy}, {"policy": reference}, side)
        assert_equal(0.1 * objective.memory["shift"][0], stored[f"running_delta_{step}"])
        assert_equal(result.losses.mean(), stored[f"loss_{step}"])
        of_likelihood = torch.zeros_like(policy.detach())
        of_likelihood[:, 0] = -shares["nll"] / likelihood
        gradient = torch.autograd.grad(result.losses.mean(), policy)[0] - of_likelihood
        expected = [stored[f"grad_policy_{one}_logps_{step}"] for one in ("chosen", "rejected")]
        assert_equal(gradient, torch.stack(expected, 1))
        assert_equal(dpo(policy, reference).losses, stored[f"sigmoid_losses_{step}"])
        shift = objective.memory["shift"][0]
        assert_equal(bco(policy, reference, shift=shift).losses, stored[f"bco_losses_{step}"])


# By hand


def test_blind_bpo_starts_at_ln_2_a_pair_and_a_blind_response_like_the_chosen_one_teaches_nothing() -> None:
    same = -torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(blind_bpo(same, same).losses, torch.full((3,), 3 * LN2, dtype=torch.float64))
    policy = leaf(tensor([-4.0, -6.0, -4.0]))
    reference = tensor([-5.0, -6.5, -5.0])
    losses = blind_bpo(policy, reference).losses
    assert losses.tolist() == pytest.approx([LN2 + math.log1p(math.exp(-0.1 * 0.5))], rel=1e-14)
    losses.sum().backward()
    assert policy.grad.sum().item() == pytest.approx(0.0, abs=1e-15)
    left = -0.1 / (1 + math.exp(0.05))
    # The blind one and the chosen one are one response: their two gradients of 0.05 cancel.
    assert policy.grad[0].tolist() == pytest.approx([left - 0.05, -left, 0.05], rel=1e-13)


def test_blind_bpo_with_several_rejected_responses_has_the_gradient_of_each_pair() -> None:
    """dL/dD_chosen = -beta * sum of shares * sigma(-z), dL/dD_j = beta * share * sigma(-z_j),  z_j = beta * (D_chosen - D_j)"""
    draw = torch.Generator().manual_seed(1)
    policy, reference = (40 * torch.randn(6, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    policy = leaf(policy)
    weight = torch.rand(6, dtype=torch.float64, generator=draw)
    for reduction, part in (("sum", 1.0), ("mean", 0.25)):
        losses = blind_bpo(policy, reference, weight, beta=0.2, blind_weight=0.5, reduction=reduction).losses
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        margins = 0.2 * (policy - reference).detach()
        falls = torch.sigmoid(margins[:, 1:] - margins[:, :1]) * tensor([1.0, 1.0, 1.0, 0.5])
        slopes = 0.2 * part * weight[:, None] * falls
        assert_equal(gradient, torch.cat([-slopes.sum(1, keepdim=True), slopes], 1))


def test_the_mean_of_blind_bpo_is_that_of_dpo_over_all_pairs_as_rows_of_their_own() -> None:
    """The released recipe: every rejected response, the blind one too, in a row with the chosen one."""
    draw = torch.Generator().manual_seed(2)
    policy, reference = (20 * torch.randn(6, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    rows = [torch.cat([values[:, [0, j]] for j in (1, 2, 3)]) for values in (policy, reference)]
    assert_equal(blind_bpo(policy, reference, reduction="mean").losses.mean(), dpo(*rows, beta=0.1).losses.mean())


@pytest.mark.parametrize("name", ["blind_bpo", "mdpo", "re_align", "chip", "svco", "symmpo", "povid", "vdpo", "opa_dpo"])
def test_margins_beyond_any_exponent_are_finite_and_have_gradients(name: str) -> None:
    for size in (-1e5, 1e5):
        values = {key: value.float() for key, value in data(name).items()}
        values["policy"] = leaf(values["policy"] + size * torch.linspace(1, -1, values["policy"].shape[1]))
        losses = LOSSES[name](**values).losses
        losses.sum().backward()
        assert losses.isfinite().all() and values["policy"].grad.isfinite().all()


def test_two_responses_are_too_few_for_blind_bpo_and_its_alias() -> None:
    pair = tensor([-1.0, -2.0])
    assert LOSSES["bpo"] is LOSSES["blind_bpo"] is blind_bpo
    with pytest.raises(
        ValueError, match=r"blind_bpo: got 2 responses a prompt, want chosen, rejected and blind\. .*data\.view"
    ):
        blind_bpo(pair, pair)
    objective = terms({"name": "bpo"})
    objective.try_settings()
    with pytest.raises(UserError, match=r"loss\.blind_bpo: got 2 responses a prompt"):
        objective.try_out({}, 2)
    objective.try_out({}, 5)
    with pytest.raises(UserError, match=r"loss\.blind_bpo\.beta: got -1\.0, want a positive number"):
        terms({"name": "bpo", "beta": -1.0}).try_settings()


def test_mdpo_as_released_compares_the_policy_with_the_reference_under_another_draw() -> None:
    given = tensor([-3.0, -5.0]), tensor([-4.0, -4.0]), tensor([-6.0])
    redrawn = tensor([-5.5])
    found = mdpo(*given, tensor([-9.0]), reference_redrawn=redrawn, variant="released")
    assert torch.equal(found.losses, mdpo(*given, redrawn).losses)
    asked = {variant: terms({"name": "mdpo", "variant": variant}).measures for variant in ("paper", "released")}
    assert asked == {"paper": {"degraded"}, "released": {"degraded", "redrawn"}}
    with pytest.raises(ValueError, match=r"mdpo\.variant: got released without reference_redrawn"):
        mdpo(*given, redrawn, variant="released")
    terms({"name": "mdpo", "variant": "released"}).try_settings()


def test_re_align_as_released_scores_what_the_model_finds_likeliest_in_place_of_the_labels() -> None:
    """From logits, as its trainer does: the first of the two likeliest tokens that is not the label."""
    draw = torch.Generator().manual_seed(3)
    labels = {name: torch.randint(7, (4, 5), generator=draw) for name in ("chosen", "rejected")}

    def measured() -> dict[str, Tensor]:
        """Of one model: logits of (chosen, rejected, chosen under the retrieved image) -> sums."""
        logits = [leaf(3 * torch.randn(4, 5, 7, dtype=torch.float64, generator=draw)) for _ in range(3)]
        asked = (labels["chosen"], labels["rejected"], labels["chosen"])
        own, other = [], []
        for values, ids in zip(logits, asked, strict=True):
            first, second = values.topk(2, dim=2).indices.unbind(2)
            rivals = torch.where(first == ids, second, first)
            logps = values.log_softmax(2)
            own.append(logps.gather(2, ids[..., None]).sum((1, 2)))
            other.append(logps.gather(2, rivals[..., None]).sum((1, 2)))
        pair = {"policy": torch.stack(own[:2], 1), "degraded": own[2][:, None]}
        return {**pair, "rival": torch.stack(other[:2], 1), "degraded_rival": other[2][:, None]}

    policy, reference = measured(), {name: value.detach() for name, value in measured().items()}
    objective = terms({"name": "re_align", "variant": "released"})
    assert objective.measures == {"degraded", "rival", "degraded_rival"}
    found = objective(policy, reference, {})

    def ratio(name: str, column: int) -> Tensor:
        return policy[name][:, column] - reference[name][:, column]

    chosen = ratio("policy", 0)
    links = [torch.sigmoid(0.1 * (chosen - worse)).log() for worse in (ratio("rival", 1), ratio("degraded_rival", 0))]
    assert_equal(found.losses, -links[0] - links[1])
    assert_equal(found.rewards, 0.1 * torch.stack([chosen, ratio("rival", 1)], 1).detach())
    (on_rejected,) = torch.autograd.grad(found.losses.sum(), policy["policy"], allow_unused=True)
    assert (on_rejected[:, 0] < 0).all() and not on_rejected[:, 1].any(), "the rejected response's own tokens teach nothing"
    paper = terms({"name": "re_align"})
    assert paper.measures == {"degraded"}, "rivals are measured for the variant alone"
    assert not torch.equal(paper(policy, reference, {}).losses, found.losses)
    objective.try_settings()
    with pytest.raises(ValueError, match=r"re_align\.variant: got released without rivals, want those of policy and reference"):
        re_align(tensor([-1.0, -2.0]), tensor([-1.0, -2.0]), tensor([-1.0]), tensor([-1.0]), variant="released")


def test_chip_puts_both_preferences_in_one_link_as_released_and_in_two_in_the_paper() -> None:
    policy, reference = leaf(tensor([-10.0, -12.0])), tensor([-11.0, -11.0])
    degraded, known = leaf(tensor([-15.0])), tensor([-13.0])
    divergence = leaf(tensor([2.0, 5.0]))
    textual, visual = 0.1 * (1 + 1 - 0.1 * 3), 0.1 * (1 + 2)
    given = (policy, reference, degraded, known, divergence)
    released = chip(*given, variant="released")
    assert released.losses.item() == pytest.approx(math.log1p(math.exp(-textual - visual)), rel=1e-14)
    paper = chip(*given)
    assert paper.losses.item() == pytest.approx(math.log1p(math.exp(-textual)) + math.log1p(math.exp(-visual)), rel=1e-14)
    released.losses.sum().backward()
    slope = 0.1 / (1 + math.exp(textual + visual))
    assert policy.grad[0].tolist() == pytest.approx([-2 * slope, slope], rel=1e-13)
    assert degraded.grad.item() == pytest.approx(slope, rel=1e-13)
    assert divergence.grad[0].tolist() == pytest.approx([0.0, 0.1 * slope], rel=1e-13)  # the chosen one's is held
    alone = chip(*given, kappa=0.0).losses
    assert torch.equal(alone, re_align(policy, reference, degraded, known).losses)


def test_svco_is_four_preferences_of_images() -> None:
    policy, reference = tensor([-3.0, -4.0]), tensor([-4.0, -4.0])
    absent, crossed = tensor([-6.0, -5.0]), tensor([-9.0, -5.0])
    result = svco(policy, reference, crossed, tensor([-8.0, -6.0]), absent, tensor([-6.0, -7.0]), beta=0.5)
    own, without, other = [1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]
    margins = [own[0] - without[0], without[0] - other[0], own[1] - without[1], without[1] - other[1]]
    assert result.losses.item() == pytest.approx(sum(math.log1p(math.exp(-0.5 * m)) for m in margins), rel=1e-14)
    assert result.rewards.tolist() == [[0.5, 0.0]]


def test_symmpo_has_five_links_and_a_penalty_on_unequal_margins() -> None:
    policy, reference = leaf(tensor([-3.0, -4.0, -5.0])), tensor([-4.0, -4.5, -3.0])
    crossed = leaf(tensor([-7.0, -6.0]))
    result = symmpo(policy, reference, crossed, tensor([-6.0, -6.5]), regulariser=1e-2)
    d1, d2, worse, d1_other, d2_other = 1.0, 0.5, -2.0, -1.0, 0.5
    first, second = d1 - d2_other, d2 - d1_other
    expected = math.log1p(math.exp(-0.1 * (d1 - worse))) + sum(math.log1p(math.exp(-0.1 * d)) for d in (d1, d2))
    expected += 0.5 * sum(math.log1p(math.exp(-0.1 * m)) for m in (first, second)) + 1e-2 * (first - second) ** 2
    assert result.losses.item() == pytest.approx(expected, rel=1e-14)
    result.losses.sum().backward()

    def slope(x: float) -> float:
        return -0.1 / (1 + math.exp(0.1 * x))

    apart = 2e-2 * (first - second)
    assert crossed.grad[0].tolist() == pytest.approx([-0.5 * slope(second) + apart, -0.5 * slope(first) - apart], rel=1e-13)
    assert policy.grad[0, 2].item() == pytest.approx(-slope(d1 - worse), rel=1e-13)


def test_mmrlhf_scales_beta_by_the_gap_of_a_reward_model_and_keeps_it_positive() -> None:
    policy, reference = tensor(*[[-3.0, -5.0]] * 3), tensor(*[[-4.0, -4.0]] * 3)
    scores = tensor([2.0, 0.0], [0.5, 0.5], [0.0, 300.0])
    released = mmrlhf(policy, reference, scores, scale=0.5, variant="released")
    betas = [0.1 * (1 + 0.5 * 2), 0.1, 1e-3]
    assert released.losses.tolist() == pytest.approx([math.log1p(math.exp(-2 * b)) for b in betas], rel=1e-14)
    paper = mmrlhf(policy, reference, scores, scale=0.5, slope=0.25)
    betas[0] = 0.1 * (1 + 0.5 * (1 - math.exp(-0.5)))
    assert paper.losses.tolist() == pytest.approx([math.log1p(math.exp(-2 * b)) for b in betas], rel=1e-14)
    assert torch.equal(mmrlhf(policy, reference, scores, scale=0.0).losses, dpo(policy, reference).losses)
    assert mmrlhf(policy, reference, -1e6 * scores).losses.isfinite().all()


def test_povid_halves_dpo_between_the_rejected_response_and_the_models_own_tokens() -> None:
    policy, reference = tensor([-3.0, -5.0]), tensor([-4.0, -4.0])
    greedy, known = leaf(tensor([-2.0])), tensor([-2.5])
    losses = povid(policy, reference, greedy, known).losses
    own, noisy = math.log1p(math.exp(-0.1 * 2)), math.log1p(math.exp(-0.1 * (1 - 0.5)))
    assert losses.item() == pytest.approx(0.5 * own + 0.5 * noisy, rel=1e-14)
    losses.sum().backward()
    assert greedy.grad.item() == pytest.approx(0.05 / (1 + math.exp(0.05)), rel=1e-13)
    assert torch.equal(povid(policy, reference, greedy, known, noisy_weight=0.0).losses, dpo(policy, reference).losses)


def test_vdpo_guides_scores_by_the_image_without_a_gradient_through_the_empty_one() -> None:
    policy, reference, degraded = leaf(tensor([-3.0, -5.0])), tensor([-4.0, -4.0]), leaf(tensor([-6.0, -5.5]))
    result = vdpo(policy, reference, degraded, gamma=1.5)
    chosen, rejected = 1.5 * -3 - 0.5 * -6 + 4, 1.5 * -5 - 0.5 * -5.5 + 4
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(-0.1 * (chosen - rejected))), rel=1e-14)
    result.losses.sum().backward()
    assert degraded.grad is None
    slope = -0.1 * 1.5 / (1 + math.exp(0.1 * (chosen - rejected)))
    assert policy.grad[0].tolist() == pytest.approx([slope, -slope], rel=1e-13)
    assert result.rewards[0].tolist() == pytest.approx([0.1, -0.1])
    assert torch.equal(vdpo(policy, reference, degraded, gamma=1.0).losses, dpo(policy, reference).losses)


@pytest.mark.parametrize("gamma", [0.0, 0.5, -1.0, math.nan, math.inf])
def test_vdpo_refuses_the_released_gamma_under_which_nothing_is_learnt(gamma: float) -> None:
    with pytest.raises(UserError, match=r"loss\.vdpo\.gamma: got .*, want (1 \(DPO\) or more|a finite number)"):
        terms({"name": "vdpo", "gamma": gamma}).try_settings()


def test_the_language_bias_of_vdpo_has_a_gradient_through_the_image_alone() -> None:
    policy, degraded = leaf(tensor([-3.0, -5.0])), leaf(tensor([-4.0]))
    given = (policy, tensor([-4.0, -4.0]), degraded, tensor([-4.5]))
    both, image = image_preference(*given), image_preference(*given, gradient="image")
    assert torch.equal(both.losses, image.losses)
    assert both.losses.item() == pytest.approx(math.log1p(math.exp(-0.1 * (1 - 0.5))), rel=1e-14)
    image.losses.sum().backward()
    assert degraded.grad is None and policy.grad[0, 0] < 0 == policy.grad[0, 1]


def test_tpo_visual_is_dpo_on_anchored_scores() -> None:
    anchored, reference = leaf(tensor([-3.0, -5.0])), tensor([-4.0, -4.0])
    result = tpo_visual(anchored, reference)
    assert torch.equal(result.losses, dpo(anchored, reference).losses)
    assert result.rewards[0].tolist() == pytest.approx([0.1, -0.1])
    objective = terms({"name": "tpo_visual"})
    assert objective.measures == {"anchored"} and objective.needs_reference
    with pytest.raises(UserError, match="got 3 candidates a prompt, want 2"):
        objective.check((), 3)


def test_opa_dpo_sets_two_good_responses_against_the_original_and_against_themselves_under_a_mask() -> None:
    policy, reference = tensor([-3.0, -4.0, -5.0]), tensor([-4.0, -4.5, -4.0])
    masked, known = tensor([-6.0, -6.0, 9.0]), tensor([-5.0, -6.25, -9.0])
    result = opa_dpo(policy, reference, masked, known, margin=0.2)
    good, original, worse = (1.0, 0.5), -1.0, (-1.0, 0.25)
    expected = sum(
        math.log1p(math.exp(-0.1 * (d - original)))
        + 0.2 * math.log1p(math.exp(-0.1 * (d - m)))
        + math.log1p(math.exp(0.2 - 0.1 * d))
        for d, m in zip(good, worse, strict=True)
    )
    assert result.losses.item() == pytest.approx(expected, rel=1e-14)


def test_opa_dpo_as_released_means_over_padded_places_and_pushes_the_corrected_response_down() -> None:
    policy = leaf(tensor([[-1.0, -2.0], [-1.5, 0.0], [-3.0, -1.0]]))
    reference, masked = torch.zeros(1, 3, 2, dtype=torch.float64), tensor([[-2.0, -4.0], [-3.0, 0.0]])
    badness = tensor([[0.5, 0.0], [2.0, 1.0]])
    loss = opa_dpo_tokens(policy, reference, masked, torch.zeros_like(masked), badness)

    def mean(*margins: float) -> float:
        return sum(math.log1p(math.exp(-0.1 * m)) for m in margins) / len(margins)

    expected = mean(2.0, -1.0) + mean(0.5 * -1.5 - 2 * -3.0, 0.0 + 1.0) + 0.2 * (mean(1.0, 2.0) + mean(1.5, 0.0))
    expected += 2 * mean(-1.0, -2.0) + 2 * mean(1.5, 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    loss.backward()
    given = (reference, masked, torch.zeros_like(masked))
    anchors_only = opa_dpo_tokens(policy, *given, image_weight=0.0) - opa_dpo_tokens(
        policy, *given, image_weight=0.0, anchor_weight=0.0
    )
    gradient = torch.autograd.grad(anchors_only, policy)[0]
    assert (gradient[0, 0] < 0).all() and (gradient[0, 1] > 0).all()


def test_opa_dpo_takes_the_released_loss_row_by_row() -> None:
    draw = torch.Generator().manual_seed(4)
    values = {name: -torch.rand(4, 3, 6, dtype=torch.float64, generator=draw) for name in ("tokens", "each_degraded_tokens")}
    known = {f"reference_{name}": value - 0.1 * torch.rand_like(value) for name, value in values.items()}
    sums = [value.sum(2) for value in (values["tokens"], known["reference_tokens"])]
    masked = [value.sum(2) for value in (values["each_degraded_tokens"], known["reference_each_degraded_tokens"])]
    found = opa_dpo(*sums, *masked, **values, **known, beta=0.3, image_weight=0.4, anchor_weight=0.7, variant="released")
    told = (
        values["tokens"],
        known["reference_tokens"],
        values["each_degraded_tokens"][:, :2],
        known["reference_each_degraded_tokens"][:, :2],
    )
    whole = opa_dpo_tokens(*told, beta=0.3, image_weight=0.4, anchor_weight=0.7)
    assert_equal(found.losses.mean(), whole)
    assert_equal(found.rewards, 0.3 * (sums[0] - sums[1]))
    objective = terms({"name": "opa_dpo", "variant": "released"})
    assert objective.measures == {"each_degraded", "tokens", "each_degraded_tokens"}
    assert terms({"name": "opa_dpo"}).measures == {"each_degraded"}
    objective.try_settings()
    with pytest.raises(UserError, match=r"loss\.opa_dpo\.margin: got 1\.0 with variant released, want 0"):
        terms({"name": "opa_dpo", "variant": "released", "margin": 1.0}).try_settings()
    with pytest.raises(ValueError, match=r"opa_dpo\.variant: got released without tokens"):
        opa_dpo(*sums, *masked, variant="released")


# What all of them are told


NAMES = [
    *("blind_bpo", "image_preference", "mdpo", "re_align", "chip", "svco", "symmpo", "ddpo", "mmrlhf", "povid", "vdpo"),
    *("tpo_visual", "opa_dpo"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_share_of_the_batch_counts_by_its_weight(name: str) -> None:
    values = data(name)
    weight = tensor(0.0, 1.0, 2.5)
    plain = LOSSES[name](**values)
    heavy = LOSSES[name](**values, weight=weight)
    torch.testing.assert_close(heavy.losses, weight * plain.losses, rtol=1e-14, atol=0)
    assert torch.equal(heavy.rewards, plain.rewards) and not plain.rewards.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_policy_costs_ln_2_a_link_whatever_the_images(name: str) -> None:
    links: dict[str, float] = {
        "blind_bpo": 2,
        "mdpo": 3,
        "re_align": 2,
        "chip": 2,
        "svco": 4,
        "symmpo": 4,
        "opa_dpo": 2 * (1 + 0.2 + 1),
    }
    values = data(name)
    for key in [key for key in values if key.startswith("reference")]:
        values[key] = values["policy" if key == "reference" else key.removeprefix("reference_")].clone()
    for key in ("divergence",):
        if key in values:
            values[key] = torch.zeros_like(values[key])
    if name == "vdpo":
        values["each_degraded"] = values["policy"].clone()
    if name == "symmpo":  # its penalty sees log-ratios alone
        assert values["crossed"].shape == (3, 2)
    losses = LOSSES[name](**values).losses
    torch.testing.assert_close(losses, torch.full((3,), links.get(name, 1) * LN2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_measures_of_images_are_asked_for_by_name() -> None:
    asked = {name: terms({"name": name}).measures for name in NAMES}
    assert asked["mdpo"] == asked["re_align"] == {"degraded"} and asked["chip"] == {"degraded", "divergence"}
    assert asked["svco"] == {"crossed", "each_absent"} and asked["symmpo"] == {"crossed"}
    assert asked["povid"] == {"greedy"} and asked["vdpo"] == asked["opa_dpo"] == {"each_degraded"}
    assert asked["blind_bpo"] == asked["ddpo"] == asked["mmrlhf"] == frozenset()
    assert not STATISTICS.keys() & frozenset().union(*asked.values())
