import inspect
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import IMPORTERS, comparisons, hpdv2, image_reward_db, imagefolder, pick_a_pic
from mmalign.records import Comparison, Content, Dropped, Examples, comparison, outlines, pair, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def jpeg(grey, size=(16, 12)):
    stream = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(stream, "JPEG")
    return stream.getvalue()


def save_images(folder, *names):
    for grey, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(grey))


def rows_of(imported):
    return [comparison(row) for row in imported.dataset]


def read_images(row):
    return [c.images[0].read() for c in row.candidates]


# --- Pick-a-Pic ----------------------------------------------------------------------------------------------------


def picks(tmp_path, rows, name="train.parquet"):
    """Write rows (caption, label_0, label_1[, changes]) in the columns of Pick-a-Pic v2."""
    table = [
        {
            "caption": caption, "jpg_0": jpeg(10 * n), "jpg_1": jpeg(10 * n + 1),
            "label_0": float(first), "label_1": float(second),
            "image_0_uid": f"u{n}0", "image_1_uid": f"u{n}1", "model_0": "sdxl", "model_1": "sd15", "has_label": True,
            **(changes[0] if changes else {}),
        }
        for n, (caption, first, second, *changes) in enumerate(rows)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), tmp_path / name)
    return str(tmp_path / name)


def test_pick_a_pic_keeps_bytes_labels_and_models(tmp_path):
    path = picks(tmp_path, [("a cat", 1, 0), ("a dog", 0, 1), ("a tie", 0.5, 0.5)])
    imported = pick_a_pic(path=path)
    first, second, tie = rows_of(imported)
    assert [first.ranks, second.ranks, tie.ranks] == [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    assert read_images(second) == [jpeg(10), jpeg(11)]
    assert second.prompt.text == "a dog" and second.where == f"{path}:2"
    assert second.provenance == ({"model": "sdxl", "uid": "u10"}, {"model": "sd15", "uid": "u11"})


def test_a_pick_a_pic_tie_never_trains_as_the_first_image_won(tmp_path):
    imported = pick_a_pic(path=picks(tmp_path, [("a tie", 0.5, 0.5), ("a dog", 0, 1)]))
    assert pair(rows_of(imported)[0]) == Dropped("tie")
    examples = Examples(imported.dataset, pair)
    assert (len(examples), examples.dropped) == (1, {"tie": 1})
    assert examples[0].samples[0].completion.images[0].read() == jpeg(11)
    assert pair(rows_of(imported)[0], ties="soft")[0].side == {"prob": 0.5}


def test_pick_a_pic_rows_of_a_prompt_share_one_weight_whose_mean_over_the_judged_rows_is_1(tmp_path):
    counts = [("a cat", 2, True), ("a cat", 2, True), ("a dog", 1, True), ("a fox", 1, False)]
    rows = [(text, 1, 0, {"num_example_per_prompt": n, "has_label": labelled}) for text, n, labelled in counts]
    path = picks(tmp_path, rows)
    weights = [row.weight for row in rows_of(pick_a_pic(path=path, weight="prompt"))]
    assert weights[:3] == pytest.approx([0.75, 0.75, 1.5])  # 1/2, 1/2 and 1 over their mean 2/3
    assert Examples(pick_a_pic(path=path, weight="prompt").dataset, pair)[2].side["weight"] == pytest.approx(1.5)
    assert all(row.weight is None for row in rows_of(pick_a_pic(path=path)))


def test_pick_a_pic_weights_need_their_column(tmp_path):
    with pytest.raises(UserError, match="got no column num_example_per_prompt, want it for weight: prompt"):
        pick_a_pic(path=picks(tmp_path, [("a cat", 1, 0)]), weight="prompt")
    path = picks(tmp_path, [("a cat", 1, 0, {"num_example_per_prompt": 0})])
    with pytest.raises(UserError, match="got num_example_per_prompt 0, want 1 or more"):
        pick_a_pic(path=path, weight="prompt")


def test_pick_a_pic_rows_without_a_label_are_not_judged(tmp_path):
    imported = pick_a_pic(path=picks(tmp_path, [("a", 0, 0, {"has_label": False}), ("b", 1, 0)]))
    assert Examples(imported.dataset, pair).dropped == {"not judged": 1}


def test_corrupt_jpegs_are_reported_with_their_row_and_left_out(tmp_path):
    rows = [("a", 1, 0), ("b", 1, 0, {"jpg_1": jpeg(1)[:200]}), ("c", 0, 1), ("d", 1, 0, {"jpg_0": b"no jpeg"})]
    path = picks(tmp_path, rows)
    imported = pick_a_pic(path=path)
    assert [r.prompt.text for r in rows_of(imported)] == ["a", "c"]
    assert [f.where for f in imported.faults] == [f"{path}:2", f"{path}:4"]
    assert "candidate 2: got a damaged image" in str(imported.faults[0])
    assert imported.summary().startswith("2 rows imported, 2 left out")
    assert len(Examples(imported.dataset, pair)) == 2


def test_filtering_pick_a_pic_reads_no_image(tmp_path):
    path = picks(tmp_path, [("a", 1, 0, {"jpg_0": b"no jpeg"}), ("b", 0.5, 0.5)])
    imported = pick_a_pic(path=path, verify=False)
    assert [[m.data for c in o.candidates for m in c.images] for o in outlines(imported.dataset)] == [[None, None]] * 2
    with pytest.raises(UserError, match=r"train\.parquet:1: candidate 1: got a damaged image"):
        Examples(imported.dataset, pair)[0].samples[0].completion.images[0].open()


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("a", 2, -1), "got label_0 2.0 and label_1 -1.0"),
        (("a", 1, 1), "got label_0 1.0 and label_1 1.0"),
        (("a", 0.7, 0.3), "got label_0 0.7"),
        ((" ", 1, 0), "empty caption"),
        (("a", 1, 0, {"jpg_1": b""}), "a pair without jpg_1"),
        (("a", 1, 0, {"jpg_0": None}), "a pair without jpg_0"),
    ],
)
def test_each_fault_of_a_pick_a_pic_row_is_told_or_dropped_and_counted(tmp_path, row, fault):
    path = picks(tmp_path, [("good", 1, 0), row, ("good", 0, 1)])
    with pytest.raises(UserError) as told:
        pick_a_pic(path=path)
    assert str(told.value).startswith(f"{path}:2: ") and fault in str(told.value)
    imported = pick_a_pic(path=path, faulty="drop")
    assert [r.where for r in rows_of(imported)] == [f"{path}:1", f"{path}:3"]
    assert [f.where for f in imported.faults] == [f"{path}:2"]


def test_pick_a_pic_from_a_folder_with_splits_and_image_columns(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    columns = {"caption": Value("string"), "label_0": Value("float64"), "label_1": Value("float64")}
    table = Dataset.from_list(
        [{"caption": "a", "label_0": 0.0, "label_1": 1.0, **{f"jpg_{i}": {"bytes": jpeg(i), "path": None} for i in (0, 1)}}],
        features=Features({**columns, "jpg_0": ImageColumn(), "jpg_1": ImageColumn()}),
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (row,) = rows_of(pick_a_pic(path=str(tmp_path), split="test"))
    assert (read_images(row), row.ranks, row.where) == ([jpeg(0), jpeg(1)], (2.0, 1.0), f"{tmp_path} (test):1")
    with pytest.raises(UserError, match="the split 'validation' cannot be read"):
        pick_a_pic(path=str(tmp_path), split="validation")


def test_missing_columns_and_missing_data_are_one_clear_error(tmp_path):
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: got the columns caption and no jpg_0, jpg_1, label_0, label_1"):
        pick_a_pic(path=str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="no such file or folder"):
        pick_a_pic(path=str(tmp_path / "gone"))


def test_a_hub_data_set_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(UserError, match=r"nobody/nothing: the split 'train' cannot be read"):
        pick_a_pic(path="nobody/nothing")


# --- HPDv2 ---------------------------------------------------------------------------------------------------------


def test_hpdv2_train_pairs_and_test_rankings(tmp_path):
    save_images(tmp_path / "train", "a.jpg", "b.jpg")
    save_images(tmp_path / "test", "a.jpg", "b.jpg", "c.jpg")
    train = [{"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
             {"prompt": "q", "file_path": ["b.jpg", "a.jpg"], "human_preference": [1, 1]}]  # fmt: skip
    test = [{"prompt": "p", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 0, 1], "raw_annotations": []}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    first, tie = rows_of(hpdv2(path=str(tmp_path)))
    assert (first.ranks, tie.ranks, read_images(first)) == ((2.0, 1.0), (1.0, 1.0), [jpeg(0), jpeg(1)])
    (ranking,) = rows_of(hpdv2(path=str(tmp_path), split="test"))
    assert (ranking.ranks, read_images(ranking)) == ((3.0, 1.0, 2.0), [jpeg(0), jpeg(1), jpeg(2)])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [2, 0]}, "human_preference [2, 0]"),
        ({"prompt": "", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}, "empty prompt"),
        ({"prompt": "p", "image_path": ["a.jpg"], "rank": [0]}, "got 1 candidate"),
        ({"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "rank": [0]}, "got 1 ranks for 2"),
        ({"prompt": "p", "image_path": ["a.jpg", "b.jpg"]}, "neither human_preference nor rank"),
        ({"prompt": "p", "file_path": ["a.jpg", "z.jpg"], "human_preference": [1, 0]}, "z.jpg is missing"),
        ({"caption": "p"}, "without file_path or image_path"),
    ],
)
def test_each_fault_of_an_hpdv2_row_is_told_with_file_and_row(tmp_path, row, fault):
    save_images(tmp_path, "a.jpg", "b.jpg")
    good = {"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([good, row]))
    with pytest.raises(UserError) as told:
        hpdv2(path=str(file))
    assert str(told.value).startswith(f"{file}:2: ") and fault in str(told.value)
    assert len(hpdv2(path=str(file), faulty="drop").dataset) == 1


def test_an_hpdv2_file_that_is_no_list_or_not_there_is_one_clear_error(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(UserError, match="got a JSON dict, want a list"):
        hpdv2(path=str(tmp_path))
    with pytest.raises(UserError, match=r"test\.json: got no such file"):
        hpdv2(path=str(tmp_path), split="test")


# --- ImageRewardDB -------------------------------------------------------------------------------------------------


def rewards():
    rows = [("1", "a", 2), ("2", "b", 1), ("1", "a", 1), ("2", "b", 2), ("1", "a", 2)]
    return [
        {"prompt_id": i, "prompt": p, "rank": r, "image_path": f"images/train/train_1/{n}.jpg", "overall_rating": 8 - r}
        for n, (i, p, r) in enumerate(rows)
    ]


def check_rewards(imported):
    first, second = rows_of(imported)
    assert (first.prompt.text, first.ranks) == ("a", (2.0, 1.0, 2.0))
    assert (second.prompt.text, second.ranks) == ("b", (1.0, 2.0))
    assert read_images(first) == [jpeg(0), jpeg(2), jpeg(4)] and read_images(second) == [jpeg(1), jpeg(3)]
    assert first.provenance[1] == {"overall_rating": 7}
    assert len(Examples(imported.dataset, pair)) == 2


@pytest.mark.parametrize("layout", ["metadata", "json", "table"])
def test_image_reward_db_groups_images_by_prompt(tmp_path, layout):
    save_images(tmp_path / "images/train/train_1", *(f"{n}.jpg" for n in range(5)))
    path = tmp_path
    if layout == "metadata":
        pq.write_table(pa.Table.from_pylist(rewards()), tmp_path / "metadata-train.parquet")
    elif layout == "json":
        (tmp_path / "images/train/train_1/train_1.json").write_text(json.dumps(rewards()))
    else:
        path = tmp_path / "table.parquet"
        bodies = [{**r, "image": {"bytes": jpeg(n), "path": None}} for n, r in enumerate(rewards())]
        pq.write_table(pa.Table.from_pylist(bodies), path)
    check_rewards(image_reward_db(path=str(path)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rank": 0}, "got the ranks [2, 0, 2]"),
        ({"prompt": "other"}, "several prompts under prompt_id 1"),
        ({"image_path": "images/gone.jpg"}, "gone.jpg is missing"),
        ({"prompt_id": "3"}, "got 1 candidate"),
    ],
)
def test_each_fault_of_image_reward_db_is_told(tmp_path, changes, fault):
    save_images(tmp_path / "images/train/train_1", *(f"{n}.jpg" for n in range(5)))
    rows = rewards()
    rows[2] |= changes
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    with pytest.raises(UserError) as told:
        image_reward_db(path=str(tmp_path))
    assert str(told.value).startswith(f"{tmp_path}:") and fault in str(told.value)


def test_a_broken_image_in_an_image_column_leaves_its_prompt_out(tmp_path):
    rows = [{**r, "image": {"bytes": jpeg(n), "path": None}} for n, r in enumerate(rewards())]
    rows[3]["image"]["bytes"] = b"no jpeg"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    imported = image_reward_db(path=str(tmp_path / "x.parquet"))
    assert [r.prompt.text for r in rows_of(imported)] == ["a"]
    assert [f.where for f in imported.faults] == [f"{tmp_path / 'x.parquet'}:2"]


# --- folders of images, and our own formats ------------------------------------------------------------------------


def paired_folder(tmp_path):
    save_images(tmp_path, "chosen/a.jpg", "rejected/a.jpg", "chosen/set/b.jpg", "rejected/set/b.png")
    (tmp_path / "chosen/a.txt").write_text("a cat\n")
    (tmp_path / "rejected/set/b.txt").write_text("a dog")
    return tmp_path


def test_paired_folders_are_pairs_whose_chosen_image_won(tmp_path):
    first, second = rows_of(imagefolder(path=str(paired_folder(tmp_path))))
    assert (first.prompt.text, first.ranks, read_images(first)) == ("a cat", (1.0, 2.0), [jpeg(0), jpeg(1)])
    assert (second.id, second.prompt.text, read_images(second)) == ("set/b", "a dog", [jpeg(2), jpeg(3)])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda p: (p / "rejected/a.jpg").unlink(), "an image without partner"),
        (lambda p: (p / "chosen/a.jpg").unlink(), "an image without partner"),
        (lambda p: (p / "chosen/a.txt").unlink(), "got no caption"),
        (lambda p: (p / "chosen/a.txt").write_text(" "), "empty prompt"),
    ],
)
def test_each_fault_of_paired_folders_is_told_with_its_file(tmp_path, damage, fault):
    damage(paired_folder(tmp_path))
    with pytest.raises(UserError, match=f"a.jpg: .*{fault}"):
        imagefolder(path=str(tmp_path))
    assert [r.id for r in rows_of(imagefolder(path=str(tmp_path), faulty="drop"))] == ["set/b"]


def test_a_folder_without_pairs_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"got no .*chosen and no .*rejected, want metadata\.jsonl"):
        imagefolder(path=str(tmp_path))


def test_an_imagefolder_with_metadata_is_read_line_by_line(tmp_path):
    save_images(tmp_path / "train", "a.jpg", "b.jpg")
    line = {"image": "a.jpg", "lose_image": "b.jpg", "prompt": "p"}
    (tmp_path / "train/metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"image": "a.jpg", "prompt": "p"}))
    (row,) = rows_of(imagefolder(path=str(tmp_path), split="train", faulty="drop"))
    assert (row.ranks, read_images(row)) == ((1.0, 2.0), [jpeg(0), jpeg(1)])
    with pytest.raises(UserError, match=r"metadata\.jsonl:2: got 1 candidate, want at least 2"):
        imagefolder(path=str(tmp_path), split="train")


def test_our_own_formats_are_read_by_path_and_split(tmp_path):
    texts = (Content(text="yes"), Content(text="no"))
    row = Comparison(id="1", prompt=Content(text="p"), candidates=texts, ranks=(1.0, 2.0))
    write([row], tmp_path / "train.parquet")
    write([row, row], tmp_path / "test")
    assert rows_of(comparisons(path=str(tmp_path), split="train")) == [row]
    assert rows_of(comparisons(path=str(tmp_path), split="test")) == [row, row]


def test_faulty_rows_of_a_parquet_table_of_ours_are_told(tmp_path):
    texts = (Content(text="yes"), Content(text="no"))
    rows = [Comparison(id="1", prompt=Content(text=p), candidates=texts) for p in ("p", "q")]
    write(rows, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    broken = table.set_column(table.schema.get_field_index("prob"), "prob", pa.array([None, 7.0]))
    pq.write_table(broken, tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet:2: got prob 7\.0"):
        comparisons(path=str(tmp_path / "y.parquet"))
    assert len(comparisons(path=str(tmp_path / "y.parquet"), faulty="drop").dataset) == 1


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_every_importer_takes_settings_only(name):
    parameters = inspect.signature(IMPORTERS[name]).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    names = {p.name for p in parameters}
    few = {"single_images": {"split"}, "prompts": {"split", "faulty"}}
    assert {"path", "split", "faulty"} - few.get(name, set()) <= names
    images = {
        "comparisons",
        "pick_a_pic",
        "hpdv2",
        "image_reward_db",
        "imagefolder",
        "single_images",
        "llama_factory",
        "ms_swift",
    }
    assert name not in images or {"verify", "num_proc"} <= names


# --- Faults of what was given ----------------------------------------------------------------------------------------


def test_pick_a_pic_downloads_nothing_that_was_not_named():
    assert inspect.signature(pick_a_pic).parameters["path"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    "change",
    [
        {"human_preference": 1},
        {"human_preference": ["a", 1]},
        {"human_preference": {"0": 1}},
        {"human_preference": None, "rank": ["a", "b"]},
        {"file_path": [1, 2]},
        {"prompt": 5},
    ],
)
def test_hpdv2_names_the_row_of_a_value_of_the_wrong_type(tmp_path, change):
    save_images(tmp_path, "a.jpg", "b.jpg")
    entry = {"prompt": "a cat", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}
    (tmp_path / "train.json").write_text(json.dumps([entry, {**entry, **change}]))
    with pytest.raises(UserError, match=r"train\.json:2: (prompt: )?got"):
        hpdv2(path=str(tmp_path))


def test_imagefolder_refuses_two_images_of_one_name(tmp_path):
    save_images(tmp_path, "chosen/a.png", "chosen/a.jpg", "rejected/a.png", "chosen/b.png", "rejected/b.png")
    for name in "ab":
        (tmp_path / f"chosen/{name}.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"got a\.jpg and a\.png in one folder"):
        imagefolder(path=str(tmp_path))
    assert [row.id for row in rows_of(imagefolder(path=str(tmp_path), faulty="drop"))] == ["b"]


def test_imagefolder_names_a_caption_that_is_not_utf8(tmp_path):
    save_images(tmp_path, "chosen/a.png", "rejected/a.png")
    (tmp_path / "chosen/a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt, which is not UTF-8"):
        imagefolder(path=str(tmp_path))


def test_every_importer_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picks(tmp_path, [("a cat", 1, 0)])
    assert len(pick_a_pic(path="~/train.parquet").dataset) == 1
    save_images(tmp_path, "pairs/chosen/a.png", "pairs/rejected/a.png")
    (tmp_path / "pairs/chosen/a.txt").write_text("a cat")
    folder = imagefolder(path="~/pairs")
    assert len(folder.dataset) == 1
    write(rows_of(folder), tmp_path / "rows.jsonl")
    assert len(comparisons(path="~/rows.jsonl").dataset) == 1
    entry = {"prompt": "a cat", "file_path": ["chosen/a.png", "rejected/a.png"], "human_preference": [1, 0]}
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    assert len(hpdv2(path="~/test.json", images="~/pairs").dataset) == 1
    ratings = [{"prompt_id": "p", "prompt": "a cat", "rank": n, "image_path": f"pairs/{n}.png"} for n in (1, 2)]
    save_images(tmp_path, "pairs/1.png", "pairs/2.png")
    (tmp_path / "ratings.json").write_text(json.dumps(ratings))
    assert len(image_reward_db(path="~/ratings.json").dataset) == 1


def test_pick_a_pic_reads_the_file_that_was_named_whatever_signs_are_in_it(tmp_path):
    picks(tmp_path, [("the other file", 1, 0)], name="d1.parquet")
    path = picks(tmp_path, [("this file", 1, 0)], name="d[1].parquet")
    assert [row.prompt.text for row in rows_of(pick_a_pic(path=path))] == ["this file"]
