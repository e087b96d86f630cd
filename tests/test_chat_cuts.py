"""Conversations that are too long: what of them stays is a conversation still."""

from typing import Any

import pytest
from text_tokenizers import tokenizer_of

from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.records import Content, Message, Sample

TURNS = (("user", "name a colour"), ("assistant", "blue"), ("user", "two plus two is four and four plus four"))
OPENED = {"chatml": "<|im_start|>{}\n", "llama": "<|turn|>{}\n\n"}
CLOSED = {"chatml": "<|im_end|>\n", "llama": "</s>"}


def prompt(*turns: tuple[str, str]) -> Content:
    return Content(messages=tuple(Message(role=role, text=words) for role, words in turns))


def lengths(tokenizer: Any, content: Content) -> int:
    return len(Encoder(tokenizer=tokenizer).prompt(content))


@pytest.mark.parametrize("template", ["chatml", "llama"])
@pytest.mark.parametrize("begins", [False, True])
def test_at_every_limit_what_stays_begins_with_a_whole_header(template: str, begins: bool) -> None:
    tokenizer = tokenizer_of(template, begins=begins)
    whole = lengths(tokenizer, prompt(*TURNS))
    least = lengths(tokenizer, prompt(("user", "four"))) + 1
    start = "<s>" if template == "llama" else ""
    for limit in range(least, whole + 1):
        encoder = Encoder(tokenizer=tokenizer, max_prompt_length=limit)
        ids = encoder.prompt(prompt(*TURNS))
        kept = tokenizer.decode(ids)
        assert len(ids) <= limit
        assert any(kept.startswith(start + OPENED[template].format(role)) for role in ("user", "assistant")), kept
        assert kept.count("<s>") == (template == "llama")
        assert kept.endswith("plus four" + CLOSED[template] + OPENED[template].format("assistant")), kept
        answered = encoder([Sample(prompt=prompt(*TURNS), completion=Content(text="is eight"))])
        assert list(answered.contexts[0]) == ids
        assert answered.cut_prompts == (limit < whole)


def test_within_a_message_every_token_of_the_limit_is_used() -> None:
    tokenizer = tokenizer_of("chatml")
    limit = lengths(tokenizer, prompt(TURNS[-1])) - 2
    ids = Encoder(tokenizer=tokenizer, max_prompt_length=limit).prompt(prompt(*TURNS))
    assert len(ids) == limit
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n")


def test_a_limit_that_leaves_no_words_of_the_last_message_is_refused() -> None:
    tokenizer = tokenizer_of("chatml")
    for limit in range(2, lengths(tokenizer, prompt(("user", "four")))):
        with pytest.raises(UserError, match=rf"whose last message adapter\.max_prompt_length \({limit}\) leaves no words"):
            Encoder(tokenizer=tokenizer, max_prompt_length=limit).prompt(prompt(*TURNS))


def test_a_call_of_a_tool_goes_or_stays_as_a_whole() -> None:
    tokenizer = tokenizer_of("chatml")
    call = Message(role="assistant", tool_calls=({"type": "function", "function": {"name": "add", "arguments": {}}},))
    messages = (Message(role="user", text="two plus two"), call, Message(role="tool", text="four"))
    content = Content(messages=messages)
    for limit in range(lengths(tokenizer, prompt(("tool", "four"))), lengths(tokenizer, content)):
        kept = tokenizer.decode(Encoder(tokenizer=tokenizer, max_prompt_length=limit).prompt(content))
        assert ("<call>" in kept) == ("</call>" in kept) and kept.startswith("<|im_start|>")
        assert ("<call>" in kept) == ("<|im_start|>assistant\n<call>" in kept)
