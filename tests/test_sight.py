"""The exam `sight`: each number worked out by hand, against the model's own logits, and of a run by the command."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_text_runs import rows_file, train_seen
from multimodal import encoder, in_one_go, parts, picture, token_logps
from torch import Tensor

from mmalign.cli import main as mmalign
from mmalign.config import Table
from mmalign.errors import UserError
from mmalign.exam import EXAMS
from mmalign.exams.sight import (
    Answers,
    Case,
    Likelihoods,
    Line,
    Measure,
    Side,
    SightFindings,
    blind_gap,
    data_lines,
    declined,
    in_order,
    mean_of,
    per_token,
    share_of,
    sight_lines,
    unchanged,
)
from mmalign.experiment import Data
from mmalign.held_out import pair_fit
from mmalign.importers import IMPORTERS
from mmalign.language.network import TokenNetwork
from mmalign.metrics import averages, preference_metrics, table
from mmalign.multimodal import network as networks
from mmalign.multimodal.degradations import Condition, drop, swap
from mmalign.multimodal.families import FAMILIES
from mmalign.records import Comparison, Content, Media, Message, write
from mmalign.row_files import read_rows
from mmalign.sight import _planned, sight
from mmalign.sight_sides import Shown, lengths_of, likelihoods, said
from mmalign.statistics import wilson_interval

SORRY = "I'm sorry, I can't help with that."


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def exact(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# By hand


def test_numbers_a_row_by_hand() -> None:
    assert blind_gap(exact(-2.0, -3.0), exact(-5.0, -3.0)).tolist() == [3.0, 0.0]
    assert per_token(exact(3.0, 1.0), exact(6.0, 4.0)).tolist() == [0.5, 0.25]
    assert unchanged(["A cat.", "no"], ["A cat. ", "No"]).tolist() == [1.0, 0.0]
    assert declined([SORRY, "Gladly."]).tolist() == [1.0, 0.0]
    assert declined(["nope, never"], ["NOPE"]).tolist() == [1.0]
    assert in_order(exact(1.0, 1.0, 1.0), exact(0.0, 1.0, 2.0)).tolist() == [1.0, 0.5, 0.0]


def test_of_no_case_there_is_no_number() -> None:
    assert mean_of(exact()) == share_of(exact()) == Measure(value=None, low=None, high=None, number=0)
    found = share_of(exact(1.0, 0.0, 1.0, 1.0))
    assert (found.value, found.low, found.high, found.number) == (0.75, *wilson_interval(3, 4), 4)


def side(chosen: float, rejected: tuple[float, ...], blind: tuple[float, ...], absent: float, kl: float, own: str) -> Side:
    fit = Likelihoods(chosen=chosen, rejected=rejected, blind=blind, absent=absent, divergence=kl)
    return Side(fit=fit, said=Answers(own=own, tokens=3, ended=True, dropped="red", swapped=own, safe=None))


def cases() -> list[Case]:
    """Two rows of two rejected answers, the second without a blind one; one that should be refused."""
    first = Case(
        base=side(-4.0, (-5.0, -3.0), (-4.0,), -4.5, 0.4, "red"),
        tuned=side(-2.0, (-6.0, -3.0), (-6.0,), -4.0, 1.2, "blue"),
        lengths=((4,), (2, 3), (5,)),
        declines=False,
    )
    second = Case(
        base=side(-8.0, (-8.0, -9.0), (), -8.0, 0.0, "green"),
        tuned=side(-9.0, (-8.0, -8.0), (), -7.0, 0.2, SORRY),
        lengths=((2,), (2, 2), ()),
        declines=True,
    )
    assert second.base.said is not None and second.tuned.said is not None
    safe = {name: replace(getattr(second, name).said, safe=text) for name, text in (("base", "yes"), ("tuned", SORRY))}
    return [
        first,
        replace(second, base=replace(second.base, said=safe["base"]), tuned=replace(second.tuned, said=safe["tuned"])),
    ]


def values(line: Line) -> tuple[Any, ...]:
    base, tuned, change = (None if one is None else one.value for one in (line.base, line.tuned, line.change))
    assert line.tuned is not None
    return (*(None if one is None else round(one, 12) for one in (base, tuned, change)), line.tuned.number)


def test_every_measure_of_two_rows_by_hand() -> None:
    found = {line.name: values(line) for line in sight_lines(cases())}
    assert found == {
        "blind_gap": (0.25, 0.0, -0.25, 2),  # .5 and 0; 2 and -2
        "blind_gap_per_token": (0.0625, -0.25, -0.3125, 2),  # .125 and 0; .5 and -1
        "image_sensitivity": (0.05, 0.2, 0.15, 2),  # .1 and 0; .3 and .1
        "ranking/accuracy_rejected": (0.625, 0.5, -0.125, 4),  # 1, 0, .5, 1; 1, 1, 0, 0
        "rewards/accuracies_rejected": (None, 0.5, None, 4),
        "rewards/margins_rejected": (None, 0.5, None, 4),  # 2 - -1, 2 - 0; -1 - 0, -1 - 1
        "ranking/accuracy_blind": (0.5, 1.0, 0.5, 1),
        "rewards/accuracies_blind": (None, 1.0, None, 1),
        "rewards/margins_blind": (None, 4.0, None, 1),
        "rewards/accuracies_rejected_1": (None, 0.5, None, 2),
        "rewards/margins_rejected_1": (None, 1.0, None, 2),
        "rewards/accuracies_rejected_2": (None, 0.5, None, 2),
        "rewards/margins_rejected_2": (None, 0.0, None, 2),
        "blind_agreement/dropped": (0.5, 0.0, -0.5, 2),
        "blind_agreement/swapped": (1.0, 1.0, 0.0, 2),
        "refusal_rate": (0.0, 0.5, 0.5, 2),
        "refusal_rate/chosen_declines": (0.0, 1.0, 1.0, 1),
        "over_refusal_rate/chosen_answers": (0.0, 0.0, 0.0, 1),
        "over_refusal_rate/safe_swap": (0.0, 1.0, 1.0, 1),
        "answer_length": (3.0, 3.0, 0.0, 2),
        "answers_cut": (0.0, 0.0, 0.0, 2),
    }
    data = {name: (one.value, one.number) for name, one in data_lines(cases()).items()}
    assert data == {"length/chosen": (3.0, 2), "length/rejected": (2.25, 4), "length/blind": (5.0, 1)}


def test_what_there_is_nothing_to_measure_of_is_told_with_why_and_never_0() -> None:
    one = cases()[0]
    assert one.base.fit is not None and one.tuned.fit is not None
    bare = [replace(fit, rejected=(), blind=(), absent=None, divergence=None) for fit in (one.base.fit, one.tuned.fit)]
    case = Case(base=Side(fit=bare[0]), tuned=Side(fit=bare[1]), lengths=((4,), (), ()), declines=False)
    lines = sight_lines([case])
    assert [line.name for line in lines if line.measured] == []
    found = SightFindings(lines=tuple(lines), data=data_lines([case]), num_rows=1, left_out={"tie": 2})
    absent = found.results()["measures"]["rewards/accuracies_blind"]
    assert absent["tuned"] == {"value": None, "low": None, "high": None, "number": 0} and "mmalign blind" in absent["why"]
    text = "\n".join(found.told())
    assert "2 left out: tie" in text and "0.0%" not in text
    assert "not measured: refusal_rate (no answers were asked for: max_new_tokens is 0)" in text
    assert "not measured: rewards/margins_rejected (no row has a rejected answer" in text


# Against the model's own logits


def prompt_of(question: str, *images: Media) -> Content:
    return Content(messages=(Message("user", question, images=images),))


def network_of(family: str, *, blindfolded: bool = False) -> Any:
    """A network of a copy of the tiny model; blindfolded: no token sees another one."""
    model = copy.deepcopy(parts(family)[0])
    if blindfolded:
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight") and "language_model" in name:
                parameter.zero_()
    shown = encoder(family).shown(prompt_of("a", picture(9, 32, 32)))
    return TokenNetwork(model, sight=networks.Sight(model, FAMILIES[family], shown))


def shown_of(family: str, image: Media, answers: Sequence[str], other: Content | None = None) -> Shown:
    conditions = {"own": None, "dropped": Condition(degradation=drop())}
    if other is not None:
        conditions["swapped"] = Condition(degradation=swap(), other=other)
    return Shown.of(
        encoder(family),
        prompt_of("what colour?", image),
        [Content(text=answer) for answer in answers],
        num_rejected=len(answers) - 2,
        absent=True,
        conditions=conditions,
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_gap_and_divergence_are_those_of_the_models_own_logits_in_float64(family: str) -> None:
    answers = ("red", "a blue one", "no", "no disc is there")
    rows = [shown_of(family, picture(number, 40, 50), answers) for number in (0, 1)]
    fits = likelihoods(network_of(family), rows, device=torch.device("cpu"))
    model = copy.deepcopy(parts(family)[0])
    for number, fit in enumerate(fits):
        assert fit is not None and fit.absent is not None and fit.divergence is not None
        lengths = [n for group in lengths_of(rows[number]) for n in group]
        assert len(lengths) == 4 and len(fit.rejected) == 2 and len(fit.blind) == 1
        logits: list[Tensor] = []
        for images in ((picture(number, 40, 50),), ()):
            for answer, count in zip(answers if images else answers[:1], lengths, strict=False):
                told = in_one_go(family, "what colour?", answer, images)
                ids = told["input_ids"][0]
                end = _end(ids, rows[number], answers.index(answer))
                with torch.no_grad():
                    found = model(**told).logits[0, :end]
                want = float(token_logps(found, ids[:end], count).sum())
                got = (fit.chosen, *fit.rejected, *fit.blind)[answers.index(answer)] if images else fit.absent
                assert got == pytest.approx(want, abs=1e-9)
                if answer == answers[0]:
                    logits.append(found[-count - 1 : -1].log_softmax(-1))
        kl = (logits[0].exp() * (logits[0] - logits[1])).sum()
        assert fit.divergence == pytest.approx(float(kl), abs=1e-9) and float(kl) > 1e-3


def _end(ids: Tensor, row: Shown, number: int) -> int:
    """Where the scored tokens of an answer end in what the processor makes of the conversation."""
    assert row.encoded is not None
    own = torch.tensor(row.encoded.continuations[number])
    start = next(n for n in range(len(ids) - len(own), -1, -1) if torch.equal(ids[n : n + len(own)], own))
    return start + len(own)


def test_a_network_that_ignores_the_image_has_no_gap_no_sensitivity_and_agrees_with_itself_blind() -> None:
    other = prompt_of("?", picture(5, 40, 50))
    rows = [shown_of("llava", picture(number, 40, 50), ("red", "blue", "no"), other) for number in (0, 1)]
    agreed = {}
    for blindfolded in (True, False):
        network = network_of("llava", blindfolded=blindfolded)
        tokenizer = parts("llava")[1].tokenizer
        answers = said(network.model, tokenizer, rows, 8)
        fits = likelihoods(network, rows, device=torch.device("cpu"))
        sides = [Side(fit=fit, said=answer) for fit, answer in zip(fits, answers, strict=True)]
        found = sight_lines([Case(base=one, tuned=one, lengths=lengths_of(row)) for one, row in zip(sides, rows, strict=True)])
        agreed[blindfolded] = {line.name: line.tuned.value for line in found if line.tuned is not None}
    names = ("blind_gap", "image_sensitivity", "blind_agreement/dropped", "blind_agreement/swapped")
    assert [agreed[True][name] for name in names] == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-9)
    assert abs(agreed[False]["blind_gap"] or 0) > 1e-3 and (agreed[False]["image_sensitivity"] or 0) > 1e-4
    assert (agreed[False]["blind_agreement/dropped"] or 0) < 1


# Rows


def row(number: int, image: int | None, *answers: str, **known: Any) -> Comparison:
    images = () if image is None else (picture(image),)
    provenance = ({},) * (len(answers) - 1) + ({"source": "blind"},)
    told = {"ranks": tuple(float(n + 1) for n in range(len(answers))), "provenance": provenance} | known
    candidates = tuple(Content(text=answer) for answer in answers)
    return Comparison(id=f"r{number}", prompt=prompt_of(f"what, {number}?", *images), candidates=candidates, **told)


def plan_of(tmp_path: Path, rows: Sequence[Comparison], **settings: Any) -> Any:
    path = write(rows, tmp_path / "rows.parquet")
    known = {"by": "auto", "limit": None, "phrases": ("sorry",), "seed": 0, "safe": None} | settings
    return _planned(read_rows(str(path), None), **known)


def test_which_answer_is_chosen_rejected_and_blind(tmp_path: Path) -> None:
    rows = (
        row(0, 0, "a", "b", "blind"),
        row(1, 1, "worst", SORRY, "middle", "blind", ranks=(3.0, 1.0, 2.0, 1.0)),
        row(2, 2, "a", "b", "blind", ranks=(1.0, 1.0, 2.0)),
        row(3, None, "a", "b", "blind"),
        row(4, 4, "a", "blind", ranks=None),
        row(5, 5, "a", "b", "blind", ranks=None),
    )
    plan = plan_of(tmp_path, rows)
    assert [(e.number, e.chosen, e.rejected, e.blind, e.declines) for e in plan.entries] == [
        (0, 0, (1,), (2,), False),
        (1, 1, (2, 0), (3,), True),
        (2, None, (), (), None),
        (4, 0, (), (1,), False),
        (5, None, (), (), None),
    ]
    assert plan.left_out == {"no image in the prompt": 1}
    assert plan.notes == ("2 rows have no one best answer: their greedy answers alone are measured",)
    with pytest.raises(UserError, match=r"got no row to show an image of \(no image in the prompt: 1\)"):
        plan_of(tmp_path, rows[3:4])


def test_a_swapped_image_is_another_rows_and_another_one(tmp_path: Path) -> None:
    images = (0, 0, 0, 1, 2)
    rows = [row(n, image, SORRY if n < 3 else "yes", "no", "blind") for n, image in enumerate(images)]
    seen = set()
    for seed in range(8):
        plan = plan_of(tmp_path, rows, seed=seed)
        for entry, image in zip(plan.entries, images, strict=True):
            other = plan.swapped(entry)
            assert picture(image).key() not in [media.key() for media in other.media()]
            seen.add((entry.number, other.words()))
            safe = plan.benign(entry)
            assert (safe is None) == (entry.number > 2), "only rows whose chosen answer declines are asked with a safe image"
            assert safe is None or safe.words() in ("what, 3?", "what, 4?")
    assert {words for number, words in seen if number == 0} == {"what, 3?", "what, 4?"}, "the seed tells which"
    same = plan_of(tmp_path, rows[:3])
    assert [same.swapped(entry) for entry in same.entries] == [None] * 3
    assert [same.benign(entry) for entry in same.entries] == [None] * 3


def test_safe_images_of_a_folder_are_shown_in_the_place_of_the_rows_own(tmp_path: Path) -> None:
    folder = tmp_path / "safe"
    folder.mkdir()
    with pytest.raises(UserError, match=r"safe_images: got .*, where there is no image"):
        plan_of(tmp_path, [row(0, 0, SORRY, "no", "blind")], safe=str(folder))
    (folder / "meadow.png").write_bytes(picture(7).read())
    plan = plan_of(tmp_path, [row(0, 0, SORRY, "no", "blind"), row(1, 1, "yes", "no", "blind")], safe=str(folder))
    assert [media.key() for media in plan.benign(plan.entries[0]).media()] == [picture(7).key()]
    assert plan.benign(plan.entries[1]) is None


# A run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    loud = {"steps": 3, "checkpoint_every": 3, "optimiser": {"learning_rate": 0.05}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return {
            "lora": train_seen(folder / "lora", adapter={"max_response_length": 8}, training=loud),
            "full": train_seen(folder / "full", adapter={"lora": None}, training=loud),
        }


def marks(run: Path, tmp_path: Path, *words: str, path: Path | None = None) -> dict[str, Any]:
    output = tmp_path / "sight.json"
    rows = ["exam.data.name=comparisons", f"exam.data.path={rows_file()}"] if path is None else [f"exam.path={path}"]
    settings = [f"exam.run={run}", *rows, "exam.max_new_tokens=5", "exam.device=cpu"]
    assert mmalign(["exam", "exam.name=sight", *settings, *words, f"output={output}"]) == 0
    found: dict[str, Any] = json.loads(output.read_text())["marks"]
    return found


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_command_tells_what_images_do_to_a_run_beside_its_base(
    kind: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = marks(runs[kind], tmp_path)
    measures = found["measures"]
    assert found["num_rows"] == 7 and found["left_out"] == {"no image in the prompt": 1}
    cut = ["some answers of the data are cut at the run's max_response_length"]
    assert found["notes"] == (cut if kind == "lora" else [])
    told = capsys.readouterr().out
    assert "blind_gap, nats" in told and "not measured: refusal_rate/chosen_declines (no chosen answer declines)" in told
    for name in ("blind_gap", "image_sensitivity", "rewards/accuracies_blind", "blind_agreement/swapped", "answer_length"):
        assert measures[name]["tuned"]["number"] == 7
    assert measures["over_refusal_rate/safe_swap"]["tuned"]["number"] == 0
    data = Data(importer=Table(IMPORTERS).choose("comparisons", path=str(rows_file("pairs"))))
    fit = pair_fit(runs[kind], data, device="cpu")
    seeing = measures["rewards/accuracies_rejected"]["tuned"]
    assert fit.num_draws == 1 and fit.accuracy.num_pairs == 8 and seeing["number"] == 7
    assert abs(fit.accuracy.rate * 8 - seeing["value"] * 7) <= 1, "the row of text alone is the pair more"


def test_the_last_checkpoint_of_a_run_is_measured_as_its_result_whatever_the_batches(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    few = ["exam.max_new_tokens=0", "exam.limit=3"]
    whole = marks(runs["lora"], tmp_path, *few)["measures"]
    again = marks(runs["lora"] / "checkpoint-3", tmp_path, *few, "exam.batch_size=2")["measures"]
    for name in ("blind_gap", "image_sensitivity", "rewards/margins_rejected"):
        assert again[name]["tuned"]["value"] == pytest.approx(whole[name]["tuned"]["value"], abs=2e-5)
    assert again["blind_gap"]["base"]["value"] == pytest.approx(whole["blind_gap"]["base"]["value"], abs=2e-5)


def test_base_and_tuned_are_told_apart_and_a_limit_and_no_answers_are_kept_to(runs: dict[str, Path], tmp_path: Path) -> None:
    some = ["exam.max_new_tokens=0", "exam.limit=4"]
    found = {kind: marks(run, tmp_path, *some, path=rows_file()) for kind, run in runs.items()}
    assert {one["num_rows"] for one in found.values()} == {4}
    gaps = {kind: one["measures"]["blind_gap"] for kind, one in found.items()}
    assert gaps["lora"]["base"]["value"] == pytest.approx(gaps["full"]["base"]["value"], abs=1e-4), "the base is the same"
    assert abs(gaps["lora"]["change"]["value"]) > 1e-3
    assert found["lora"]["measures"]["refusal_rate"]["why"] == "no answers were asked for: max_new_tokens is 0"


def test_the_exam_takes_runs_of_models_that_see_and_rows_with_images(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "sight" in EXAMS
    with pytest.raises(UserError, match="data: got both or neither of path and data"):
        sight(run=str(runs["lora"]))
    with pytest.raises(UserError, match=r"run: got .*, want the output folder"):
        sight(run=str(tmp_path), path=str(rows_file()))
    text = (runs["lora"] / "config.yaml").read_text().replace("name: image_text", "name: text")
    other = tmp_path / "text"
    other.mkdir()
    keys = ("processor", "degradation", "tower", "projector", "as_video", "num_frames", "features")
    lines = [line for line in text.splitlines() if line.strip().split(":")[0] not in keys]
    (other / "config.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="a run of adapter text, want one of adapter image_text"):
        sight(run=str(other), path=str(rows_file()))
    with pytest.raises(UserError, match="batch_size, max_new_tokens, limit: got 0"):
        sight(run=str(runs["lora"]), path=str(rows_file()), batch_size=0)


def test_a_run_tells_the_gap_where_its_loss_measures_it() -> None:
    losses, rewards, logps = torch.zeros(2), torch.zeros(2, 2), torch.tensor([[-2.0, -3.0], [-4.0, -4.0]])
    absent, lengths = torch.tensor([[-5.0, -1.0], [-4.0, -9.0]]), torch.tensor([[6.0, 1.0], [2.0, 1.0]])
    for name, told in (("each_absent", "blind_gap"), ("each_degraded", "degraded_gap"), ("degraded", "degraded_gap")):
        values = absent[:, :1] if name == "degraded" else absent
        sums = preference_metrics(losses, rewards, {"logps": logps, name: values}, lengths=lengths)
        found = averages(sums, table(sums).tolist())
        assert (found[f"{told}/chosen"], found[f"{told}/per_token"]) == (1.5, 0.25)
    assert not [name for name in preference_metrics(losses, rewards, {"logps": logps}) if "gap" in name]
