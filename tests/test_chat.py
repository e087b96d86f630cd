"""Texts and conversations as token ids: templates, beginnings and ends, boundaries, and what is cut."""

from typing import Any

import pytest
from text_tokenizers import tokenizer_of

from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder, _token_ids
from mmalign.language.tiny import tiny_tokenizer
from mmalign.records import Content, Message, Sample


def text(prompt: str, answer: str, **more: Any) -> Sample:
    return Sample(prompt=Content(text=prompt), completion=Content(text=answer), **more)


def said(*turns: tuple[str, str]) -> Content:
    return Content(messages=tuple(Message(role=role, text=words) for role, words in turns))


def chat(answer: str | Content, *turns: tuple[str, str], tools: tuple[Any, ...] = (), **more: Any) -> Sample:
    prompt = Content(messages=said(*(turns or (("user", "name a colour"),))).messages, tools=tools)
    return Sample(prompt=prompt, completion=Content(text=answer) if isinstance(answer, str) else answer, **more)


def read(tokenizer: Any, encoded: Encoded, number: int = 0) -> tuple[str, str]:
    """What is given before the scored tokens of a sample, and these, as texts with all marks."""
    continuation, given = encoded.continuations[number], encoded.given[number]
    context = [*encoded.contexts[encoded.context_of[number]], *continuation[:given]]
    return tokenizer.decode(context), tokenizer.decode(continuation[given:])


# --- beginnings and ends ----------------------------------------------------------------------------------------------


def test_a_text_begins_as_its_tokenizer_begins_texts_and_ends_in_its_end() -> None:
    plain, begun = tokenizer_of(), tokenizer_of(begins=True)
    assert read(plain, Encoder(tokenizer=plain)([text("the cat", " sat")])) == ("the cat", " sat</s>")
    assert read(begun, Encoder(tokenizer=begun)([text("the cat", " sat")])) == ("<s>the cat", " sat</s>")


def test_a_text_that_has_its_beginning_and_end_already_gets_no_second() -> None:
    tokenizer = tokenizer_of(begins=True)
    assert read(tokenizer, Encoder(tokenizer=tokenizer)([text("<s>the cat", " sat</s>")])) == ("<s>the cat", " sat</s>")


@pytest.mark.parametrize("begins", [False, True])
def test_a_template_that_writes_the_beginning_is_not_doubled(begins: bool) -> None:
    tokenizer = tokenizer_of("llama", begins=begins)
    encoded = Encoder(tokenizer=tokenizer)([chat("blue")])
    assert read(tokenizer, encoded) == ("<s><|turn|>user\n\nname a colour</s><|turn|>assistant\n\n", "blue</s>")
    assert tokenizer.decode(Encoder(tokenizer=tokenizer).prompt(chat("blue").prompt)).count("<s>") == 1


def test_a_template_without_a_beginning_gets_none_from_the_tokenizer() -> None:
    tokenizer = tokenizer_of("chatml", begins=True)
    context, _ = read(tokenizer, Encoder(tokenizer=tokenizer)([chat("blue")]))
    assert context == "<|im_start|>user\nname a colour<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("eos", "plain", "templated"),
    [
        ("auto", " sat</s>", "blue<|im_end|>\n"),
        ("always", " sat</s>", "blue<|im_end|>\n</s>"),
        ("never", " sat", "blue<|im_end|>\n"),
    ],
)
def test_the_end_of_text_follows_its_rule(eos: Any, plain: str, templated: str) -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer, eos=eos)
    assert read(tokenizer, encoder([text("the cat", " sat")]))[1] == plain
    assert read(tokenizer, encoder([chat("blue")]))[1] == templated


@pytest.mark.parametrize("eos", ["auto", "always"])
def test_where_the_template_ends_a_turn_with_the_end_of_text_there_is_one(eos: Any) -> None:
    for tokenizer in (tokenizer_of("chatml", eos="<|im_end|>"), tokenizer_of("llama")):
        answer = read(tokenizer, Encoder(tokenizer=tokenizer, eos=eos)([chat("blue")]))[1]
        assert answer.count(tokenizer.eos_token) == 1


@pytest.mark.parametrize("eos", ["auto", "always", "never"])
def test_a_step_of_a_solution_never_ends_its_turn(eos: Any) -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer, eos=eos)
    step = {"prefix": "two is two.", "ends_turn": False}
    assert read(tokenizer, encoder([text("two plus two: ", " four", **step)])) == ("two plus two: two is two.", " four")
    context, answer = read(tokenizer, encoder([chat(" four", **step)]))
    assert (context[-len("assistant\ntwo is two.") :], answer) == ("assistant\ntwo is two.", " four")


def test_a_whole_solution_after_a_prefix_ends_its_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer)
    assert read(tokenizer, encoder([text("two: ", " four", prefix="one.")])) == ("two: one.", " four</s>")
    context, answer = read(tokenizer, encoder([chat(" four", prefix="one.")]))
    assert (context[-len("assistant\none.") :], answer) == ("assistant\none.", " four<|im_end|>\n")


# --- conversations ----------------------------------------------------------------------------------------------------


def test_an_answer_as_a_text_and_as_a_message_are_the_same_tokens() -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer)
    assert encoder([chat("blue")]) == encoder([chat(said(("assistant", "blue")))])


def test_a_prompt_as_a_text_with_an_answer_as_messages_is_the_users_message() -> None:
    tokenizer = tokenizer_of("chatml")
    mixed = Sample(prompt=Content(text="name a colour"), completion=said(("assistant", "blue")))
    assert Encoder(tokenizer=tokenizer)([mixed]) == Encoder(tokenizer=tokenizer)([chat("blue")])


def test_template_always_takes_texts_for_messages_and_auto_leaves_them() -> None:
    tokenizer = tokenizer_of("chatml")
    sample = text("name a colour", "blue")
    assert Encoder(tokenizer=tokenizer, template="always")([sample]) == Encoder(tokenizer=tokenizer)([chat("blue")])
    assert read(tokenizer, Encoder(tokenizer=tokenizer)([sample]))[0] == "name a colour"


def test_the_system_prompt_stands_before_conversations_that_have_none() -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer, system_prompt="cats only")
    assert read(tokenizer, encoder([chat("blue")]))[0].startswith("<|im_start|>system\ncats only<|im_end|>\n<|im_start|>user")
    own = read(tokenizer, encoder([chat("blue", ("system", "German"), ("user", "hello"))]))[0]
    assert "German" in own and "cats only" not in own
    assert tokenizer.decode(encoder.prompt(said(("user", "hello")))).startswith("<|im_start|>system\ncats only")


def test_an_answer_goes_on_where_the_assistants_message_of_the_prompt_stops() -> None:
    tokenizer = tokenizer_of("chatml")
    encoder = Encoder(tokenizer=tokenizer)
    turns = (("user", "name a colour"), ("assistant", "a colour is"))
    for answer in (" blue", said(("assistant", " blue"))):
        context, scored = read(tokenizer, encoder([chat(answer, *turns)]))
        assert context == "<|im_start|>user\nname a colour<|im_end|>\n<|im_start|>assistant\na colour is"
        assert scored == " blue<|im_end|>\n"
    assert tokenizer.decode(encoder.prompt(said(*turns))).endswith("assistant\na colour is")


def test_tools_and_their_calls_reach_the_template() -> None:
    tokenizer = tokenizer_of("chatml")
    tool = {"type": "function", "function": {"name": "mix", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "mix", "arguments": {"a": "red"}}}
    answer = Content(
        messages=(
            Message(role="assistant", tool_calls=(call,)),
            Message(role="tool", text="red", name="mix"),
            Message(role="assistant", text="it is red"),
        )
    )
    context, scored = read(tokenizer, Encoder(tokenizer=tokenizer)([chat(answer, tools=(tool,))]))
    assert '"name": "mix"' in context and context.endswith("<|im_start|>assistant\n")
    assert scored.startswith("<call>") and '"arguments": {"a": "red"}' in scored and "None" not in scored
    assert scored.endswith("it is red<|im_end|>\n")


def test_an_answer_after_a_tools_result_begins_a_new_message() -> None:
    tokenizer = tokenizer_of("chatml")
    prompt = Content(
        messages=(
            Message(role="user", text="hello"),
            Message(role="assistant", tool_calls=({"function": {"name": "mix"}},)),
        )
    )
    result = Content(messages=(Message(role="tool", text="red"), Message(role="assistant", text="blue")))
    _, scored = read(tokenizer, Encoder(tokenizer=tokenizer)([Sample(prompt=prompt, completion=result)]))
    assert scored.endswith("<|im_start|>assistant\nblue<|im_end|>\n")


@pytest.mark.parametrize(
    "turns", [(("system", "cats only"), ("user", "hello")), (("user", "hello"), ("user", "again"))], ids=["system", "order"]
)
def test_a_conversation_that_the_template_refuses_is_told_with_its_reason(turns: tuple[tuple[str, str], ...]) -> None:
    encoder = Encoder(tokenizer=tokenizer_of("gemma", begins=True))
    with pytest.raises(
        UserError, match=r"adapter.chat_template: it refuses .*hello.*(System role not supported|must alternate)"
    ):
        encoder([chat("blue", *turns)])


def test_conversations_without_a_template_are_refused_and_texts_are_not() -> None:
    encoder = Encoder(tokenizer=tokenizer_of())
    with pytest.raises(UserError, match=r"adapter.chat_template: the tokenizer has none"):
        encoder([chat("blue")])
    assert encoder([text("a", "b")]).lengths == (2,)


# --- boundaries -------------------------------------------------------------------------------------------------------


def test_the_answer_begins_at_the_first_token_that_is_not_one_of_the_prompts() -> None:
    tokenizer = tokenizer_of()
    ids = {words: tokenizer.encode(words) for words in ("the ca", "the cat", "the car")}
    assert ids["the cat"][: len(ids["the ca"])] != ids["the ca"]  # a merge across the boundary
    encoded = Encoder(tokenizer=tokenizer, eos="never")([text("the ca", "t"), text("the ca", "!")])
    assert len(encoded.contexts) == 1
    for number, whole in enumerate(("the cat", "the ca!")):
        context, scored = read(tokenizer, encoded, number)
        assert context + scored == whole
        sequence = [*encoded.contexts[0], *encoded.continuations[number]]
        assert sequence == tokenizer.encode(whole)  # as the model will see it
    assert read(tokenizer, encoded, 0)[1] == " cat" and read(tokenizer, encoded, 1)[1] == "!"


def test_a_candidate_is_scored_alike_whatever_it_is_compared_with() -> None:
    tokenizer = tokenizer_of(begins=True)
    encoder = Encoder(tokenizer=tokenizer)
    samples = [text("the ca", "t"), text("the ca", "! two"), text("the ca", " cat")]
    together = encoder(samples)
    for number, sample in enumerate(samples):
        alone = encoder([sample])
        assert read(tokenizer, together, number) == read(tokenizer, alone)
        assert together.lengths[number] == alone.lengths[0]


def test_equal_prompts_share_a_context_and_others_do_not() -> None:
    encoded = Encoder(tokenizer=tokenizer_of("chatml"))([chat("blue"), chat("red"), chat("blue", ("user", "hello"))])
    assert (len(encoded.contexts), encoded.context_of) == (2, (0, 0, 1))


def test_many_rows_at_once_are_the_rows_one_by_one() -> None:
    encoder = Encoder(tokenizer=tokenizer_of("llama", begins=True), max_prompt_length=22, max_response_length=4)
    rows = [[chat("blue"), chat("red and blue and red")], [text("the ca", "t"), text("the ca", " sat")], [text("", "b")]]
    assert encoder.all(rows) == [encoder(row) for row in rows]


def test_the_template_is_run_once_for_the_prompt_of_a_pair_and_once_for_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, runs = tokenizer_of("chatml"), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **more: runs.append(1) or render(messages, **more))
    prompt = said(("user", "name a colour"))
    Encoder(tokenizer=tokenizer)([Sample(prompt=prompt, completion=Content(text=answer)) for answer in ("blue", "red")])
    assert len(runs) == 3


def test_a_prompt_alone_is_the_context_of_its_answers() -> None:
    for name in ("chatml", "llama", "gemma"):
        encoder = Encoder(tokenizer=tokenizer_of(name, begins=True))
        assert tuple(encoder.prompt(chat("x").prompt)) == encoder([chat("blue")]).contexts[0]
    encoder = Encoder(tokenizer=tokenizer_of(begins=True))
    assert tuple(encoder.prompt(Content(text="the cat"))) == encoder([text("the cat", " sat")]).contexts[0]


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_long_prompts_lose_their_beginning_but_not_the_token_that_every_text_begins_with() -> None:
    long = "the cat sat on the mat and the cat ran to the other cat"
    for begins in (True, False):
        tokenizer = tokenizer_of("llama", begins=begins)
        encoded = Encoder(tokenizer=tokenizer, max_prompt_length=30)(
            [chat("blue", ("user", long)), chat("red", ("user", long))]
        )
        context, answer = read(tokenizer, encoded)
        assert len(encoded.contexts[0]) == 30 and encoded.cut_prompts == 2 and encoded.cut_responses == 0
        assert (
            context.startswith("<s><|turn|>user\n\n")
            and context.endswith("cat</s><|turn|>assistant\n\n")
            and answer == "blue</s>"
        )
    tokenizer = tokenizer_of()
    encoded = Encoder(tokenizer=tokenizer, max_prompt_length=3)([text(long, " sat")])
    assert encoded.contexts[0] == tuple(tokenizer.encode(long)[-3:])


def test_long_answers_lose_their_end_and_the_token_that_ends_them() -> None:
    tokenizer = tokenizer_of(begins=True)
    encoded = Encoder(tokenizer=tokenizer, max_response_length=3)([text("the cat", " sat on the mat"), text("the cat", " sat")])
    assert encoded.lengths == (3, 2) and encoded.cut_responses == 1
    assert [read(tokenizer, encoded, n)[1] for n in (0, 1)] == [" sat on the", " sat</s>"]


def test_an_answer_of_just_the_limit_keeps_its_end() -> None:
    tokenizer = tokenizer_of()
    encoded = Encoder(tokenizer=tokenizer, max_response_length=2)([text("the cat", " sat")])
    assert (encoded.lengths, encoded.cut_responses) == ((2,), 0) and read(tokenizer, encoded)[1] == " sat</s>"


def test_the_prompt_of_a_shared_boundary_is_not_counted_as_answer() -> None:
    tokenizer = tokenizer_of()
    encoded = Encoder(tokenizer=tokenizer, max_response_length=2)([text("the ca", "t and"), text("the ca", "! two two")])
    assert encoded.lengths == (2, 2)


# --- nothing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "context"), [({"begins": True}, "<s>"), ({}, "<s>"), ({"bos": None}, "</s>")])
def test_an_empty_prompt_is_the_beginning_of_a_text(more: dict[str, Any], context: str) -> None:
    tokenizer = tokenizer_of(**more)
    encoder = Encoder(tokenizer=tokenizer)
    assert read(tokenizer, encoder([text("", "the cat")])) == (context, "the cat</s>")
    assert tokenizer.decode(encoder.prompt(Content(text=""))) == context


def test_an_empty_prompt_is_refused_where_no_token_begins_or_ends_a_text() -> None:
    with pytest.raises(UserError, match="got an empty prompt"):
        Encoder(tokenizer=tokenizer_of(eos=None, bos=None))([text("", "the cat")])


@pytest.mark.parametrize("answer", ["", "  \n", said(("assistant", ""))], ids=["nothing", "space", "message"])
def test_an_empty_answer_is_refused_with_its_prompt(answer: str | Content) -> None:
    with pytest.raises(UserError, match=r"name a colour.*empty answer"):
        Encoder(tokenizer=tokenizer_of("chatml"))([chat(answer)])


def test_token_ids_are_the_tokenizers_own_whatever_it_was_last_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["one<|im_end|>two", "", "three"]
    wanted = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer(texts, padding=True, truncation=True, max_length=2)
    assert _token_ids(tokenizer, texts) == wanted

    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: list[str], **more: Any) -> Any:
            return super()._encode_plus(text=[one.upper() for one in text], **more)

    own = tiny_tokenizer()
    own.__class__ = Shouting
    assert _token_ids(own, ["abc"]) == tokenizer(["ABC"], add_special_tokens=False)["input_ids"]
