import math

import pytest

from mmalign.errors import UserError
from mmalign.records import VIEWS, Comparison, Content, Dropped, Message, joint, pair, ranked, step, unpaired

TEXTS = ("aa", "bb", "cc", "dd")

OF_SIGHT = {"blind", "clips", "crossed", "retrieved"}  # test_views_sight.py


def row(k=4, **known):
    candidates = tuple(Content(text=text) for text in TEXTS[:k])
    return Comparison(id="r", prompt=Content(text="q"), candidates=candidates, **known)


def said(examples):
    return [tuple(sample.completion.text for sample in example.samples) for example in examples]


SCORED = {"scores": {"judge": (4.0, 9.0, 6.0, 2.0)}}  # best to worst: bb, cc, aa, dd


@pytest.mark.parametrize(
    "pairs, wanted",
    [
        ("best_worst", [("bb", "dd")]),
        ("best_vs_rest", [("bb", "cc"), ("bb", "aa"), ("bb", "dd")]),
        ("adjacent", [("bb", "cc"), ("cc", "aa"), ("aa", "dd")]),
        ("all", [("bb", "cc"), ("bb", "aa"), ("bb", "dd"), ("cc", "aa"), ("cc", "dd"), ("aa", "dd")]),
    ],
)
def test_a_list_becomes_the_pairs_that_are_asked_for(pairs, wanted):
    examples = pair(row(**SCORED), pairs=pairs)
    assert said(examples) == wanted
    assert len({example.id for example in examples}) == len(wanted)


def test_pairs_below_the_gap_are_left_out_or_soft():
    assert said(pair(row(**SCORED), pairs="adjacent", min_gap=2.5)) == [("bb", "cc")]
    soft = pair(row(**SCORED), pairs="adjacent", min_gap=2.5, ties="soft")
    assert [example.side["prob"] for example in soft] == [1.0, 0.5, 0.5]


def test_the_margin_is_the_gap_of_the_ratings():
    assert [e.side["margin"] for e in pair(row(**SCORED), pairs="best_vs_rest", margin="gap")] == [3.0, 5.0, 7.0]
    tied = pair(row(2, scores={"judge": (1.0, 1.5)}), margin="gap", min_gap=1.0, ties="soft")
    assert tied[0].side == {"prob": 0.5, "margin": 0.0}


def test_the_probability_is_the_sigmoid_of_the_gap_over_the_temperature():
    sides = [e.side["prob"] for e in pair(row(**SCORED), pairs="best_vs_rest", prob="gap", temperature=2.0)]
    assert sides == pytest.approx([1 / (1 + math.exp(-gap / 2)) for gap in (3, 5, 7)])
    with pytest.raises(UserError, match="temperature 0"):
        pair(row(**SCORED), prob="gap", temperature=0.0)


def test_a_gap_far_beyond_the_temperature_is_certain_and_does_not_overflow():
    far = row(2, ranks=(1, 2), scores={"judge": (0.0, 1.0)})
    assert pair(far, prob="gap", temperature=1e-4)[0].side["prob"] == 0.0
    assert pair(row(2, scores={"judge": (1.0, 0.0)}), prob="gap", temperature=1e-4)[0].side["prob"] == 1.0


def test_where_ranks_order_the_row_the_gap_is_that_of_its_only_judge():
    known = row(2, ranks=(2, 1), scores={"judge": (1.0, 4.0)})
    example = pair(known, margin="gap", prob="gap", with_scores=True)[0]
    assert example.side == {"margin": 3.0, "prob": pytest.approx(1 / (1 + math.exp(-3))), "scores": (4.0, 1.0)}
    two = row(2, ranks=(2, 1), scores={"a": (1.0, 4.0), "b": (1.0, 2.0)})
    with pytest.raises(UserError, match="scores by a, b"):
        pair(two, margin="gap")
    assert pair(two, by="b", margin="gap")[0].side == {"margin": 1.0}


def test_scores_against_the_ranks_make_a_doubtful_label_and_no_margin():
    doubtful = row(2, ranks=(1, 2), scores={"judge": (0.0, 2.0)})
    assert pair(doubtful, prob="gap")[0].side["prob"] == pytest.approx(1 / (1 + math.exp(2)))
    assert pair(doubtful, margin="gap") == Dropped("scores against the ranks")


def test_a_gap_of_rows_without_scores_drops_them():
    assert pair(row(2, ranks=(1, 2)), margin="gap") == Dropped("no scores whose gap is wanted")


def test_ranked_gives_phi_or_the_raw_scores():
    assert ranked(row(**SCORED))[0].side["scores"] == pytest.approx((1, 2 / 3, 1 / 3, 0))
    assert ranked(row(**SCORED), raw_scores=True)[0].side["scores"] == (9, 6, 4, 2)
    assert ranked(row(**SCORED), raw_scores=True, num_candidates=2)[0].side["scores"] == (9, 2)


def test_raw_scores_order_the_row_and_are_never_those_that_rank_pooled():
    both = row(ranks=(1, 2, 3, 4), scores={"judge": (4.0, 9.0, 6.0, 2.0), "phi": (1.0, 0.5, 0.2, 0.0)})
    assert said(ranked(both, raw_scores=True)) == [("bb", "cc", "aa", "dd")]
    assert ranked(row(ranks=(1, 2, 3, 4)), raw_scores=True) == Dropped("no scores")
    many = row(scores={"a": (1.0, 2.0, 3.0, 4.0), "b": (4.0, 3.0, 2.0, 1.0)})
    with pytest.raises(UserError, match="scores by a, b"):
        ranked(many, raw_scores=True)
    assert ranked(many, by="b", raw_scores=True)[0].side["scores"] == (4, 3, 2, 1)


def own_prompts(**known):
    prompts = (Content(text="write a poem"), Content(text="write a letter"))
    return Comparison(
        id="j", prompt=prompts[0], candidates=(Content(text="aa"), Content(text="bb")), prompts=prompts, ranks=(2, 1), **known
    )


def test_joint_pairs_keep_each_candidate_with_its_own_prompt():
    example = joint(own_prompts())[0]
    assert [(s.prompt.text, s.completion.text) for s in example.samples] == [("write a letter", "bb"), ("write a poem", "aa")]
    shared = joint(row(2, ranks=(1, 2)))[0]
    assert [s.prompt.text for s in shared.samples] == ["q", "q"]
    assert joint(row(1)) == Dropped("1 candidates, want 2 or more to compare")


@pytest.mark.parametrize("view", [pair, ranked, step])
def test_views_of_one_prompt_drop_rows_of_several(view):
    assert view(own_prompts()) == Dropped("a prompt of its own for each candidate, want the view joint")


def test_unpaired_candidates_answer_their_own_prompts():
    assert [e.samples[0].prompt.text for e in unpaired(own_prompts())] == ["write a poem", "write a letter"]


def test_a_step_goes_on_from_the_prefix_and_does_not_end_the_turn():
    example = step(row(2, ranks=(2, 1), prefix="Step 1: 2 apples.\n"))[0]
    assert said([example]) == [("bb", "aa")]
    assert [(s.prefix, s.ends_turn) for s in example.samples] == [("Step 1: 2 apples.\n", False)] * 2
    whole = pair(row(2, ranks=(2, 1), prefix="Step 1"))[0]
    assert [(s.prefix, s.ends_turn) for s in whole.samples] == [("Step 1", True)] * 2
    alone = unpaired(row(1, scores={"label": (0.0,)}, prefix="so"), ends_turn=False)[0]
    assert (alone.side["labels"], alone.samples[0].prefix, alone.samples[0].ends_turn) == (0.0, "so", False)


@pytest.mark.parametrize("name", sorted(set(VIEWS) - {"prompts", "reward_weighted", *OF_SIGHT}))
def test_extras_and_weight_pass_through_every_view(name):
    told = row(2, ranks=(1, 2), weight=2.0, extras={"rationale": Content(text="because"), "gold": Content(text="gg")})
    for example in VIEWS[name](told):
        assert {key: (s.prompt.text, s.completion.text) for key, s in example.extras.items()} == {
            "rationale": ("q", "because"),
            "gold": ("q", "gg"),
        }
        assert example.side["weight"] == 2.0


def test_views_pass_messages_and_tools_on_untouched():
    prompt = Content(messages=(Message("user", "hi"),), tools=({"type": "function"},))
    answers = tuple(Content(messages=(Message("assistant", text),)) for text in TEXTS[:2])
    told = Comparison(id="m", prompt=prompt, candidates=answers, ranks=(2, 1))
    samples = pair(told)[0].samples
    assert [s.completion for s in samples] == [answers[1], answers[0]] and all(s.prompt is prompt for s in samples)
