"""`mmalign pairs`: every method by hand-worked lists, and the command on files: stages, two models' answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.cli import main as mmalign
from mmalign.config import read_config
from mmalign.curation.pairings import Pair, code_tests, curriculum, paired, ranked, search_steps
from mmalign.curation.predictions import predictions
from mmalign.errors import UserError
from mmalign.pairs import PairsConfig, main
from mmalign.records import Comparison, Content, Dropped, Message, comparison, pair, read, write
from mmalign.row_files import Curated


def listed(name: str, *ratings: float, **more: Any) -> Comparison:
    candidates = tuple(Content(text=f"{name}{n}") for n in range(len(ratings)))
    return Comparison(id=name, prompt=Content(text=f"prompt {name}"), candidates=candidates, scores={"rm": ratings}, **more)


def places(outcome: tuple[Pair, ...] | Dropped) -> list[tuple[int, int]]:
    assert not isinstance(outcome, Dropped)
    return [(one.better, one.worse) for one in outcome]


def pairs(*settings: str) -> Curated:
    return main(read_config(PairsConfig, None, list(settings)))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(one) for one in read(path)]


LISTS = [listed("a", 4.0, 9.0, 6.0, 2.0), listed("b", 5.0, 5.0, 5.0), listed("c", 1.0, 2.0)]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("best_vs_rest", [(1, 3), (1, 0), (1, 2)]),
        ("best_worst", [(1, 3)]),
        ("adjacent", [(1, 2), (2, 0), (0, 3)]),
        ("all", [(1, 3), (1, 0), (2, 3), (1, 2), (2, 0), (0, 3)]),
    ],
)
def test_lists_become_pairs_by_scheme(scheme: Any, expected: list[tuple[int, int]]) -> None:
    first, tied, short = ranked(LISTS, scheme=scheme)
    assert places(first) == expected and tied == Dropped("tie") and places(short) == [(1, 0)]


def test_a_gap_below_the_least_makes_no_pair() -> None:
    first, _, short = ranked(LISTS, min_gap=4.0)
    assert places(first) == [(1, 3), (1, 0)] and short == Dropped("gaps below 4")


def test_the_curriculum_goes_from_the_widest_gap_to_the_narrowest() -> None:
    first, _, short = curriculum(LISTS)
    assert places(first) == [(1, 3), (1, 0), (1, 2)]
    assert not isinstance(first, Dropped) and [one.stage for one in first] == [1, 2, 3]
    assert not isinstance(short, Dropped) and [one.stage for one in short] == [1]
    [first, *_] = curriculum(LISTS, stages=2)
    assert places(first) == [(1, 3), (1, 0)]


def test_stages_by_gap_are_cut_over_all_rows() -> None:
    first, _, short = curriculum(LISTS, stages=2, key="gap")
    assert not isinstance(first, Dropped) and [(one.gap, one.stage) for one in first] == [(7.0, 1), (5.0, 1), (3.0, 2)]
    assert not isinstance(short, Dropped) and [(one.gap, one.stage) for one in short] == [(1.0, 2)]


def test_sibling_steps_pair_with_the_confidence_of_their_visits() -> None:
    row = Comparison(
        id="s",
        prompt=Content(text="p"),
        candidates=tuple(Content(text=text) for text in "abc"),
        prefix="Step 1.",
        scores={"quality": (0.1, 0.8, 0.5), "visits": (1.0, 4.0, 9.0)},
    )
    [outcome] = search_steps([row])
    assert not isinstance(outcome, Dropped)
    assert outcome[0].prob == pytest.approx(0.8) and places(outcome) == [(1, 0)]
    made = paired(row, outcome[0], "search_steps")
    assert (made.prefix, made.ranks, made.prob) == ("Step 1.", (1.0, 2.0), pytest.approx(0.8))
    doubt = Comparison(**{**vars(row), "scores": {"quality": (0.1, 0.8, 0.5), "visits": (9.0, 1.0, 0.0)}})
    [outcome] = search_steps([doubt])
    assert not isinstance(outcome, Dropped) and outcome[0].prob == 0.5
    assert paired(doubt, outcome[0], "search_steps").ranks == (1.0, 1.0), "no surer than a tie"


def test_programs_pair_by_the_tests_they_pass_and_by_speed() -> None:
    passed = ([1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 1])
    row = listed("c", 0, 0, 0, 0, provenance=tuple({"passed": p, "s": t} for p, t in zip(passed, (1, 3, 1, 1), strict=True)))
    [outcome] = code_tests([row], seconds="s")
    assert not isinstance(outcome, Dropped)
    assert [(one.better, one.worse, one.stage) for one in outcome] == [(1, 3, 1), (2, 1, 2)]
    assert outcome[1].note == {"by": "speed", "ratio": 3.0}
    [outcome] = code_tests([row])
    assert not isinstance(outcome, Dropped) and [one.stage for one in outcome] == [None]
    [outcome] = code_tests([listed("d", 0, 0, provenance=({"passed": [1]}, {"passed": [1, 0]}))])
    assert outcome == Dropped("no list of equal length under passed for every candidate")


def test_a_pair_keeps_scores_provenance_and_the_media_of_its_candidates() -> None:
    row = listed("a", 4.0, 9.0, 6.0, provenance=tuple({"model": name} for name in "xyz"), where="f:3")
    made = paired(row, Pair(better=1, worse=0, gap=5.0, stage=2), "curriculum")
    assert (made.id, made.scores, made.ranks, made.prob) == ("a#1-0", {"rm": (9.0, 4.0)}, (1.0, 2.0), None)
    note = {"pairs": "curriculum", "stage": 2, "gap": 5.0, "of": "a", "from": "f:3"}
    assert made.provenance == ({"model": "y", "curation": [note]}, {"model": "x", "curation": [note]})


# the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(LISTS, tmp_path / "lists.jsonl")


def test_the_stages_stand_in_one_file_easy_ones_first(data: Path, tmp_path: Path) -> None:
    made = pairs(f"path={data}", "method=curriculum", f"output={tmp_path / 'pairs.parquet'}")
    rows = rows_of(tmp_path / "pairs.parquet")
    assert [one.id for one in rows] == ["a#1-3", "c#1-0", "a#1-0", "a#1-2"]
    assert [one.provenance[0]["curation"][0]["stage"] for one in rows] == [1, 1, 2, 3]
    assert made.told == ("stage 1: 2 pairs", "stage 2: 1 pairs", "stage 3: 1 pairs")
    assert dict(made.dropped) == {"tie": 1}
    examples = pair(rows[0], by="ranks")
    assert not isinstance(examples, Dropped)
    assert [one.completion.text for one in examples[0].samples] == ["a1", "a3"]


def test_or_one_file_a_stage(data: Path, tmp_path: Path) -> None:
    settings = (f"path={data}", "method=curriculum", f"output={tmp_path / 'stage-{stage}'}")
    made = pairs(*settings)
    assert {path.name: count for path, count in made.files.items()} == {"stage-1": 2, "stage-2": 1, "stage-3": 1}
    assert [one.id for one in rows_of(tmp_path / "stage-1")] == ["a#1-3", "c#1-0"]
    assert [one.id for one in rows_of(tmp_path / "stage-3")] == ["a#1-2"]
    pairs(*settings)  # again: folders of an earlier run are replaced


def test_two_models_answers_become_pairs_without_a_judge(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Talk"}]
    strong = [
        {"prompt": "p", "response": "good"},
        {"prompt": "q", "response": "same"},
        {"prompt": talk, "response": "hm"},
        {"x": 1},
    ]
    weak = [{"prompt": "q", "completion": "same"}, {"prompt": "p", "completion": "bad"}, {"prompt": talk, "completion": "eh"}]
    weak += [{"prompt": "alone", "completion": "z"}]
    for name, rows in (("strong", strong), ("weak", weak)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    files = [f"predictions.{side}={tmp_path / name}.jsonl" for side, name in (("chosen", "strong"), ("rejected", "weak"))]
    made = pairs(*files, f"output={tmp_path / 'pairs.jsonl'}")
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert [tuple(c.text for c in one.candidates) for one in rows] == [("good", "bad"), ("hm", "eh")]
    assert rows[1].prompt == Content(messages=(Message("user", "Talk"),)) and rows[0].ranks == (1.0, 2.0)
    assert rows[0].provenance[1]["predictions"] == str(tmp_path / "weak.jsonl")
    assert rows[0].provenance[0]["curation"] == [{"pairs": "predictions", "from": f"{tmp_path / 'strong'}.jsonl:1"}]
    assert dict(made.dropped) == {"no chosen answer": 1, "same answer": 1}
    assert "strong.jsonl:4: got nothing for prompt" in str(made)


def test_predictions_are_read_from_any_table_and_named_column(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"q": ["one", "one", "two"], "text": ["a", "later", ""]}).to_parquet(tmp_path / "p.parquet")
    found = predictions(str(tmp_path / "p.parquet"), prompt="q", answer="text")
    assert [one.text for one in found.answers.values()] == ["a"], "a prompt's first answer counts"
    assert [str(one) for one in found.faults] == [
        f"{tmp_path / 'p.parquet'}:3: got an empty text, want a text. Write one or remove the row."
    ]


def test_a_dry_run_counts_the_stages(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = data.with_name("s-{stage}.jsonl")
    assert mmalign(["pairs", str(data), "method=curriculum", f"output={output}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 rows: 4 pairs" in out and f"{data.with_name('s-2.jsonl')}: 1 rows, not written (dry run)" in out
    assert [path.name for path in data.parent.iterdir()] == [data.name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method={name: ranked, by: rmm}"], "every row was left out .not judged by rmm. Did you mean rm"),
        (["method={name: ranked, scheme: best}"], "method.scheme"),
        (["method={name: curriculum, stages: 0}"], "stages: got 0"),
        (["method=search_steps"], "got no scores by quality"),
        ([], "method: got none, want one of ranked"),
        (["method=ranked", "predictions.chosen=a", "predictions.rejected=b"], "predictions: got path, data or method too"),
    ],
)
def test_pairs_says_what_it_cannot_do(data: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs(f"path={data}", *settings, f"output={data.with_name('o.jsonl')}")


def test_stages_are_asked_for_where_there_are_some(data: Path) -> None:
    with pytest.raises(UserError, match="but ranked has no stages"):
        pairs(f"path={data}", "method=ranked", f"output={data.with_name('o-{stage}.jsonl')}")
    with pytest.raises(UserError, match="want a place outside the data"):
        data.rename(data.with_name("o-2.jsonl"))
        pairs(f"path={data.with_name('o-2.jsonl')}", "method=curriculum", f"output={data.with_name('o-{stage}.jsonl')}")
