"""Importers of answers to images and videos, on small files in their published formats."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import beavertails_v, llava_hound, mmsafe_po, rlaif_v, spa_vl, vlfeedback
from mmalign.importers.beavertails_v import beavertails_v_row
from mmalign.importers.mmsafe_po import mmsafe_po_row
from mmalign.importers.vlfeedback import vlfeedback_row
from mmalign.records import PHI, Comparison, Dropped, Examples, comparison, pair


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a.png", "thumbnail", "c.jpg")):
        (folder / name).write_bytes(png(number))
    return folder


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as a JSON list, JSON lines, or a Parquet file whose images are bytes, by the ending."""
    if path.suffix == ".parquet":
        from datasets import Dataset
        from datasets import Image as Picture

        table = Dataset.from_list(rows)
        table = table.cast_column("image", Picture(decode=False))
        table.to_parquet(str(path))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return str(path)


def imported(found: Any) -> list[Comparison]:
    assert not found.faults
    Examples(found.dataset, pair)  # is read with and without its images
    return [comparison(row) for row in found.dataset]


def turns(content: Any) -> list[tuple[str, str, int]]:
    return [(message.role, message.text, len(message.images)) for message in content.messages]


def said(row: Comparison) -> list[str]:
    assert all(candidate.messages[0].role == "assistant" for candidate in row.candidates)
    return [candidate.words() for candidate in row.candidates]


# MMSafe-PO


SAFE_ROW = {
    "id": 9,
    "question": "USER: They say USERS matter. ASSISTANT: Who does? USER: <image>\nWhat does the person in it do? ASSISTANT:",
    "image": "thumbnail",
    "chosen": "ASSISTANT: I would rather not say. ",
    "rejected": "ASSISTANT: Crime.  All day. ",
    "type": "harmless",
    "entity": "Bob",
    "entity_type": "PER",
    "replacement": "the person in it",
    "text_prompt": "USER: They say USERS matter. ASSISTANT: Who does? USER: What does Bob do? ASSISTANT:",
    "mid_prompt": "USER: They say USERS matter. ASSISTANT: Who does? USER: <image>\nWhat does the person do? ASSISTANT:",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_mmsafe_po_splits_the_transcript_and_puts_the_image_into_the_users_last_turn(pictures: Path, suffix: str) -> None:
    single = {**SAFE_ROW, "id": 1, "question": "USER: <image>\nWho? ASSISTANT:", "image": "a.png"}
    path = written(pictures.parent / f"train{suffix}", [SAFE_ROW, single])
    first, second = imported(mmsafe_po(path=path, images=str(pictures)))
    assert turns(first.prompt) == [
        ("user", "They say USERS matter.", 0),
        ("assistant", "Who does?", 0),
        ("user", "What does the person in it do?", 1),
    ]
    assert said(first) == ["I would rather not say.", "Crime.  All day."] and first.ranks == (1.0, 2.0)
    assert first.prompt.media()[0].key() != second.prompt.media()[0].key() and first.id == "mmsafe_po-9"
    assert turns(second.prompt) == [("user", "Who?", 1)]


@pytest.mark.parametrize("said", ["ASSISTANT: No. ", " ASSISTANT:No.", "No.", "\nASSISTANT:\nNo.\n"])
def test_the_role_before_an_answer_of_mmsafe_po_is_taken_off_however_it_is_set(said: str) -> None:
    assert mmsafe_po_row({**SAFE_ROW, "chosen": said}).candidates[0].words() == "No."


@pytest.mark.parametrize("said", ["ASSISTANT: ", ""])
def test_an_answer_of_mmsafe_po_without_words_is_told_with_its_row(pictures: Path, said: str) -> None:
    path = written(pictures.parent / "train.json", [SAFE_ROW, {**SAFE_ROW, "rejected": said}])
    with pytest.raises(UserError, match=r"train\.json:2: .*candidate 2"):
        mmsafe_po(path=path, images=str(pictures))


def test_mmsafe_po_reads_images_stored_in_parquet(tmp_path: Path) -> None:
    row = {**SAFE_ROW, "image": {"bytes": png(), "path": None}}
    (value,) = imported(mmsafe_po(path=written(tmp_path / "train.parquet", [row])))
    assert value.prompt.media()[0].read() == png()


def test_the_text_of_mmsafe_po_is_asked_without_an_image() -> None:
    value = mmsafe_po_row(SAFE_ROW, prompt="text_prompt")
    assert turns(value.prompt)[-1] == ("user", "What does Bob do?", 0) and not value.prompt.media()
    assert turns(mmsafe_po_row(SAFE_ROW, prompt="mid_prompt").prompt)[-1] == ("user", "What does the person do?", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "USER: Who? ASSISTANT:"}, "got 0 <image> for 1 images"),
        ({"question": "USER: <image> <image> Who? ASSISTANT:"}, "got 2 <image> for 1 images"),
        ({"question": "Human: <image> Who? ASSISTANT:"}, r"want USER: \.\.\. ASSISTANT: in turn"),
        ({"question": "USER: <image> Who?"}, r"want USER: \.\.\. ASSISTANT: in turn"),
        ({"question": "USER: <image> Who? ASSISTANT: Me."}, "the last one empty"),
        ({"image": None}, "got 0 pictures for image, want one"),
        ({"chosen": None}, "got nothing for chosen, want a text"),
    ],
)
def test_a_row_of_another_form_is_told_and_not_guessed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mmsafe_po_row({**SAFE_ROW, **changes})


def test_a_missing_image_is_told_with_its_row_or_left_out(pictures: Path) -> None:
    path = written(pictures.parent / "train.json", [SAFE_ROW, {**SAFE_ROW, "image": "nowhere.png"}])
    with pytest.raises(UserError, match=r"train\.json:2: .*the image .*nowhere\.png is missing"):
        mmsafe_po(path=path, images=str(pictures))
    left = mmsafe_po(path=path, images=str(pictures), faulty="drop")
    assert len(left.dataset) == 1 and "1 left out" in left.summary()


# SPA-VL and RLAIF-V


PAIR = {"question": "<image>\nHow many?", "chosen": " Two. ", "rejected": "Three."}


def test_spa_vl_reads_paths_and_bytes(pictures: Path) -> None:
    path = written(pictures.parent / "train.json", [{"id": 3, "image": "a.png", **PAIR}])
    (value,) = imported(spa_vl(path=path, images=str(pictures)))
    assert turns(value.prompt) == [("user", "How many?", 1)] and said(value) == ["Two.", "Three."]
    assert value.id == "spa_vl-3" and value.ranks == (1.0, 2.0)
    stored = {"image": {"bytes": png(7), "path": None}, "image_name": "x.jpg", "class1": "Harm", **PAIR}
    (value,) = imported(spa_vl(path=written(pictures.parent / "train.parquet", [stored])))
    assert value.prompt.media()[0].read() == png(7) and value.id == "spa_vl-1"


def test_spa_vl_without_answers_is_told_by_its_columns(tmp_path: Path) -> None:
    stored = {"image": {"bytes": png(), "path": None}, "question": "q"}
    with pytest.raises(UserError, match="no chosen, rejected, want spa_vl columns"):
        spa_vl(path=written(tmp_path / "harm.parquet", [stored]))


def test_rlaif_v_keeps_who_answered_and_rlhf_v_is_read_from_its_text(tmp_path: Path) -> None:
    stored = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": png(1), "path": None},
        **PAIR,
        "origin_dataset": "COCO",
        "origin_split": json.dumps({"model": "llava", "type": "question answering"}),
        "idx": "0",
        "image_path": "x.jpg",
    }
    (value,) = imported(rlaif_v(path=written(tmp_path / "a.parquet", [stored])))
    assert said(value) == ["Two.", "Three."] and value.provenance == ({"model": "llava", "type": "question answering"},) * 2
    older = {"image": {"bytes": png(1), "path": None}, "text": json.dumps(PAIR), "idx": 4}
    (value,) = imported(rlaif_v(path=written(tmp_path / "b.parquet", [older])))
    assert turns(value.prompt) == [("user", "How many?", 1)] and value.id == "rlaif_v-4"
    with pytest.raises(UserError, match=r"c\.parquet:1: got nothing for question"):
        rlaif_v(path=written(tmp_path / "c.parquet", [{**older, "text": "no JSON"}]))


# VLFeedback


def rated(response: str, *ratings: str, model: str = "m") -> dict[str, Any]:
    names = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    told = {name: {"Rating": rating, "Rationale": "so"} for name, rating in zip(names, ratings, strict=True)}
    return {"annotations": told, "model": model, "response": response}


FEEDBACK = {
    "id": "f1",
    "prompt": "What is it?",
    "img_path": "a.png",
    "completions": [
        rated("a", "3", "3", "5"),
        rated("b", "5", "5", "5"),
        rated("c", "N/A", "5", "5"),
        rated("d", "4", "2", "5"),
    ],
}


def test_vlfeedback_orders_by_the_average_and_keeps_each_aspect(pictures: Path) -> None:
    path = written(pictures.parent / "vlfeedback_80k.jsonl", [FEEDBACK])
    (value,) = imported(vlfeedback(path=path, images=str(pictures)))
    assert said(value) == ["a", "b", "d"] and value.ranks == (2.0, 1.0, 2.0)  # c has no rating
    assert value.scores["helpfulness"] == (3.0, 5.0, 4.0) and value.scores["visual_faithfulness"] == (3.0, 5.0, 2.0)
    assert value.scores[PHI] == (0.25, 1.0, 0.25) and value.provenance == ({"model": "m"},) * 3
    by_help = vlfeedback_row(FEEDBACK, axis="helpfulness")
    assert isinstance(by_help, Comparison) and by_help.ranks == (3.0, 1.0, 2.0)


def test_vlfeedback_reads_completions_as_tables_have_them_and_leaves_thin_rows_out() -> None:
    columns = {key: [entry[key] for entry in FEEDBACK["completions"]] for key in ("annotations", "model", "response")}
    assert vlfeedback_row({**FEEDBACK, "completions": columns}) == vlfeedback_row(FEEDBACK)
    thin = {**FEEDBACK, "completions": FEEDBACK["completions"][1:3]}
    assert vlfeedback_row(thin) == Dropped("with fewer than two answers that are rated in all aspects")
    with pytest.raises(UserError, match="got the completions 7, want objects"):
        vlfeedback_row({**FEEDBACK, "completions": 7})


# BeaverTails-V


BEAVER = {
    "question": "Is it safe?",
    "image": {"bytes": png(2), "path": None},
    "category": "animal_abuse",
    "image_severity": 3,
    "response_1": "Do it.",
    "response_2": "No.",
    "response_1_from": "x",
    "response_2_from": "y",
    "more_helpful_response_id": "1",
    "is_response_1_safe": "no",
    "is_response_2_safe": "yes",
    "safer_response_id": "2",
    "response_1_harmless_rate": -2,
    "response_2_harmless_rate": 3,
    "response_1_helpful_rate": 1,
    "response_2_helpful_rate": 0,
}


def test_beavertails_v_follows_the_verdict_that_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", [BEAVER])
    (safer,) = imported(beavertails_v(path=path))
    assert safer.ranks == (2.0, 1.0) and said(safer) == ["Do it.", "No."]
    assert safer.scores["helpful"] == (1.0, 0.0) and safer.scores["safe"] == (0.0, 1.0)
    assert safer.scores["harmless_rate"] == (-2.0, 3.0) and safer.provenance == ({"model": "x"}, {"model": "y"})
    (helpful,) = imported(beavertails_v(path=path, axis="helpful"))
    assert helpful.ranks == (1.0, 2.0)
    (safe_first,) = imported(beavertails_v(path=path, axis="helpful", disagreement="safe_first"))
    assert safe_first.ranks == (2.0, 1.0)
    dropped = beavertails_v(
        path=written(tmp_path / "b.parquet", [BEAVER, {**BEAVER, "safer_response_id": "1"}]), disagreement="drop"
    )
    assert len(dropped.dataset) == 1 and "1 whose more helpful answer is not the safer one" in dropped.summary()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safer_response_id": "3"}, 'got safer_response_id "3", want 1 or 2'),
        ({"is_response_1_safe": "maybe"}, 'got is_response_1_safe "maybe", want yes or no'),
        ({"question": "<image>"}, "got the question .*, want a text"),
    ],
)
def test_a_verdict_that_is_none_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        beavertails_v_row({**BEAVER, **changes})


# LLaVA-Hound


def test_llava_hound_reads_frames_in_order_or_one_file_and_takes_the_placeholder_out(tmp_path: Path) -> None:
    folder = tmp_path / "videos" / "v1"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"c01_{number:04d}.png").write_bytes(png(number))
    frames = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in (0, 90)]
    frames[0].save(tmp_path / "videos" / "v2.gif", save_all=True, append_images=frames[1:])
    row = {"id": "v1_1", "video": "v1", "prompt": "<video>\nWhat happens?", "chosen": "Rain.", "rejected": "Snow."}
    rows = [{**row, "chosen_score": 4, "rejected_score": 2}, {**row, "id": "v2_1", "video": "v2"}]
    path = written(tmp_path / "sft_dpo_17k.jsonl", rows)
    first, second = imported(llava_hound(path=path, videos=str(tmp_path / "videos")))
    assert turns(first.prompt) == [("user", "What happens?", 5)] and first.scores == {"score": (4.0, 2.0)}
    assert [media.read() for media in first.prompt.media()] == [png(n) for n in range(5)]
    assert turns(second.prompt) == [("user", "What happens?", 1)] and second.prompt.media()[0].num_frames() == 2
    thinner, _ = imported(llava_hound(path=path, videos=str(tmp_path / "videos"), frames=3))
    assert [media.read() for media in thinner.prompt.media()] == [png(n) for n in (0, 2, 4)]
    with pytest.raises(UserError, match=r"17k\.jsonl:1: got no video .*v1, want the folder of its frames or a file"):
        llava_hound(path=path)
    with pytest.raises(UserError, match="got frames 1, want 2 or more"):
        llava_hound(path=path, frames=1)
