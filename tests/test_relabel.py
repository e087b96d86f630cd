"""`mmalign relabel`: every method by hand-worked rows, and the command on files, interrupted runs of a judge included."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.cli import main as mmalign
from mmalign.config import read_config
from mmalign.curation import RELABELS
from mmalign.curation.edits import Edit, edited
from mmalign.curation.relabels import density_ratio, r3, ratings, reward_augmented, self_labels, voting
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Dropped, Message, comparison, pair, read, read_judgements, write
from mmalign.relabel import RelabelConfig, main
from mmalign.row_files import Curated

LENGTH = "test_relabel:length_judge"


class LengthJudge:
    """Prefers the longer response, and by `bias` the one that is shown first; counts what it is asked."""

    name = "length"
    asked = 0

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def __call__(self, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
        LengthJudge.asked += len(prompts)
        shares = [len(one) / (len(one) + len(other)) for one, other in zip(first, second, strict=True)]
        return torch.tensor(shares).add(self.bias).clamp(0, 1)


def length_judge(*, bias: float = 0.0) -> LengthJudge:
    """A judge of JUDGES' kind, named by its address."""
    return LengthJudge(bias)


def row(name: str, first: str = "aaaa", second: str = "bb", **more: Any) -> Comparison:
    candidates = (Content(text=first), Content(text=second))
    return Comparison(id=name, prompt=Content(text=f"prompt {name}"), candidates=candidates, **{"ranks": (1.0, 2.0), **more})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def relabel(*settings: str) -> Curated:
    return main(read_config(RelabelConfig, None, list(settings)))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(one) for one in read(path)]


def only(outcome: Any) -> Edit:
    [edit] = outcome
    assert isinstance(edit, Edit)
    return edit


VOTED = [
    row("agreed", scores={"m1": (2.0, 0.0), "m2": (1.0, 0.0)}),
    row("wrong", scores={"m1": (0.0, 3.0), "m2": (0.0, 5.0)}),
    row("doubt", scores={"m1": (0.0, 1.0), "m2": (0.5, 0.0)}, ranks=(2.0, 1.0)),
    row("half", scores={"m1": (0.0, 1.0)}),
    row("tied", scores={"m1": (0.0, 1.0), "m2": (0.0, 1.0)}, ranks=(1.0, 1.0)),
]


def test_votes_turn_the_weakest_pairs_and_soften_all() -> None:
    made = voting(VOTED, flip=0.34, labels="soft", margin=True)
    first, turned, doubt, half, tied = made.outcomes
    assert only(first).labels == {"ranks": (1.0, 2.0), "prob": pytest.approx(sigmoid(1.5)), "margin": 1.5}
    assert only(turned).labels == {"ranks": (2.0, 1.0), "prob": pytest.approx(sigmoid(-4.0)), "margin": 4.0}
    assert only(turned).note == {"strength": -4.0, "deviation": 1.0, "flipped": True, "judges": ["m1", "m2"]}
    assert only(doubt).labels == {"ranks": (2.0, 1.0), "prob": pytest.approx(sigmoid(-0.25)), "margin": 0.25}
    assert half == Dropped("not judged by m2") and tied == Dropped("tie")
    assert made.told == ("3 pairs voted on by 2 judges, 1 turned, 1 of negative strength",)


def test_hard_votes_keep_the_label_and_give_a_margin() -> None:
    made = voting(VOTED[:2], margin=True)
    assert [only(one).labels for one in made.outcomes] == [
        {"ranks": (1.0, 2.0), "prob": None, "margin": 1.5},
        {"ranks": (1.0, 2.0), "prob": None, "margin": 0.0},
    ]


def test_a_soft_label_against_the_order_turns_it() -> None:
    [edit] = voting(VOTED[1:2], labels="soft").outcomes
    assert only(edit).labels == {"ranks": (2.0, 1.0), "prob": pytest.approx(sigmoid(-4.0))}
    value = edited(VOTED[1], only(edit), "voting")
    examples = pair(value)
    assert not isinstance(examples, Dropped)
    assert examples[0].samples[0].completion.text == "bb", "the view takes the row as it is labelled now"
    assert examples[0].side["prob"] == pytest.approx(sigmoid(4.0))


def test_judges_of_other_units_are_brought_to_one() -> None:
    rows = [row("a", scores={"m1": (1.0, 0.0), "m2": (0.0, 100.0)}), row("b", scores={"m1": (0.0, 1.0), "m2": (0.0, 100.0)})]
    [a, b] = voting(rows, standardise=True).outcomes
    assert only(a).note["strength"] == pytest.approx(0.0) and only(b).note["strength"] == pytest.approx(-2.0)


def test_one_judges_ratings_become_soft_labels() -> None:
    rows = [row("a", scores={"rm": (4.0, 1.0)}, ranks=(2.0, 1.0)), row("b", scores={"rm": (2.0, 2.0)})]
    made = ratings(rows, by="rm", temperature=2.0, margin=True)
    assert only(made.outcomes[0]).labels == {"ranks": (1.0, 2.0), "prob": pytest.approx(sigmoid(1.5)), "margin": 3.0}
    assert made.outcomes[1] == Dropped("tie")


def test_the_reward_by_rule_ranks_candidates_by_relevance_length_and_repetition() -> None:
    long, often = "a b c d e f", "a b c a b c a b c"
    one = row("r", long, often, scores={"relevance": (0.5, 0.7)})
    edit = only(r3([one, row("unjudged")], relevance="relevance").outcomes[0])
    assert edit.scores["r3"] == pytest.approx((0.5 * 0.06, 0.7 * 0.09 * 3 / 7)) and edit.labels["ranks"] == (1.0, 2.0)
    edit = only(r3([one], relevance="relevance", mode="closed", label="rule").outcomes[0])
    assert edit.scores["rule"] == pytest.approx((0.5, 0.7 * 3 / 7))
    assert r3([one, row("unjudged")], relevance="relevance").outcomes[1] == Dropped("no relevance")


def test_density_ratios_rank_candidates() -> None:
    three = Comparison(
        id="t",
        prompt=Content(text="p"),
        candidates=tuple(Content(text=text) for text in "abc"),
        scores={"strong": (-4.0, -2.0, -9.0), "weak": (-5.0, -1.0, -9.0), "tokens": (2.0, 1.0, 3.0)},
    )
    edit = only(density_ratio([three], strong="strong", weak="weak").outcomes[0])
    assert edit.scores == {"density_ratio": (1.0, -1.0, 0.0)} and edit.labels["ranks"] == (1.0, 3.0, 2.0)
    edit = only(density_ratio([three], strong="strong", weak="weak", lengths="tokens").outcomes[0])
    assert edit.scores == {"density_ratio": (0.5, -1.0, 0.0)}


def test_a_policy_labels_its_own_pairs_and_doubts_the_closest() -> None:
    rows = [
        row(str(n), scores={"pi": (-4.0, -4.0 - margin), "ref": (-5.0, -5.0)}) for n, margin in enumerate((20.0, -30.0, 40.0))
    ]
    made = self_labels(rows, policy="pi", reference="ref")
    assert [only(one).labels for one in made.outcomes] == [
        {"ranks": (1.0, 2.0), "prob": 0.9},
        {"ranks": (2.0, 1.0), "prob": pytest.approx(0.0)},
        {"ranks": (1.0, 2.0), "prob": 1.0},
    ]
    assert only(made.outcomes[0]).scores == {"implicit_reward": pytest.approx((0.1, -1.9))}
    assert "3 pairs labelled, 1 in doubt" in made.told[0]


def test_each_pair_is_asked_for_both_scores() -> None:
    value = row("a", scores={"overall": (3.5, 9.0), "fine": (1.0, 2.0)})
    made = reward_augmented([value], by="overall", template="Aim at {score}.", check="fine")
    assert not isinstance(made.outcomes[0], Dropped)
    high, low = (edited(value, edit, "reward_augmented") for edit in made.outcomes[0])
    assert [one.id for one in (high, low)] == ["a#high", "a#low"]
    assert high.prompt.messages == (Message("system", "Aim at 9."), Message("user", "prompt a"))
    assert low.prompt.messages[0].text == "Aim at 3.5."
    assert (high.ranks, low.ranks) == ((2.0, 1.0), (1.0, 2.0))
    assert high.candidates[0].messages == (Message("assistant", "aaaa"),)
    assert high.provenance[0]["curation"][0]["goal"] == 9.0
    other = row("b", scores={"overall": (3.5, 9.0), "fine": (2.0, 1.0)})
    assert reward_augmented([other], by="overall", check="fine").outcomes == [Dropped("fine does not agree with overall")]


def test_a_conversation_keeps_its_messages_and_refuses_a_second_system_prompt() -> None:
    messages = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    talk = Comparison(id="t", prompt=Content(messages=messages), candidates=row("x").candidates)
    told = edited(talk, Edit(system="Be kind."), "m")
    assert told.prompt.messages == (Message("system", "Be kind."), *messages)
    with pytest.raises(UserError, match="got a system prompt already"):
        edited(told, Edit(system="Again."), "m")


def test_lists_are_left_out_with_what_to_do() -> None:
    three = Comparison(
        id="t", prompt=Content(text="p"), candidates=tuple(map(lambda t: Content(text=t), "abc")), scores={"rm": (1, 2, 3)}
    )
    for name in ("voting", "reward_augmented", "ratings"):
        settings = {} if name == "voting" else {"by": "rm"}
        [outcome] = RELABELS[name]([three], **settings).outcomes
        assert outcome == Dropped("3 candidates, want 2; `mmalign pairs` makes pairs of lists")


# the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        row("a", "aaaa", "b", scores={"rm": (3.0, 1.0)}, provenance=({"model": "length"}, {"model": "other"})),
        row("b", "cc", "dddddd", scores={"rm": (0.0, 1.0)}, provenance=({"model": "length"}, {"model": "other"})),
        row("c", "eeee", "ffff", scores={"rm": (0.0, 1.0)}),
        row("d", "gggg", "hhh", scores={"rm": (2.0, 1.0)}),
    ]
    return write(rows, tmp_path / "rows.jsonl")


def test_votes_on_disk(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "voted.parquet"
    made = relabel(f"path={data}", "method={name: voting, labels: soft, margin: true}", f"output={output}")
    rows = rows_of(output)
    assert [one.prob for one in rows] == pytest.approx([sigmoid(2), sigmoid(-1), sigmoid(-1), sigmoid(1)])
    assert [one.margin for one in rows] == [2.0, 0.0, 0.0, 1.0]
    [done] = rows[0].provenance[0]["curation"]
    assert (done["relabel"], done["of"], done["from"]) == ("voting", "a", f"{data}:1")
    assert "4 rows: 4 relabelled rows" in str(made) and made.report.exists()


def test_two_rows_a_pair_on_disk_are_trained_on_as_conversations(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "goals.jsonl"
    assert relabel(f"path={data}", "method={name: reward_augmented, by: rm}", f"output={output}").num_written == 8
    rows = rows_of(output)
    assert [one.id for one in rows[:2]] == ["a#high", "a#low"]
    assert "rated 3 by" in rows[0].prompt.messages[0].text and "rated 1 by" in rows[1].prompt.messages[0].text
    best = [
        examples[0].samples[0].completion.words()
        for one in rows[:2]
        if not isinstance(examples := pair(one, by="ranks"), Dropped)
    ]
    assert best == ["aaaa", "b"]


def test_a_judge_in_both_orders_drops_what_it_says_only_in_one(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "judged.jsonl"
    method = f"method={{name: judge, judge: {{name: '{LENGTH}', bias: 0.1}}, soft: true, own: length}}"
    made = relabel(f"path={data}", method, f"output={output}")
    rows = rows_of(output)
    assert [one.id for one in rows] == ["a", "b"], "c is a tie; d is longer by less than what position gains"
    assert [one.prob for one in rows] == pytest.approx([0.8, 0.25], abs=1e-6)
    assert dict(made.dropped) == {"length says another one in the other order": 2}
    told = "\n".join(made.told)
    assert "4 pairs judged in both orders, 0 kept from before" in told
    assert "same verdict in both orders: 50.0%; the response shown first gains +0.100" in told
    # own response first and chosen in both rows: (0.8 - 1 + 0.25 - 1) / 2
    assert "self-preference (DBG): -0.475 over 2 labelled pairs with one response of length" in told
    ties = relabel(f"path={data}", method.replace("soft: true", "inconsistent: tie"), f"output={tmp_path / 'ties.jsonl'}")
    assert [one.prob for one in rows_of(ties.files.popitem()[0])] == [None, None, 0.5, 0.5]


def test_an_interrupted_judge_goes_on_and_ends_with_the_same_bytes(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "judged.jsonl"
    settings = (f"path={data}", f"method={{name: judge, judge: '{LENGTH}', group: 1}}", f"output={output}")
    LengthJudge.asked = 0
    relabel(*settings)
    assert LengthJudge.asked == 8
    journal = tmp_path / "judged.jsonl.judgements.jsonl"
    whole, rows = journal.read_bytes(), output.read_bytes()
    assert sorted(read_judgements(journal)) == ["a", "b", "c", "d"]
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:10])  # killed in the middle of a line
    output.unlink()
    LengthJudge.asked = 0
    made = relabel(*settings)
    assert LengthJudge.asked == 4 and "2 pairs judged in both orders, 2 kept from before" in str(made)
    assert (journal.read_bytes(), output.read_bytes()) == (whole, rows)
    relabel(settings[0], settings[1].replace(f"'{LENGTH}'", f"{{name: '{LENGTH}', bias: 0.05}}"), settings[2])
    assert LengthJudge.asked == 12, "verdicts under other settings do not count"


def test_a_language_model_judges_on_disk(data: Path, tmp_path: Path) -> None:
    from test_curation_judge import tiny_llama

    from mmalign.curation import language_model

    model = tiny_llama(tmp_path / "llama", None)
    method = f"method={{name: judge, judge: {{name: language_model, model: '{model}'}}, inconsistent: tie}}"
    relabel(f"path={data}", method, f"output={tmp_path / 'judged.jsonl'}")
    row = rows_of(tmp_path / "judged.jsonl")[0]
    [done] = row.provenance[0]["curation"]
    [forward] = language_model(model=str(model))(["prompt a"], ["aaaa"], ["b"]).tolist()
    assert done["judge"] == "llama" and done["forward"] == pytest.approx(forward, abs=1e-6)


def test_a_dry_run_writes_no_rows(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmalign(["relabel", str(data), "method.name=voting", f"output={data.with_name('o.jsonl')}", "--dry-run"]) == 0
    assert "4 rows, not written (dry run)" in capsys.readouterr().out
    assert [path.name for path in data.parent.iterdir()] == [data.name]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: voting, flip: 2}", "flip: got 2"),
        ("{name: voting, judges: [rmm]}", "got no scores by rmm.*Did you mean rm"),
        ("{name: reward_augmented, by: rm, template: Good}", "want a text with"),
        ("{name: self_labels, policy: rm, reference: rm, smoothing: 1}", "smoothing: got 1"),
        ("{name: judge, judge: {name: language_model, model: nowhere/none}}", "judge none: cannot open nowhere/none"),
        ("{name: judge, judge: {name: language_modl}}", "Did you mean language_model"),
        ("{name: followups, model: tiny, positive: []}", "got 0 positive and 4 negative"),
    ],
)
def test_relabel_says_what_it_cannot_do(data: Path, method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        relabel(f"path={data}", f"method={method}", f"output={data.with_name('o.jsonl')}")
    assert not data.with_name("o.jsonl").exists()


def test_the_report_tells_the_method(data: Path, tmp_path: Path) -> None:
    made = relabel(f"path={data}", "method={name: ratings, by: rm}", f"output={tmp_path / 'o.jsonl'}")
    assert json.loads(made.report.read_text())["config"]["method"] == {
        "name": "ratings",
        "by": "rm",
        "temperature": 1.0,
        "margin": False,
    }
