"""Prompts alone and single images: their formats, their faults with file and line, and the runs that read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import metrics_of, train

from mmalign.errors import UserError
from mmalign.experiment import Data, read_examples
from mmalign.importers import IMPORTERS, prompts, single_images
from mmalign.records import Comparison, Content, Dropped, Example, Media, comparison
from mmalign.records.views import VIEWS, reward_weighted


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def rows_of(imported: Any) -> list[Comparison]:
    return [comparison(row, least=0) for row in imported.dataset]


def images(folder: Path, count: int = 4) -> list[str]:
    for number in range(count):
        Image.new("RGB", (36, 36), (60 * number, 20, 90)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


# Prompts


def test_prompts_of_a_text_file_are_its_distinct_lines(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.txt", "a cat", "a dog, \u201cred\u201d", "a cat", "two\u2028in one")
    rows = rows_of(prompts(path=str(path)))
    assert [(row.prompt.text, row.where) for row in rows] == [
        ("a cat", f"{path}:1"),
        ("a dog, \u201cred\u201d", f"{path}:2"),
        ("two\u2028in one", f"{path}:4"),
    ]
    assert [row.candidates for row in rows] == [()] * 3
    assert len(rows_of(prompts(path=str(path), distinct=False))) == 4


def test_prompts_of_a_jsonl_file_are_texts_or_objects(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", '"a cat"', {"prompt": "a dog", "caption": "no"}, {"caption": "a cow", "id": 7})
    assert [row.prompt.text for row in rows_of(prompts(path=str(path)))] == ["a cat", "a dog", "a cow"]


FAULTY_PROMPTS = {
    "empty": ("p.txt", "a cat\n\na dog\n", r"p\.txt:2: got an empty prompt"),
    "blank": ("p.jsonl", '"a"\n{"prompt": " "}\n', r"p\.jsonl:2: got an empty prompt"),
    "json": ("p.jsonl", '"a"\n{"prompt": \n', r"p\.jsonl:2: got no valid JSON"),
    "number": ("p.jsonl", "5\n", r"p\.jsonl:1: got no prompt, want"),
    "list": ("p.jsonl", '["prompt"]\n', r"p\.jsonl:1: got no prompt, want"),
    "null": ("p.jsonl", '{"prompt": null}\n', r"p\.jsonl:1: got no prompt, want"),
    "other key": ("p.jsonl", '{"promt": "a"}\n', r"p\.jsonl:1: got no prompt, want"),
    "nothing": ("p.txt", "", r"p\.txt: got no prompts, want at least one"),
    "kind": ("p.csv", "a\n", r"p\.csv: want a \.txt or \.jsonl file"),
}


@pytest.mark.parametrize("name", FAULTY_PROMPTS)
def test_a_fault_of_a_file_of_prompts_is_told_with_its_line(tmp_path: Path, name: str) -> None:
    file, text, message = FAULTY_PROMPTS[name]
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prompts(path=str(tmp_path / file))


def test_a_file_of_prompts_that_is_not_there_or_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt: cannot be read"):
        prompts(path=str(tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read.*UTF-8"):
        prompts(path=str(tmp_path / "latin.txt"))


def test_rollouts_read_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.txt", "a cat", "a dog")
    scorer = {"name": "image", "scorer": "brightness"}
    few = {"num_steps": 2, "num_candidates": 2, "prompts_per_round": 2, "threshold": 0.0}
    output = train(
        tmp_path / "out",
        data={"importer": {"name": "prompts", "path": str(path)}, "view": "prompts"},
        source={"name": "rollouts", "scorer": scorer, **few},
        loss={"name": "spo"},
    )
    assert len(metrics_of(output)) == 2


# Single images


def test_single_images_of_a_jsonl_file(tmp_path: Path) -> None:
    names = images(tmp_path)
    path = lines(
        tmp_path / "x.jsonl",
        {"image": names[0], "prompt": "a", "label": 1},
        {"file_name": names[1], "caption": "b", "label": False},
        {"image": str(tmp_path / names[2]), "text": "c"},
    )
    rows = rows_of(single_images(path=str(path)))
    assert [(row.prompt.text, row.scores, row.where) for row in rows] == [
        ("a", {"label": (1.0,)}, f"{path}:1"),
        ("b", {"label": (0.0,)}, f"{path}:2"),
        ("c", {}, f"{path}:3"),
    ]
    assert [row.candidates[0].images[0].path for row in rows] == [str(tmp_path / name) for name in names[:3]]


def test_diffusion_ktos_csv_wants_what_ever_won(tmp_path: Path) -> None:
    images(tmp_path)
    path = lines(
        tmp_path / "x.csv",
        "file_name,caption,split",
        '0.png,"a cat, red",exclusive_win',
        "1.png,a dog,exclusive_lose",
        "2.png,a cow,intersections",
    )
    rows = rows_of(single_images(path=str(path)))
    assert [row.scores["label"] for row in rows] == [(1.0,), (0.0,), (1.0,)]
    assert rows[0].prompt.text == "a cat, red" and rows[2].where == f"{path}:4"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata_is_read(tmp_path: Path, kind: str) -> None:
    images(tmp_path)
    if kind == "csv":
        lines(tmp_path / "metadata.csv", "file_name,text,label", "0.png,a,", "1.png,b,0")
    else:
        lines(tmp_path / "metadata.jsonl", {"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": "b", "label": 0})
    rows = rows_of(single_images(path=str(tmp_path)))
    assert [row.scores for row in rows] == [{}, {"label": (0.0,)}]


FAULTY_ROWS = {
    "absent": ({"image": "no.png", "prompt": "a"}, r"the image .*no\.png is missing"),
    "no image": ({"prompt": "a"}, "got no image, want"),
    "no prompt": ({"image": "0.png"}, "got no prompt, want"),
    "blank": ({"image": "0.png", "prompt": "  "}, "got the prompt '  ', want"),
    "number": ({"image": "0.png", "prompt": 5}, "got the prompt 5, want"),
    "list": ({"image": ["0.png"], "prompt": "a"}, r"got the image \['0\.png'\], want"),
    "label": ({"image": "0.png", "prompt": "a", "label": "yes"}, "got the label 'yes', want 1"),
    "two": ({"image": "0.png", "prompt": "a", "label": 2}, "got the label 2, want 1"),
    "json": ("{", "got no valid JSON"),
    "object": ("[1]", r"got \[1\], want an object"),
}


@pytest.mark.parametrize("name", FAULTY_ROWS)
def test_a_fault_of_a_single_image_is_told_with_its_line_or_dropped_and_counted(tmp_path: Path, name: str) -> None:
    images(tmp_path)
    row, message = FAULTY_ROWS[name]
    path = lines(tmp_path / "x.jsonl", {"image": "0.png", "prompt": "a"}, row, {"image": "1.png", "prompt": "b"})
    with pytest.raises(UserError, match=rf"x\.jsonl:2.*{message}"):
        single_images(path=str(path))
    imported = single_images(path=str(path), faulty="drop")
    assert [row.prompt.text for row in rows_of(imported)] == ["a", "b"]
    assert [fault.where for fault in imported.faults] == [f"{path}:2"]


def test_a_broken_image_is_left_out_and_reported(tmp_path: Path) -> None:
    images(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no image")
    path = lines(tmp_path / "x.jsonl", *({"image": f"{n}.png", "prompt": "a"} for n in range(2)))
    imported = single_images(path=str(path))
    assert len(imported.dataset) == 1 and imported.faults[0].where == f"{path}:2"
    assert len(single_images(path=str(path), verify=False).dataset) == 2


def test_a_place_without_rows_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: want a \.jsonl or \.csv file"):
        single_images(path=str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"got a folder without metadata\.jsonl"):
        single_images(path=str(tmp_path))
    with pytest.raises(UserError, match=r"x\.csv: got no rows, want at least one"):
        single_images(path=str(lines(tmp_path / "x.csv", "image,prompt")))
    (tmp_path / "latin.csv").write_bytes("image,prompt\n0.png,caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv: cannot be read.*UTF-8"):
        single_images(path=str(tmp_path / "latin.csv"))


def single_data(tmp_path: Path, view: Any) -> dict[str, Any]:
    images(tmp_path)
    rows = ({"image": f"{n}.png", "prompt": f"a red {n}", "label": n % 2} for n in range(4))
    path = lines(tmp_path / "x.jsonl", *rows)
    return {"importer": {"name": "single_images", "path": str(path)}, "view": view}


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kto": ("unpaired", {"name": "kto", "beta": 2000}),
    "sft": ("best", {"name": "sft"}),
    "rwr": ({"name": "reward_weighted", "baseline": 0.5, "temperature": 0.5}, {"name": "sft"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_single_images_train(tmp_path: Path, name: str) -> None:
    view, loss = RUNS[name]
    rows = metrics_of(train(tmp_path / "out", data=single_data(tmp_path, view), loss=loss))
    assert len(rows) == 2 and rows[0]["loss"] > 0
    if name == "kto":
        assert rows[0]["loss"] == pytest.approx(0.5)


def test_labels_reach_the_loss(tmp_path: Path) -> None:
    name, path = "single_images", single_data(tmp_path, "unpaired")["importer"]["path"]
    from mmalign.config import Choice

    importer = Choice(name=name, target=IMPORTERS[name], settings={"path": path})
    examples, _ = read_examples(Data(importer=importer, view=Choice(name="unpaired", target=VIEWS["unpaired"])))
    assert [examples[i].side["labels"] for i in range(4)] == [0.0, 1.0, 0.0, 1.0]


# Reward weights


def judged(*scores: float, **changes: Any) -> Comparison:
    candidates = tuple(Content(images=(Media(data=bytes([n])),)) for n in range(len(scores)))
    return Comparison(id="r", prompt=Content(text="p"), candidates=candidates, scores={"clip": scores}, **changes)


def weights(outcome: tuple[Example, ...] | Dropped) -> list[Any]:
    assert not isinstance(outcome, Dropped)
    return [example.side["weight"] for example in outcome]


def test_a_reward_weight_is_the_exponential_of_the_score_above_the_baseline() -> None:
    assert weights(reward_weighted(judged(2.0, 3.0), baseline=2.0, temperature=0.5)) == pytest.approx([1.0, 7.38905609893])
    assert weights(reward_weighted(judged(3.0), baseline=2.0)) == pytest.approx([2.71828182846])


def test_without_a_baseline_the_weights_of_a_prompt_have_mean_one() -> None:
    # e^0 : e^1 : e^2 = 1 : 2.718281828 : 7.389056099, whose sum is 11.107337927
    expected = [3 * value / 11.107337927 for value in (1.0, 2.718281828, 7.389056099)]
    assert weights(reward_weighted(judged(1.0, 2.0, 3.0))) == pytest.approx(expected)
    assert weights(reward_weighted(judged(1001.0, 1002.0, 1003.0))) == pytest.approx(expected)  # and do not overflow
    assert weights(reward_weighted(judged(10.0, 20.0, 30.0), temperature=10.0)) == pytest.approx(expected)
    assert weights(reward_weighted(judged(1.0, 2.0, 3.0, weight=2.0))) == pytest.approx([2 * value for value in expected])


def test_every_candidate_is_an_example_of_its_own_in_the_rows_order() -> None:
    outcome = reward_weighted(judged(1.0, 2.0, ranks=(1.0, 2.0)))
    assert not isinstance(outcome, Dropped)
    assert [example.id for example in outcome] == ["r#0", "r#1"]
    assert [example.samples[0].completion.images[0].data for example in outcome] == [b"\x00", b"\x01"]


def test_reward_weights_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="got temperature 0, want a positive number"):
        reward_weighted(judged(1.0, 2.0), temperature=0)
    with pytest.raises(UserError, match="got a single image and no baseline"):
        reward_weighted(judged(1.0))
    with pytest.raises(UserError, match="the score 3000 has a weight too large"):
        reward_weighted(judged(3000.0), baseline=0.0)
    assert reward_weighted(judged(1.0, 2.0), by="hps") == Dropped("not judged by hps")
