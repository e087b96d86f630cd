"""What else TRL and the papers' equations say of the golden pairs and lists: metrics, sums, ranks, weights, scores of lists."""

import pytest
import torch
from loss_inputs import tensor
from text_golden import arrays, assert_equal, case, leaf, lists, pairs, token_logps
from torch import Tensor

from mmalign.losses import apo_zero_unpaired, dpo, kto, lipo, orpo
from mmalign.losses.reward_models import mean_skew_scores
from mmalign.metrics import averages, preference_metrics, table

BETAS = {"robust_b0.5_e0.3": 0.5, "sigmoid_norm_b2": 2.0, "sppo_hard_b0.001": 1e-3}
CASES = sorted({name.split("/")[0] for name in arrays("trl116_dpo_seq")})


def beta_of(name: str) -> float:
    return BETAS.get(name, 0.5 if "_b0.5" in name else 0.1)


@pytest.mark.parametrize("name", CASES)
def test_plain_log_ratios_times_beta_are_the_rewards_that_trl_logs_of_every_loss(name: str) -> None:
    expected = case("trl116_dpo_seq", name)
    policy, reference = pairs()
    told = preference_metrics(policy[:, 0], policy, {"logps": policy, "logps/ref": reference})
    found = averages(told, table(told).tolist())
    rtol = 1e-6 if name.endswith("f32") else 1e-9
    chosen, rejected = tensor(*(beta_of(name) * found[f"logps/ratio_{side}"] for side in ("chosen", "rejected")))
    assert_equal(chosen, expected["metric_reward_chosen"].double(), rtol)
    assert_equal(rejected, expected["metric_reward_rejected"].double(), rtol)
    assert_equal(chosen - rejected, expected["metric_reward_margin"].double(), rtol)


@pytest.mark.parametrize("name", CASES)
def test_accuracies_are_trls_but_for_the_tie_which_counts_one_half(name: str) -> None:
    policy, reference = pairs()
    ratios = policy - reference
    assert (ratios[:, 0] == ratios[:, 1]).sum() == 1
    told = preference_metrics(policy[:, 0], ratios, {})
    ours = averages(told, table(told).tolist())["rewards/accuracies"]
    assert ours == pytest.approx(case("trl116_dpo_seq", name)["metric_reward_accuracy"].item() + 0.5 / 8, rel=1e-12)


@pytest.mark.parametrize("name", ["kto", "kto_w", "kto_negkl", "kto_b0.5", "apo_zero_unpaired"])
def test_ktos_anchor_and_the_mean_rewards_of_both_classes_are_trls(name: str) -> None:
    stored, expected = arrays("inputs_kto"), case("trl116_kto", name)
    policy, reference, labels = stored["logps"][:, None], stored["ref_logps"][:, None], stored["label"]
    anchor = (stored["kl_logps"] - stored["ref_kl_logps"]).mean()
    anchor = {"kto_negkl": -anchor, "apo_zero_unpaired": torch.zeros_like(anchor)}.get(name, anchor)
    assert_equal(anchor.clamp(min=0), expected["kl"].double())
    if name == "apo_zero_unpaired":
        result = apo_zero_unpaired(policy, reference, labels)
    else:
        result = kto(policy, reference, labels, anchor, beta=beta_of(name))
    assert torch.equal(result.losses, kto(policy, reference, labels, expected["kl"].double(), beta=beta_of(name)).losses)
    told = preference_metrics(result.losses, result.rewards, {}, labels=labels.double())
    found = averages(told, table(told).tolist())
    assert found["rewards/chosen"] == pytest.approx(expected["rewards_chosen_mean"].item(), rel=1e-9)
    assert found["rewards/rejected"] == pytest.approx(expected["rewards_rejected_mean"].item(), rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_odds_of_orpo_are_trls(beta: float) -> None:
    expected, stored = case("trl116_cpo_orpo", f"orpo_b{beta}"), arrays("inputs_seq")
    lengths = torch.stack([stored["chosen_len"], stored["rejected_len"]], 1).double()
    policy, _ = pairs()
    of_odds = (orpo(policy, lengths, beta=beta).losses + policy[:, 0] / lengths[:, 0]) / beta  # -log sigma(odds)
    assert_equal(-of_odds.mean(), expected["mean_log_sigmoid"].double(), 1e-6)
    assert_equal(-torch.expm1(of_odds).log().mean(), expected["mean_log_odds"].double(), 1e-6)


@pytest.mark.parametrize("trainer", ["cpo", "orpo"])
def test_sums_and_means_of_token_log_probabilities_are_those_of_trls_trainers(trainer: str) -> None:
    sums, lengths = token_logps(arrays("inputs_tok")["logits"])
    assert_equal(sums.T.flatten(), case("trl116_cpo_orpo", "get_batch_logps_avg0")[trainer])
    assert_equal((sums / lengths).T.flatten(), case("trl116_cpo_orpo", "get_batch_logps_avg1")[trainer])


def test_logps_of_pairs_are_those_that_trl_logs_and_under_ld_dpo_those_of_its_weighed_tails() -> None:
    stored, tokens = arrays("trl116_dpo_tok"), arrays("inputs_tok")
    sums, lengths = token_logps(tokens["logits"])
    assert_equal(sums.T.flatten(), stored["sigmoid/logps"])
    assert_equal(token_logps(tokens["ref_logits"])[0].T.flatten(), stored["sigmoid/ref_logps"])
    assert_equal((sums / lengths).T.flatten(), stored["sigmoid/avg_logps"])
    assert torch.equal(lengths, torch.stack([tokens["chosen_len"], tokens["rejected_len"]], 1).double())
    by_token = stored["sigmoid/per_token_logps"]
    place = (by_token != 0).cumsum(1)
    heads = lengths.min(1).values.repeat(2)[:, None]
    for name, alpha in (("sigmoid", 1.0), ("ld_alpha0.0", 0.0), ("ld_alpha0.5", 0.5)):
        weighed = (by_token * torch.where(place <= heads, 1.0, alpha)).sum(1)
        for side, values in zip(("chosen", "rejected"), weighed.chunk(2), strict=True):
            assert_equal(values.mean(), stored[f"{name}/metric_logps_{side}"])


# Lists


@pytest.mark.parametrize("rank_by", ["score", "label"])
@pytest.mark.parametrize("log", ["ln", "log2"])
def test_every_pair_of_a_list_pulls_by_the_derived_weight_of_its_ranks(rank_by: str, log: str) -> None:
    expected = case("derived_list", f"lambda_dcg_rankby_{rank_by}_{log}")
    policy, reference, scores = lists()
    rewards = 0.1 * (policy - reference)
    ranked = rewards if rank_by == "score" else scores
    assert torch.equal((ranked[:, None, :] > ranked[:, :, None]).sum(2) + 1, expected["rank"].long())
    logps = leaf(policy)
    settings = {"rank_by": {"score": "model", "label": "label"}[rank_by], "discount": {"ln": "natural", "log2": "log2"}[log]}
    lipo(logps, reference, scores, beta=0.1, **settings).losses.sum().backward()
    better = (scores[:, :, None] > scores[:, None, :]).double()
    pull = 0.1 * better * expected["weights"] * torch.sigmoid(rewards[:, None, :] - rewards[:, :, None])
    assert_equal(logps.grad, pull.sum(1) - pull.sum(2))


def embeddings_of(matrix: Tensor) -> Tensor:
    """Embeddings, in blocks of two, whose skew scores are a given antisymmetric S: (S_ij - S_ji) / 2."""
    return torch.stack([torch.eye(len(matrix), dtype=matrix.dtype), -matrix / 2], 2).flatten(1)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_scores_for_gpo_are_the_derived_means_of_skew_scores(beta: float) -> None:
    expected = case("derived_list", f"gpo_K4_b{beta}")
    matrix = expected["score_matrix"]
    means = mean_skew_scores(embeddings_of(matrix)[None], normalised=False)[0]
    assert_equal(means, expected["s_mean"])


def test_win_rates_for_sppo_are_the_derived_means_over_the_other_answers() -> None:
    expected = case("derived_list", "sppo_K4_b0.1")
    wins = expected["win_prob"]
    assert_equal((wins.sum(1) - wins.diagonal()) / 3, expected["p_mean"])


def test_preferences_between_prompts_are_pairs_of_other_rows() -> None:
    # Columns x1y1, x1y2, x2y1, x2y2: each response belongs to its own prompt, each prompt to its own response.
    expected = case("derived_list", "mapl")
    logps, reference = leaf(expected["policy_logps"]), expected["ref_logps"]

    def axis(*columns: tuple[int, int]) -> Tensor:
        return sum(dpo(logps[:, list(two)], reference[:, list(two)]).losses for two in columns)

    standard, by_prompt = axis((0, 1), (3, 2)), axis((0, 2), (3, 1))
    assert_equal(standard, expected["standard"])
    assert_equal(by_prompt, expected["prompt_axis"])
    loss = (standard + by_prompt).mean()
    loss.backward()
    assert_equal(loss, expected["loss"])
    assert_equal(logps.grad, expected["grad"])
