"""`chat_template_kwargs`: what a chat template is given by names of its own, in training and when the tuned model answers."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from text_runs import model_folder, pairs_file, train_text
from text_tokenizers import TEMPLATES, tokenizer_of

from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_reward import TextRewardAdapter
from mmalign.answer import AnswerConfig
from mmalign.answerers import completed, opened_encoder
from mmalign.errors import UserError
from mmalign.importers.trl import trl
from mmalign.language.chat import Encoder
from mmalign.records import Content, Examples, Message, Sample, comparison, pair, read, write
from mmalign.scorers.text_reward import text_reward

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


def rows_file(path: Path, *given: dict[str, Any] | None) -> Path:
    """Pairs on one prompt, each with what it gives the chat template."""
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    Dataset.from_list([{"prompt": TURN, **sides, "chat_template_kwargs": one} for one in given]).to_parquet(path)
    return path


def test_each_row_of_trl_gives_the_template_its_own_and_leaves_the_adapters_to_the_others(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.parquet", {"date": "Monday"}, None, {"date": "Friday"})
    examples = Examples(trl(path=str(path)).dataset, pair)
    encoder = dated(date="Sunday")
    prompts = [encoder.tokenizer.decode(encoder(one.samples).contexts[0]) for one in examples]
    assert [text.split("<|im_end|>")[0].split()[-1] for text in prompts] == ["Monday", "Sunday", "Friday"]
    assert [encoder.tokenizer.decode(encoder.prompt(one.samples[0].prompt)) for one in examples] == prompts


def test_rows_that_give_other_things_are_other_contexts_and_other_data(tmp_path: Path) -> None:
    monday, friday = (trl(path=str(rows_file(tmp_path / f"{day}.parquet", {"date": day}))) for day in ("Monday", "Friday"))
    assert Examples(monday.dataset, pair).fingerprint != Examples(friday.dataset, pair).fingerprint
    samples = [Examples(table.dataset, pair)[0].samples[0] for table in (monday, friday)]
    assert len(dated()(samples).contexts) == 2


def test_a_row_may_not_give_what_its_conversation_decides(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.parquet", {"add_generation_prompt": True})
    (example,) = Examples(trl(path=str(path)).dataset, pair)
    with pytest.raises(UserError, match="chat_template_kwargs: got add_generation_prompt in a row"):
        dated()(example.samples)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.tar"])
def test_what_a_row_gives_is_kept_in_every_format_of_ours(name: str, tmp_path: Path) -> None:
    row = comparison(trl(path=str(rows_file(tmp_path / "trl.parquet", {"date": "Monday", "deep": {"a": [1]}}))).dataset[0])
    (again,) = [comparison(one) for one in read(write([row], tmp_path / name))]
    assert again.prompt == row.prompt and again.prompt.template_kwargs == {"date": "Monday", "deep": {"a": [1]}}


def test_a_reward_model_is_trained_and_asked_with_them(tmp_path: Path) -> None:
    given = {"chat_template_kwargs": {"date": "Monday"}}
    adapter = {"name": "text_reward", "model": str(model_folder(template="chatml")), "chat_template": DATED, **given}
    data = {"importer": {"name": "trl", "path": str(pairs_file(chats=True))}}
    run = train_text(tmp_path / "run", adapter=adapter, data=data, loss={"name": "bradley_terry"}, training={"steps": 1})
    (seen,) = (
        TextRewardAdapter(**{name: value for name, value in adapter.items() if name != "name"})
        .open()
        .reader.encoder([Sample(prompt=PROMPT, completion=Content(text="blue"))])
        .contexts
    )
    scorer = text_reward(model=str(run), **given)
    ids, asked = scorer.reader("name a colour", "blue")
    assert tuple(ids[:asked]) == seen and scorer.reader.tokenizer.decode(ids).startswith(BEGINNING)
    assert text_reward(model=str(run))(["name a colour"], ["blue"]) != scorer(["name a colour"], ["blue"])
