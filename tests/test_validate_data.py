import io
import json

import pytest
from PIL import Image

from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.validate_data import ValidateDataConfig, main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(path, colour, size=(8, 8), mode="RGB"):
    Image.new(mode, size, colour).save(path)
    return {"image": path.name}


@pytest.fixture
def pairs(tmp_path):
    """Nine rows: three good ones, and one of each thing worth reporting."""
    red, blue = save(tmp_path / "red.png", "red"), save(tmp_path / "blue.png", "blue")
    copy = save(tmp_path / "copy.png", "red")
    wide, grey = save(tmp_path / "wide.png", "red", (16, 8)), save(tmp_path / "grey.png", 7, mode="L")
    (tmp_path / "half.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    rows = [
        {"prompt": "a", "candidates": [red, blue], "ranks": [1, 2]},
        {"prompt": "a", "candidates": [blue, red], "ranks": [2, 1]},  # the first row again, in the other order
        {"prompt": "b", "candidates": [red, blue], "ranks": [1, 1]},
        {"prompt": "c", "candidates": [red, copy], "ranks": [1, 2]},
        {"prompt": "d", "candidates": [wide, grey, blue], "scores": {"clip": [3, 2, 1]}},
        {"prompt": "e", "candidates": [red, blue]},
        {"prompt": "f", "candidates": [red, {"image": "half.png"}], "ranks": [1, 2]},
        {"prompt": "g", "candidates": [red, {"image": "gone.png"}], "ranks": [1, 2]},
        {"prompt": "h", "candidates": [red], "ranks": [1]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_pairs_ties_and_judges_are_counted(pairs):
    report = main(ValidateDataConfig(path=str(pairs)))
    assert (report.num_rows, report.num_usable, report.candidates) == (6, 5, {2: 5, 3: 1})
    assert (report.num_pairs, report.num_ties) == (4 + 3, 1)
    assert (report.first_won, report.last_won) == (2 + 3, 1)
    assert report.judged == {"ranks": 4, "clip": 1, "none": 1, "usable": 5}


def test_duplicates_are_found_by_content(pairs):
    report = main(ValidateDataConfig(path=str(pairs)))
    assert (report.repeated_prompts, report.repeated_rows) == (1, 1)
    assert report.same_image == [f"{pairs}:4"]


def test_sizes_aspects_and_modes_are_counted(pairs):
    report = main(ValidateDataConfig(path=str(pairs)))
    assert (report.mixed_sizes, report.mixed_aspects) == (1, 1)
    assert report.modes == {"RGB": 13, "L": 1}
    assert "width             min 8, median 8, max 16 pixels" in str(report)
    assert "1 L converted to RGB when used" in str(report)


def test_broken_rows_are_named_with_file_and_row(pairs):
    report = main(ValidateDataConfig(path=str(pairs)))
    told = {fault.where: fault.problem for fault in report.faults}
    assert sorted(told) == [f"{pairs}:{n}" for n in (7, 8, 9)]
    assert "candidate 2" in told[f"{pairs}:7"] and "damaged" in told[f"{pairs}:7"]
    assert "gone.png is missing" in told[f"{pairs}:8"]
    assert "got 1 candidate" in told[f"{pairs}:9"]
    assert all(where in str(report) for where in told)


def test_the_command_prints_the_table_and_only_strict_fails_on_broken_rows(pairs, capsys):
    assert command_line(ValidateDataConfig, main, [str(pairs)]) == 0
    printed = capsys.readouterr().out
    assert "rows              9 (5 usable, 3 broken)" in printed
    assert "pairs             7 (1 ties, 14.3 %)" in printed
    assert printed.rstrip().endswith("Usable without the 3 broken rows.")
    assert command_line(ValidateDataConfig, main, [str(pairs), "--strict"]) == 2
    assert "Refused: 3 rows are broken" in capsys.readouterr().out


def test_good_data_pass_strictly(tmp_path, capsys):
    candidates = [save(tmp_path / "a.png", "red"), save(tmp_path / "b.png", "blue")]
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "p", "candidates": candidates, "prob": 0.7}))
    assert command_line(ValidateDataConfig, main, [str(tmp_path / "x.jsonl"), "--strict"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Good.")


def test_data_whose_pairs_are_all_ties_are_not_called_good(tmp_path):
    red, blue = save(tmp_path / "red.png", "red"), save(tmp_path / "blue.png", "blue")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "candidates": [red, blue], "ranks": [1, 1]}) + "\n")
    told = str(main(ValidateDataConfig(path=str(path))))
    assert told.endswith(
        "All pairs are ties, of which losses learn nothing but with data.view.ties: soft. Judge the rows again."
    )


def test_data_without_any_verdict_are_unusable(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "p", "candidates": [{"text": "a"}, {"text": "b"}]}))
    report = main(ValidateDataConfig(path=str(tmp_path / "x.jsonl")))
    assert report.exit_code == 2 and "Unusable" in str(report)


def test_an_importer_is_named_in_the_config(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def jpeg(grey):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (grey,) * 3).save(stream, "JPEG")
        return stream.getvalue()

    labels = [(1.0, 0.0), (0.5, 0.5), (0.3, 0.3)]
    rows = [{"caption": "p", "jpg_0": jpeg(0), "jpg_1": jpeg(99), "label_0": a, "label_1": b} for a, b in labels]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    overrides = ["data.name=pick_a_pic", f"data.path={tmp_path / 'x.parquet'}"]
    report = main(read_config(ValidateDataConfig, None, overrides))
    assert (report.num_rows, report.num_ties, len(report.faults)) == (2, 1, 1)
    assert report.faults[0].where == f"{tmp_path / 'x.parquet'}:3"


def test_without_images_only_rows_are_read(pairs):
    report = main(ValidateDataConfig(path=str(pairs), images=False))
    assert (report.num_rows, report.sizes) == (7, [])
    assert [f.where for f in report.faults] == [f"{pairs}:8", f"{pairs}:9"]


def test_a_missing_data_set_is_one_clear_error(tmp_path, capsys):
    assert command_line(ValidateDataConfig, main, [str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl: got no such file or folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="want one"):
        main(ValidateDataConfig())


@pytest.mark.parametrize("images", [True, False])
def test_an_id_given_twice_is_reported_with_both_rows(tmp_path, images):
    red, blue = save(tmp_path / "red.png", "red"), save(tmp_path / "blue.png", "blue")
    rows = [{"id": name, "prompt": "a", "candidates": [red, blue], "ranks": [1, 2]} for name in ("x", "y", "x")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = main(ValidateDataConfig(path=str(path), images=images))
    assert report.repeated_ids == [f"{path}:3: got id 'x' again, first in {path}:1"]
    assert report.repeated_ids[0] in str(report)
    assert str(report).splitlines()[-1].startswith("Usable, but")


def test_that_ids_are_repeated_is_told_also_where_all_pairs_are_ties(tmp_path):
    rows = [{"id": "x", "prompt": p, "candidates": [{"text": "a"}, {"text": "b"}], "ranks": [1, 1]} for p in "pq"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = str(main(ValidateDataConfig(path=str(tmp_path / "pairs.jsonl"))))
    assert told.splitlines()[-1].startswith("All pairs are ties, ")
    assert told.endswith("Give each row an id of its own, by which verdicts are kept, and judge them again.")


@pytest.mark.parametrize("line", ['{"prompt": "caf\xe9"}', '{"prompt": "a", "candidates": ["a", "b"], "provenance": [1, 2]}'])
def test_data_that_will_not_do_end_with_2_and_the_line(tmp_path, capsys, line):
    (tmp_path / "pairs.jsonl").write_bytes(line.encode("latin-1"))
    assert command_line(ValidateDataConfig, main, [str(tmp_path / "pairs.jsonl")]) == 2
    assert "pairs.jsonl:1: got" in capsys.readouterr().out
