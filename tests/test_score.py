import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Media, comparison, read, read_judgements, write
from mmalign.score import ScoreConfig, main


def png(folder, name, value):
    path = folder / f"{name}.png"
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(path)
    return Content(images=(Media(path=str(path)),))


@pytest.fixture
def data(tmp_path):
    """Three comparisons of two or three flat grey images; brightness is value / 255."""
    values = {"a": (0, 51), "b": (255, 102, 51), "c": (204, 204)}
    rows = [
        Comparison(
            id=name,
            prompt=Content(text=f"prompt {name}"),
            candidates=tuple(png(tmp_path, f"{name}{n}", value) for n, value in enumerate(greys)),
            scores={"human": tuple(map(float, greys))},
        )
        for name, greys in values.items()
    ]
    return write(rows, tmp_path / "rows.jsonl")


def score(data, *settings):
    return main(read_config(ScoreConfig, None, [f"data={data}", *settings]))


def scores_of(path, judge):
    return {row["id"]: comparison(row).scores.get(judge) for row in read(path)}


def test_score_adds_raw_scores_beside_those_of_other_judges(data, tmp_path):
    result = score(data, "scorers=[brightness, sharpness]", "batch_size=2")
    assert result.output == tmp_path / "rows_scored.jsonl"
    assert (result.num_comparisons, result.num_judged, result.faults) == (3, 6, ())
    assert scores_of(result.output, "brightness") == {
        "a": pytest.approx((0.0, 0.2)),
        "b": pytest.approx((1.0, 0.4, 0.2)),
        "c": pytest.approx((0.8, 0.8)),
    }
    assert scores_of(result.output, "human")["a"] == (0.0, 51.0)
    assert "brightness: mean 0.4857" in str(result)
    assert scores_of(data, "brightness") == {"a": None, "b": None, "c": None}


@pytest.mark.parametrize("name", ["out.parquet", "out.tar", "out"])
def test_score_writes_the_format_that_the_output_names(data, tmp_path, name):
    result = score(data, "scorers=brightness", f"output={tmp_path / name}")
    assert scores_of(result.output, "brightness")["b"] == pytest.approx((1.0, 0.4, 0.2))


def test_score_appends_a_judgement_for_every_comparison_with_the_settings_of_the_judge(data):
    result = score(data, "scorers=brightness")
    verdicts = read_judgements(result.judgements)
    assert sorted(verdicts) == ["a", "b", "c"]
    (verdict,) = verdicts["b"]
    assert (verdict.judge, verdict.details["settings"]) == ("brightness", {"scorer": "brightness"})
    assert verdict.scores == pytest.approx((1.0, 0.4, 0.2))


def test_score_goes_on_where_it_was_interrupted(data):
    whole = score(data, "scorers=brightness")
    journal = whole.judgements
    first, second, _ = journal.read_text().splitlines(keepends=True)
    whole.output.unlink()
    journal.write_text(first + second[: len(second) // 2])  # killed in the middle of a line
    again = score(data, "scorers=brightness")
    assert (again.num_kept, again.num_judged) == (1, 2)
    assert journal.read_text().startswith(first)
    assert scores_of(again.output, "brightness")["c"] == pytest.approx((0.8, 0.8))


def test_a_second_scorer_later_leaves_the_verdicts_of_the_first(data):
    score(data, "scorers=brightness")
    both = score(data, "scorers=[brightness, colourfulness]")
    assert (both.num_kept, both.num_judged) == (3, 3)
    assert scores_of(both.output, "brightness")["a"] == pytest.approx((0.0, 0.2))
    assert scores_of(both.output, "colourfulness")["a"] == (0.0, 0.0)


def test_a_changed_image_is_judged_again(data, tmp_path):
    score(data, "scorers=brightness")
    png(tmp_path, "a0", 255)
    again = score(data, "scorers=brightness")
    assert (again.num_kept, again.num_judged) == (2, 1)
    assert scores_of(again.output, "brightness")["a"] == pytest.approx((1.0, 0.2))


def test_a_damaged_image_is_counted_with_its_row_and_the_row_is_kept_unscored(data, tmp_path):
    whole = (tmp_path / "b1.png").read_bytes()
    (tmp_path / "b1.png").write_bytes(whole[:-30])
    result = score(data, "scorers=brightness")
    (fault,) = result.faults
    assert fault.where == f"{data}:2"
    assert "1 rows not judged" in str(result) and "b1.png" in str(result)
    assert scores_of(result.output, "brightness") == {"a": pytest.approx((0, 0.2)), "b": None, "c": pytest.approx((0.8, 0.8))}


def test_a_missing_image_is_counted_with_its_row_and_the_row_is_left_out(data, tmp_path):
    (tmp_path / "b1.png").unlink()
    result = score(data, "scorers=brightness")
    assert [fault.where for fault in result.faults] == [f"{data}:2"]
    assert list(scores_of(result.output, "brightness")) == ["a", "c"]


def test_an_id_used_twice_is_a_fault_of_the_second_row(tmp_path, data):
    row = comparison(next(iter(read(data))))
    twice = write([row, replace(row, prompt=Content(text="other"))], tmp_path / "twice.jsonl")
    result = score(twice, "scorers=brightness")
    assert result.num_comparisons == 1
    assert "got id 'a' again" in str(result.faults[0])


def test_data_without_a_usable_row_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a cat", "candidates": []}\n')
    with pytest.raises(UserError, match="no usable row"):
        score(tmp_path / "bad.jsonl", "scorers=brightness")
    assert not (tmp_path / "bad_scored.jsonl").exists()


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A scorer from outside the package: the image's width times a setting."""

    factor: float
    batch_size: int = 1
    name: str = "scaled"

    def __call__(self, prompts, images):
        return torch.tensor([self.factor * image.width for image in images])


def scaled(*, factor: float = 1.0, batch_size: int = 1) -> Scaled:
    return Scaled(factor=factor, batch_size=batch_size)


def not_a_number() -> Scaled:
    return Scaled(factor=float("nan"), name="not_a_number")


def test_a_score_that_is_no_number_is_refused_with_the_image_it_belongs_to(data):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: candidate 1: got nan from scorer not_a_number"):
        score(data, f"scorers={{name: '{__name__}:not_a_number'}}")


class Of:
    """A scorer that gives what it is told to, a number of images in."""

    name = "of"

    def __init__(self, gives):
        self.gives = gives

    def __call__(self, prompts, images):
        return self.gives(len(images))


def column():
    return Of(lambda count: torch.ones(count, 1))


def too_few():
    return Of(lambda count: torch.ones(count - 1))


def an_array(kind):
    return Of(lambda count: np.arange(count, dtype=kind)[::-1])


def float64s():
    return an_array(np.float64)


def float16s():
    return an_array(np.float16)


def int64s():
    return an_array(np.int64)


def words():
    return Of(lambda count: np.array(["1"] * count))


def square():
    return Of(lambda count: np.ones((count, count)))


def numbers():
    return Of(lambda count: [1.0] * count)


def no_scorer():
    return 3


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("column", r"scorer of: got shape \(7, 1\) for 7 candidates, want a tensor of shape \(7,\)"),
        ("too_few", r"scorer of: got shape \(6,\) for 7 candidates"),
        ("words", r"scorer of: got a ndarray for 7 candidates"),
        ("square", r"scorer of: got shape \(7, 7\) for 7 candidates"),
        ("numbers", r"scorer of: got a list for 7 candidates"),
        ("no_scorer", r"scorers: got .*:no_scorer, which makes a int, want a scorer: a `name`, and a call"),
    ],
)
def test_a_scorer_from_outside_that_gives_no_score_a_candidate_is_told_so(data, name, told):
    with pytest.raises(UserError, match=told):
        score(data, f"scorers={{name: '{__name__}:{name}'}}")


@pytest.mark.parametrize("name", ["float64s", "float16s", "int64s"])
def test_a_scorer_from_outside_may_give_an_array_of_numpy(data, name):
    result = score(data, f"scorers={{name: '{__name__}:{name}'}}")
    assert result.means == {"of": 3.0}
    assert [row["scores"][-1]["values"] for row in read(result.output)] == [[6.0, 5.0], [4.0, 3.0, 2.0], [1.0, 0.0]]


def test_rows_without_use_of_one_kind_are_one_line(tmp_path):
    rows = [{"prompt": "p", "candidates": [{"image": "a.png"}]} for _ in range(9)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as told:
        score(tmp_path / "one.jsonl", "scorers=brightness")
    heading, line = str(told.value).splitlines()
    assert "got no usable row" in heading
    assert line.startswith(f"{tmp_path}/one.jsonl:1: got 1 candidate, want at least 2.") and "Such faults: 9" in line


def test_what_one_judge_said_is_kept_when_another_one_fails(data):
    address = f"{__name__}:"
    with pytest.raises(UserError, match="from scorer not_a_number"):
        score(data, f"scorers=[{{name: '{address}scaled'}}, {{name: '{address}not_a_number'}}]")
    result = score(data, f"scorers={{name: '{address}scaled'}}")
    assert result.num_kept > 0 and result.num_judged + result.num_kept == result.num_comparisons


def test_a_scorer_is_used_twice_under_two_labels(data):
    address = f"{__name__}:scaled"
    result = score(data, f"scorers=[{{name: '{address}'}}, {{name: '{address}', factor: 3.0, label: thrice}}]")
    assert scores_of(result.output, "scaled")["a"] == (4.0, 4.0)
    assert scores_of(result.output, "thrice")["a"] == (12.0, 12.0)
    with pytest.raises(UserError, match="got the judge brightness twice"):
        score(data, "scorers=[brightness, brightness]")


def test_verdicts_given_with_other_settings_are_refused_but_speed_settings_do_not_matter(data):
    address = f"{__name__}:scaled"
    score(data, f"scorers={{name: '{address}'}}")
    assert score(data, f"scorers={{name: '{address}', batch_size: 7}}").num_kept == 3
    with pytest.raises(UserError, match=r"rows_scored\.jsonl\.judgements\.jsonl: got verdicts of scaled with settings"):
        score(data, f"scorers={{name: '{address}', factor: 2.0}}")


def test_score_from_the_command_line_ends_with_0_or_2(data, tmp_path, capsys):
    assert command_line(ScoreConfig, main, [str(data), "scorers=brightness"]) == 0
    assert "3 comparisons, 3 verdicts given" in capsys.readouterr().out
    assert command_line(ScoreConfig, main, [str(data), "scorers=brightnes"]) == 2
    assert "Did you mean brightness?" in capsys.readouterr().err
    assert command_line(ScoreConfig, main, [str(data), "scorers=[]"]) == 2
    assert "scorers" in capsys.readouterr().err


def test_the_journal_is_json_lines_that_any_tool_reads(data):
    lines = score(data, "scorers=brightness").judgements.read_text().splitlines()
    assert [json.loads(line)["comparison"] for line in lines] == ["a", "b", "c"]


def test_score_runs_again_with_more_judges_on_a_folder(data, tmp_path):
    write((comparison(row) for row in read(data)), tmp_path / "cand")
    for folder in ("cand_scored", "other"):
        more = [] if folder == "cand_scored" else [f"output={tmp_path / folder}"]
        assert score(tmp_path / "cand", "scorers=brightness", *more).output == tmp_path / folder
        again = score(tmp_path / "cand", "scorers=[brightness, sharpness]", *more)
        assert (again.num_judged, again.num_kept) == (3, 3)
        assert len(scores_of(again.output, "sharpness")["b"]) == 3


def test_a_folder_of_other_files_is_refused_before_anything_is_judged(data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        score(data, "scorers=brightness", f"output={tmp_path / 'full'}")
    assert (tmp_path / "full/letter.txt").read_text() == "keep me"
    assert not (tmp_path / "full.judgements.jsonl").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows.jsonl", "folder/rows.jsonl/x", "letter.txt/x.jsonl", "x.jpg"])
def test_an_output_that_cannot_be_written_or_is_the_data_ends_with_2(data, tmp_path, capsys, name):
    (tmp_path / "letter.txt").write_text("keep me")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/rows.jsonl").write_text("a file")
    before = data.read_bytes()
    assert command_line(ScoreConfig, main, [str(data), "scorers=brightness", f"output={tmp_path}/{name}"]) == 2
    assert "got" in capsys.readouterr().err
    assert data.read_bytes() == before
    assert not list(tmp_path.rglob("*.judgements.jsonl"))


def test_an_output_inside_the_folder_of_the_data_is_refused(data, tmp_path):
    write((comparison(row) for row in read(data)), tmp_path / "cand")
    with pytest.raises(UserError, match="want a place outside the data"):
        score(tmp_path / "cand", "scorers=brightness", f"output={tmp_path / 'cand/scored.parquet'}")


def test_a_folder_is_not_replaced_by_a_file_nor_the_reverse(data, tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x").write_text("keep me")
    for name, wanted in (("x.jsonl", "want a file"), ("x", "want a folder")):
        with pytest.raises(UserError, match=wanted):
            score(data, "scorers=brightness", f"output={tmp_path / name}")


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """A scorer whose scores depend on what else is in the batch, as those of a network do in the last digit."""

    name: str = "rounding"

    def __call__(self, prompts, images):
        return torch.tensor([image.getpixel((0, 0))[0] + 1e-3 * len(images) for image in images])


def rounding() -> Rounding:
    return Rounding()


@pytest.mark.parametrize("kept", [[0], [1], [2], [0, 2]])
def test_scores_are_byte_for_byte_those_of_a_run_without_a_stop(data, kept):
    settings = (f"scorers={{name: '{__name__}:rounding'}}", "batch_size=5")
    whole = score(data, *settings)
    output, journal = whole.output.read_bytes(), whole.judgements.read_bytes()
    lines = journal.splitlines(keepends=True)
    whole.output.unlink()
    whole.judgements.write_bytes(b"".join(lines[number] for number in kept))
    again = score(data, *settings)
    assert (again.num_kept, again.num_judged) == (len(kept), 3 - len(kept))
    assert (again.output.read_bytes(), again.judgements.read_bytes()) == (output, journal)


def test_parts_that_killed_processes_left_are_gathered_without_a_double(data):
    whole = score(data, "scorers=[brightness, sharpness]")
    output, journal = whole.output.read_bytes(), whole.judgements.read_bytes()
    lines = journal.splitlines(keepends=True)
    whole.output.unlink()
    whole.judgements.write_bytes(lines[3])
    for process, part in enumerate((lines[0] + lines[1][:20], lines[3] + lines[4])):
        whole.judgements.with_name(f"{whole.judgements.name}.part-{process:03d}").write_bytes(part)
    again = score(data, "scorers=[brightness, sharpness]")
    assert (again.num_kept, again.num_judged) == (3, 3)
    assert (again.output.read_bytes(), again.judgements.read_bytes()) == (output, journal)
    assert not list(data.parent.glob("*.part-*"))


def test_the_mean_is_of_the_rows_as_they_are_now(data, tmp_path):
    score(data, "scorers=brightness")
    png(tmp_path, "c0", 255)
    png(tmp_path, "c1", 255)
    assert score(data, "scorers=brightness").means["brightness"] == pytest.approx((0 + 0.2 + 1 + 0.4 + 0.2 + 1 + 1) / 7)
