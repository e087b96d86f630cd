"""`mmalign rank`: merged lists, phi from the wins of an ensemble, what is left out and why, and expert images."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.experiment import Data, read_examples
from mmalign.rank import RankConfig, Ranked, main
from mmalign.records import (
    Comparison,
    Content,
    Examples,
    Media,
    Message,
    best,
    comparison,
    pair,
    preference_scores,
    ranked,
    read,
    write,
)
from mmalign.records.verdicts import PHI

GOLDEN = np.load(Path(__file__).parent / "golden" / "rankdpo_scores.npz")
JUDGES = tuple(f"judge{number}" for number in range(5))


def image(folder: Path, name: str, grey: int) -> Content:
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), grey, dtype=np.uint8)).save(path)
    return Content(images=(Media(path=str(path)),))


def row(folder: Path, name: str, prompt: str, **scores: tuple[float, ...]) -> Comparison:
    k = len(next(iter(scores.values())))
    return Comparison(
        id=name,
        prompt=Content(text=prompt),
        candidates=tuple(image(folder, f"{name}{n}", (hash((name, n)) % 251)) for n in range(k)),
        scores=scores,
        provenance=tuple({"generator": name[0], "seed": 10 * n} for n in range(k)),
    )


def rank(*settings: str) -> Ranked:
    return main(read_config(RankConfig, None, list(settings)))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(one) for one in read(path)]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Three prompts of four images and five reward models: the arrays of tests/golden."""
    scores = GOLDEN["reward_scores"]
    rows = [
        row(tmp_path, f"g{n}", f"prompt {n}", **{judge: tuple(scores[m, n]) for m, judge in enumerate(JUDGES)})
        for n in range(3)
    ]
    return write(rows, tmp_path / "golden.jsonl")


def test_phi_and_the_wins_behind_it_are_the_golden_numbers(golden: Path, tmp_path: Path) -> None:
    made = rows_of(rank(f"data={golden}", f"output={tmp_path / 'out.jsonl'}").output)
    for n, one in enumerate(made):
        assert one.scores[PHI] == pytest.approx(GOLDEN["phi_from_scores"][n], abs=1e-12)
        for m, judge in enumerate(JUDGES):
            assert one.scores[judge] == tuple(GOLDEN["reward_scores"][m, n]), "raw scores are kept"
            assert 3 * np.array(preference_scores([one.scores[judge]])) == pytest.approx(GOLDEN["wins"][m, n])
        assert one.ranks == tuple(1.0 + sum(o > p for o in one.scores[PHI]) for p in one.scores[PHI])
    assert made[0].ranks == (4.0, 3.0, 2.0, 1.0)
    assert made[1].ranks == (1.0, 2.0, 2.0, 4.0), "equal is a tie"


def test_the_ranked_view_takes_phi_as_it_stands_and_never_as_one_more_judge(golden: Path, tmp_path: Path) -> None:
    whole = rank(f"data={golden}", f"output={tmp_path / 'whole.jsonl'}").output
    by_one = rank(f"data={golden}", "rank_by=judge3", f"output={tmp_path / 'one.jsonl'}").output
    for n, (before, all_five, one) in enumerate(zip(rows_of(golden), rows_of(whole), rows_of(by_one), strict=True)):
        phi = sorted(GOLDEN["phi_from_scores"][n], reverse=True)
        for seen in (ranked(before), ranked(all_five), ranked(all_five, by=PHI)):
            assert seen[0].side["scores"] == pytest.approx(phi, abs=1e-12)
        assert ranked(one)[0].side["scores"] == pytest.approx([1, 2 / 3, 1 / 3, 0])
        order = np.argsort(-GOLDEN["reward_scores"][3, n])
        assert [s.completion for s in ranked(one)[0].samples] == [one.candidates[i] for i in order]
    # A judge more in the same row would move phi, were it counted.
    with_phi = replace(rows_of(whole)[2], scores={**rows_of(whole)[2].scores})
    assert preference_scores(list(with_phi.scores.values())) != pytest.approx(with_phi.scores[PHI])


def test_judges_that_are_not_named_do_not_count_and_stay_in_the_row(golden: Path, tmp_path: Path) -> None:
    result = rank(f"data={golden}", "judges=[judge0, judge2]", f"output={tmp_path / 'out.jsonl'}")
    assert result.judges == ("judge0", "judge2")
    wins = GOLDEN["wins"]
    for n, one in enumerate(rows_of(result.output)):
        assert one.scores[PHI] == pytest.approx((wins[0, n] + wins[2, n]) / 6)
        assert set(one.scores) == {*JUDGES, PHI}


@pytest.fixture
def generators(tmp_path: Path) -> list[Path]:
    """Two generators on the same prompts in another order; one prompt is of the second alone."""
    first = [row(tmp_path, "a0", "a cat", x=(1.0, 4.0), y=(1.0, 2.0)), row(tmp_path, "a1", "a dog", x=(5.0, 1.0), y=(0.0, 1.0))]
    second = [
        row(tmp_path, "b0", "a dog", x=(2.0, 3.0), y=(3.0, 4.0)),
        row(tmp_path, "b1", "a fox", x=(1.0, 2.0), y=(2.0, 1.0)),
        row(tmp_path, "b2", "a cat", x=(3.0, 2.0), y=(5.0, 0.0)),
    ]
    return [write(first, tmp_path / "first.jsonl"), write(second, tmp_path / "second.parquet")]


def test_rows_of_one_prompt_become_one_list_with_everything_that_was_known(generators: list[Path], tmp_path: Path) -> None:
    before = [one for path in generators for one in rows_of(path)]
    result = rank(f"data={json.dumps([str(p) for p in generators])}", f"output={tmp_path / 'out.parquet'}")
    cat, dog = rows_of(result.output)
    assert (result.num_rows, result.num_written, dict(result.dropped)) == (5, 2, {"all candidates tie": 1})
    assert (cat.prompt.text, dog.prompt.text) == ("a cat", "a dog")
    assert (cat.scores["x"], cat.scores["y"]) == ((1.0, 4.0, 3.0, 2.0), (1.0, 2.0, 5.0, 0.0))
    assert [(p["generator"], p["seed"]) for p in cat.provenance] == [("a", 0), ("a", 10), ("b", 0), ("b", 10)]
    wanted = [*before[0].candidates, *before[4].candidates]
    assert [c.images[0].read() for c in cat.candidates] == [c.images[0].read() for c in wanted]
    # x: 1 < 2 < 3 < 4 and y: 0 < 1 < 2 < 5 give the wins 0+1, 3+2, 2+3, 1+0 of 6.
    assert cat.scores[PHI] == pytest.approx((1 / 6, 5 / 6, 5 / 6, 1 / 6))
    assert cat.ranks == (3.0, 1.0, 1.0, 3.0)
    assert len({cat.id, dog.id, *(one.id for one in before)}) == 7


def test_repeated_prompts_of_a_file_are_one_list_or_kept_apart(tmp_path: Path) -> None:
    files = [
        write([row(tmp_path, f"{name}{n}", "a cat", x=(float(n), 2.5)) for n in range(2)], tmp_path / f"{name}.jsonl")
        for name in "ab"
    ]
    data = f"data={json.dumps([str(p) for p in files])}"
    (together,) = rows_of(rank(data, f"output={tmp_path / 'one.jsonl'}").output)
    assert together.scores["x"] == (0.0, 2.5, 1.0, 2.5, 0.0, 2.5, 1.0, 2.5)
    apart = rows_of(rank(data, "merge=nth", f"output={tmp_path / 'two.jsonl'}").output)
    assert [one.scores["x"] for one in apart] == [(0.0, 2.5, 0.0, 2.5), (1.0, 2.5, 1.0, 2.5)]
    assert [[p["generator"] for p in one.provenance] for one in apart] == [["a", "a", "b", "b"]] * 2


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.tar", "out"])
def test_the_same_command_writes_the_same_bytes_and_reads_its_own_output(
    generators: list[Path], tmp_path: Path, name: str
) -> None:
    settings = (f"data={json.dumps([str(p) for p in generators])}", f"output={tmp_path / name}")
    made = rows_of(rank(*settings).output)

    def contents() -> dict[str, bytes]:
        kept = [p for p in tmp_path.rglob("*") if p.is_file() and "ranking" not in p.name and p.name != "state.json"]
        return {str(p): p.read_bytes() for p in kept}

    first = contents()
    rank(*settings)
    if name != "out.tar":  # a tar keeps the time of writing
        assert contents() == first
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    again = rank(f"data={tmp_path / name}", f"output={tmp_path / 'again.jsonl'}")
    assert again.judges == ("x", "y"), "phi is no judge of the second run either"
    assert [replace(one, id="") for one in rows_of(again.output)] == [
        replace(one, id="", candidates=twin.candidates) for one, twin in zip(made, rows_of(again.output), strict=True)
    ]
    assert [one.id for one in rows_of(again.output)] == [one.id for one in made]


def test_thinning_in_rank_is_thinning_in_the_view(golden: Path, tmp_path: Path) -> None:
    rank(f"data={golden}", f"output={tmp_path / 'whole.jsonl'}")
    thin = rank(f"data={golden}", "num_candidates=3", f"output={tmp_path / 'thin.jsonl'}").output
    for one, other in zip(rows_of(tmp_path / "whole.jsonl"), rows_of(thin), strict=True):
        assert len(other.candidates) == 3
        assert [p["seed"] for p in other.provenance] == sorted(p["seed"] for p in other.provenance), "in the order made"
        assert ranked(one, num_candidates=3) == ranked(other)


def test_what_is_left_out_is_counted_by_reason(generators: list[Path], tmp_path: Path) -> None:
    tied = row(tmp_path, "t0", "a tie", x=(1.0, 1.0), y=(2.0, 2.0))
    file = write([tied, *rows_of(generators[0])], tmp_path / "more.jsonl")
    data = f"data={json.dumps([str(file), str(generators[1])])}"
    result = rank(data, "num_candidates=4", f"output={tmp_path / 'out.jsonl'}")
    assert dict(result.dropped) == {"all candidates tie": 2}, "x and y disagree about the fox"
    by_x = rank(data, "rank_by=x", "num_candidates=4", f"output={tmp_path / 'out.jsonl'}")
    assert dict(by_x.dropped) == {"all candidates tie": 1, "2 candidates, want 4": 1}
    assert "1 left out: 2 candidates, want 4" in str(by_x)
    wide = rank(data, "rank_by=x", "min_gap=3.5", f"output={tmp_path / 'out.jsonl'}")
    assert dict(wide.dropped) == {"best and worst differ by less than 3.5": 2, "all candidates tie": 1}
    assert [one.prompt.text for one in rows_of(wide.output)] == ["a dog"]
    told = json.loads(wide.report.read_text())
    assert (told["num_written"], told["config"]["min_gap"], told["dropped"]) == (1, 3.5, dict(wide.dropped))


def test_only_ties_are_refused(tmp_path: Path) -> None:
    data = write([row(tmp_path, "t0", "a tie", x=(1.0, 1.0))], tmp_path / "ties.jsonl")
    with pytest.raises(UserError, match=r"no row that can be ranked \(all candidates tie: 1\)"):
        rank(f"data={data}", f"output={tmp_path / 'out.jsonl'}")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_that_a_judge_has_not_judged_is_named_with_the_judge(generators: list[Path], tmp_path: Path) -> None:
    short = replace(rows_of(generators[0])[1], scores={"x": (1.0, 2.0)})
    file = write([rows_of(generators[0])[0], short], tmp_path / "short.jsonl")
    with pytest.raises(UserError, match=r"short\.jsonl:2: got no score by y, want every candidate judged by x, y"):
        rank(f"data={json.dumps([str(file), str(generators[1])])}", f"output={tmp_path / 'out.jsonl'}")
    assert rank(f"data={file}", "judges=[x]", f"output={tmp_path / 'out.jsonl'}").num_written == 2


def test_nan_scores_and_lists_of_one_are_counted_with_their_rows_and_left_out(generators: list[Path], tmp_path: Path) -> None:
    lines = generators[0].read_text().splitlines()
    alone, spoilt = json.loads(lines[0]), json.loads(lines[1])
    alone |= {"id": "alone", "candidates": alone["candidates"][:1], "provenance": [], "scores": {"x": [1.0], "y": [1.0]}}
    spoilt |= {"id": "spoilt", "scores": {"x": [1.0, float("nan")], "y": [1.0, 2.0]}}
    generators[0].write_text("\n".join([lines[0], json.dumps(alone), json.dumps(spoilt), lines[1]]) + "\n")
    result = rank(f"data={generators[0]}", "rank_by=x", f"output={tmp_path / 'out.jsonl'}")
    assert [fault.where for fault in result.faults] == [f"{generators[0]}:2", f"{generators[0]}:3"]
    assert "got 1 candidate, want at least 2" in str(result)
    assert "got scores of x (1.0, nan), want finite numbers" in str(result)
    assert result.num_written == 2
    generators[0].write_text(json.dumps(spoilt) + "\n")
    with pytest.raises(UserError, match=r"no usable row.*\n.*first\.jsonl:1: got scores of x \(1\.0, nan\)"):
        rank(f"data={generators[0]}", f"output={tmp_path / 'none.jsonl'}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["judges=[z]"], "judges: got z, want some of x, y"),
        (["rank_by=xx"], r"judges: got xx, want some of x, y\. Did you mean x\?"),
        (["judges=[x]", "rank_by=y"], "rank_by: got y, want ensemble or one of x"),
        (["judges=[phi]"], "phi is what rank makes"),
        (["min_gap=-1"], "min_gap: got -1"),
        (["num_candidates=1"], "num_candidates: got 1"),
        (["select.judge=x", "min_gap=1"], "Remove them"),
        (["select.judge=x", "select.count=0"], "count: got 0, want 1 or more"),
        (["select.judge=phi"], "want a scorer's name"),
    ],
)
def test_faults_of_the_settings_are_told(generators: list[Path], tmp_path: Path, settings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        rank(f"data={generators[0]}", f"output={tmp_path / 'out.jsonl'}", *settings)
    assert not (tmp_path / "out.jsonl").exists()


def test_data_without_scores_and_outputs_over_data_are_refused(generators: list[Path], tmp_path: Path) -> None:
    plain = write([replace(one, scores={}) for one in rows_of(generators[0])], tmp_path / "plain.jsonl")
    with pytest.raises(UserError, match=r"plain\.jsonl:1: got no scores.*mmalign score"):
        rank(f"data={plain}", f"output={tmp_path / 'out.jsonl'}")
    with pytest.raises(UserError, match="want a place outside the data"):
        rank(f"data={plain}", f"output={plain}")
    with pytest.raises(UserError, match="one of them twice"):
        rank(f"data=[{plain}, {tmp_path}/./plain.jsonl]", f"output={tmp_path / 'out.jsonl'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        rank(f"data={generators[0]}", f"output={tmp_path / 'full'}")
    assert (tmp_path / "full" / "letter.txt").read_text() == "keep me"


def experts_of(path: Path) -> list[bytes]:
    data = read_config(Data, None, ["importer.name=comparisons", f"importer.path={path}", "view=best"])
    examples, _ = read_examples(data)
    return [example.samples[0].completion.images[0].read() for example in examples]


def test_experts_are_the_top_images_of_a_judge_over_all_prompts(generators: list[Path], tmp_path: Path) -> None:
    data = f"data={json.dumps([str(p) for p in generators])}"
    result = rank(data, "select={judge: x, count: 3}", f"output={tmp_path / 'experts.parquet'}")
    a, b = rows_of(generators[0]), rows_of(generators[1])
    wanted = [a[1].candidates[0], a[0].candidates[1], b[0].candidates[1]]  # x = 5, 4, and the first of two 3s by prompt ...
    wanted[2] = b[2].candidates[0]  # ... which is the cat's: its prompt came first
    assert experts_of(result.output) == [c.images[0].read() for c in wanted]
    assert "3 experts" in str(result) and "data.view=best" in str(result)
    for one in rows_of(result.output):
        assert PHI not in one.scores and one.ranks is not None and sorted(one.ranks) == [1.0, 2.0, 2.0, 2.0]
        assert len(best(one)) == 1


def test_experts_can_be_chosen_within_each_prompt_and_too_few_are_told(generators: list[Path], tmp_path: Path) -> None:
    data = f"data={json.dumps([str(p) for p in generators])}"
    result = rank(data, "select={judge: y, count: 1, per: prompt}", f"output={tmp_path / 'one.jsonl'}")
    a, b = rows_of(generators[0]), rows_of(generators[1])
    wanted = [b[2].candidates[0], b[0].candidates[1], b[1].candidates[0]]
    assert experts_of(result.output) == [c.images[0].read() for c in wanted]
    assert [one.prompt.text for one in rows_of(result.output)] == ["a cat", "a dog", "a fox"]
    all_there_are = rank(data, "select.judge=y", f"output={tmp_path / 'all.jsonl'}")
    assert (all_there_are.num_written, all_there_are.missing) == (10, 490)
    assert "490 fewer experts than asked for" in str(all_there_are)
    assert len(a) == 2


def test_the_same_prompt_text_with_another_source_image_is_another_prompt(tmp_path: Path) -> None:
    rows = [row(tmp_path, f"e{n}", "make it red", x=(1.0, 2.0 + n)) for n in range(3)]
    sources = [image(tmp_path, "s0", 10), image(tmp_path, "s1", 200), image(tmp_path, "s2", 10)]
    edits = [replace(r, prompt=replace(s, text="make it red")) for r, s in zip(rows, sources, strict=True)]
    made = rows_of(rank(f"data={write(edits, tmp_path / 'edits.parquet')}", f"output={tmp_path / 'out.parquet'}").output)
    assert [one.scores["x"] for one in made] == [(1.0, 2.0, 1.0, 4.0), (1.0, 3.0)]


def test_ranked_data_serve_every_other_view(golden: Path, tmp_path: Path) -> None:
    table = read(rank(f"data={golden}", f"output={tmp_path / 'out.jsonl'}").output)
    assert len(Examples(table, pair)) == 3
    (example,) = Examples(table.select([0]), best)
    assert example.samples[0].completion == rows_of(golden)[0].candidates[3]
    assert len(Examples(table, partial(pair, by=PHI, min_gap=0.3))) == 1, "phi spans 0.33, 0.27 and 0.27"


def test_rank_from_the_command_line_takes_several_files(
    generators: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(generators[0]), str(generators[1]), "--judges", "x", "--output", str(tmp_path / "out.jsonl")]
    assert command_line(RankConfig, main, words) == 0
    told = capsys.readouterr().out
    assert "5 rows, judged by x: 3 ranked lists" in told
    assert "data.view=ranked" in told
    assert command_line(RankConfig, main, [*words, "--rank-by", "z"]) == 2


def test_answers_to_one_conversation_are_one_list_and_to_others_not(tmp_path: Path) -> None:
    def said(role: str, text: str) -> Content:
        return Content(messages=(Message(role, text),))

    def answers(name: str, question: str, low: float, **more: str) -> Comparison:
        candidates = (said("assistant", f"{name} a"), said("assistant", f"{name} b"))
        return Comparison(id=name, prompt=said("user", question), candidates=candidates, scores={"x": (low, low + 1)}, **more)

    rows = [
        answers("r1", "one?", 0.0),
        answers("r2", "two?", 0.0),
        answers("r3", "one?", 5.0),
        answers("r4", "one?", 0.0, prefix="so"),
    ]
    data = write(rows, tmp_path / "rows.jsonl")
    made = rows_of(rank(f"data={data}", f"output={tmp_path / 'out.jsonl'}").output)
    assert [[c.words() for c in one.candidates] for one in made] == [
        ["r1 a", "r1 b", "r3 a", "r3 b"],
        ["r2 a", "r2 b"],
        ["r4 a", "r4 b"],
    ]


def test_joint_rows_keep_the_prompt_of_each_candidate(tmp_path: Path) -> None:
    prompts = (Content(text="p1"), Content(text="p2"))
    candidates = (Content(text="a1"), Content(text="a2"))
    row = Comparison(id="j", prompt=prompts[0], prompts=prompts, candidates=candidates, scores={"x": (0.0, 1.0)})
    data = write([row], tmp_path / "rows.jsonl")
    (made,) = rows_of(rank(f"data={data}", f"output={tmp_path / 'out.jsonl'}").output)
    assert [(p.text, c.text) for p, c in zip(made.prompts or (), made.candidates, strict=True)] == [("p1", "a1"), ("p2", "a2")]


@pytest.mark.parametrize("judges", [[], [(1.0,)], [(1.0, 2.0), (1.0, 2.0, 3.0)], [(1.0, float("nan"))]])
def test_wins_of_nothing_to_compare_are_refused(judges):
    with pytest.raises(ValueError, match=r"preference_scores: got .*, want two or more numbers of each judge"):
        preference_scores(judges)
