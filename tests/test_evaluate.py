import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.evaluate import EvaluateConfig, evaluate_pairs, main, paired_images, training_drift
from mmalign.records import Comparison, Content, Media, write
from mmalign.report import RULE, before_after_grid, checkpoint_grid, chosen_places
from mmalign.report.grid import _drawable, short_captions, thumbnail
from mmalign.scorers import SCORERS

PROMPTS = ("a small grey square", "a small grey circle", "a small <b> & star")


def grey(value, size=(8, 8), seed=None):
    pixels = np.full((size[1], size[0], 3), float(value))
    if seed is not None:
        pixels += np.random.default_rng(seed).normal(0, 20, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def images_of(folder, name, value, *, seeds=(1, 2, 3, 4), prompts=PROMPTS, spread=True):
    """Comparisons of one image a seed; `value(prompt number, seed)` is its brightness."""
    rows = []
    for number, prompt in enumerate(prompts):
        candidates = []
        for seed in seeds:
            path = folder / f"{name}_{number}_{seed}.png"
            grey(value(number, seed), seed=seed + 10 * number if spread else None).save(path)
            candidates.append(Content(images=(Media(path=str(path)),)))
        rows.append(
            Comparison(
                id=f"{name}-{number}",
                prompt=Content(text=prompt),
                candidates=tuple(candidates),
                provenance=tuple({"seed": seed} for seed in seeds),
            )
        )
    return write(rows, folder / f"{name}.jsonl")


@pytest.fixture
def sides(tmp_path):
    before = images_of(tmp_path, "before", lambda number, seed: 60)
    after = images_of(tmp_path, "after", lambda number, seed: 140 if seed > 1 else 30)
    return before, after


def evaluate(before, after, tmp_path, *settings):
    fixed = [f"before={before}", f"after={after}", f"output={tmp_path / 'report'}"]
    return main(read_config(EvaluateConfig, None, [*fixed, *settings]))


class Failing:
    """Brightness, which counts its images and fails once it has seen so many."""

    name = "failing"
    seen = 0
    last = 0

    def __call__(self, prompts, images):
        Failing.seen += len(images)
        if Failing.seen > Failing.last:
            raise KeyboardInterrupt
        return SCORERS["brightness"]()(prompts, images)


def failing(*, grain: float = 1.0):
    return Failing()


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_evaluation_goes_on_with_what_was_judged(sides, tmp_path, monkeypatch, torn):
    monkeypatch.setattr("mmalign.evaluate.IMAGES_AT_ONCE", 5)
    scorers = f"scorers=[sharpness, {{name: '{__name__}:failing'}}]"
    kept = tmp_path / "report.scores.jsonl"
    monkeypatch.setattr(Failing, "last", 10)
    monkeypatch.setattr(Failing, "seen", 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, scorers)
    assert kept.exists() and not (tmp_path / "report").exists()
    if torn:
        kept.write_text(kept.read_text() + '{"group": "ab')
    monkeypatch.setattr(Failing, "last", 1000)
    monkeypatch.setattr(Failing, "seen", 0)
    resumed = evaluate(*sides, tmp_path, scorers).evaluation
    assert Failing.seen == 24 - 10, "two groups of five were judged before"
    assert not kept.exists(), "the next evaluation judges anew"
    assert evaluate(*sides, tmp_path, scorers).evaluation == resumed
    assert Failing.seen == 24 - 10 + 24


class Mended:
    """1 for an image while it is broken, and NaN from the eleventh image on; then 100."""

    name = "mended"
    broken = True

    def __init__(self):
        self.seen = 0

    def __call__(self, prompts, images):
        self.seen += len(images)
        value = 100.0 if not self.broken else 1.0 if self.seen <= 10 else float("nan")
        return torch.full((len(images),), value)


def mended():
    return Mended()


def test_nothing_that_a_refused_judge_said_is_kept(sides, tmp_path, monkeypatch):
    monkeypatch.setattr("mmalign.evaluate.IMAGES_AT_ONCE", 5)
    monkeypatch.setattr(Mended, "broken", True)
    scorers = f"scorers={{name: '{__name__}:mended'}}"
    with pytest.raises(UserError, match="got nan from scorer mended"):
        evaluate(*sides, tmp_path, scorers)
    assert not list(tmp_path.glob("*.scores.jsonl"))
    monkeypatch.setattr(Mended, "broken", False)
    change = evaluate(*sides, tmp_path, scorers).evaluation.headline
    assert (change.mean_before, change.mean_after) == (100, 100)


@pytest.mark.parametrize("output", [".", "..", "../"])
def test_the_folder_one_is_in_may_be_the_output(sides, tmp_path, monkeypatch, output):
    folder = tmp_path / "here" / "there"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Mended, "broken", False)
    evaluate(*sides, tmp_path, f"scorers={{name: '{__name__}:mended'}}", f"output={output}")
    assert (folder / output / "results.json").exists()
    monkeypatch.setattr("mmalign.evaluate.IMAGES_AT_ONCE", 5)
    monkeypatch.setattr(Failing, "last", 10)
    monkeypatch.setattr(Failing, "seen", 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, f"scorers={{name: '{__name__}:failing'}}", f"output={output}")
    place = (folder / output).resolve()
    assert place.with_name(f"{place.name}.scores.jsonl").exists()


OWN = """
import torch

class Own:
    name = "own"
    seen = 0

    def __call__(self, prompts, images):
        self.seen += len(images)
        if VALUE == 1.0 and self.seen > 10:
            raise KeyboardInterrupt
        return torch.full((len(images),), VALUE)

def own(*, weights: str = ""):
    return Own()
"""


@pytest.mark.parametrize("where", ["code", "file", "folder"])
@pytest.mark.parametrize("label", ["", ", label: mine"])
def test_code_and_weights_that_were_changed_after_a_kill_are_another_judge(sides, tmp_path, monkeypatch, caplog, where, label):
    monkeypatch.setattr("mmalign.evaluate.IMAGES_AT_ONCE", 5)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    folder, code = tmp_path / "weights", tmp_path / "own_judge.py"
    folder.mkdir()
    weights = folder / "model.bin"
    weights.write_text("1")
    reads = {"code": "VALUE = 1.0", "file": f"import pathlib; VALUE = float(pathlib.Path({str(weights)!r}).read_text())"}
    code.write_text(reads.get(where, reads["file"]) + OWN)
    path = {"code": "", "file": str(weights), "folder": str(folder)}[where]
    scorers = f"scorers={{name: 'own_judge:own', weights: '{path}'{label}}}"
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, scorers)
    kept = tmp_path / "report.scores.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    if where == "code":
        code.write_text("VALUE = 100.0" + OWN)
    else:
        weights.write_text("100")
    monkeypatch.delitem(sys.modules, "own_judge")
    change = evaluate(*sides, tmp_path, scorers).evaluation.headline
    assert (change.mean_before, change.mean_after) == (100, 100)
    (line,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{kept}: 2 groups of images are judged already" in line.getMessage() and "Delete the file" in line.getMessage()
    assert not kept.exists()


def test_what_was_judged_with_other_settings_is_judged_again(sides, tmp_path, monkeypatch):
    monkeypatch.setattr("mmalign.evaluate.IMAGES_AT_ONCE", 5)
    monkeypatch.setattr(Failing, "last", 10)
    monkeypatch.setattr(Failing, "seen", 0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, f"scorers={{name: '{__name__}:failing'}}")
    monkeypatch.setattr(Failing, "last", 1000)
    monkeypatch.setattr(Failing, "seen", 0)
    evaluate(*sides, tmp_path, f"scorers={{name: '{__name__}:failing', grain: 2.0}}")
    assert Failing.seen == 24


def metrics(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drifting_rows():
    for step in range(1, 21):
        yield {
            "step": step,
            "rewards/accuracies": 0.5 + step / 50,
            "mse/chosen": 0.10 + step / 1000,
            "mse/ref_chosen": 0.10,
            "mse/rejected": 0.20 + step / 100,
            "mse/ref_rejected": 0.20,
        }
    yield {"step": 20, "validation/loss": 0.3}


def test_evaluate_counts_pairs_of_the_same_prompt_and_seed(sides, tmp_path):
    result = evaluate(*sides, tmp_path, "scorers=brightness")
    rate = result.evaluation.headline.win_rate
    assert (rate.wins, rate.ties, rate.losses) == (9, 0, 3)  # seed 1 of each of three prompts got darker
    assert (result.evaluation.num_pairs, result.evaluation.num_prompts) == (12, 3)
    assert "75.0 %" in str(result)


def test_pairing_does_not_depend_on_the_order_of_the_rows(sides, tmp_path):
    turned = images_of(tmp_path, "turned", lambda number, seed: 140 if seed > 1 else 30, seeds=(4, 2, 1, 3), prompts=PROMPTS)
    lines = turned.read_text().splitlines()
    turned.write_text("\n".join(lines[::-1]) + "\n")
    rates = [evaluate(sides[0], after, tmp_path, "scorers=brightness").evaluation.headline for after in (sides[1], turned)]
    assert rates[0].win_rate == rates[1].win_rate


def test_results_json_holds_win_rate_fidelity_and_diversity(sides, tmp_path):
    evaluate(*sides, tmp_path, "scorers=[brightness, sharpness]", "held_out=colourfulness", "tie_eps=0")
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["win_rate"] == 0.75 and results["low"] < 0.75 < results["high"]
    assert results["fidelity_before"] == results["scorers"]["colourfulness"]["mean_before"]
    assert 0 < results["diversity_before"] < 0.2 and results["diversity_after"] > results["diversity_before"]
    assert list(results["scorers"]) == ["brightness", "sharpness", "colourfulness"]
    assert [results["scorers"][name]["held_out"] for name in results["scorers"]] == [False, False, True]
    assert results["scorers"]["brightness"]["effect_size"] > 0
    assert (tmp_path / "report/evaluation.yaml").exists()


def test_ties_are_counted_in_standard_deviations_of_the_scores_before():
    before = [grey(value) for value in (100, 120, 140, 160)]
    after = [grey(value + 1) for value in (100, 120, 140, 160)]
    prompts = ["a"] * 4
    # Brightness before has the standard deviation sqrt(500) / 255; a grey level is 0.0447 of it.
    strict, calm = (evaluate_pairs(prompts, before, after, scorers=[SCORERS["brightness"]()], tie_eps=e) for e in (0.04, 0.05))
    assert strict.headline.win_rate.wins == 4
    assert calm.headline.win_rate.ties == 4
    assert calm.headline.eps == pytest.approx(0.05 * 500**0.5 / 255)


def test_interval_by_bootstrap_is_a_setting(sides, tmp_path):
    wilson, bootstrap = (
        evaluate(*sides, tmp_path, "scorers=brightness", f"interval={name}").evaluation for name in ("wilson", "bootstrap")
    )
    assert wilson.headline.win_rate.rate == bootstrap.headline.win_rate.rate
    assert wilson.headline.win_rate.low != bootstrap.headline.win_rate.low
    assert "bootstrap over the pairs" in (tmp_path / "report/report.html").read_text()


def test_collapse_and_a_falling_held_out_judge_are_told_in_the_report(tmp_path):
    before = images_of(tmp_path, "before", lambda number, seed: 60)
    after = images_of(tmp_path, "after", lambda number, seed: 200, spread=False)
    settings = ("scorers=brightness", "held_out=sharpness")
    result = evaluate(before, after, tmp_path, *settings)
    assert result.evaluation.headline.win_rate.rate == 1.0
    page = (tmp_path / "report/report.html").read_text()
    for text in (str(result), page):
        assert "Diversity fell by 100 %" in text
        assert "The held-out judge sharpness fell from" in text


def test_an_unchanged_model_is_told_to_show_no_difference(tmp_path):
    side = images_of(tmp_path, "same", lambda number, seed: 60)
    evaluation = evaluate(side, side, tmp_path, "scorers=brightness").evaluation
    assert evaluation.headline.win_rate.ties == 12
    notes = " ".join(evaluation.warnings())
    assert "contains 50 %" in notes and "No held-out judge" in notes and "Diversity" not in notes


def test_a_sound_gain_has_no_warning(tmp_path):
    before = images_of(tmp_path, "before", lambda number, seed: 60)
    after = images_of(tmp_path, "after", lambda number, seed: 120)
    evaluation = evaluate(before, after, tmp_path, "scorers=brightness", "held_out=colourfulness").evaluation
    assert evaluation.warnings() == []


def test_training_drift_compares_the_first_with_the_last_tenth(tmp_path):
    drift = training_drift(metrics(tmp_path / "run", drifting_rows()))
    assert drift.accuracy.ends == pytest.approx((0.53, 0.89))
    assert drift.chosen_error.ends == pytest.approx((0.0015, 0.0195))
    assert drift.rejected_error.ends == pytest.approx((0.015, 0.195))
    assert drift.accuracy.steps[-1] == 20


def test_training_drift_stands_in_every_output(sides, tmp_path):
    run = metrics(tmp_path / "run", drifting_rows())
    result = evaluate(*sides, tmp_path, "scorers=brightness", f"run={run}")
    assert "implicit reward accuracy: 0.53 in the first tenth" in str(result)
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert results["training"]["rejected_error_drift"] == pytest.approx([0.015, 0.195])
    assert (tmp_path / "report/report.html").read_text().count("<polyline") == 3


def test_a_run_without_metrics_is_a_user_fault(tmp_path):
    with pytest.raises(UserError, match=r"with metrics\.jsonl"):
        training_drift(tmp_path)
    with pytest.raises(UserError, match="want at least one"):
        training_drift(metrics(tmp_path / "sft", [{"step": 1, "loss": 0.1}]))
    (tmp_path / "sft/metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: got no JSON"):
        training_drift(tmp_path / "sft")


def row(seeds, prompt="a cat", where="x.jsonl:1"):
    candidates = tuple(Content(images=(Media(path=f"{seed}.png"),)) for seed in seeds)
    provenance = tuple({} if seed is None else {"seed": seed} for seed in seeds)
    return Comparison(id="x", prompt=Content(text=prompt), candidates=candidates, provenance=provenance, where=where)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ([1, 2], [1, 3], r"after: got no image for 1 of 2 prompts and seeds, the first 'a cat' with seed 2"),
        ([1], [1, 3], r"before: got no image for 1 of 2 prompts and seeds, the first 'a cat' with seed 3"),
        ([1, 1], [1], r"x\.jsonl:1: candidate 2: got prompt 'a cat' with seed 1 again"),
        ([1, None], [1], r"x\.jsonl:1: candidate 2: got no seed"),
    ],
)
def test_images_that_cannot_be_paired_are_refused(before, after, message):
    with pytest.raises(UserError, match=message):
        paired_images([row(before)], [row(after)])


def test_a_judge_is_not_scorer_and_held_out_at_once(sides, tmp_path):
    with pytest.raises(UserError, match="got the judge brightness twice"):
        evaluate(*sides, tmp_path, "scorers=brightness", "held_out=brightness")
    scorer = SCORERS["brightness"]()
    with pytest.raises(UserError, match="held-out judge is not among the scorers"):
        evaluate_pairs(["a"], [grey(1)], [grey(2)], scorers=[scorer], held_out=[scorer])


class NotANumber:
    name = "not_a_number"

    def __call__(self, prompts, images):
        return torch.full((len(images),), float("nan"))


def test_a_score_that_is_no_number_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"before, image 1 \('a'\): got nan from scorer not_a_number"):
        evaluate_pairs(["a"], [grey(1)], [grey(2)], scorers=[NotANumber()])


def test_nothing_is_written_when_an_image_cannot_be_read(sides, tmp_path):
    (tmp_path / "after_1_3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"after\.jsonl:2.*after_1_3\.png"):
        evaluate(*sides, tmp_path, "scorers=brightness")
    assert not (tmp_path / "report").exists()


class Page(HTMLParser):
    """Collects the addresses of a page and checks that tags close."""

    def __init__(self):
        super().__init__()
        self.addresses, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_escaped_and_well_formed(sides, tmp_path):
    evaluate(*sides, tmp_path, "scorers=brightness", "rows=2", "cols=3", "title=Tiny <run>")
    text = (tmp_path / "report/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.addresses) == 2 * 2 * 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "Tiny &lt;run&gt;" in text and "&lt;b&gt; &amp; star" in text and "<b> & star" not in text
    assert not re.search(r"https?://|<script", text)
    assert "prefers-color-scheme: dark" in text


def test_the_grid_shows_before_on_the_left_and_after_on_the_right():
    prompts = ["one", "two", "one", "two"]
    red, green = (Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00"))
    sheet = np.array(before_after_grid(prompts, [red] * 4, [green] * 4, rows=2, cols=2))
    is_red, is_green = ((sheet == colour).all(axis=-1) for colour in ((255, 0, 0), (0, 255, 0)))
    assert is_red.sum() == is_green.sum() == 4 * 128 * 128
    columns = np.flatnonzero(is_red.any(axis=0)), np.flatnonzero(is_green.any(axis=0))
    assert (columns[0] + 128 + 4 == columns[1]).all()


def test_the_grid_is_as_large_as_its_pairs_and_takes_any_size_of_image():
    mixed = [grey(40, (300, 100)), grey(40, (5, 9)), grey(40, (128, 128))]
    few = before_after_grid(["a"] * 3, mixed, mixed, rows=6, cols=4)
    many = before_after_grid(["a"] * 24, mixed * 8, mixed * 8, rows=6, cols=4)
    assert few.width < many.width and few.height < many.height
    assert thumbnail(mixed[0], 128).size == (128, 42)
    assert thumbnail(mixed[1], 128).size == (70, 126)


def test_pairs_are_shown_in_turn_over_the_prompts_whatever_their_scores():
    assert chosen_places(["a", "a", "b", "c", "b"], 4) == [0, 2, 3, 1]
    assert chosen_places(["a"], 10) == [0]


def test_captions_drop_the_words_that_all_prompts_share():
    assert short_captions(["a handwritten digit two", "a handwritten digit six"]) == ("a handwritten digit", ["two", "six"])
    assert short_captions(["a cat", "a dog"]) == ("", ["a cat", "a dog"])
    assert short_captions(["a red cat", "a red cat sits"]) == ("a red", ["cat", "cat sits"])
    assert short_captions(["the same words"] * 2) == ("", ["the same words"] * 2)


def test_evaluate_from_the_command_line_tells_every_fault_at_once(sides, tmp_path, capsys):
    arguments = [f"before={sides[0]}", f"after={sides[1]}", f"output={tmp_path / 'report'}"]
    assert command_line(EvaluateConfig, main, [*arguments, "scorers=brightness"]) == 0
    out = capsys.readouterr().out
    assert "12 pairs from 3 prompts" in out and "report.html" in out
    assert command_line(EvaluateConfig, main, [*arguments, "scorers=brightnes", "interval=wald"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean brightness?" in error and "interval" in error
    assert command_line(EvaluateConfig, main, [*arguments, "scorers=brightness", "tie_eps=-1.0"]) == 2
    assert "tie_eps" in capsys.readouterr().err


def test_prompts_beyond_ascii_do_not_become_empty_boxes():
    prompts = ["Ein Bär im Schnee", "一只红色的猫"]
    image = grey(40)
    sheet = before_after_grid(prompts, [image] * 2, [image] * 2, rows=1, cols=2)
    assert _drawable("a cat …", 15)[0] == "a cat …"
    text, font = _drawable("一只红色的猫", 15)
    box = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != box for letter in text)
    assert sheet.width == 2 * 40 + 2 * 260 + 28


def test_evaluate_into_the_folder_of_a_run_leaves_its_files(sides, tmp_path):
    run = metrics(tmp_path / "report", drifting_rows())
    for name in ("config.yaml", "environment.json"):
        (run / name).write_text("of the run")
    evaluate(*sides, tmp_path, "scorers=brightness", f"run={run}")
    assert [(run / name).read_text() for name in ("config.yaml", "environment.json")] == ["of the run"] * 2
    again = read_config(EvaluateConfig, run / "evaluation.yaml")
    assert (again.before, again.run) == (str(sides[0]), str(run))
    assert "packages" in json.loads((run / "evaluation_environment.json").read_text())


@pytest.mark.parametrize("name", ["letter.txt", "letter.txt/below"])
def test_an_output_that_is_no_folder_is_refused_before_anything_is_scored(sides, tmp_path, capsys, name):
    (tmp_path / "letter.txt").write_text("keep me")
    words = [f"before={sides[0]}", f"after={sides[1]}", f"output={tmp_path / name}", f"scorers={{name: '{__name__}:never'}}"]
    assert command_line(EvaluateConfig, main, words) == 2
    assert "letter.txt is a file" in capsys.readouterr().err


def never():
    raise AssertionError("the scorer was built before the output was checked")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_ends_with_2(sides, tmp_path, capsys, device):
    words = [f"before={sides[0]}", f"after={sides[1]}", f"output={tmp_path / 'o'}", "scorers=brightness", f"device={device}"]
    assert command_line(EvaluateConfig, main, words) == 2
    assert f"device: got '{device}'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("entry", "named"), [("[1, 2, 3, 4]", "want an object"), ('[{"seed": [1]}, {}, {}, {}]', "no seed")])
def test_provenance_of_another_kind_ends_with_2_and_the_line(sides, tmp_path, capsys, entry, named):
    rows = [json.loads(line) for line in sides[0].read_text().splitlines()]
    rows[1]["provenance"] = json.loads(entry)
    sides[0].write_text("\n".join(map(json.dumps, rows)))
    words = [f"before={sides[0]}", f"after={sides[1]}", f"output={tmp_path / 'o'}", "scorers=brightness"]
    assert command_line(EvaluateConfig, main, words) == 2
    error = capsys.readouterr().err
    assert "before.jsonl:2: " in error
    assert named in error


def test_metrics_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"caf\xe9": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: got no JSON"):
        training_drift(tmp_path)


def told_by(origin, side):
    """The same comparisons with more provenance."""
    rows = [json.loads(line) for line in side.read_text().splitlines()]
    for entry in (entry for row in rows for entry in row["provenance"]):
        entry |= origin
    side.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return side


def brightening(folder, name, value, sharp):
    """Images of a brightness whose sharpness falls with `sharp`: noise of that strength."""
    rows = []
    for number, prompt in enumerate(PROMPTS):
        candidates = []
        for seed in (1, 2, 3, 4):
            pixels = value + sharp * np.random.default_rng(seed + 10 * number).normal(0, 1, (8, 8, 3))
            path = folder / f"{name}_{number}_{seed}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            candidates.append(Content(images=(Media(path=str(path)),)))
        rows.append(
            Comparison(
                id=f"{name}-{number}",
                prompt=Content(text=prompt),
                candidates=tuple(candidates),
                provenance=tuple({"seed": seed} for seed in (1, 2, 3, 4)),
            )
        )
    return write(rows, folder / f"{name}.jsonl")


@pytest.fixture
def series(tmp_path):
    """Brightness rises all along; sharpness rises at first and is below its start from step 200 on."""
    course = {"before": (60, 20), "at100": (90, 25), "at200": (120, 12), "after": (150, 6)}
    sides = {name: brightening(tmp_path, name, *values) for name, values in course.items()}
    for step in (100, 200):
        told_by({"lora": f"runs/x/checkpoint-{step}"}, sides[f"at{step}"])
    told_by({"lora": "runs/x"}, sides["after"])
    return sides


def test_a_scorer_that_rises_while_the_held_out_judge_falls_is_a_named_finding(series, tmp_path):
    settings = ("scorers=brightness", "held_out=sharpness")
    result = evaluate(series["before"], series["after"], tmp_path, *settings)
    found = json.loads((tmp_path / "report/results.json").read_text())["over_optimisation"]
    assert (found["found"], found["risen"], found["fallen"], found["since"]) == (True, ["brightness"], ["sharpness"], None)
    assert found["rule"] == RULE
    page = (tmp_path / "report/report.html").read_text()
    assert "OVER-OPTIMISATION" in str(result) and 'class="note alarm"' in page
    assert RULE in page
    assert page.count("OVER-OPTIMISATION") == 1


@pytest.mark.parametrize(
    ("before", "after", "scorers", "held_out"),
    [
        ("before", "at100", "brightness", "sharpness"),  # the held-out judge rises too
        ("before", "before", "brightness", "sharpness"),  # nothing moves
        ("after", "before", "brightness", "sharpness"),  # the scorer falls
        ("before", "after", "brightness", "[sharpness, dark]"),  # one held-out judge falls and one rises
    ],
)
def test_the_alarm_is_silent_where_its_rule_does_not_hold(series, tmp_path, before, after, scorers, held_out):
    judges = held_out.replace("dark", f"{{name: '{__name__}:brightness_too'}}")
    result = evaluate(series[before], series[after], tmp_path, f"scorers={scorers}", f"held_out={judges}")
    assert json.loads((tmp_path / "report/results.json").read_text())["over_optimisation"]["found"] is False
    assert "OVER-OPTIMISATION" not in str(result)


class BrightnessToo:
    name = "dark"

    def __call__(self, prompts, images):
        return SCORERS["brightness"]()(prompts, images)


def brightness_too():
    return BrightnessToo()


def test_without_a_held_out_judge_there_is_no_alarm_to_give(series, tmp_path):
    evaluate(series["before"], series["after"], tmp_path, "scorers=brightness")
    assert json.loads((tmp_path / "report/results.json").read_text())["over_optimisation"] is None


def test_checkpoints_stand_side_by_side_with_curves_and_the_step_where_the_alarm_begins(series, tmp_path):
    run = metrics(tmp_path / "run", ({**row, "step": 15 * row["step"]} for row in drifting_rows()))
    between = f"checkpoints=[{series['at200']}, {series['at100']}]"
    settings = ("scorers=brightness", "held_out=sharpness", "rows=2", f"run={run}", between)
    result = evaluate(series["before"], series["after"], tmp_path, *settings)
    results = json.loads((tmp_path / "report/results.json").read_text())
    assert [one["step"] for one in results["checkpoints"]] == [100, 200]
    assert (results["over_optimisation"]["since"], results["over_optimisation"]["best"]) == (200, 100)
    assert results["last_step"] == 300
    curve = result.evaluation.mean_curves()["brightness"]
    assert curve.steps == (0, 100, 200, 300)
    assert np.array(curve.values) * 255 == pytest.approx([60, 90, 120, 150], abs=2)
    at200 = results["checkpoints"][1]["scorers"]["brightness"]
    assert at200["mean_before"] == curve.values[0] and at200["mean_after"] == curve.values[2] and at200["win_rate"] == 1.0
    assert "since checkpoint 200" in str(result) and "checkpoints.png" in str(result)
    text = (tmp_path / "report/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert text.count("Mean of ") == 2 * 2, "a chart for each judge, named in its label and under it"
    assert text.count('alt="step 100: ') == text.count('alt="step 200: ') == 2
    assert "before · step 100 · step 200 · after" in text


def test_the_checkpoint_grid_has_a_row_a_seed_and_a_column_a_state():
    colours = ("#ff0000", "#00ff00", "#0000ff")
    columns = [(name, [Image.new("RGB", (8, 8), colour)] * 5) for name, colour in zip("abc", colours, strict=True)]
    sheet = np.array(checkpoint_grid(["one", "two", "one", "two", "three"], columns, rows=4))
    lefts = []
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        shown = (sheet == colour).all(axis=-1)
        assert shown.sum() == 4 * 128 * 128
        lefts.append(np.flatnonzero(shown.any(axis=0))[0])
    assert np.diff(lefts).tolist() == [132, 132]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("checkpoints={after}", "do not all come from one checkpoint-N"),
        ("checkpoints=[{at100}, {twin}]", "got step 100 twice"),
        ("checkpoints={short}", "short.jsonl: got no image for 3 of 12 prompts and seeds"),
    ],
)
def test_checkpoints_that_cannot_be_placed_are_refused(series, tmp_path, capsys, settings, told):
    twin, short = tmp_path / "twin.jsonl", tmp_path / "short.jsonl"
    twin.write_text(series["at100"].read_text())
    rows = [json.loads(line) for line in series["at200"].read_text().splitlines()]
    for row in rows:
        row["candidates"], row["provenance"] = row["candidates"][:3], row["provenance"][:3]
    short.write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = [f"before={series['before']}", f"after={series['after']}", f"output={tmp_path / 'o'}", "scorers=brightness"]
    places = {name: str(path) for name, path in series.items()}
    assert command_line(EvaluateConfig, main, [*words, settings.format(**places, twin=twin, short=short)]) == 2
    assert told in capsys.readouterr().err
