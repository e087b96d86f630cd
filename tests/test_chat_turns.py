"""Answers of several messages: what users and tools say in them is read by the model, and never scored."""

from typing import Any

import pytest
import torch
from text_tokenizers import TEMPLATES, tokenizer_of

from mmalign.adapters.text_tokens import mismatched_of, tokens_of
from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder
from mmalign.records import Content, Message, Sample

QUESTION = Content(messages=(Message(role="user", text="name a colour"),))
DIALOGUE = (("assistant", "blue"), ("user", "in French"), ("assistant", "bleu"))
# Like Qwen 3's: reasoning is written in the last turn alone, an empty one too.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' }}{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answer(*turns: tuple[str, str]) -> Sample:
    return Sample(prompt=QUESTION, completion=Content(messages=tuple(Message(role=r, text=words) for r, words in turns)))


def scored(tokenizer: Any, encoded: Encoded, number: int = 0) -> str:
    ids = encoded.continuations[number]
    return "".join(tokenizer.decode([ids[place]]) for place in encoded.scored[number])


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        ("chatml", DIALOGUE, "blue<|im_end|>\nbleu<|im_end|>\n"),
        ("llama", DIALOGUE, "blue</s>bleu</s>"),
        ("gemma", DIALOGUE, "blue<|im_end|>\nbleu<|im_end|>\n"),
        ("chatml", (*DIALOGUE, ("user", "and cats")), "blue<|im_end|>\nbleu<|im_end|>\n"),
        (
            "chatml",
            (("assistant", "blue"), ("tool", "4"), ("tool", "8"), ("assistant", "red")),
            "blue<|im_end|>\nred<|im_end|>\n",
        ),
    ],
)
def test_only_the_assistants_turns_are_scored(template: str, turns: Any, expected: str) -> None:
    tokenizer = tokenizer_of(template)
    encoded = Encoder(tokenizer=tokenizer)([answer(*turns), answer(("assistant", "red"))])
    assert scored(tokenizer, encoded) == expected
    assert encoded.lengths == tuple(len(places) for places in encoded.scored)
    assert "French" in tokenizer.decode(encoded.continuations[0]) or template == "chatml"


def test_a_template_that_drops_earlier_reasoning_is_followed_by_the_words_of_each_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = REASONING
    encoded = Encoder(tokenizer=tokenizer)([answer(*DIALOGUE)])
    assert scored(tokenizer, encoded) == "blue<|im_end|>\n<think></think>bleu<|im_end|>\n"


def test_a_template_whose_turns_cannot_be_told_apart_is_refused() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "{{ m['content'] }}", "{{ messages | length }}{{ m['content'] | upper }}"
    )
    with pytest.raises(UserError, match=r"adapter\.chat_template: it writes .* otherwise once the conversation goes on"):
        Encoder(tokenizer=tokenizer)([answer(*DIALOGUE)])


def test_an_answer_in_which_the_assistant_has_no_part_is_refused() -> None:
    with pytest.raises(UserError, match="got an answer of user and tool, want the assistant's"):
        Encoder(tokenizer=tokenizer_of("chatml"))([answer(("user", "no"), ("tool", "4"))])


def test_an_answer_whose_limit_leaves_nothing_of_the_assistants_is_refused() -> None:
    encoder = Encoder(tokenizer=tokenizer_of("chatml"), max_response_length=2)
    with pytest.raises(UserError, match=r"says nothing within adapter\.max_response_length"):
        encoder([answer(("user", "no"), ("assistant", "blue"))])


def test_a_limit_within_a_users_turn_keeps_what_was_said_before_it() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = Encoder(tokenizer=tokenizer)([answer(*DIALOGUE)])
    cut = Encoder(tokenizer=tokenizer, max_response_length=whole.others[0][2] + 1)([answer(*DIALOGUE)])
    assert scored(tokenizer, cut) == "blue<|im_end|>\n"
    assert cut.cut_responses == 1


@pytest.mark.parametrize("wanted", [frozenset[str](), frozenset({"joint"}), frozenset({"shared"})])
def test_their_tokens_weigh_nothing_whatever_is_measured(wanted: frozenset[str]) -> None:
    encoded = Encoder(tokenizer=tokenizer_of("chatml"))([answer(*DIALOGUE), answer(("assistant", "red"))])
    tokens = tokens_of([encoded], 2, wanted=wanted)
    assert tokens.scored().tolist() == [float(n) for n in encoded.lengths]
    assert tokens.weights is not None
    assert tokens.weights[0].nonzero()[:, 0].tolist() == list(encoded.scored[0])
    if tokens.heads is not None:  # as many scored tokens as the shorter answer has
        assert [int(w[:head].sum()) for w, head in zip(tokens.weights, tokens.heads, strict=True)] == [encoded.lengths[1]] * 2


def test_told_weights_go_to_scored_tokens_and_differences_begin_at_the_first_one() -> None:
    other = (*DIALOGUE[:2], ("assistant", "red"))
    encoded = Encoder(tokenizer=tokenizer_of("chatml"))([answer(*DIALOGUE), answer(*other)])
    told = [[float(n + 1) for n in range(length)] for length in encoded.lengths]
    weights = tokens_of([encoded], 2, wanted=frozenset(), weights=[told]).weights
    assert weights is not None and [w[w > 0].tolist() for w in weights] == told
    late = tokens_of([encoded], 2, wanted=frozenset(), weights=[told], from_difference=True).weights
    assert late is not None
    for number, (weight, values) in enumerate(zip(late, told, strict=True)):
        kept = weight[weight > 0].tolist()
        assert 0 < len(kept) < len(values) and kept == values[-len(kept) :]
        assert set(torch.nonzero(weight)[:, 0].tolist()) <= set(encoded.scored[number])


def test_ktos_anchor_leaves_them_out_too() -> None:
    encoder = Encoder(tokenizer=tokenizer_of("chatml"))
    rows = [encoder([answer(*DIALOGUE)]), encoder([answer(("assistant", "red"))])]
    assert mismatched_of(rows).scored().tolist() == [float(rows[1].lengths[0]), float(rows[0].lengths[0])]
