"""Data methods: every golden score and case, and values worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmalign.curation.code_tests import correctness_pair, mutual_ranking, speed_pairs
from mmalign.curation.corruptions import CORRUPTIONS, STAGES, drop, keeps_pair, reverse, shuffle
from mmalign.curation.curriculum import curry_stages, gap_stages, rated_pairs
from mmalign.curation.density_ratio import annotated, density_ratio, response_sum
from mmalign.curation.followups import followup_reward, followup_rewards
from mmalign.curation.grounding import length_incentive, r3_reward, uniqueness
from mmalign.curation.judging import both_orders, self_preference
from mmalign.curation.learnability import davir_scores, top_share
from mmalign.curation.reward_conditioning import GOAL, agrees, goal, reward_conditioned
from mmalign.curation.self_labels import WINDOW, confidence_threshold, decoupled, implicit_rewards, label_probs
from mmalign.curation.step_search import Step, confidence, label_smoothing, node_value, puct, step_pair, step_prior
from mmalign.curation.token_effects import history_effects, token_weights
from mmalign.curation.two_models import delta_pairs, dissatisfaction_pairs
from mmalign.curation.voting import denoised, preference_strength, standardised, vote_diversity
from mmalign.errors import UserError
from mmalign.moving_reference import Following, MovingReference

FOLDER = Path(__file__).parent / "golden" / "text"
SCORES = np.load(FOLDER / "data_scores.npz")
SEQ = np.load(FOLDER / "inputs_seq.npz")
CASES: dict[str, Any] = json.loads((FOLDER / "data_cases.json").read_text())


def golden(name: str) -> Tensor:
    return torch.as_tensor(SCORES[name])


def pairs_of(chosen: str, rejected: str) -> Tensor:
    return torch.stack([torch.as_tensor(SEQ[chosen]), torch.as_tensor(SEQ[rejected])], 1)


# learnability


def test_davir_scores_of_sums_and_of_token_means_are_the_golden_numbers() -> None:
    base, tuned = SCORES["davir/loss_base"], SCORES["davir/loss_ref"]
    scores = davir_scores(base.tolist(), tuned.tolist())
    assert scores == pytest.approx(SCORES["davir/score_sum"], rel=1e-12)
    lengths = SEQ["chosen_len"]
    assert davir_scores((base / lengths).tolist(), (tuned / lengths).tolist()) == pytest.approx(
        SCORES["davir/score_avg"], rel=1e-12
    )
    assert top_share(scores, 0.5) == SCORES["davir/top_half"].tolist()


def test_a_share_keeps_at_least_one_and_the_earlier_of_a_tie() -> None:
    assert top_share([1.0, 3.0, 3.0, 2.0], 0.01) == [1]
    assert top_share([1.0, 3.0, 3.0, 2.0], 0.75) == [1, 2, 3]
    assert top_share([], 0.5) == []
    with pytest.raises(UserError, match="share: got 0, want above 0"):
        top_share([1.0], 0)


def test_a_response_that_is_already_certain_has_no_learnability() -> None:
    with pytest.raises(ValueError, match="want positive ones"):
        davir_scores([1.0, 0.0], [1.0, 1.0])


# density ratio

STRONG = (
    (["<s>", "Hi", "?", "A", "b", "c", "</s>"], [-0.1, -1.0, -0.5, -0.2, -0.7, -0.3, -0.9], 3),
    (["<s>", "Q", "x", "y", "<pad>"], [-0.1, -0.4, -1.2, -0.6, 0.0], 2),
)
WEAK = (
    (["<s>", "H", "i", "?", "A", "bc", "</s>"], [-0.1, -0.8, -0.9, -0.6, -0.5, -1.9, -1.1], 4),
    (["<s>", "Q", "xy", "</s>"], [-0.1, -0.4, -2.5, -0.2], 2),
)


@pytest.mark.parametrize(("case", "special"), [("cdr_drsow_mask0", ("<pad>",)), ("cdr_drsow_mask1", ("<s>", "</s>", "<pad>"))])
def test_density_ratios_are_those_of_the_published_code(case: str, special: tuple[str, ...]) -> None:
    sums = [
        [response_sum(logps, tokens, count, special=special, shifted=True) for tokens, logps, count in model]
        for model in (STRONG, WEAK)
    ]
    strong, weak = (torch.tensor([total for total, _ in model], dtype=torch.float64) for model in sums)
    lengths = torch.tensor([count for _, count in sums[0]], dtype=torch.float64)
    assert density_ratio(strong, weak).tolist() == pytest.approx(SCORES[f"{case}/reward"], rel=1e-12)
    assert density_ratio(strong, weak, lengths).tolist() == pytest.approx(SCORES[f"{case}/avg"], rel=1e-12)
    assert lengths.tolist() == SCORES[f"{case}/n_strong"].tolist()
    assert [count for _, count in sums[1]] == SCORES[f"{case}/n_weak"].tolist()


def test_a_response_does_not_score_the_last_token_of_its_prompt_unless_asked_to() -> None:
    assert response_sum([-1.0, -2.0, -4.0], ["a", "b", "c"], 2) == (-4.0, 1)
    assert response_sum([-1.0, -2.0, -4.0], ["a", "b", "c"], 2, shifted=True) == (-6.0, 2)


def test_only_the_strong_model_is_asked_what_is_customised() -> None:
    asked = []

    def strong(prompts: list[str], responses: list[str]) -> Tensor:
        asked.append(list(prompts))
        return torch.tensor([-1.0, -2.0])

    def weak(prompts: list[str], responses: list[str]) -> Tensor:
        asked.append(list(prompts))
        return torch.tensor([-3.0, -1.0])

    scores = annotated(["p", "q"], ["a", "b"], strong=strong, weak=weak, customise=lambda prompt: f"Be brief.\n{prompt}")
    assert scores.tolist() == [2.0, -1.0]
    assert asked == [["Be brief.\np", "Be brief.\nq"], ["p", "q"]]


# votes


def test_strength_is_the_mean_and_spread_of_the_judges_differences() -> None:
    chosen = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    rejected = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    mean, deviation = preference_strength(chosen, rejected)
    assert mean.tolist() == [2.0, -1.0]
    assert deviation.tolist() == [1.0, 1.0]


def test_votes_turn_soften_and_part_pairs() -> None:
    strength = [2.0, -1.0, -3.0, 0.5]
    labels = denoised(strength, flip=0.25, labels="soft", temperature=2.0, margin=True)
    assert [one.flipped for one in labels] == [False, False, True, False]
    expected = [1 / (1 + math.exp(-mu / 2)) for mu in (2.0, -1.0, 3.0, 0.5)]
    assert [one.prob for one in labels] == pytest.approx(expected)
    assert [one.margin for one in labels] == [2.0, 0.0, 3.0, 0.5]


def test_a_pair_that_the_judges_lean_to_is_never_turned() -> None:
    assert [one.flipped for one in denoised([0.1, 0.2, -0.1], flip=1.0)] == [False, False, True]
    assert all(one.prob is None and one.margin is None for one in denoised([0.1, -5.0]))


@pytest.mark.parametrize(
    ("settings", "message"), [({"flip": 1.5}, "flip: got 1.5"), ({"temperature": 0}, "temperature: got 0")]
)
def test_votes_refuse_settings_without_a_meaning(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        denoised([1.0], **settings)  # type: ignore[arg-type]


def test_judges_of_different_units_are_brought_to_one() -> None:
    scores = torch.tensor([[0.0, 2.0], [0.0, 200.0], [7.0, 7.0]])
    assert standardised(scores).tolist() == [[0.0, 2.0], [0.0, 2.0], [7.0, 7.0]]


def test_the_diversity_of_heads_is_that_of_the_published_code() -> None:
    first, second = (golden(f"p2c_diversity/head_logit_{n}")[..., 0].requires_grad_() for n in (1, 2))
    diversity = vote_diversity(first, second)
    assert diversity.item() == pytest.approx(float(SCORES["p2c_diversity/value"]), rel=1e-6)
    [gradient] = torch.autograd.grad(diversity, first)
    assert gradient.abs().sum() > 0


# self-labels


def test_the_confidence_threshold_is_the_golden_one() -> None:
    margins = SCORES["spa_threshold/last_50_margins"].tolist()
    assert len(margins) == WINDOW
    assert confidence_threshold(margins) == pytest.approx(float(SCORES["spa_threshold/threshold"]), rel=1e-12)
    assert confidence_threshold([3.0]) == 3.0


def test_labels_in_doubt_are_smoothed() -> None:
    assert label_probs([0.1, 0.5, 0.6], 0.5) == [0.9, 0.9, 1.0]
    with pytest.raises(UserError, match=r"smoothing: got 0\.6"):
        label_probs([0.1], 0.5, smoothing=0.6)
    rewards = implicit_rewards(torch.tensor([[-4.0, -6.0]]), torch.tensor([[-5.0, -5.0]]), 0.1)
    assert rewards.tolist() == [pytest.approx([0.1, -0.1])]
    assert decoupled(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0]), 2.0).tolist() == [2.0, -2.0]


# step search


def test_confidence_and_smoothing_of_step_pairs_are_those_of_the_published_code() -> None:
    visits = list(zip(*(SCORES[f"mcts_dpo_confidence/{w}_visits"].tolist() for w in ("better", "worse")), strict=True))
    assert [confidence(b, w) for b, w in visits] == pytest.approx(SCORES["mcts_dpo_confidence/confidence"], rel=1e-12)
    assert [label_smoothing(b, w) for b, w in visits] == pytest.approx(SCORES["mcts_dpo_confidence/label_smoothing"], rel=1e-12)


def test_puct_and_the_prior_are_those_of_the_published_code() -> None:
    columns = zip(*(SCORES[f"mcts_dpo_puct/{name}"].tolist() for name in ("Q", "p", "N")), strict=True)
    parent = int(SCORES["mcts_dpo_puct/parent_N"])
    assert [puct(q, p, n, parent) for q, p, n in columns] == pytest.approx(SCORES["mcts_dpo_puct/puct"], rel=1e-12)
    prior = step_prior([-0.5, -1.0, -0.2])
    assert prior == pytest.approx(float(SCORES["mcts_dpo_puct/prior_of_logps"][0]), rel=1e-12)


def test_a_node_is_worth_its_childrens_quality_by_visits() -> None:
    assert node_value([1.0, 0.0], [3, 0]) == 0.75
    assert node_value([1.0, 0.0], [0, 0]) == 0.5


def test_siblings_are_paired_by_quality_and_ties_of_it_by_share_value_and_visits() -> None:
    siblings = [Step(quality=0.2, visits=1), Step(quality=0.9, share=0.1, visits=2), Step(quality=0.9, share=0.5, visits=6)]
    assert step_pair(siblings) == (2, 0, pytest.approx(1 / (1 + 1 / 6)))
    assert step_pair([Step(quality=0.5), Step(quality=0.5, visits=9)]) is None
    assert step_pair(siblings[:1]) is None


# programs and tests


def test_programs_and_tests_rank_each_other_as_in_the_golden_case() -> None:
    link = golden("codedpo_pagerank/link")
    codes, tests = mutual_ranking(link)
    assert codes.tolist() == pytest.approx(SCORES["codedpo_pagerank/score_code"], rel=1e-12)
    assert tests.tolist() == pytest.approx(SCORES["codedpo_pagerank/score_test"], rel=1e-12)
    codes, tests = mutual_ranking(link, iterations=1)
    assert codes.tolist() == pytest.approx(SCORES["codedpo_pagerank/code_iter1"], rel=1e-12)
    assert tests.tolist() == pytest.approx(SCORES["codedpo_pagerank/test_iter1"], rel=1e-12)
    assert torch.argsort(-mutual_ranking(link)[0]).tolist() == SCORES["codedpo_pagerank/code_rank"].tolist()


def test_programs_pair_by_correctness_and_trusted_ones_by_speed() -> None:
    scores = [5.0, 9.0, 9.0, 1.0]
    assert correctness_pair(scores) == (1, 3)
    assert correctness_pair([2.0, 2.0]) is None
    assert speed_pairs(scores, [0.1, 3.0, 1.0, 0.1], correct=9.0) == [(2, 1)]
    assert speed_pairs(scores, [0.1, 1.05, 1.0, 0.1], correct=9.0, min_ratio=1.1) == []


# follow-ups, rules


def test_the_follow_up_reward_is_the_golden_one() -> None:
    case = CASES["flr"]
    assert followup_reward(case["positive_loglik"], case["negative_loglik"]) == pytest.approx(case["score"], rel=1e-12)
    with pytest.raises(ValueError, match="want at least one of both"):
        followup_reward([], [1.0])


def test_follow_ups_are_asked_after_dialogue_and_response() -> None:
    def logps(contexts: list[str], followups: list[str]) -> Tensor:
        good = torch.tensor(["kind" in context for context in contexts])
        thanks = torch.tensor([said == "Thanks!" for said in followups])
        return torch.where(good == thanks, -1.0, -3.0)

    rewards = followup_rewards(["d", "d"], ["kind", "rude"], positive=["Thanks!"], negative=["No.", "Bad."], logps=logps)
    assert rewards == [2.0, -2.0]


@pytest.mark.parametrize("case", CASES["r3"]["cases"], ids=lambda case: case["text"])
def test_the_terms_of_r3_are_the_golden_ones(case: dict[str, Any]) -> None:
    assert length_incentive(case["text"]) == pytest.approx(case["li"], rel=1e-12)
    assert uniqueness(case["text"]) == pytest.approx(case["rp"], rel=1e-12)


def test_length_counts_for_open_questions_only() -> None:
    text = "a b c a b c a b c"

    def relevance(prompt: str, response: str) -> float:
        return 4.0

    assert r3_reward("q", text, relevance=relevance) == pytest.approx(4 * 0.09 * 3 / 7)
    assert r3_reward("q", text, relevance=relevance, mode="closed", shape=math.sqrt) == pytest.approx(2 * 3 / 7)


# video corruptions


def test_the_schedule_and_the_corruptions_of_clips_are_the_published_ones() -> None:
    assert list(STAGES) == CASES["temple_schedule"]["stages"]
    clips = list(range(9))
    assert reverse(clips, 4) == [8, 6, 7, 4, 5, 2, 3, 0, 1]
    assert reverse(clips, 16) == clips[::-1]
    shuffled = shuffle(clips, 4, seed=1)
    assert sorted(shuffled) == clips and shuffled != clips
    groups = [(0, 1), (2, 3), (4, 5), (6, 7), (8,)]
    assert all([shuffled.index(c) - shuffled.index(group[0]) for c in group] == list(range(len(group))) for group in groups)
    kept = drop(clips, 4, seed=3)
    assert len(kept) == 2 and kept == sorted(kept)
    assert len(drop(clips, 16)) == 1
    assert all(operation([], 4) == [] for operation in CORRUPTIONS.values())
    with pytest.raises(UserError, match="magnitude: got 0"):
        drop(clips, 0)


def test_descriptions_pair_by_length() -> None:
    assert keeps_pair("drop", "long one", "short")
    assert not keeps_pair("drop", "short", "long one")
    assert keeps_pair("reverse", "abcdef", "ghij")
    assert not keeps_pair("shuffle", "abcdefg", "hijk")
    assert not keeps_pair("reverse", "abcd", "xabcdx"), "the chosen one is a part of the rejected one"
    with pytest.raises(UserError, match="want one of drop, reverse, shuffle"):
        keeps_pair("blur", "a", "b")


# token effects


def test_tokens_that_the_history_makes_likelier_weigh_more() -> None:
    with_history = torch.tensor([[0.5, 0.2, 0.9, 0.5]]).log()
    without = torch.tensor([[0.1, 0.2, 0.88, 0.1]]).log()
    effects = history_effects(with_history, without)
    assert effects[0].tolist() == pytest.approx([0.4, 0.0, 0.02, 0.4], abs=1e-6)
    mask = torch.tensor([[True, True, True, False]])
    weights = token_weights(effects, mask)
    assert weights[0].tolist() == pytest.approx([0.9 * 3 / 1.1, 0.1 * 3 / 1.1, 0.1 * 3 / 1.1, 0.0], rel=1e-6)
    assert float(weights.sum()) == pytest.approx(3.0)
    assert token_weights(torch.zeros(1, 4), mask, low=0.0).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="want high above 0"):
        token_weights(effects, mask, high=0.1, low=0.2)


# curricula


def test_the_stages_of_curry_dpo_are_the_golden_ones() -> None:
    case = CASES["curry_dpo"]
    names, ratings = ([one[key] for one in case["input"]] for key in ("id", "rating"))
    stages = [
        {"stage": stage, "chosen": names[better], "rejected": names[worse]}
        for stage, (better, worse) in enumerate(curry_stages(ratings), 1)
    ]
    assert stages == case["stages"]


def test_pairs_of_a_list_by_scheme() -> None:
    ratings = [2.0, 5.0, 5.0, 1.0]
    assert rated_pairs(ratings, "best_vs_rest") == [(1, 3), (1, 0)]
    assert rated_pairs(ratings, "best_worst") == [(1, 3)]
    assert rated_pairs(ratings, "adjacent") == [(2, 0), (0, 3)]
    assert rated_pairs(ratings, "all") == [(1, 3), (2, 3), (1, 0), (2, 0), (0, 3)]
    assert rated_pairs([], "best_vs_rest") == rated_pairs([1.0], "all") == []


def test_pairs_of_a_whole_data_set_are_cut_into_stages_by_gap() -> None:
    assert gap_stages([1.0, 9.0, 4.0, 4.0, 0.5, 2.0], 3) == [3, 1, 1, 2, 3, 2]
    assert gap_stages([], 3) == []


# reward conditioning


def relabelled(template: str) -> tuple[dict[str, Any], dict[str, Any]]:
    row = CASES["reward_augmented"]["input"]
    sides = {"chosen": row["chosen"], "rejected": row["rejected"]}
    scores = {name: row[name] for name in ("overall_score_chosen", "overall_score_rejected")}
    made = []
    for system, turned in reward_conditioned(*scores.values(), template):
        message = {"role": "system", "content": system}
        order = ("rejected", "chosen") if turned else ("chosen", "rejected")
        made.append({**{to: [message, *sides[of]] for to, of in zip(("chosen", "rejected"), order, strict=True)}, **scores})
    return made[0], made[1]


def test_a_pair_becomes_the_two_golden_rows() -> None:
    high, low = relabelled("<SYSTEM target score {score}>")
    assert high == CASES["reward_augmented"]["positive"]
    assert low == CASES["reward_augmented"]["negative"]


def test_the_goal_names_the_score_and_a_template_without_it_is_refused() -> None:
    assert "rated 9 by" in goal(9.0, GOAL) and "rated 3.5 by" in goal(3.5, GOAL)
    with pytest.raises(UserError, match=r"want a text with \{score\} in it"):
        goal(9.0, "Be good.")
    assert agrees([5.0, 4.0], [4.0, 5.0]) and not agrees([1.0], [2.0])


# pairs without a judge


def test_two_models_answers_pair_where_they_differ() -> None:
    strong, weak = {"p": "a", "q": "same", "r": "c"}, {"q": "same", "p": "b", "s": "d"}
    assert delta_pairs(strong, weak) == [("p", "a", "b")]


def test_a_disliked_answer_is_rejected_for_one_that_heard_the_user() -> None:
    heard = []

    def generate(requests: list[str]) -> list[str]:
        heard.extend(requests)
        return ["better", "same", " "]

    log = [("p", "bad", "Too long {answer}."), ("q", "same", "No."), ("r", "x", "No.")]
    assert dissatisfaction_pairs(log, generate=generate) == [("p", "better", "bad")]
    assert "bad" in heard[0] and "Too long" in heard[0]


# judges


def test_self_preference_is_the_golden_one() -> None:
    case = CASES["dbg"]
    forward, backward = (torch.tensor([[case[order]["A"], case[order]["B"]]]) for order in ("forward", "backward"))
    bias = self_preference(forward.double(), backward.double(), torch.tensor([case["gold"]]).double())
    assert bias.tolist() == pytest.approx([case["dbg"]], abs=1e-7)
    assert (bias + case["gold"]).tolist() == pytest.approx([case["prob_first"]], abs=1e-7)


class Swayed:
    """A judge of length, which adds 0.2 for the response that stands first."""

    name = "swayed"

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        shares = [len(one) / (len(one) + len(other)) for one, other in zip(first, second, strict=True)]
        return torch.tensor([min(share + 0.2, 1.0) for share in shares], dtype=torch.float64)


def test_asking_in_both_orders_cancels_what_position_gains_and_shows_it() -> None:
    verdicts = both_orders(Swayed(), ["p", "p"], ["aaa", "aaaaa"], ["a", "aaaa"])
    assert verdicts.prob.tolist() == pytest.approx([0.75, 5 / 9])
    assert verdicts.consistent.tolist() == [True, False]
    assert verdicts.position_bias == pytest.approx(0.2)


# the reference of TR-DPO


@pytest.mark.parametrize(("case", "decay"), [("soft_alpha0_6", 0.4), ("hard", 0.0)])
def test_the_moving_reference_moves_as_in_tr_dpo(case: str, decay: float) -> None:
    weights = nn.Parameter(golden("tr_dpo/ref").clone())
    reference = MovingReference([weights], Following(decay=decay, every=2))
    with torch.no_grad():
        weights.copy_(golden("tr_dpo/theta"))
    reference.follow([weights])
    assert reference.weights[0].tolist() == SCORES["tr_dpo/ref"].tolist(), "between two updates it stands still"
    reference.follow([weights])
    assert reference.weights[0].tolist() == pytest.approx(SCORES[f"tr_dpo/{case}"], rel=1e-12)
