"""Exports of real projects: each is read again by the importer it names, and trains at once."""

import atexit
import csv
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from annotation_votes import Voter, cast, images, judged_project, opened, protocol, saying, texts
from runs import train
from text_runs import PAIRS, text_weights, train_text

from mmalign.annotation.export import Exported, Settings, export
from mmalign.annotation.store import Store
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.export import ExportConfig, main
from mmalign.importers import IMPORTERS
from mmalign.records import Comparison, Content, comparison

A, B, TIE, BAD, SKIP = (saying(choice) for choice in ("a", "b", "tie", "both_bad", "skip"))
# Two people, seven items: both a; both b; a and b; both tie; both bad; both skip; b and tie.
VOTES = ((A, B, A, TIE, BAD, SKIP, B), (A, B, B, TIE, BAD, SKIP, TIE))
DROPPED = {"candidates equal in the mean": 1, "tie": 1, "all candidates bad": 1, "no verdict yet": 1}
READABLE = [
    *(("text", "trl", container) for container in ("parquet", "jsonl", "datasets")),
    *(("image", "trl", container) for container in ("parquet", "jsonl", "datasets")),
    *((kind, "comparisons", "jsonl") for kind in ("text", "image")),
    *((kind, "unpaired", "parquet") for kind in ("text", "image")),
    *((kind, "ranked", "parquet") for kind in ("text", "image")),
    *(("image", "pick_a_pic", container) for container in ("parquet", "datasets")),
    ("image", "hpdv2", "json"),
]


@functools.cache
def trial_of(kind: str = "text") -> tuple[Store, int]:
    """A project that tests only read."""
    folder = Path(tempfile.mkdtemp(prefix="mmalign-export-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return trial(folder, kind)


def trial(folder: Path, kind: str = "text", votes: Sequence[Sequence[Voter]] = VOTES, **changes: object) -> tuple[Store, int]:
    rows = [texts(n) if kind == "text" else images(n) for n in range(len(votes[0]))]
    return judged_project(folder, rows, votes, kind=kind, **changes)


def read_again(done: Exported) -> list[Comparison]:
    assert done.importer is not None
    imported = IMPORTERS[done.importer](path=str(done.path))
    assert not imported.faults
    return [comparison(row, least=1) for row in imported.dataset]


def key(row: Comparison, place: int) -> str:
    return row.candidates[place].key()


@pytest.mark.parametrize(("kind", "name", "container"), READABLE)
def test_what_is_exported_is_read_again_with_the_order_that_people_gave(
    kind: str, name: str, container: str, tmp_path: Path
) -> None:
    store, project = trial_of(kind)
    settings = Settings(format=name, container=container)
    rows = read_again(export(store, project, tmp_path / "out", settings))
    given = {item.comparison.prompt.text: item.comparison for item in store.items(project)}
    said = {row.prompt.text: row for row in rows}
    for row in rows:  # candidates are those of the project, bit for bit
        known = {key(given[str(row.prompt.text)], place) for place in (0, 1)}
        assert {candidate.key() for candidate in row.candidates} <= known
    if name == "unpaired":
        labels = {(row.prompt.text, key(row, 0)): row.scores["label"][0] for row in rows}
        first, second, bad = (given[f"{'name a colour' if kind == 'text' else 'a red'} {n}"] for n in (0, 1, 4))
        assert [labels[one.prompt.text, key(one, place)] for one in (first, second, bad) for place in (0, 1)] == [
            *(1.0, 0.0),
            *(0.0, 1.0),
            *(0.0, 0.0),
        ]
        assert len(rows) == 8
        return
    better = {text: key(row, _winner(row)) for text, row in said.items() if _winner(row) is not None}
    expected = {given[text].prompt.text: key(given[text], place) for text, place in _won(given).items()}
    assert better == expected
    ties = {text for text, row in said.items() if _winner(row) is None}
    assert len(ties) == (2 if name in ("comparisons", "pick_a_pic", "hpdv2") else 0)


def _won(given: dict[str | None, Comparison]) -> dict[str | None, int]:
    """Prompt -> the candidate that won, of the three items that have a winner."""
    prompts = list(given)
    return {prompts[0]: 0, prompts[1]: 1, prompts[6]: 1}


def _winner(row: Comparison) -> int | None:
    values = (1 - row.prob, row.prob) if row.prob is not None else row.ranks
    assert values is not None
    return None if values[0] == values[1] else int(values[1] < values[0])


def test_what_gives_no_preference_is_counted_by_reason(tmp_path: Path) -> None:
    store, project = trial_of()
    done = export(store, project, tmp_path / "out", Settings(format="trl"))
    assert (done.num_rows, dict(done.dropped)) == (3, DROPPED)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {reason} | {count} |" in card for reason, count in DROPPED.items())
    assert "| rows | 3 |" in card and "| items judged | 6 of 7 |" in card and "raw agreement" in card
    assert "items left out" in str(done) and "data.importer.name=trl" in str(done)


def test_two_exports_into_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for n, votes in enumerate(([[A, A]], [[B, B]])):
        (tmp_path / str(n)).mkdir()
        store, project = trial(tmp_path / str(n), votes=votes)
        rows = read_again(export(store, project, tmp_path / str(n) / "data", Settings()))
        assert [row.candidates[0].text for row in rows] == [(" blue", " two is four")[n]] * 2


def test_soft_labels_margins_and_counts_stand_beside_a_pair(tmp_path: Path) -> None:
    strong, weak = saying("b", strength=3), saying("b", strength=1)
    store, project = trial(tmp_path, votes=[[strong, A], [weak, A], [saying("a", strength=-1), TIE]], strength=True)
    done = export(store, project, tmp_path / "out", Settings(format="trl", container="jsonl"))
    first, second = map(json.loads, done.path.read_text().splitlines())
    assert (first["prob"], first["margin"], first["n_votes"], first["agreement"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1.0),
        3,
        pytest.approx(2 / 3),
    )
    assert first["chosen"] == " two is four" and second["chosen"] == " blue"
    assert second["prob"] == pytest.approx(5 / 6) and "margin" not in second
    [row, _] = read_again(done)
    assert (row.prob, row.margin) == (pytest.approx(2 / 3), pytest.approx(1.0))
    hard = export(store, project, tmp_path / "hard", Settings(format="trl", prob=False))
    assert [one.prob for one in read_again(hard)] == [None, None]


def test_lists_keep_their_ranks_and_become_pairs_where_pairs_are_wanted(tmp_path: Path) -> None:
    rows = [texts(n, answers=(" blue", " two", " red")) for n in range(2)]
    votes = [[saying("ranks", ranks=(2, 1, 3)), saying("ranks", ranks=(1, 1, 2))]]
    store, project = judged_project(tmp_path, rows, votes)
    whole = read_again(export(store, project, tmp_path / "ranked", Settings(format="ranked")))
    assert [row.ranks for row in whole] == [(2.0, 1.0, 3.0), (1.5, 1.5, 3.0)]
    done = export(store, project, tmp_path / "pairs", Settings(format="trl", pairs="all", container="jsonl"))
    pairs = [(row["id"], row["chosen"], row["rejected"]) for row in map(json.loads, done.path.read_text().splitlines())]
    assert pairs == [
        ("row0#1-0", " two", " blue"),
        ("row0#1-2", " two", " red"),
        ("row0#0-2", " blue", " red"),
        ("row1#0-2", " blue", " red"),
        ("row1#1-2", " two", " red"),
    ]


def test_judgements_lose_nothing(tmp_path: Path) -> None:
    store, project = trial(tmp_path)
    [first, *_] = store.accounts()
    shown = store.undo(project, first.id)
    assert shown is not None
    cast(store, project, first.id, A)
    for container in ("parquet", "jsonl"):
        folder = tmp_path / container
        done = export(store, project, folder, Settings(format="judgements", container=container))
        rows = _rows(folder / f"judgements.{container}")
        votes = store.votes(project, latest=False)
        assert done.num_rows == len(rows) == len(votes) == 15
        for row, vote in zip(rows, votes, strict=True):
            assert (row["choice"], row["shown_choice"], row["order"]) == (
                vote.verdict.choice,
                vote.shown.choice,
                list(vote.order),
            )
            assert (row["item"], row["assignment"], row["revision"]) == (vote.item, vote.assignment, vote.revision)
            assert (row["submitted_at"], row["dwell_ms"], row["is_latest"]) == (
                vote.submitted_at,
                vote.dwell_ms,
                vote.is_latest,
            )
            assert row["annotator"] in ("person-1", "person-2")
        items = IMPORTERS["comparisons"](path=str(folder / f"items.{container}")).dataset
        texts_of = [[c["text"] for c in row["candidates"]] for row in items]
        assert texts_of == [[c.text for c in item.comparison.candidates] for item in store.items(project)]
        assert {row["item"] for row in rows} == {int(row["id"]) for row in items}
        told = json.loads((folder / "project.json").read_text())
        assert told["protocol"]["choices"] and len(told["guidelines"]) == 1
    named = export(store, project, tmp_path / "named", Settings(format="judgements", container="jsonl", names=True))
    assert {row["annotator"] for row in _rows(named.folder / "judgements.jsonl")} == {"person 0", "person 1"}


def _rows(file: Path) -> list[dict[str, object]]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    import pyarrow.parquet as pq

    found: list[dict[str, object]] = pq.read_table(file).to_pylist()
    return found


def test_nobody_is_named_in_what_is_shared(tmp_path: Path) -> None:
    store, project = trial_of("image")
    for name in ("trl", "hpdv2", "judgements"):
        folder = export(store, project, tmp_path / name, Settings(format=name)).folder
        said = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
        assert b"person 0" not in said and str(tmp_path).encode() not in said


def test_a_table_for_spreadsheets_has_a_line_an_item_and_runs_nothing(tmp_path: Path) -> None:
    row = texts(0, prompt=Content(text="=1+1"))
    store, project = judged_project(tmp_path, [row, texts(1)], [[A, BAD]])
    done = export(store, project, tmp_path / "out", Settings(format="csv"))
    with open(done.folder / "items.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["prompt"] == "'=1+1" and (first["votes a"], first["rank a"], first["rank b"]) == ("1", "1.0", "2.0")
    assert second["outcome"] == "all candidates bad" and first["source b"] == "model 1"


def test_known_answers_people_and_thin_evidence_are_left_out_on_demand(tmp_path: Path) -> None:
    store, project = trial_of()
    thin = export(store, project, tmp_path / "thin", Settings(min_agreement=0.9))
    assert (thin.num_rows, thin.dropped["agreement below 0.9"]) == (2, 2)
    alone = export(store, project, tmp_path / "alone", Settings(without=("person 1",)))
    assert alone.num_rows == 4 and "left out on demand | 1 |" in (alone.folder / "README.md").read_text()
    assert "person 1" not in (alone.folder / "README.md").read_text()
    with pytest.raises(UserError, match="want people who voted"):
        export(store, project, tmp_path / "none", Settings(without=("nobody",)))
    few = export(store, project, tmp_path / "few", Settings(format="comparisons", min_votes=2))
    assert few.num_rows == 5
    with pytest.raises(UserError, match="fewer than 3 votes"):
        export(store, project, tmp_path / "fewer", Settings(min_votes=3))
    assert not (tmp_path / "fewer").exists() and not list(tmp_path.glob(".*partial"))


def test_gold_items_and_repeats_are_no_training_data(tmp_path: Path) -> None:
    store = opened(tmp_path)
    project = store.create_project("trial", "text", protocol(gold_share=0.6)).id
    store.add(project, [texts(n) for n in range(4)])
    store.add(project, [texts(n, ranks=(1.0, 2.0)) for n in range(10, 14)], role="gold")
    annotator = store.add_account("p").id
    while store.take(project, annotator) is not None:
        cast(store, project, annotator, B)
    golds = sum(vote.kind == "gold" for vote in store.votes(project))
    assert golds > 0
    done = export(store, project, tmp_path / "out", Settings(format="comparisons"))
    assert done.num_rows == 4 and done.dropped["gold item, whose answer was known"] == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "pick_a_pic"}, "want one of comparisons"),
        ({"format": "unknown"}, "want one of comparisons"),
        ({"format": "csv", "container": "parquet"}, "want csv"),
    ],
)
def test_what_cannot_be_exported_is_refused(changes: dict[str, str], match: str, tmp_path: Path) -> None:
    store, project = trial_of()
    with pytest.raises(UserError, match=match):
        export(store, project, tmp_path / "out", Settings(**changes))
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced_and_only_on_demand(tmp_path: Path) -> None:
    store, project = trial_of()
    export(store, project, tmp_path / "out", Settings())
    with pytest.raises(UserError, match="Set replace"):
        export(store, project, tmp_path / "out", Settings())
    export(store, project, tmp_path / "out", Settings(format="csv", replace=True))
    assert not (tmp_path / "out" / "train.parquet").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        export(store, project, tmp_path / "mine", Settings(replace=True))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_verb_finds_the_project_and_writes_the_dashboard_too(tmp_path: Path) -> None:
    store, _ = trial(tmp_path)
    overrides = [f"store={tmp_path / 'votes.db'}", f"output={tmp_path / 'out'}", "dashboard=true", "format=comparisons"]
    assert main(read_config(ExportConfig, None, overrides)).num_rows == 5
    assert (tmp_path / "out" / "dashboard" / "agreement.svg").read_text().startswith("<svg")
    store.create_project("other", "text", protocol())
    with pytest.raises(UserError, match="trial, other"):
        main(read_config(ExportConfig, None, [*overrides, "replace=true"]))
    with pytest.raises(UserError, match="want the database"):
        main(read_config(ExportConfig, None, [f"store={tmp_path / 'no.db'}", f"output={tmp_path / 'out'}"]))
    assert not (tmp_path / "no.db").exists()


@pytest.mark.parametrize("name", ["trl", "comparisons"])
def test_exported_images_train_at_once(name: str, tmp_path: Path) -> None:
    store, project = trial(tmp_path, "image", [[A, B, A, B]])
    done = export(store, project, tmp_path / "data", Settings(format=name))
    data = {"importer": {"name": done.importer, "path": str(done.path)}}
    run = train(tmp_path / "run", data=data, training={"steps": 1})
    assert (run / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(("name", "loss", "view"), [("trl", "dpo", "pair"), ("unpaired", "kto", "unpaired")])
def test_exported_texts_train_at_once(name: str, loss: str, view: str, tmp_path: Path) -> None:
    rows = [texts(n, prompt=Content(text=prompt), answers=answers) for n, (prompt, *answers) in enumerate(PAIRS)]
    store, project = judged_project(tmp_path, rows, [[A, B] * 4])
    done = export(store, project, tmp_path / "data", Settings(format=name))
    data = {"importer": {"name": done.importer, "path": str(done.path)}, "view": {"name": view}}
    run = train_text(tmp_path / "run", data=data, loss={"name": loss}, training={"steps": 1})
    assert any(bool(weight.any()) for weight in text_weights(run).values())
