"""Answers that a chat template does not write as they are: counted, and told once."""

import logging
from typing import Any

import pytest
from text_tokenizers import TEMPLATES, tokenizer_of

from mmalign.adapters.text_lengths import length_note
from mmalign.language.chat import Encoder
from mmalign.records import Content, Example, Message, Sample

PROMPT = Content(messages=(Message(role="user", text="two plus two"),))
THOUGHT = Message(role="assistant", text="<think>two and two</think>\n\nfour")
BESIDE = Message(role="assistant", text="four", extra={"reasoning_content": "two and two"})
PLAIN = Message(role="assistant", text="  four ")
CHATML = str(TEMPLATES["chatml"])
STRIPPED = CHATML.replace("m['content'] }}", "(m['content'] or '').split('</think>')[-1] | trim }}")
SPACED = CHATML.replace("m['content'] }}", "(m['content'] or '').replace('</think>', '\\n</think>') | trim }}")
WRITTEN = CHATML.replace("{{ m['content'] }}", "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' + m['content'] }}")


@pytest.mark.parametrize(
    ("template", "answer", "changed"),
    [
        (CHATML, THOUGHT, 0),
        (STRIPPED, THOUGHT, 1),
        (SPACED, THOUGHT, 0),
        (STRIPPED, PLAIN, 0),
        (CHATML, BESIDE, 1),
        (WRITTEN, BESIDE, 0),
    ],
)
def test_answers_that_lose_words_are_counted_and_others_are_not(template: str, answer: Message, changed: int) -> None:
    encoded = Encoder(tokenizer=tokenizer(template))([sample(answer), sample(Message(role="assistant", text="eight"))])
    assert encoded.changed == changed


def test_they_are_told_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Example(id=str(n), samples=(sample(THOUGHT), sample(PLAIN))) for n in range(3)]
    with caplog.at_level(logging.WARNING):
        length_note(Encoder(tokenizer=tokenizer(CHATML)), rows)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        length_note(Encoder(tokenizer=tokenizer(STRIPPED)), rows)
    assert caplog.text.count("leaves something out of 3 of 6 answers") == len(caplog.records) == 1


def tokenizer(template: str) -> Any:
    found = tokenizer_of("chatml")
    found.chat_template = template
    return found


def sample(answer: Message) -> Sample:
    return Sample(prompt=PROMPT, completion=Content(messages=(answer,)))
