"""What the dashboard says of real votes, the plots it draws of them, and the blind win rate of before and after training."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
from annotation_ballots import ballot, votes_on
from annotation_votes import cast, encoded, images, judged_project, opened, protocol, saying, texts

from mmalign.annotate import AnnotateConfig, _data, _project
from mmalign.annotation.before_after import blind_win_rate, comparisons_of
from mmalign.annotation.dashboard import Dashboard, as_csv, dashboard, save
from mmalign.annotation.export import Settings, export
from mmalign.annotation.selection import in_random_slice
from mmalign.annotation.store import Store
from mmalign.annotation.tally import ballots_of, dashboard_of, select, source_of
from mmalign.apps.intake import Intake
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Media, write
from mmalign.statistics import wilson_interval

A, B, TIE, BAD, SKIP = (saying(choice) for choice in ("a", "b", "tie", "both_bad", "skip"))
HOSTILE = '<script>alert("1")</script>'


def test_votes_are_tallied_in_the_order_of_the_data_whatever_the_sides_were(tmp_path: Path) -> None:
    rows = [texts(n) for n in range(8)]
    store, project = judged_project(tmp_path, rows, [[saying("b", strength=2)] * 8], strength=True)
    found = ballots_of(store, project)
    assert {(one.choice, one.ranks, one.strength) for one in found} == {("b", (2.0, 1.0), 2.0)}
    assert {one.order for one in found} == {(0, 1), (1, 0)}
    assert {(one.sources, one.lengths) for one in found} == {(("model 0", "model 1"), (1, 3))}


def test_an_undone_vote_counts_once_with_what_was_said_last(tmp_path: Path) -> None:
    store, project = judged_project(tmp_path, [texts(0), texts(1)], [[A, A]])
    [who] = store.accounts()
    assert store.undo(project, who.id) is not None
    cast(store, project, who.id, BAD)
    assert [one.choice for one in ballots_of(store, project)] == ["a", "both_bad"]
    assert dashboard_of(store, project).num_votes == 2


def test_practice_is_no_data(tmp_path: Path) -> None:
    store = opened(tmp_path)
    project = store.create_project("trial", "text", protocol(calibration=2)).id
    store.add(project, [texts(n, ranks=(1.0, 2.0)) for n in range(10, 12)], role="calibration")
    store.add(project, [texts(n) for n in range(2)])
    who = store.add_account("p").id
    for _ in range(4):
        cast(store, project, who, A)
    assert len(store.votes(project)) == 4
    assert len(ballots_of(store, project)) == 2


def test_the_dashboard_counts_what_was_cast(tmp_path: Path) -> None:
    votes = [[A, B, TIE, BAD, SKIP], [A, A, TIE, BAD, SKIP], [A, B, B, TIE, A]]
    store, project = judged_project(tmp_path, [texts(n) for n in range(5)], votes)
    found = dashboard_of(store, project, num_resamples=20)
    assert (found.num_items, found.num_judged, found.num_overlapping, found.num_votes) == (5, 5, 4, 15)
    assert dict(found.counts) == {"a": 5, "b": 3, "tie": 3, "both_bad": 2, "skip": 2}
    assert found.raw is not None and found.raw.value == pytest.approx((3 + 1 + 1 + 1) / 12)
    assert found.left is not None and found.left.total == 8
    assert found.longer is not None and (found.longer.count, found.longer.total) == (3, 8)
    assert [one.source for one in found.standings] == ["model 0", "model 1"]
    assert {name: (one.votes, one.skips) for name, one in found.raters.items()} == {
        "person 0": (5, 1),
        "person 1": (5, 1),
        "person 2": (5, 0),
    }
    assert dict(found.dropped) == {"all candidates bad": 1}
    assert found.on_random is None


def test_what_is_saved_can_be_read_by_other_programs(tmp_path: Path) -> None:
    cast_votes = [one for n in range(12) for one in votes_on(n, "aab", sources=(HOSTILE, "plain"))]
    folder = save(dashboard(cast_votes, num_items=20, num_resamples=10), tmp_path / "out")
    told = json.loads((folder / "dashboard.json").read_text())
    assert told["num_votes"] == 36 and told["standings"][0]["source"] == HOSTILE
    [first, _] = csv.DictReader(io.StringIO((folder / "ranking.csv").read_text()))
    assert first["source"] == HOSTILE and float(first["win rate"]) == pytest.approx(2 / 3)
    for name in ("choices", "agreement", "bias", "raters", "ranking"):
        image = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert image.tag.endswith("svg") and not [one for one in image.iter() if one.tag.endswith("script")]


def test_an_empty_project_has_a_dashboard_without_numbers() -> None:
    found = dashboard([], num_items=3)
    assert found.raw is None and found.left is None and found.standings == [] and found.raters == {}
    assert set(found.plots()) == {"choices"} and found.tables()["agreement"] == []
    assert json.loads(found.to_json())["num_judged"] == 0


def test_a_text_that_a_spreadsheet_would_run_is_quoted() -> None:
    assert as_csv([{"name": "=cmd()", "value": -1.5}]) == "name,value\n'=cmd(),-1.5\n"


def test_where_votes_chose_items_the_random_slice_is_told_apart(tmp_path: Path) -> None:
    rows = [texts(n) for n in range(30)]
    store = opened(tmp_path)
    project = store.create_project("trial", "text", protocol(votes_per_item=2, random_share=0.4)).id
    store.add(project, rows)
    people = [store.add_account(f"p{n}").id for n in range(2)]
    for number in range(10):
        cast(store, project, people[0], A if number % 2 else B)
    chosen = select(store, project, most=15)
    assert 0 < chosen <= 15
    for _ in range(20):
        cast(store, project, people[1], A)
    votes = [vote for vote in store.votes(project) if vote.kind == "active"]
    assert votes and not any(in_random_slice(str(vote.item), random_share=0.4, seed=project) for vote in votes)
    whole = dashboard_of(store, project, num_resamples=10)
    assert whole.on_random is not None and 0 < whole.on_random.num_votes < whole.num_votes


def test_the_maker_of_a_candidate_is_what_tells_it_from_others() -> None:
    assert source_of({"source": "after", "model": "m"}) == "after"
    assert source_of({"generator": "m", "model": "m", "lora": "runs/x"}) == "runs/x"
    assert source_of({"generator": "fast", "model": "m"}) == "fast"
    assert source_of({"seed": 3}) == ""


def made(folder: Path, name: str, rows: Sequence[Comparison]) -> Path:
    return write(rows, folder / f"{name}.jsonl")


def test_two_output_folders_become_pairs_by_prompt_and_seed(tmp_path: Path) -> None:
    def side(words: str, order: Sequence[int]) -> list[Comparison]:
        seeds = tuple({"model": words, "seed": seed} for seed in order)
        return [texts(n, answers=[f" {words} {n} {seed}" for seed in order], provenance=seeds, ranks=None) for n in range(2)]

    before, after = made(tmp_path, "before", side("old", (7, 8))), made(tmp_path, "after", side("new", (8, 7)))
    pairs = list(comparisons_of(before, after))
    said = [tuple(content.text for content in pair.candidates) for pair in pairs]
    assert said == [(f" old {n} {seed}", f" new {n} {seed}") for n in range(2) for seed in (7, 8)]
    assert [origin["source"] for origin in pairs[0].provenance] == ["before", "after"]
    with pytest.raises(UserError, match="want one to pair it by"):
        list(comparisons_of(before, made(tmp_path, "seedless", [texts(0)])))
    with pytest.raises(UserError, match="got nothing for 2 of 4"):
        list(comparisons_of(before, made(tmp_path, "few", side("new", (7, 8))[:1])))
    with pytest.raises(UserError, match="again, want it once"):
        list(comparisons_of(before, made(tmp_path, "twice", side("new", (7, 7)))))


def test_a_trained_model_is_judged_blind_and_its_win_rate_told_with_an_interval(tmp_path: Path) -> None:
    def side(number: int) -> list[Comparison]:
        return [
            Comparison(
                id=f"{n}",
                prompt=Content(text=f"a red {n}"),
                candidates=(Content(images=(Media(data=encoded(100 * number + n)),)),),
                provenance=({"model": "m", "seed": n},),
            )
            for n in range(6)
        ]

    pairs = comparisons_of(made(tmp_path, "before", side(1)), made(tmp_path, "after", side(2)))
    store, project = judged_project(tmp_path, list(pairs), [[B, B, B, A, TIE, BAD], [B, B, A, A, TIE, SKIP]], kind="image")
    rate = blind_win_rate(ballots_of(store, project))
    assert rate is not None
    assert (rate.wins, rate.losses, rate.ties) == (2, 1, 3)  # split, tied and bad items are ties
    assert (rate.rate, (rate.low, rate.high)) == (pytest.approx(3.5 / 6), pytest.approx(wilson_interval(3.5, 6)))
    whole = dashboard_of(store, project, num_resamples=5)
    assert whole.blind == rate and "after training" in whole.plots()["blind"]


def test_the_verb_opens_two_folders_as_one_blind_project(tmp_path: Path) -> None:
    def side(words: str) -> list[Comparison]:
        return [texts(n, answers=[f" {words} {n}"], provenance=({"model": "m", "seed": n},)) for n in range(3)]

    before, after = made(tmp_path, "base", side("old")), made(tmp_path, "tuned", side("new"))
    database = str(tmp_path / "votes.db")
    config = AnnotateConfig(what=("text", str(before)), after=str(after), store=database)
    store = Store.open(database)
    project = _project(store, config, _data(config))
    assert project is not None and project.name == "tuned"
    Intake(store, project.id, _data(config)).begin(20.0)
    assert store.progress(project.id).items == 3
    shown = store.take(project.id, store.add_account("p").id)
    assert shown is not None and "source" not in repr(shown) and "before" not in repr(shown)
    with pytest.raises(UserError, match="want both"):
        _data(AnnotateConfig(what=("text",), after=str(after), store=database))


def test_other_projects_have_no_blind_win_rate(tmp_path: Path) -> None:
    store, project = judged_project(tmp_path, [images(0)], [[A]], kind="image")
    found: Dashboard = dashboard_of(store, project, num_resamples=5)
    assert found.blind is None and blind_win_rate(ballots_of(store, project)) is None
    assert blind_win_rate([ballot(1, "p", "a", sources=("after", "before"))]).rate == 1.0  # type: ignore[union-attr]


def test_gold_and_repeats_tell_of_people_and_count_nowhere_else(tmp_path: Path) -> None:
    store = opened(tmp_path)
    checks = protocol(gold_share=0.25, repeat_share=0.25, repeat_gap=2, votes_per_item=2, calibration=1)
    project = store.create_project("trial", "text", checks).id
    store.add(project, [texts(90, ranks=(2.0, 1.0))], role="calibration")
    store.add(project, [texts(n, ranks=(2.0, 1.0)) for n in range(60, 70)], role="gold")
    store.add(project, [texts(n) for n in range(12)])
    for number, says in enumerate((A, B)):
        who = store.add_account(f"p{number}").id
        while store.take(project, who) is not None:
            cast(store, project, who, says)
    ballots = ballots_of(store, project)
    plain = [one for one in ballots if not one.repeat and one.right is None]
    assert len(plain) == 24 and len(ballots) > 30
    found, expected = dashboard(ballots, num_resamples=20), dashboard(plain, num_resamples=20)
    assert (found.num_checks, found.num_votes) == (len(ballots) - 24, len(ballots))
    for name in ("counts", "raw", "alpha_nominal", "alpha_ordinal", "fleiss", "cohen", "left", "longer", "standings", "skills"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.counts == {"a": 12, "b": 12} and (found.num_judged, found.num_overlapping) == (12, 12)
    assert found.raters["p0"].gold is not None and found.raters["p0"].gold.rate == 0.0
    assert found.raters["p1"].gold is not None and found.raters["p1"].gold.rate == 1.0
    card = (export(store, project, tmp_path / "out", Settings(format="comparisons")).folder / "README.md").read_text()
    assert "| votes | 24 |" in card and "| votes by choice | a 12, b 12 |" in card
    assert f"on items that came back | {len(ballots) - 24} |" in card
