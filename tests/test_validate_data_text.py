import json

import pytest

from mmalign.config import command_line, read_config
from mmalign.validate_data import ValidateDataConfig, main

QUESTION, OTHER = "How many apples are there in all?", "What is the capital of Norway today?"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def of(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def report_of(tmp_path, *rows, **settings):
    """The report on rows in TRL's format."""
    path = write(tmp_path / "rows.jsonl", *rows)
    overrides = ["data.name=trl", f"data.path={path}", *(f"{name}={value}" for name, value in settings.items())]
    return main(read_config(ValidateDataConfig, None, overrides))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rows_of(places):
    return [int(place.split(".jsonl:")[1].split(":")[0]) for place in places]


GOOD = of(QUESTION, "There are five of them.", "Six.")


def test_good_texts_are_good(tmp_path):
    report = report_of(tmp_path, GOOD, of([user(OTHER)], [assistant("Oslo.")], [assistant("Bergen, I think.")]))
    assert report.texts.num_rows == 2 and not report.texts.concerns()
    assert "texts             nothing found" in str(report) and str(report).endswith("Good.")


def test_equal_sides_are_counted_and_located(tmp_path):
    same = of([user(OTHER)], [assistant("Oslo.")], [assistant("Oslo.")])
    report = report_of(tmp_path, GOOD, of(QUESTION, "Five.", "Five."), same, {"prompt": OTHER, "completions": ["a", "b", "a"]})
    assert rows_of(report.texts.equal_sides) == [2, 3, 4]
    assert report.texts.equal_sides[2].endswith("candidates 1 and 3 are equal") and report.same_image == []
    assert report.texts.equal_sides[0] in str(report) and "Usable, but look at the rows with equal sides." in str(report)


def test_joint_pairs_with_one_answer_to_two_prompts_are_not_equal_sides(tmp_path):
    row = {"chosen": {"prompt": QUESTION, "completion": "Five."}, "rejected": {"prompt": OTHER, "completion": "Five."}}
    assert not report_of(tmp_path, row).texts.equal_sides


def test_empty_completions_are_broken_rows_and_counted_apart(tmp_path):
    report = report_of(tmp_path, GOOD, of(QUESTION, "Five.", " "), {"chosen": "same", "rejected": "same"})
    assert rows_of(fault.where for fault in report.faults) == [2, 3]
    assert "empty answers     2 of the broken rows" in str(report)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("<|im_start|>user\nhi<|im_end|>", "ChatML"),
        ("[INST] hi [/INST]", "Llama 2 or Mistral"),
        ("\n\nHuman: hi\n\nAssistant:", "Human and Assistant"),
        ("Human: hi", "Human and Assistant"),
        ("<|start_header_id|>user<|end_header_id|>", "Llama 3"),
        ("<start_of_turn>user", "Gemma"),
        ("### Instruction:\nhi", "Alpaca"),
    ],
)
def test_text_that_went_through_a_template_is_told_with_its_kind(tmp_path, text, kind):
    rows = [of(text, "Yes.", "No."), of([user(QUESTION)], [assistant("Yes.")], [assistant(text)]), GOOD]
    report = report_of(tmp_path, *rows)
    assert {name: rows_of(places) for name, places in report.texts.marks.items()} == {kind: [1, 2]}
    assert "in the prompt" in report.texts.marks[kind][0] and "in candidate 2" in report.texts.marks[kind][1]


def test_talk_of_humans_inside_a_sentence_is_no_template(tmp_path):
    row = of("Is it true what they say about the Human: Nature festival?", "Yes, Assistant: no.", "No.")
    assert not report_of(tmp_path, row).texts.marks


def test_marks_of_the_beginning_and_end_of_a_text_are_told(tmp_path):
    rows = [of(QUESTION, "Five.</s>", "Six."), of("<s>How many?", "Five.", "Six."), of(OTHER, "Oslo.<|endoftext|>", "Bergen.")]
    html = of("What does <s>this</s> tag do in HTML?", "It strikes <s>text</s> out.", "Nothing.")
    assert rows_of(report_of(tmp_path, *rows, html).texts.ends) == [1, 2, 3]


def test_marks_are_found_in_prefixes_and_rationales_too(tmp_path):
    rows = [{**GOOD, "prefix": "Step 1. [INST]"}, {**GOOD, "rationale": "because [INST]"}]
    (places,) = report_of(tmp_path, *rows).texts.marks.values()
    assert [place.rpartition(" in ")[2] for place in places] == ["the prefix", "rationale"]


def test_the_share_of_longer_chosen_answers_is_counted_in_words(tmp_path):
    rows = [of(QUESTION, "one two three", "one"), of(OTHER, "one", "one two"), of("Why is it so, then?", "one", "two"),
            of("And who did that?", "one two", "one", prob=0.2), of("Tied, or is it?", "one two", "one", prob=0.5)]  # fmt: skip
    report = report_of(tmp_path, *rows)
    assert report.texts.lengths == [(3, 1), (1, 2), (1, 1), (1, 2)]
    line = "the chosen is longer in 1 of 4 pairs (25.0 %), as long in 1; on average 1.5 against 1.5 words"
    assert f"length bias       {line}" in str(report)


def test_lists_count_each_pair_that_their_scores_decide(tmp_path):
    report = report_of(tmp_path, {"prompt": QUESTION, "completions": ["a", "b b", "c c c"], "scores": [2, 1, 1]})
    assert sorted(report.texts.lengths) == [(1, 2), (1, 3)]


def test_a_tokenizer_counts_tokens_and_names_what_its_template_does_not_write(tmp_path):
    rows = [of([user("hi")], [assistant("abc")], [assistant("a [INST]")]), of("p q", "abc", "a<|endoftext|>")]
    report = report_of(tmp_path, *rows, tokenizer="tiny")
    ends = 2  # its own mark and the line break after it
    assert report.texts.lengths == [(3 + ends, 8 + ends), (4, 2)]
    assert report.texts.marks["Llama 2 or Mistral"][0].endswith("which the tokenizer's template does not write")
    assert "tokens" in str(report) and not report.texts.not_prefix


def test_a_prompt_whose_tokens_an_answer_changes_is_told(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<e>", "a", "b", "c", "ab", "?"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>").save_pretrained(tmp_path / "tokenizer")
    rows = [of("ca", "b", "c"), of("c", "a", "b")]
    report = report_of(tmp_path, *rows, tokenizer=tmp_path / "tokenizer")
    (place,) = report.texts.not_prefix
    assert rows_of([place]) == [1] and place.endswith("the last 1 of 2 tokens change before candidate 1")


def test_conversations_without_a_template_are_told_row_by_row(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="?").save_pretrained(tmp_path / "tokenizer")
    rows = [of([user(OTHER)], [assistant("Oslo.")], [assistant("Bergen.")])]
    report = report_of(tmp_path, *rows, tokenizer=tmp_path / "tokenizer")
    assert "the tokenizer has none" in report.texts.not_prefix[0]


def test_a_tokenizer_that_is_not_there_is_one_clear_error(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "candidates": ["a", "b"], "ranks": [1, 2]})
    assert command_line(ValidateDataConfig, main, [str(path), "--tokenizer", str(tmp_path / "gone")]) == 2
    assert "validate-data: tokenizer: cannot open" in capsys.readouterr().err


def test_answers_that_hold_turns_of_the_user_or_the_prompt_again_are_told(tmp_path):
    early = {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("x")]}
    again = of(QUESTION, f"{QUESTION} There are five.", "Six.")
    short = of("Hi", "Hi there!", "Go away.")
    report = report_of(tmp_path, early, again, short)
    assert (rows_of(report.texts.user_turns), rows_of(report.texts.said_twice)) == ([1], [2])


def test_prompts_of_the_test_set_are_found_whatever_their_case_and_blanks(tmp_path):
    test = write(tmp_path / "test.jsonl", of("how many  APPLES are there in all?", "a", "b"), of("Another one.", "a", "b"))
    report = report_of(
        tmp_path, GOOD, of([user(QUESTION)], [assistant("a")], [assistant("b")]), of(OTHER, "a", "b"), against=test
    )
    assert rows_of(report.texts.also_there) == [1, 2] and report.texts.also_there[0].endswith(f"as {test}:1")
    assert report.repeated_prompts == 1
    assert "2 rows with a prompt of the other data" in str(report)


def test_two_splits_of_a_data_set_are_compared(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"train": [GOOD, of(OTHER, "a", "b")], "test": [of(OTHER, "c", "d")]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "data")
    overrides = ["data.name=trl", f"data.path={tmp_path / 'data'}", "against_split=test"]
    report = main(read_config(ValidateDataConfig, None, overrides))
    assert [place.rpartition(": as ")[2] for place in report.texts.also_there] == [f"{tmp_path / 'data'} (test):1"]


def test_our_own_files_are_compared_by_path(tmp_path, capsys):
    row = {"prompt": QUESTION, "candidates": ["a", "b"], "ranks": [1, 2]}
    train, test = write(tmp_path / "train.jsonl", row), write(tmp_path / "test.jsonl", {**row, "prompt": OTHER}, row)
    assert command_line(ValidateDataConfig, main, [str(train), "--against", str(test)]) == 0
    assert f"{train}:1: as {test}:2" in capsys.readouterr().out


def test_an_importer_without_splits_cannot_be_asked_for_another_one(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n")
    given = ["data.name=prompts", f"data.path={tmp_path / 'p.txt'}", "against_split=test"]
    assert command_line(ValidateDataConfig, main, given) == 2
    assert "got another split for prompts, which has none" in capsys.readouterr().err


def test_images_alone_have_no_text_findings(tmp_path):
    from PIL import Image

    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    row = {"prompt": "a cat", "candidates": [{"image": "a.png"}, {"image": "b.png"}], "ranks": [1, 2]}
    report = main(ValidateDataConfig(path=str(write(tmp_path / "x.jsonl", row))))
    assert report.texts.num_rows == 0 and "texts" not in str(report) and "length bias" not in str(report)
