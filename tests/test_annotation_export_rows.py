"""What an export keeps of a row, what it leaves out and says so, and that each trainable format trains."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from annotation_votes import Voter, cast, encoded, images, judged_project, opened, protocol, saying, texts
from runs import train
from sqlalchemy import text
from text_runs import PAIRS, text_weights, train_text

from mmalign.annotation.export import Exported, Settings, export
from mmalign.annotation.store import Store
from mmalign.errors import UserError
from mmalign.importers import IMPORTERS
from mmalign.records import Comparison, Content, Media, Message, comparison

A, B, TIE, BAD, SKIP = (saying(choice) for choice in ("a", "b", "tie", "both_bad", "skip"))
Pair = tuple[Content, Content]
TOLD: Pair = (Content(text=" one"), Content(text=" two"))


def picture(seed: int) -> Media:
    return Media(data=encoded(seed))


def drawn(number: int) -> Pair:
    return Content(images=(picture(10 * number),)), Content(images=(picture(10 * number + 1),))


def said(*words: str, **changes: object) -> tuple[Message, ...]:
    """A conversation in turns, the person first."""
    turns = [Message(role=("user", "assistant")[n % 2], text=text) for n, text in enumerate(words)]
    return (*turns[:-1], Message(role="user", text=words[-1], **changes))  # type: ignore[arg-type]


# What is asked, and what answers it.
ROWS: dict[str, Callable[[int], tuple[Content, Pair]]] = {
    "a conversation": lambda n: (Content(messages=said(f"hello {n}", "yes?", "go on")), TOLD),
    "images in a conversation": lambda n: (
        Content(messages=said(f"what is on these {n}?", images=(picture(n), picture(50 + n)), places=(0, 4))),
        TOLD,
    ),
    "an image beside a text": lambda n: (Content(text=f"what is it {n}?", images=(picture(n),)), TOLD),
    "an image to be edited": lambda n: (Content(text=f"make it red {n}", images=(picture(n),)), drawn(n + 1)),
}


def rows_of(name: str, count: int = 3) -> list[Comparison]:
    made = [ROWS[name](n) for n in range(count)]
    return [Comparison(id=f"row{n}", prompt=prompt, candidates=pair) for n, (prompt, pair) in enumerate(made)]


def kind_of(rows: Sequence[Comparison]) -> str:
    return "image" if rows[0].candidates[0].images else "text"


def read_again(done: Exported) -> list[Comparison]:
    assert done.importer is not None
    return [comparison(row, least=1) for row in IMPORTERS[done.importer](path=str(done.path)).dataset]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("format", ["comparisons", "trl", "unpaired", "ranked"])
def test_conversations_and_images_in_prompts_are_kept(name: str, format: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    store, project = judged_project(tmp_path, rows, [[A, B, A]], kind=kind_of(rows))
    for container in ("parquet", "jsonl"):
        found = read_again(export(store, project, tmp_path / container, Settings(format=format, container=container)))
        assert len(found) == (6 if format == "unpaired" else 3)
        given = {row.prompt.key(): row for row in rows}
        assert {row.prompt.key() for row in found} == set(given)
        for row in found:
            answers = {candidate.words().strip() or candidate.key() for candidate in given[row.prompt.key()].candidates}
            assert {candidate.words().strip() or candidate.key() for candidate in row.candidates} <= answers


def test_a_text_that_answers_go_on_from_ends_the_prompt(tmp_path: Path) -> None:
    rows = [texts(n, prefix=" It is") for n in range(2)]
    store, project = judged_project(tmp_path, rows, [[A, B]])
    for format in ("trl", "unpaired", "ranked"):
        found = read_again(export(store, project, tmp_path / format, Settings(format=format)))
        assert {row.prompt.text for row in found} == {f"name a colour {n} It is" for n in range(2)}
    assert {row.prefix for row in read_again(export(store, project, tmp_path / "all", Settings(format="comparisons")))} == {
        " It is"
    }


def unholdable(number: int) -> dict[str, Comparison]:
    beside = tuple(Content(text=f"look {n}", images=(picture(90 + n),)) for n in range(2))
    speech = tuple(Content(messages=(Message(role="assistant", text="look", images=(picture(80 + n),)),)) for n in range(2))
    prompt = Content(text=f"a red {number}")
    return {
        "words and images": Comparison(id="beside", prompt=prompt, candidates=beside),
        "words and images in": Comparison(id="speech", prompt=Content(messages=said("draw")), candidates=speech),
        "a conversation before": Comparison(id="chat", prompt=Content(messages=said("draw")), candidates=drawn(5)),
        "several images": Comparison(
            id="many", prompt=prompt, candidates=(Content(images=(picture(1), picture(2))), Content(images=(picture(3),)))
        ),
        "prompt of its own": Comparison(
            id="own", prompt=prompt, candidates=drawn(6), prompts=(Content(text="a red one"), Content(text="a blue one"))
        ),
    }


def test_what_a_format_cannot_hold_is_left_out_and_told_and_comparisons_hold_it(tmp_path: Path) -> None:
    odd = unholdable(1)
    rows = [images(0), *odd.values(), *rows_of("an image to be edited", 1)]
    rows[-1] = Comparison(id="edit", prompt=rows[-1].prompt, candidates=rows[-1].candidates)
    store, project = judged_project(tmp_path, rows, [[A] * len(rows)], kind="image")
    for format, count in (("trl", 2), ("ranked", 2), ("unpaired", 4), ("pick_a_pic", 1), ("hpdv2", 1)):
        done = export(store, project, tmp_path / format, Settings(format=format))
        assert done.num_rows == len(read_again(done)) == count, format
        assert sum(done.dropped.values()) == len(rows) - (count if format != "unpaired" else 2)
        assert all(any(told in reason for reason in done.dropped) for told in odd)
        card = (done.folder / "README.md").read_text()
        assert all(f"| {reason} | {number} |" in card for reason, number in done.dropped.items())
    whole = export(store, project, tmp_path / "all", Settings(format="comparisons"))
    assert (whole.num_rows, dict(whole.dropped)) == (len(rows), {})
    assert [row.candidates[0].key() for row in read_again(whole)] == [row.candidates[0].key() for row in rows]


def test_half_characters_keep_nobody_from_his_data(tmp_path: Path) -> None:
    """Intake takes no such texts today; older stores hold them, and what is told of makers may."""
    half, whole = "half \ud83d and nul \0", "half \ufffd and nul \0"
    origins = ({"model": half}, {"model": "plain"})
    rows = [
        texts(n, prompt=Content(text=f"half MARK and nul \0 {n}"), answers=("MARK", f"{n} \U0001f600"), provenance=origins)
        for n in range(2)
    ]
    store, project = judged_project(tmp_path, rows, [[A, B]])
    with store.database.write() as connection:
        connection.execute(text("UPDATE item SET row = replace(row, 'MARK', :half)"), {"half": "\\ud83d"})
    assert [item.comparison.prompt.text for item in store.items(project)] == [f"{half} {n}" for n in range(2)]
    for format in ("comparisons", "trl", "unpaired", "ranked"):
        for container in ("parquet", "jsonl", "datasets"):
            found = read_again(
                export(store, project, tmp_path / f"{format}-{container}", Settings(format=format, container=container))
            )
            assert {row.prompt.text for row in found} == {f"{whole} {n}" for n in range(2)}
            assert "\U0001f600" in {str(candidate.text)[2:] for row in found for candidate in row.candidates}
    for container in ("parquet", "jsonl"):
        done = export(store, project, tmp_path / f"votes-{container}", Settings(format="judgements", container=container))
        assert done.num_rows == 2
    assert export(store, project, tmp_path / "csv", Settings(format="csv")).num_rows == 2


def test_an_image_that_was_changed_since_it_was_judged_is_no_training_data(tmp_path: Path) -> None:
    rows = []
    for n in range(4):
        files = [tmp_path / f"{n}-{side}.png" for side in "ab"]
        for place, file in enumerate(files):
            file.write_bytes(encoded(10 * n + place))
        pair = tuple(Content(images=(Media(path=str(file)),)) for file in files)
        rows.append(Comparison(id=f"row{n}", prompt=Content(text=f"a red {n}"), candidates=pair))
    store, project = judged_project(tmp_path, rows, [[A] * 4], kind="image")
    (tmp_path / "1-a.png").write_bytes(encoded(77))
    (tmp_path / "2-b.png").unlink()
    for format in ("trl", "comparisons", "pick_a_pic", "hpdv2"):
        done = export(store, project, tmp_path / format, Settings(format=format))
        assert {row.prompt.text for row in read_again(done)} == {"a red 0", "a red 3"}
        assert done.dropped["an image that is gone, or was changed since it was added"] == 2
    for container in ("parquet", "jsonl"):
        done = export(store, project, tmp_path / container, Settings(format="judgements", container=container))
        assert done.num_rows == 4, "no judgement is lost"
        told = json.loads((done.folder / "project.json").read_text())["items"]
        assert [entry["id"] for entry in told.values() if "left_out" in entry] == ["row1", "row2"]
        items = IMPORTERS["comparisons"](path=str(done.folder / f"items.{container}")).dataset
        assert len(items) == 2


def test_the_last_revision_is_what_is_exported(tmp_path: Path) -> None:
    store, project = judged_project(tmp_path, [texts(n) for n in range(4)], [[A, A, A, A]])
    [who] = store.accounts()
    for number, voter in ((3, B), (2, SKIP), (1, BAD)):
        assert store.undo(project, who.id, store.votes(project)[number].assignment) is not None
        cast(store, project, who.id, voter)
    done = export(store, project, tmp_path / "trl", Settings(container="jsonl"))
    rows = [json.loads(line) for line in done.path.read_text().splitlines()]
    assert [(row["id"], row["chosen"]) for row in rows] == [("row0", " blue"), ("row3", " two is four")]
    assert dict(done.dropped) == {"all candidates bad": 1, "no verdict yet": 1}
    labels = {row["id"]: row["label"] for row in _lines(export(store, project, tmp_path / "kto", _jsonl("unpaired")))}
    expected = {"row0#0": True, "row0#1": False, "row1#0": False, "row1#1": False, "row3#0": False, "row3#1": True}
    assert labels == expected
    everything = _lines(export(store, project, tmp_path / "all", _jsonl("judgements")), "judgements.jsonl")
    assert [(row["id"], row["revision"], row["choice"], row["is_latest"]) for row in everything] == [
        ("row0", 1, "a", True),
        ("row1", 1, "a", False),
        ("row2", 1, "a", False),
        ("row3", 1, "a", False),
        ("row3", 2, "b", True),
        ("row2", 2, "skip", True),
        ("row1", 2, "both_bad", True),
    ]


def _jsonl(format: str) -> Settings:
    return Settings(format=format, container="jsonl")


def _lines(done: Exported, name: str = "train.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (done.folder / name).read_text().splitlines()]


def test_pick_a_pic_has_its_columns_and_a_prompt_counts_once_where_that_is_wanted(tmp_path: Path) -> None:
    rows = [images(n, prompt=Content(text="a red" if n < 3 else "a blue")) for n in range(4)]
    store, project = judged_project(tmp_path, rows, [[A, B, TIE, A]], kind="image")
    done = export(store, project, tmp_path / "out", Settings(format="pick_a_pic"))
    import pyarrow.parquet as pq

    table = pq.read_table(done.folder / "train.parquet").to_pylist()
    assert [(row["label_0"], row["label_1"]) for row in table] == [(1, 0), (0, 1), (0.5, 0.5), (1, 0)]
    assert [row["best_image_uid"] for row in table] == ["row0#0", "row1#1", "tie", "row3#0"]
    assert [row["num_example_per_prompt"] for row in table] == [3, 3, 3, 1]
    columns = {"caption", "jpg_0", "jpg_1", "image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id", "has_label"}
    assert columns | {"are_different"} <= set(table[0])
    assert table[0]["jpg_0"] == rows[0].candidates[0].images[0].data
    weights = [row["weight"] for row in IMPORTERS["pick_a_pic"](path=str(done.path), weight="prompt").dataset]
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_the_card_names_the_columns_that_are_there(tmp_path: Path) -> None:
    store, project = judged_project(tmp_path, [texts(n) for n in range(2)], [[A, B]])
    hard = export(store, project, tmp_path / "hard", Settings(prob=False))
    assert "| prob |" not in (hard.folder / "README.md").read_text()
    soft = (export(store, project, tmp_path / "soft", Settings()).folder / "README.md").read_text()
    assert "| prob |" in soft and "| margin |" not in soft
    (tmp_path / "strong").mkdir()
    strong, strengths = judged_project(tmp_path / "strong", [texts(0)], [[saying("a", strength=-2)]], strength=True)
    assert "| margin |" in (export(strong, strengths, tmp_path / "strength", Settings()).folder / "README.md").read_text()
    (tmp_path / "long").mkdir()
    answers = (" one", " two", " three")
    lists, ranked = judged_project(tmp_path / "long", [texts(0, answers=answers)], [[saying("ranks", ranks=(1, 2, 3))]])
    told = export(lists, ranked, tmp_path / "lists", Settings(container="jsonl"))
    (row,) = _lines(told)
    assert "prob" not in row and "| prob |" not in (told.folder / "README.md").read_text()
    assert (
        "| ranks |" in (export(lists, ranked, tmp_path / "whole", Settings(format="ranked")).folder / "README.md").read_text()
    )


LISTS = [(prompt, (good, bad, " eight")) for prompt, good, bad in PAIRS]


@pytest.mark.parametrize("loss", ["rank_dpo", "plackett_luce"])
def test_rankings_of_people_train_losses_of_lists(loss: str, tmp_path: Path) -> None:
    rows = [texts(n, prompt=Content(text=prompt), answers=answers) for n, (prompt, answers) in enumerate(LISTS)]
    said_by: list[Voter] = [saying("ranks", ranks=(1, 2, 3) if n % 2 else (2, 1, 2)) for n in range(len(rows))]
    store, project = judged_project(tmp_path, rows, [said_by])
    done = export(store, project, tmp_path / "data", Settings(format="ranked"))
    data = {"importer": {"name": done.importer, "path": str(done.path)}, "view": {"name": "ranked"}}
    run = train_text(tmp_path / "run", data=data, loss={"name": loss}, training={"steps": 1})
    assert any(bool(weight.any()) for weight in text_weights(run).values())


@pytest.mark.parametrize("name", ["pick_a_pic", "hpdv2"])
def test_images_in_foreign_columns_train_at_once(name: str, tmp_path: Path) -> None:
    store, project = judged_project(tmp_path, [images(n) for n in range(4)], [[A, B, A, B]], kind="image")
    done = export(store, project, tmp_path / "data", Settings(format=name))
    data = {"importer": {"name": done.importer, "path": str(done.path)}}
    run = train(tmp_path / "run", data=data, training={"steps": 1})
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_a_project_without_anything_to_export_says_why(tmp_path: Path) -> None:
    store: Store = opened(tmp_path)
    project = store.create_project("trial", "text", protocol()).id
    store.add(project, [texts(0)])
    for format in ("trl", "judgements", "comparisons", "csv"):
        with pytest.raises(UserError, match="want at least one"):
            export(store, project, tmp_path / "out", Settings(format=format))
        assert not (tmp_path / "out").exists()
