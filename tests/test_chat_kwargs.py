"""`chat_template_kwargs`: what a chat template is given by names of its own, in training and when the tuned model answers."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from text_runs import model_folder, pairs_file, train_text
from text_tokenizers import TEMPLATES, tokenizer_of

from mmalign.adapters.text import TextAdapter
from mmalign.answer import AnswerConfig
from mmalign.answerers import completed, opened_encoder
from mmalign.errors import UserError
from mmalign.importers.trl import trl
from mmalign.language.chat import Encoder
from mmalign.records import Content, Message, Sample

DATED = "{% if date is defined %}<|im_start|>system\nit is {{ date }}<|im_end|>\n{% endif %}" + str(TEMPLATES["chatml"])
BEGINNING = "<|im_start|>system\nit is Monday<|im_end|>\n<|im_start|>user\nname a colour"
PROMPT = Content(messages=(Message(role="user", text="name a colour"),))
TURN = [{"role": "user", "content": "name a colour"}]


def dated(**kwargs: Any) -> Encoder:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = DATED
    return Encoder(tokenizer=tokenizer, template_kwargs=kwargs)


def test_the_template_is_given_them_with_and_without_an_answer() -> None:
    encoder = dated(date="Monday")
    encoded = encoder([Sample(prompt=PROMPT, completion=Content(text="blue"))])
    assert encoder.tokenizer.decode(encoded.contexts[0]).startswith(BEGINNING)
    assert encoder.prompt(PROMPT) == list(encoded.contexts[0])
    assert not dated().tokenizer.decode(dated().prompt(PROMPT)).startswith("<|im_start|>system")


@pytest.mark.parametrize(("name", "fault"), [("dat", "does not read"), ("tools", "the data decide")])
def test_names_that_the_template_does_not_read_or_the_data_decide_are_refused(name: str, fault: str) -> None:
    with pytest.raises(UserError, match=rf"adapter\.chat_template_kwargs: got {name}, which .*{fault}"):
        dated(**{name: "Monday"})


def test_a_run_is_trained_with_them_and_its_model_answers_with_them(tmp_path: Path) -> None:
    more = {"chat_template": DATED, "chat_template_kwargs": {"date": "Monday"}, "model": str(model_folder(template="chatml"))}
    data = {"importer": {"name": "trl", "path": str(pairs_file(chats=True))}}
    run = train_text(tmp_path / "run", adapter={**more, "lora": {"rank": 2}}, data=data, training={"steps": 1})
    assert TextAdapter(**more).open().prompt_ids(PROMPT) == dated(date="Monday").prompt(PROMPT)
    (answerer,) = AnswerConfig(tuned=str(run), prompts=("name a colour",), output=tmp_path / "out").answerers
    assert opened_encoder(completed(answerer)).prompt(PROMPT) == dated(date="Monday").prompt(PROMPT)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([{"date": "Monday"}] * 2, "Set adapter.chat_template_kwargs to {'date': 'Monday'}, as the first 2 rows have"),
        ([{"date": "Monday"}, {"date": "Friday"}], "the rows differ in it"),
    ],
)
def test_a_column_of_them_is_told_with_what_to_set(
    values: list[Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": TURN, **sides, "chat_template_kwargs": value} for value in values]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with caplog.at_level(logging.WARNING):
        trl(path=str(tmp_path / "rows.parquet"))
    assert told in caplog.text
