"""Public text preference data sets, one row at a time and as whole files in their published columns."""

import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.config import Table
from mmalign.errors import UserError
from mmalign.experiment import Data, read_examples
from mmalign.importers import IMPORTERS, hh_rlhf, oasst, shp
from mmalign.importers.argilla import argilla_row
from mmalign.importers.helpsteer import helpsteer2_pair, helpsteer2_preference_row
from mmalign.importers.hh_rlhf import hh_rlhf_row, nectar_row
from mmalign.importers.pku_safe_rlhf import pku_safe_rlhf_labels, pku_safe_rlhf_row
from mmalign.importers.shp import shp_row
from mmalign.importers.step_dpo import dove_row, step_dpo_row
from mmalign.importers.ultrafeedback import ASPECTS, ultrafeedback_row
from mmalign.records import VIEWS, Content, Dropped, Message, comparison, pair, ranked, unpaired


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def user(*texts):
    """A conversation of the user and the assistant in turns."""
    return Content(messages=tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)))


def says(text):
    return Content(messages=(Message("assistant", text),))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def imported_by(name, **settings):
    """Import as a config would, its settings checked."""
    return Table(IMPORTERS).choose(name, **settings).build()


def rows_of(imported):
    return [comparison(row, least=1) for row in imported.dataset]


# --- UltraFeedback -------------------------------------------------------------------------------------------------


def completion(ratings, overall=5.0, response=None, **more):
    annotations = {name: {"Rating": str(r), "Rationale": "so"} for name, r in zip(ASPECTS, ratings, strict=True)}
    text = response if response is not None else f"answer {ratings}"
    return {"response": text, "model": "m", "annotations": annotations, "overall_score": overall, **more}


def feedback(*completions, **changes):
    return {"source": "flan", "instruction": "Why?", "completions": list(completions), **changes}


FOUR = (
    completion([5, 4, 5, 4], 8.0),
    completion([1, 2, 1, 2], 2.0),
    completion([3, 3, 4, 4], 6.0),
    completion([5, 5, 5, 5], 9.0),
)


def test_ultrafeedback_keeps_four_completions_ordered_by_the_mean_of_their_ratings():
    value = ultrafeedback_row(feedback(*FOUR))
    assert value.scores["fine_grained"] == (4.5, 1.5, 3.5, 5.0)
    assert value.scores["honesty"] == (4.0, 2.0, 3.0, 5.0) and value.scores["overall"] == (8.0, 2.0, 6.0, 9.0)
    assert value.ranks == (2.0, 4.0, 3.0, 1.0)
    assert value.prompt == user("Why?") and value.candidates[1] == says("answer [1, 2, 1, 2]")
    assert value.provenance[0] == {"model": "m"}
    (best_worst,) = pair(value)
    assert [s.completion for s in best_worst.samples] == [value.candidates[3], value.candidates[1]]


def test_a_list_of_ultrafeedback_follows_the_score_that_orders_it_and_not_all_aspects_together():
    row = feedback(completion([5, 1, 1, 1], 1.0), completion([1, 3, 3, 3], 9.0), completion([2, 2, 2, 1], 5.0))
    (fine,) = ranked(ultrafeedback_row(row))
    assert fine.side["scores"] == (1.0, 0.5, 0.0)
    assert [s.completion.words() for s in fine.samples] == ["answer [1, 3, 3, 3]", "answer [5, 1, 1, 1]", "answer [2, 2, 2, 1]"]
    (overall,) = ranked(ultrafeedback_row(row, score="overall"))
    assert [s.completion.words()[8] for s in overall.samples] == ["1", "2", "5"]


@pytest.mark.parametrize(
    ("ratings", "more", "outcome"),
    [
        ([1, 2, 2, 1], {}, 1.0),
        ([2, 2, 2, 2], {}, 1.0),
        ([5, 4, 5, 4], {}, 10.0),
        ([3, 3, 2, 3], {}, None),
        ([4, 4, 4, 4], {}, None),
        ([1, 2, 2, 1], {"fine-grained_score": 1.5}, 10.0),
    ],
)
def test_an_ultrafeedback_score_of_10_beside_poor_ratings_is_a_1_and_a_doubtful_one_leaves_the_row_out(ratings, more, outcome):
    value = ultrafeedback_row(feedback(completion(ratings, 10.0, **more), completion([3, 3, 3, 3], 5.0)), score="overall")
    if outcome is None:
        assert value == Dropped("with an overall_score of 10 beside poor ratings")
    else:
        assert value.scores["overall"] == (outcome, 5.0)
        assert value.ranks == ((2.0, 1.0) if outcome == 1 else (1.0, 2.0))


def test_ultrafeedback_means_skip_ratings_that_are_not_there():
    value = ultrafeedback_row(feedback(completion([5, "N/A", 4, 3]), completion([1, 1, 1, 1])))
    assert value.scores["fine_grained"] == (4.0, 1.0) and "honesty" not in value.scores
    unrated = completion(["N/A"] * 4)
    assert ultrafeedback_row(feedback(unrated, *FOUR)) == Dropped("with a completion without a rating")


def test_ultrafeedback_rows_of_a_source_are_left_out_on_demand():
    row = feedback(*FOUR, source="truthful_qa")
    assert ultrafeedback_row(row, exclude=("truthful_qa",)) == Dropped("of the source truthful_qa")
    assert ultrafeedback_row(row).id == ""
    assert ultrafeedback_row(feedback(FOUR[0])) == Dropped("with fewer than two completions")


def test_ultrafeedback_as_plain_text():
    value = ultrafeedback_row(feedback(*FOUR), form="text")
    assert value.prompt == Content(text="Why?") and value.candidates[0] == Content(text="answer [5, 4, 5, 4]")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (feedback(*FOUR, instruction=None), "got nothing for instruction, want a text"),
        (feedback(*FOUR, completions="four"), 'got "four" for completions, want a list'),
        (feedback("a", "b"), 'got the completion "a", want an object'),
        (feedback(completion([6, 1, 1, 1]), *FOUR), 'got the rating "6" for instruction_following'),
        (feedback(completion(["good", 1, 1, 1]), *FOUR), 'got the rating "good"'),
        (feedback({**FOUR[0], "response": None}, *FOUR), "got nothing for response"),
    ],
)
def test_each_fault_of_an_ultrafeedback_row_is_told(row, fault):
    with pytest.raises(UserError, match="^" + fault.replace("(", r"\(")):
        ultrafeedback_row(row)


# --- HelpSteer2 ----------------------------------------------------------------------------------------------------


def helpful(response, helpfulness, verbosity=2, prompt="Why?", **more):
    rest = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": verbosity}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **rest, **more}


def test_helpsteer2_pairs_are_ordered_by_helpfulness_and_keep_the_five_attributes():
    value = helpsteer2_pair(helpful("a", 1, verbosity=0), helpful("b", 4, verbosity=4))
    assert (value.ranks, value.candidates) == ((2.0, 1.0), (says("a"), says("b")))
    assert value.scores["helpfulness"] == (1.0, 4.0) and value.scores["coherence"] == (4.0, 4.0)
    assert pair(value, by="helpfulness", margin="gap")[0].side["margin"] == 3.0


def test_helpsteer2_by_a_weighted_sum_of_the_attributes():
    weights = {"helpfulness": 0.5, "verbosity": -0.75}
    value = helpsteer2_pair(helpful("a", 1, verbosity=0), helpful("b", 4, verbosity=4), weights=weights)
    assert (value.scores["weighted"], value.ranks) == ((0.5, -1.0), (1.0, 2.0))
    assert pair(value, by="weighted", margin="gap")[0].side["margin"] == 1.5


def test_helpsteer2_ties_are_ties():
    value = helpsteer2_pair(helpful("a", 3), helpful("b", 3))
    assert pair(value) == Dropped("tie") and pair(value, ties="soft")[0].side == {"prob": 0.5}


def test_helpsteer2_turns_of_a_prompt_become_messages():
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello!\n\n<extra_id_1>User\nBye"
    value = helpsteer2_pair(helpful("a", 3, prompt=prompt), helpful("b", 1, prompt=prompt))
    assert value.prompt == user("Hi", "Hello!", "Bye")
    assert helpsteer2_pair(helpful("a", 3, prompt=prompt), helpful("b", 1), form="text").prompt.text == prompt


def test_a_helpsteer2_row_without_partner_is_told_and_the_pairs_around_it_stay(tmp_path):
    prompts = ["p", "p", "q", "r", "r", "s"]
    rows = [helpful(str(n), n % 2, prompt=p) for n, p in enumerate(prompts)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    imported = IMPORTERS["helpsteer2"](path=path, faulty="drop")
    assert [r.where for r in rows_of(imported)] == [f"{path}:1", f"{path}:4"]
    assert [f.where for f in imported.faults] == [f"{path}:3", f"{path}:6"]
    with pytest.raises(UserError, match=r"train\.jsonl:3: got one response to its prompt"):
        IMPORTERS["helpsteer2"](path=path)
    with pytest.raises(UserError, match="weights: got length, want attributes"):
        IMPORTERS["helpsteer2"](path=path, weights={"length": 1.0})


def preferred(strength, **changes):
    texts = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_statement": "b says why"}
    return {"split": "train", **texts, "preference_strength": strength, **changes}


@pytest.mark.parametrize(("strength", "ranks"), [(-3, (1.0, 2.0)), (-1, (1.0, 2.0)), (0, (1.0, 1.0)), (2, (2.0, 1.0))])
def test_the_sign_of_a_helpsteer2_preference_says_which_is_better_and_its_size_is_margin_or_weight(strength, ranks):
    value = helpsteer2_preference_row(preferred(strength))
    assert (value.ranks, value.margin, value.weight, value.extras) == (ranks, None, None, {})
    assert helpsteer2_preference_row(preferred(strength), strength="margin").margin == abs(strength)
    assert helpsteer2_preference_row(preferred(strength), strength="weight").weight == abs(strength)
    assert helpsteer2_preference_row(preferred(strength), rationale=True).extras == {"rationale": says("b says why")}


def test_helpsteer2_preference_rows_of_another_split_are_left_out_and_a_strength_off_the_scale_is_a_fault():
    assert helpsteer2_preference_row(preferred(1, split="val"), split="train") == Dropped("of the split val")
    assert helpsteer2_preference_row(preferred(1, split="val"), split="validation").ranks == (2.0, 1.0)
    for strength in (4, -100, 0.5):
        with pytest.raises(UserError, match="want an integer from -3 to 3"):
            helpsteer2_preference_row(preferred(strength))


# --- HH-RLHF and Nectar --------------------------------------------------------------------------------------------

START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def test_hh_rlhf_splits_transcripts_at_their_markers():
    value = hh_rlhf_row({"chosen": START + " Because.\n\nReally.", "rejected": START + " No idea."})
    assert value.prompt == user("Hi", "Hello.", "Why?")
    assert (value.candidates, value.ranks) == ((says("Because.\n\nReally."), says("No idea.")), (1.0, 2.0))


def test_hh_rlhf_as_text_keeps_every_character():
    value = hh_rlhf_row({"chosen": START + " Because.", "rejected": START + " No idea. "}, form="text")
    assert value.prompt.text == START
    assert [c.text for c in value.candidates] == [" Because.", " No idea. "]


def test_hh_rlhf_rows_whose_last_human_turns_differ_are_left_out_and_counted(tmp_path):
    good = {"chosen": START + " Because.", "rejected": START + " No."}
    other = {"chosen": START + " Because.", "rejected": START.replace("Why?", "How?") + " No."}
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (good, other, good, other)).encode()))
    imported = hh_rlhf(path=str(path))
    reason = "with transcripts that differ before the last answer"
    assert [r.id for r in rows_of(imported)] == ["hh_rlhf-1", "hh_rlhf-3"]
    assert imported.left_out == {reason: [f"{path}:2", f"{path}:4"]} and imported.faults == ()
    assert f"left out by rule: 2 {reason} (first: {path}:2)" in imported.summary()


@pytest.mark.parametrize(
    ("chosen", "fault"),
    [
        ("Hi there", "a transcript that begins"),
        ("Human: Hi\n\nAssistant: Hello", "a transcript that begins"),
        ("\n\nAssistant: Hello", "a chosen transcript from assistant to assistant"),
        (START + " Yes.\n\nHuman: Ok", "a chosen transcript from user to user"),
        (None, "nothing for chosen"),
    ],
)
def test_each_fault_of_a_transcript_is_told(chosen, fault):
    with pytest.raises(UserError, match=f"^got {fault}"):
        hh_rlhf_row({"chosen": chosen, "rejected": START + " No."})


def test_an_empty_answer_of_hh_rlhf_is_a_fault_with_its_row(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"chosen": START + " Yes.", "rejected": START}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: candidate 2: got an empty completion(.|\n)*faulty: drop"):
        hh_rlhf(path=path)


def nectar_answers(*ranks):
    return [{"answer": f"a{rank:g}", "model": f"m{n}", "rank": rank} for n, rank in enumerate(ranks)]


def test_nectar_strips_markers_and_keeps_seven_ranks():
    row = {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": nectar_answers(3.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0)}
    value = nectar_row(row)
    assert value.prompt == user("Why?") and value.ranks == (3.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0)
    assert value.provenance[2] == {"model": "m2"}
    (listed,) = ranked(value)
    assert [s.completion.words() for s in listed.samples] == [f"a{n}" for n in range(1, 8)]
    assert len(pair(value, pairs="best_vs_rest")) == 6
    assert nectar_row(row, form="text").prompt.text == row["prompt"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "\n\nHuman: Why?\n\nAssistant: Done.", "answers": nectar_answers(1.0, 2.0)}, "got the prompt"),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "answers": nectar_answers(0.0, 1.0)}, "got the ranks"),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "answers": ["a"]}, "got the answers"),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "answers": [{"answer": "a", "rank": None}]}, "got nothing for rank"),
    ],
)
def test_each_fault_of_a_nectar_row_is_told(row, fault):
    with pytest.raises(UserError, match=f"^{fault}"):
        nectar_row(row)


def test_an_answer_alone_is_a_fault_where_answers_are_compared(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "\n\nHuman: Why?\n\nAssistant:", "answers": nectar_answers(1.0)}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: got 1 candidate, want at least 2"):
        imported_by("nectar", path=path)


# --- OASST ---------------------------------------------------------------------------------------------------------


def message(name, parent, text, rank=None, **more):
    role = more.pop("role", "prompter" if parent is None or parent.startswith("a") else "assistant")
    labels = {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]}
    common = {"lang": "en", "deleted": False, "synthetic": False, "model_name": None, "labels": labels}
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, **common, **more}


TREE = [
    message("a2", "p1", "second", 1),
    message("p1", None, "Why?"),
    message("a1", "p1", "first", 0),
    message("a3", "p1", "third", 2, deleted=True),
    message("p2", "a1", "And?", 0),
    message("p3", "a1", "So?", 1),
    message("b1", "p2", "worse", 1),
    message("b2", "p2", "better", 0),
    message("b3", "p2", "unranked"),
]


def test_oasst_siblings_are_lists_whose_prompt_is_the_path_to_them(tmp_path):
    imported = oasst(path=write_parquet(tmp_path / "oasst.parquet", TREE))
    first, second = sorted(rows_of(imported), key=lambda row: row.id)
    assert (first.id, first.prompt, first.ranks) == ("oasst-p1", user("Why?"), (2.0, 1.0))
    assert first.candidates == (says("second"), says("first"))
    assert second.prompt == user("Why?", "first", "And?")
    assert second.candidates == (says("worse"), says("better")) and second.ranks == (2.0, 1.0)
    assert second.provenance[0] == {"lang": "en", "synthetic": False, "labels": {"spam": 0.0, "quality": 0.75}}


def test_oasst_languages_and_deleted_messages_are_left_out_and_counted(tmp_path):
    tree = [message("p9", None, "Pourquoi ?", lang="fr"), message("a8", "p9", "oui", 0), message("a9", "p9", "non", 1)]
    deleted = [{**row, "deleted": row["message_id"] == "a1" or row["deleted"]} for row in TREE]
    path = write_lines(tmp_path / "oasst.jsonl", [*deleted, *tree])
    imported = oasst(path=path, languages=("en",))
    assert len(imported.dataset) == 0
    assert {reason: len(places) for reason, places in imported.left_out.items()} == {
        "in other languages": 1,
        "with a deleted message in the prompt": 1,
        "with fewer than two ranked replies": 1,
    }
    everything = oasst(path=path, deleted=True)
    assert sorted(len(row.candidates) for row in rows_of(everything)) == [2, 2, 3]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (message("a9", "gone", "text", 0), "its parent gone is missing"),
        (message("a1", "p1", "again", 3), "got the message_id a1 again, first in"),
        (message("a9", "p1", "  ", 3), "got an empty message"),
        (message("a9", "p1", "x", 3, role="bot"), "got the role 'bot'"),
        (message("a9", "p1", "x", "best"), 'got "best" for rank, want a number'),
        (message(None, "p1", "x", 3), "got nothing for message_id"),
    ],
)
def test_each_fault_of_an_oasst_message_is_told_with_its_row(tmp_path, row, fault):
    path = write_lines(tmp_path / "oasst.jsonl", [*TREE, row])
    with pytest.raises(UserError) as told:
        oasst(path=path)
    assert f"oasst.jsonl:{len(TREE) + 1}: {fault}" in str(told.value)
    assert len(oasst(path=path, faulty="drop").dataset) == 2


# --- SHP -----------------------------------------------------------------------------------------------------------


def votes(label=1, ratio=4.0, post="x", **changes):
    scores = {"score_A": 40 if label else 10, "score_B": 10 if label else 40}
    texts = {"post_id": post, "history": "How to boil an egg?", "human_ref_A": "a", "human_ref_B": "b"}
    return {**texts, "labels": label, "score_ratio": ratio, **scores, **changes}


def test_shp_labels_say_whether_a_is_better_and_the_log_of_the_ratio_is_the_margin():
    value = shp_row(votes(1), margin=True)
    assert (value.ranks, value.scores) == ((1.0, 2.0), {"votes": (40.0, 10.0)})
    assert value.margin == pytest.approx(math.log(4.0)) and shp_row(votes(1)).margin is None
    assert shp_row(votes(0)).ranks == (2.0, 1.0) and value.prompt == user("How to boil an egg?")


def test_shp_ratios_below_the_least_and_pairs_beyond_five_a_post_are_left_out_and_counted(tmp_path):
    rows = [votes(ratio=1.9), *(votes(ratio=2.0, post="y", human_ref_A=f"a{n}") for n in range(7)), votes(post="z")]
    path = write_lines(tmp_path / "shp.jsonl", rows)
    imported = shp(path=path)
    assert [r.candidates[0].words() for r in rows_of(imported)] == ["a0", "a1", "a2", "a3", "a4", "a"]
    counts = {reason: len(places) for reason, places in imported.left_out.items()}
    assert counts == {"with a score_ratio below 2": 1, "beyond 5 pairs of one post": 2}
    assert len(shp(path=path, min_ratio=1.0, max_pairs=None).dataset) == 9
    with pytest.raises(UserError, match="want both 1 or more"):
        shp(path=path, max_pairs=0)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"labels": 2}, "got labels 2, want 1"),
        ({"labels": None}, "got labels nothing"),
        ({"score_ratio": 0.5}, "got the score_ratio 0.5, want 1 or more"),
        ({"score_ratio": "big"}, 'got "big" for score_ratio'),
        ({"human_ref_B": None}, "got nothing for human_ref_B"),
    ],
)
def test_each_fault_of_an_shp_row_is_told(changes, fault):
    with pytest.raises(UserError, match=f"^{fault}"):
        shp_row(votes(**changes))


# --- PKU-SafeRLHF --------------------------------------------------------------------------------------------------


def safety(better, safer, safe=(True, True), **changes):
    texts = {"prompt": "How?", "response_0": "a", "response_1": "b", "response_0_source": "m0", "response_1_source": "m1"}
    flags = {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    return {**texts, **flags, "better_response_id": better, "safer_response_id": safer, **changes}


def test_pku_safe_rlhf_is_ordered_by_the_axis():
    row = safety(better=0, safer=1, safe=(False, True))
    better, safer = pku_safe_rlhf_row(row), pku_safe_rlhf_row(row, axis="safer")
    assert (better.ranks, safer.ranks) == ((1.0, 2.0), (2.0, 1.0))
    assert {name: better.scores[name] for name in ("better", "safer", "safe")} == {
        "better": (1.0, 0.0), "safer": (0.0, 1.0), "safe": (0.0, 1.0),
    }  # fmt: skip
    assert better.provenance == ({"model": "m0"}, {"model": "m1"})


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        (safety(0, 1, (False, True)), (2.0, 1.0)),
        (safety(0, 1, (True, True)), (1.0, 2.0)),
        (safety(0, 1, (False, False)), (1.0, 2.0)),
        (safety(1, 1, (False, True)), (2.0, 1.0)),
    ],
)
def test_pku_safe_rlhf_safe_first_lets_the_only_safe_response_win(row, ranks):
    assert pku_safe_rlhf_row(row, disagreement="safe_first").ranks == ranks


def test_pku_safe_rlhf_disagreement_can_be_dropped():
    assert pku_safe_rlhf_row(safety(0, 1), disagreement="drop") == Dropped("whose better response is not the safer one")
    assert pku_safe_rlhf_row(safety(1, 1), disagreement="drop").ranks == (2.0, 1.0)


def test_pku_safe_rlhf_unpaired_labels_are_whether_a_response_is_safe():
    first, second = pku_safe_rlhf_labels(safety(0, 1, (False, True)))
    assert (first.candidates, first.scores) == ((says("a"),), {"label": (0.0,)})
    assert unpaired(second)[0].side == {"labels": 1.0} and unpaired(first)[0].side == {"labels": 0.0}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (safety(2, 1), "got better_response_id 2, want 0 or 1"),
        (safety(0, None), "got safer_response_id nothing"),
        (safety(0, 1, (None, True)), "got is_response_0_safe and is_response_1_safe"),
        (safety(0, 1, response_1=None), "got nothing for response_1"),
    ],
)
def test_each_fault_of_a_pku_safe_rlhf_row_is_told(row, fault):
    with pytest.raises(UserError, match=f"^{fault}"):
        pku_safe_rlhf_row(row)


# --- Step-DPO and DOVE ---------------------------------------------------------------------------------------------

SOLVED = {
    "dataset": "gsm8k", "prompt": "1 + 2?", "initial_reason_steps": "Step 1: Count.\nStep 2:", "chosen": " It is 3.",
    "rejected": " It is 4.", "full_chosen": " It is 3. Done.", "full_rejected": " It is 4. Done.", "answer": "3",
}  # fmt: skip
JOINT = {"i_chosen": "Say hello.", "r_chosen": "Hello.", "i_reject": "Say bye.", "r_reject": "Hello?"}


def test_step_dpo_steps_go_on_from_the_steps_that_are_given():
    value = step_dpo_row(SOLVED)
    assert (value.prompt, value.prefix) == (user("1 + 2?"), "Step 1: Count.\nStep 2:")
    assert (value.candidates, value.ranks) == ((Content(text=" It is 3."), Content(text=" It is 4.")), (1.0, 2.0))
    assert value.provenance[0] == {"answer": "3", "full": " It is 3. Done."}
    with pytest.raises(UserError, match="got nothing for initial_reason_steps"):
        step_dpo_row({**SOLVED, "initial_reason_steps": None})


def test_dove_candidates_answer_a_prompt_of_their_own():
    value = dove_row(JOINT)
    assert value.prompts == (user("Say hello."), user("Say bye.")) and value.prompt == value.prompts[0]
    assert (value.candidates, value.ranks) == ((says("Hello."), says("Hello?")), (1.0, 2.0))
    with pytest.raises(UserError, match="got nothing for r_reject"):
        dove_row({**JOINT, "r_reject": None})


# --- Argilla -------------------------------------------------------------------------------------------------------


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CLEANED = {
    "source": "flan", "prompt": "Why?", "chosen": chat("Why?", "So."), "chosen-rating": 4.5, "chosen-model": "m1",
    "rejected": chat("Why?", "Dunno."), "rejected-rating": 2.25, "rejected-model": "m2",
}  # fmt: skip


def test_argilla_messages_are_split_and_the_gap_of_the_ratings_can_be_the_margin():
    value = argilla_row(CLEANED)
    assert (value.prompt, value.candidates) == (user("Why?"), (says("So."), says("Dunno.")))
    assert (value.ranks, value.scores) == ((1.0, 2.0), {"rating": (4.5, 2.25)})
    assert value.provenance == ({"model": "m1"}, {"model": "m2"})
    assert pair(value, margin="gap")[0].side["margin"] == 2.25


def test_argilla_equal_ratings_are_a_tie():
    value = argilla_row({**CLEANED, "chosen-rating": 2.25})
    assert pair(value) == Dropped("tie") and pair(value, ties="soft")[0].side["prob"] == 0.5


def test_argilla_columns_of_other_exports_are_known():
    plain = {"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No.", "chosen_avg_rating": 4.0}
    value = argilla_row({**plain, "rejected_avg_rating": 3.0, "chosen_model": "m"}, form="text")
    assert (value.prompt.text, value.scores) == ("Why?", {"rating": (4.0, 3.0)})
    mixed = {"chosen": chat("Why?", "So."), "rejected": chat("Why?", "No."), "chosen_rating": 4.0, "rejected_rating": 3.0}
    assert argilla_row(mixed).scores == {"rating": (4.0, 3.0)}
    capybara = {**CLEANED, "rating_chosen": 5, "rating_rejected": 3, "chosen-rating": None, "rejected-rating": None}
    assert argilla_row(capybara).scores == {"rating": (5.0, 3.0)}
    orca = {"system": "Be kind.", "input": "Why?", "chosen": "So.", "rejected": "No."}
    value = argilla_row(orca)
    assert [m.role for m in value.prompt.messages] == ["system", "user"] and (value.scores, value.ranks) == ({}, (1.0, 2.0))


def test_argilla_ratings_in_one_list_are_those_of_the_better_and_the_worse_answer():
    orca = {"input": "Why?", "chosen": "So.", "rejected": "No.", "generations": ["No.", "So."], "rating": [7.0, 9.0]}
    assert argilla_row(orca).scores == {"rating": (9.0, 7.0)} and argilla_row(orca).ranks == (1.0, 2.0)
    assert pair(argilla_row({**orca, "rating": [9.0, 9.0], "status": "tie"})) == Dropped("tie")
    assert argilla_row({**orca, "rating": None}).scores == {}
    with pytest.raises(UserError, match="got 1 numbers for rating, want those of two answers"):
        argilla_row({**orca, "rating": [7.0]})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_an_empty_file_is_told_as_one(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: got an empty file, want rows"):
        IMPORTERS["trl"](path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"chosen-rating": 1.0}, r"got the ratings \[1.0, 2.25\] of chosen and rejected"),
        ({"chosen-rating": None}, "got nothing for chosen-rating"),
        ({"rejected": chat("How?", "No.")}, "got conversations that differ from message 1 on"),
        ({"rejected": []}, "got an empty conversation"),
        ({"rejected": None}, "got .* for chosen, want a text"),
        ({"chosen": [{"role": "user"}]}, "got .* want a message with role and content"),
        ({"chosen": [{"role": "judge", "content": "x"}]}, 'got the role "judge"'),
    ],
)
def test_each_fault_of_an_argilla_row_is_told(changes, fault):
    with pytest.raises(UserError, match=f"^{fault}"):
        argilla_row({**CLEANED, **changes})


# --- whole files, as a run reads them ------------------------------------------------------------------------------

PREFERRED = [preferred(n % 3 - 1) for n in range(6)]
FILES = {
    "ultrafeedback": ([feedback(*FOUR)], {"exclude": ["truthful_qa"]}, "pair", 1),
    "helpsteer2": (
        [helpful("a", 1), helpful("b", 3), helpful("c", 2, prompt="q"), helpful("d", 2, prompt="q")],
        {"weights": {"helpfulness": 1, "verbosity": -0.5}}, "pair", 1,
    ),
    "helpsteer2_preference": (PREFERRED, {"rationale": True, "strength": "weight"}, "pair", 4),
    "hh_rlhf": ([{"chosen": START + " Because.", "rejected": START + " No."}], {"form": "text"}, "pair", 1),
    "nectar": (
        [{"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": nectar_answers(2.0, 1.0, 3.0)}], {}, "ranked", 1,
    ),
    "oasst": (TREE, {"languages": ["en"]}, "pair", 2),
    "shp": ([votes(), votes(0)], {"margin": True}, "pair", 2),
    "pku_safe_rlhf": ([safety(0, 1), safety(1, 1, (False, True))], {"unpaired": True}, "unpaired", 4),
    "step_dpo": ([SOLVED], {}, "step", 1),
    "dove": ([JOINT], {}, "joint", 1),
    "argilla": ([CLEANED], {}, "pair", 1),
}  # fmt: skip


@pytest.mark.parametrize("written", [write_lines, write_parquet])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_in_the_published_columns_becomes_the_examples_of_a_view(tmp_path, name, written):
    rows, settings, view, count = FILES[name]
    suffix = "jsonl" if written is write_lines else "parquet"
    path = written(tmp_path / f"data.{suffix}", rows)
    data = Data(importer=Table(IMPORTERS).choose(name, path=path, **settings), view=Table(VIEWS).choose(view))
    examples, line = read_examples(data)
    assert len(examples) == count and line.startswith(f"{len(examples.dataset)} rows: {count} examples")
    values = [comparison(row, least=1) for row in examples.dataset]
    assert len({value.id for value in values}) == len(values) and all(v.where.startswith(f"{path}:") for v in values)
    example = examples[0]
    assert all(sample.prompt.words() and sample.completion.words() for sample in example.samples)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_broken_line_is_told_with_its_row_or_dropped_and_counted(tmp_path, name):
    rows, settings, _, _ = FILES[name]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '\n{"prompt": \n[1]\n')
    with pytest.raises(UserError, match=rf"data\.jsonl:{len(rows) + 2}: got no valid JSON"):
        imported_by(name, path=str(path), **settings)
    imported = imported_by(name, path=str(path), faulty="drop", **settings)
    assert [fault.where for fault in imported.faults] == [f"{path}:{len(rows) + n}" for n in (2, 3)]
    whole = write_lines(tmp_path / "whole.jsonl", rows)
    assert len(imported.dataset) == len(imported_by(name, path=whole, **settings).dataset)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"argilla"}))
def test_a_table_of_another_format_is_one_clear_error(tmp_path, name):
    path = write_parquet(tmp_path / "x.parquet", [{"caption": "a"}])
    with pytest.raises(UserError, match=rf"x\.parquet: got the columns caption and no .*, want {name} columns"):
        IMPORTERS[name](path=path)


def test_a_run_tells_what_the_rules_of_a_format_leave_out(tmp_path):
    path = write_lines(tmp_path / "shp.jsonl", [votes(), votes(ratio=1.5), votes(ratio=1.2)])
    _, line = read_examples(Data(importer=Table(IMPORTERS).choose("shp", path=path)))
    assert line == f"1 rows: 1 examples; left out by rule: 2 with a score_ratio below 2 (first: {path}:2)"


def test_a_saved_data_set_with_splits_and_a_folder_of_files_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([CLEANED])
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    (row,) = rows_of(IMPORTERS["argilla"](path=str(tmp_path / "saved"), split="test"))
    assert row.where == f"{tmp_path / 'saved'} (test):1"
    (tmp_path / "hh" / "helpful-base").mkdir(parents=True)
    rows = [{"chosen": START + " Because.", "rejected": START + " No."}]
    write_parquet(tmp_path / "hh" / "helpful-base" / "train.parquet", rows)
    assert len(hh_rlhf(path=str(tmp_path / "hh"), folder="helpful-base").dataset) == 1


def test_helpsteer2_preference_is_split_by_its_own_column_or_by_that_of_the_data_set(tmp_path):
    from datasets import Dataset, DatasetDict

    path = write_lines(tmp_path / "preference.jsonl", [preferred(1), preferred(2, split="val"), preferred(3, split="val")])
    read = IMPORTERS["helpsteer2_preference"]
    assert [len(read(path=path, split=split).dataset) for split in ("train", "validation")] == [1, 2]
    plain = [{k: v for k, v in preferred(1).items() if k != "split"}]
    DatasetDict(train=Dataset.from_list(plain), validation=Dataset.from_list(plain * 3)).save_to_disk(tmp_path / "saved")
    assert len(read(path=str(tmp_path / "saved"), split="validation").dataset) == 3
