"""`mmalign select`: every filter by hand-worked rows, and the command on files."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.cli import main as mmalign
from mmalign.config import read_config
from mmalign.curation.filters import FILTERS
from mmalign.errors import UserError
from mmalign.experiment import Data, read_examples
from mmalign.records import Comparison, Content, Message, comparison, read, write
from mmalign.row_files import Curated
from mmalign.select import SelectConfig, main


def row(name: str, prompt: str, first: str = "aaaa", second: str = "bb", **more: Any) -> Comparison:
    candidates = (Content(text=first), Content(text=second))
    return Comparison(id=name, prompt=Content(text=prompt), candidates=candidates, **{"ranks": (1.0, 2.0), **more})


def kept(filter: str, rows: list[Comparison], **settings: Any) -> list[str]:
    reasons = FILTERS[filter](rows, **settings)
    assert len(reasons) == len(rows)
    return [one.id for one, reason in zip(rows, reasons, strict=True) if reason is None]


def select(*settings: str) -> Curated:
    return main(read_config(SelectConfig, None, list(settings)))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(one) for one in read(path)]


SCORED = [
    row("a", "p", scores={"rm": (1.0, 9.0)}),
    row("b", "q", scores={"rm": (5.0, 4.0)}),
    row("c", "r", scores={"rm": (2.0, 2.5)}),
    row("d", "s"),
]


@pytest.mark.parametrize(("of", "best"), [("best", "a"), ("worst", "b"), ("chosen", "b"), ("gap", "a"), ("mean", "a")])
def test_the_top_share_is_by_the_number_that_is_asked_for(of: str, best: str) -> None:
    assert kept("top", SCORED, by="rm", share=0.34, of=of) == [best]


def test_the_lowest_share_and_rows_without_a_score() -> None:
    assert kept("top", SCORED, by="rm", share=0.34, lowest=True) == ["c"]
    assert FILTERS["top"](SCORED, by="rm", share=1.0)[3] == "not judged by rm"


def test_davir_keeps_what_is_learnt_most() -> None:
    rows = [
        row("half", "p", scores={"base": (-10.0, -1.0), "tuned": (-5.0, -1.0)}),
        row("much", "q", scores={"base": (-1.0, -10.0), "tuned": (-1.0, -1.0)}, ranks=(2.0, 1.0)),
        row("none", "r", scores={"base": (-100.0, -1.0), "tuned": (-90.0, -1.0)}),
        row("sure", "s", scores={"base": (0.0, -1.0), "tuned": (0.0, -1.0)}),
        row("lack", "t", scores={"base": (-1.0, -1.0)}),
        row("tied", "u", scores={"base": (-1.0, -1.0), "tuned": (-1.0, -1.0)}, ranks=(1.0, 1.0)),
    ]
    assert kept("davir", rows, base="base", tuned="tuned", share=0.67) == ["half", "much"]
    reasons = FILTERS["davir"](rows, base="base", tuned="tuned", share=0.34)
    assert reasons == [
        "not of the most learnable 0.34",
        None,
        "not of the most learnable 0.34",
        "base is not below 0: nothing is left to learn",
        "no tuned",
        "tie",
    ]


def test_gaps_are_in_the_judges_units() -> None:
    assert kept("min_gap", SCORED, by="rm", gap=1.0) == ["a", "b"]


def test_lengths_may_differ_by_a_ratio() -> None:
    rows = [row("even", "p", "aaaa", "bbbb"), row("twice", "q"), row("thrice", "r", "aaaaaa", "bb")]
    assert kept("length_ratio", rows, ratio=2.0) == ["even", "twice"]
    talk = Content(messages=(Message("assistant", "a" * 9), Message("user", "go on"), Message("assistant", "b" * 9)))
    assert kept("length_ratio", [Comparison(id="t", prompt=Content(text="p"), candidates=(talk, Content(text="c")))]) == []
    with pytest.raises(UserError, match="ratio: got 0.5, want 1 or more"):  # noqa: RUF043
        kept("length_ratio", rows, ratio=0.5)


def test_prompts_that_differ_in_case_and_blanks_are_one() -> None:
    talk = Content(messages=(Message("user", "What  is\nthis?"),))
    rows = [row("a", "What is this?"), row("b", "what is  this? "), row("c", "What is that?")]
    rows += [Comparison(id="d", prompt=talk, candidates=rows[0].candidates)]
    assert kept("distinct_prompts", rows) == ["a", "c"]
    assert kept("distinct_prompts", rows, per_prompt=2) == ["a", "b", "c"]


def test_pairs_that_dpo_cannot_rank_go_or_are_looked_at() -> None:
    rows = [  # log(a / (1 - a)) / beta is log 3 / 0.1 = 10.986
        row("easy", "p", scores={"ref": (-5.0, -15.9)}),
        row("just", "q", scores={"ref": (-15.9, -5.0)}),
        row("hard", "r", scores={"ref": (-16.0, -5.0)}),
        row("soft", "s", scores={"ref": (-11.0, -5.0)}, prob=0.6),
    ]
    assert kept("rankable", rows, reference="ref") == ["easy", "just"]
    assert kept("rankable", rows, reference="ref", hard=True) == ["hard", "soft"]
    with pytest.raises(UserError, match="no scores by reff"):
        kept("rankable", rows, reference="reff")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        row("a", "Say hi", scores={"rm": (1.0, 0.0)}, provenance=({"model": "x"}, {"model": "y"})),
        row("b", "say HI", scores={"rm": (9.0, 0.0)}),
        row("c", "Add", scores={"rm": (5.0, 0.0)}),
        row("d", "Multiply", scores={"rm": (0.5, 0.0)}),
    ]
    return write(rows, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_command_keeps_rows_filter_by_filter(data: Path, tmp_path: Path, ending: str) -> None:
    output = tmp_path / "out" / f"kept.{ending}"
    filters = "filters=[{name: distinct_prompts}, {name: top, by: rm, share: 0.67}]"
    made = select(f"path={data}", filters, f"output={output}")
    rows = rows_of(output)
    assert [one.id for one in rows] == ["a", "c"], "b went with the first filter, d with the second"
    assert rows[0].provenance == tuple(
        {"model": model, "curation": [{"select": ["distinct_prompts", "top"], "from": f"{data}:1"}]} for model in "xy"
    )
    assert rows[1].scores == {"rm": (5.0, 0.0)} and rows[1].ranks == (1.0, 2.0)
    assert dict(made.dropped) == {"more than 1 of its prompt": 1, "not of the highest 0.67 by rm": 1}
    assert "4 rows: 2 kept" in str(made) and f"data.importer.path={output}" in str(made)
    report = json.loads(made.report.read_text())
    assert report["num_rows"] == 4 and report["config"]["filters"][1]["share"] == 0.67
    before = output.read_bytes()
    select(f"path={data}", filters, f"output={output}")
    assert output.read_bytes() == before, "the same command writes the same bytes"


def test_what_select_writes_is_trained_on_as_pairs(data: Path, tmp_path: Path) -> None:
    select(f"path={data}", "filters.name=min_gap", "filters.by=rm", "filters.gap=1", f"output={tmp_path / 'kept.jsonl'}")
    named = ["importer.name=comparisons", f"importer.path={tmp_path / 'kept.jsonl'}", "view=pair", "view.by=ranks"]
    examples, _ = read_examples(read_config(Data, None, named))
    assert [one.samples[0].completion.text for one in examples] == ["aaaa"] * 3


def test_a_dry_run_counts_and_writes_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = data.with_name("kept.jsonl")
    code = mmalign(["select", str(data), "filters.name=distinct_prompts", f"output={output}", "--dry-run"])
    assert code == 0
    assert f"{output}: 3 rows, not written (dry run)" in capsys.readouterr().out
    assert [path.name for path in data.parent.iterdir()] == [data.name]


def test_an_importers_rows_are_selected_too(tmp_path: Path) -> None:
    (tmp_path / "hh.jsonl").write_text(
        "".join(
            json.dumps(
                {"chosen": f"\n\nHuman: {prompt}\n\nAssistant: good", "rejected": f"\n\nHuman: {prompt}\n\nAssistant: no"}
            )
            + "\n"
            for prompt in ("One?", "one?", "Two?")
        )
    )
    made = select(
        "data.name=hh_rlhf",
        f"data.path={tmp_path / 'hh.jsonl'}",
        "filters.name=distinct_prompts",
        f"output={tmp_path / 'o.parquet'}",
    )
    assert made.num_written == 2
    assert [one.prompt.words() for one in rows_of(tmp_path / "o.parquet")] == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["filters.name=min_gap", "filters.by=rmm", "filters.gap=1"], "got no scores by rmm.*Did you mean rm"),
        (["filters.name=min_gap", "filters.by=rm", "filters.gap=99"], "every row was left out .gap below 99 by rm: 4"),
        (["filters.name=top", "filters.by=rm", "filters.share=2"], "share: got 2, want above 0"),
        (["filters=[]"], "filters: got none"),
        (["filters.name=tops"], "Did you mean top"),
    ],
)
def test_select_says_what_it_cannot_do(data: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(f"path={data}", *settings, f"output={data.with_name('o.jsonl')}")
    assert not data.with_name("o.jsonl").exists()


def test_the_data_are_never_written_over(data: Path) -> None:
    with pytest.raises(UserError, match="want a place outside the data"):
        select(f"path={data}", "filters.name=distinct_prompts", f"output={data}")
    with pytest.raises(UserError, match="got both or neither of path and data"):
        select("filters.name=distinct_prompts", f"output={data.with_name('o.jsonl')}")
