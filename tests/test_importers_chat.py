"""Files of LLaMA-Factory and ms-swift, one row at a time and as a run reads them; conversations under any keys."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import llama_factory, ms_swift
from mmalign.importers.conversations import (
    media_of,
    read_message,
    read_messages,
    split_conversations,
    tool_calls,
    tools_of,
    transcript,
)
from mmalign.importers.llama_factory import COLUMNS, TAGS, llama_factory_row
from mmalign.importers.ms_swift import ms_swift_row
from mmalign.records import Dropped, Examples, Media, Message, comparison, joint, pair, unpaired


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(grey=0):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(stream, "PNG")
    return stream.getvalue()


def rows_of(imported):
    return [comparison(row, least=1) for row in imported.dataset]


def turns(content):
    return [(message.role, message.text) for message in content.messages]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*texts, roles=("user", "assistant")):
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


# --- conversations -------------------------------------------------------------------------------------------------


def test_a_transcript_is_split_at_its_markers_and_nowhere_else():
    text = "\n\nHuman: He said: Human: hi\n\nwell?\n\nAssistant: Yes \n\nHuman: And\n\nAssistant:"
    expected = [("user", "He said: Human: hi\n\nwell?"), ("assistant", "Yes"), ("user", "And"), ("assistant", "")]
    assert [(m.role, m.text) for m in transcript(text)] == expected


def test_conversations_share_the_messages_before_the_first_difference_and_leave_an_answer_each():
    first = read_messages(chat("a", "b", "c", "d"))
    assert split_conversations(first, first) == (first[:3], first[3:], first[3:])
    other = read_messages(chat("a", "B"))
    with pytest.raises(UserError, match="differ from message 2 on, which go on by assistant, user, assistant"):
        split_conversations(first, other)
    with pytest.raises(UserError, match="differ from message 1 on"):
        split_conversations(first, read_messages(chat("x", "b", "c", "d")))
    with pytest.raises(UserError, match="got an empty conversation"):
        split_conversations(first, ())


def test_images_stand_where_their_placeholder_does_or_before_the_first_words_of_the_user():
    pictures = [Media(path="1.png"), Media(path="2.png")]
    first, answer, second = read_messages(chat("see <image> here", "yes", "<image>and"), pictures)
    assert (first.text, first.images, first.places) == ("see  here", (pictures[0],), (4,))
    assert (second.text, second.images, second.places) == ("and", (pictures[1],), ())
    assert answer.images == ()
    (untagged,) = read_messages(chat("see"), pictures)
    assert (untagged.text, untagged.images, untagged.places) == ("see", tuple(pictures), ())
    with pytest.raises(UserError, match="got 2 images and 1 <image>, want one each"):
        read_messages(chat("<image>"), pictures)
    with pytest.raises(UserError, match="more image parts than images"):
        read_messages(chat("<image><image><image>"), pictures)
    with pytest.raises(UserError, match="got <video> in a message"):
        read_messages(chat("<video>"), pictures)


def test_calls_in_a_row_become_one_message_with_the_calls_as_chat_templates_want_them():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}
    messages = read_messages([*chat("q"), call, call, {"role": "tool_response", "content": "2"}, *chat("a")[:0]])
    assert [m.role for m in messages] == ["user", "assistant", "tool"]
    assert messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},) * 2
    assert len(tool_calls('[{"name": "f"}, {"name": "g"}]')) == 2
    for text in ("f(1)", "[1]", '{"arguments": {}}'):
        with pytest.raises(UserError, match=r"^got the call"):
            tool_calls(text)


def test_tools_are_functions_however_they_are_written():
    bare = {"name": "f", "parameters": {}}
    whole = {"type": "function", "function": bare}
    assert tools_of(json.dumps([bare])) == tools_of([whole]) == (whole,)
    assert tools_of(None) == tools_of("") == ()
    with pytest.raises(UserError, match=r"^got the tools"):
        tools_of("none")


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("hi", 'got "hi", want a message'),
        ({"role": "user"}, "want a message with role and content"),
        ({"role": "judge", "content": "x"}, 'got the role "judge", want one of'),
        ({"role": "user", "content": [{"type": "sound"}]}, "the part"),
    ],
)
def test_each_fault_of_a_message_is_told(entry, fault):
    with pytest.raises(UserError, match=fault):
        read_message(entry, iter(()))


def test_images_are_paths_beside_the_data_or_bytes(tmp_path):
    values = ["a.png", {"bytes": b"x", "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}, "https://x/c.png"]
    places = [(m.path, m.data) for m in media_of(values, tmp_path)]
    assert places == [(f"{tmp_path}/a.png", None), (None, b"x"), (f"{tmp_path}/b.png", None), ("https://x/c.png", None)]
    assert media_of(None, tmp_path) == () and media_of("a.png", tmp_path) == media_of(["a.png"], tmp_path)
    for wrong in ([1], [{"bytes": None, "path": None}], [""]):
        with pytest.raises(UserError, match=r"^got the image"):
            media_of(wrong, tmp_path)


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "1 + 2", "chosen": "3", "rejected": "4"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "So."},
    "rejected": {"from": "gpt", "value": "No."},
}


def test_alpaca_rows_join_instruction_and_input_and_put_system_and_history_before_them():
    value = llama_factory_row({**ALPACA, "system": "Be exact.", "history": [["Hi", "Hello"]]})
    before = [("system", "Be exact."), ("user", "Hi"), ("assistant", "Hello")]
    assert turns(value.prompt) == [*before, ("user", "Add.\n1 + 2")]
    assert [turns(c) for c in value.candidates] == [[("assistant", "3")], [("assistant", "4")]]
    assert value.ranks == (1.0, 2.0)
    assert turns(llama_factory_row({**ALPACA, "input": ""}).prompt) == [("user", "Add.")]


def test_an_alpaca_row_may_have_its_question_in_input_alone_and_a_column_of_conversations_beside():
    row = llama_factory_row({"input": "Add.", "chosen": "3", "rejected": "4", "conversations": [{"from": "x", "value": "y"}]})
    assert turns(row.prompt) == [("user", "Add.")]


def test_sharegpt_rows_are_read_under_the_tags_of_dataset_info():
    value = llama_factory_row(SHAREGPT, formatting="sharegpt")
    assert turns(value.prompt) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    assert [turns(c) for c in value.candidates] == [[("assistant", "So.")], [("assistant", "No.")]]
    tags = {**TAGS, "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    openai = {
        "messages": [{"role": "system", "content": "Be kind."}, *chat("Why?")],
        "better": chat("", "So.")[1],
        "worse": chat("", "No.")[1],
        "system": "not this one",
    }
    columns = {**COLUMNS, "messages": "messages", "chosen": "better", "rejected": "worse"}
    value = llama_factory_row(openai, formatting="sharegpt", columns=columns, tags=tags)
    assert turns(value.prompt) == [("system", "Be kind."), ("user", "Why?")]


def test_sharegpt_tools_calls_and_observations_are_those_of_chat_templates():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = {
        **SHAREGPT,
        "conversations": [{"from": "human", "value": "f(1)?"}, call, {"from": "observation", "value": "2"}],
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    value = llama_factory_row(row, formatting="sharegpt")
    assert [m.role for m in value.prompt.messages] == ["user", "assistant", "tool"]
    assert value.prompt.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert value.prompt.tools[0]["function"]["name"] == "f"
    assert llama_factory_row({**row, "chosen": call}, formatting="sharegpt").candidates[0].messages[0].tool_calls


def test_kto_rows_of_llama_factory_are_single_answers_with_their_label():
    alpaca = llama_factory_row({"instruction": "Add.", "output": "3", "kto_tag": True})
    assert unpaired(alpaca)[0].side == {"labels": 1.0} and turns(alpaca.candidates[0]) == [("assistant", "3")]
    conversation = [*SHAREGPT["conversations"], SHAREGPT["chosen"]]
    sharegpt = llama_factory_row({"conversations": conversation, "kto_tag": False}, formatting="sharegpt")
    assert unpaired(sharegpt)[0].side == {"labels": 0.0} and turns(sharegpt.prompt)[-1] == ("user", "Why?")


@pytest.mark.parametrize(
    ("row", "formatting", "fault"),
    [
        ({"instruction": "Add.", "chosen": "3"}, "alpaca", "want chosen and rejected, or kto_tag"),
        ({**ALPACA, "history": [["Hi"]]}, "alpaca", "in the history"),
        ({**ALPACA, "chosen": 3}, "alpaca", "got 3 for chosen"),
        ({**ALPACA, "videos": ["a.mp4"]}, "alpaca", "got videos"),
        ({"instruction": "Add.", "output": "3", "kto_tag": "yes"}, "alpaca", 'got kto_tag "yes"'),
        (ALPACA, "sharegpt", "got nothing for messages"),
        ({**SHAREGPT, "instruction": "", "input": ""}, "alpaca", "got the column conversations, .* Set formatting: sharegpt"),
        ({**SHAREGPT, "chosen": "So."}, "sharegpt", 'got "So.", want a message with from and value'),
        ({**SHAREGPT, "rejected": {"from": "human", "value": "x"}}, "sharegpt", "got an answer that does not follow"),
        ({**SHAREGPT, "conversations": []}, "sharegpt", "got an answer that does not follow"),
        ({**SHAREGPT, "conversations": [{"from": "gpt", "value": "x"}]}, "sharegpt", "got an answer that does not follow"),
    ],
)
def test_each_fault_of_a_llama_factory_row_is_told(row, formatting, fault):
    with pytest.raises(UserError, match=fault):
        llama_factory_row(row, formatting=formatting)


def test_a_data_set_is_named_in_dataset_info(tmp_path):
    entries = {
        "mine": {
            "file_name": "mine.json", "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "dialogue", "chosen": "good", "rejected": "bad"}, "tags": {"user_tag": "person"},
        },
        "nowhere": {"script_url": "x"},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    row = {
        "dialogue": [{"from": "person", "value": "Why?"}],
        "good": {"from": "gpt", "value": "So."},
        "bad": {"from": "gpt", "value": "No."},
    }
    (tmp_path / "mine.json").write_text(json.dumps([row, row]))
    for path in (tmp_path, tmp_path / "dataset_info.json"):
        imported = llama_factory(path=str(path), dataset="mine")
        assert [turns(r.prompt) for r in rows_of(imported)] == [[("user", "Why?")]] * 2
    assert rows_of(imported)[1].where == f"{tmp_path / 'mine.json'}:2"
    with pytest.raises(UserError, match="got no data set 'theirs', want one of mine, nowhere"):
        llama_factory(path=str(tmp_path), dataset="theirs")
    with pytest.raises(UserError, match="nowhere has neither file_name nor hf_hub_url"):
        llama_factory(path=str(tmp_path), dataset="nowhere")
    with pytest.raises(UserError, match="columns: got winner, want names of LLaMA-Factory"):
        llama_factory(path=str(tmp_path / "mine.json"), columns={"winner": "good"})
    with pytest.raises(UserError, match=r"gone.dataset_info\.json: cannot be read"):
        llama_factory(path=str(tmp_path / "gone" / "dataset_info.json"), dataset="mine")


def test_images_of_llama_factory_lie_beside_the_data_and_missing_or_broken_ones_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png()[:40])
    row = {**ALPACA, "instruction": "<image>Add."}
    path = write_lines(tmp_path / "x.jsonl", [{**row, "images": [f"{name}.png"]} for name in "abc"])
    with pytest.raises(UserError, match=r"x\.jsonl:3: the image .*c\.png is missing"):
        llama_factory(path=path)
    imported = llama_factory(path=path, faulty="drop")
    (value,) = rows_of(imported)
    assert value.prompt.messages[0].images[0].open().size == (4, 4)
    assert [fault.where for fault in imported.faults] == [f"{path}:3", f"{path}:2"]
    (tmp_path / "media").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "media" / "a.png")
    write_lines(tmp_path / "x.jsonl", [{**row, "images": ["a.png"]}])
    assert len(llama_factory(path=path, images=str(tmp_path / "media")).dataset) == 1


def test_rows_of_a_llama_factory_parquet_with_image_bytes_are_read_as_examples(tmp_path):
    rows = [{**ALPACA, "images": [{"bytes": png(n), "path": None}]} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    examples = Examples(llama_factory(path=str(tmp_path / "x.parquet")).dataset, pair)
    assert len(examples) == 2
    assert examples[1].samples[0].prompt.messages[0].images[0].read() == png(1)


# --- ms-swift ------------------------------------------------------------------------------------------------------

SWIFT = {"messages": [{"role": "system", "content": "Be kind."}, *chat("Why?", "So.")], "rejected_response": "No."}


def test_ms_swift_messages_end_with_the_chosen_answer():
    value = ms_swift_row(SWIFT)
    assert turns(value.prompt) == [("system", "Be kind."), ("user", "Why?")]
    assert [turns(c) for c in value.candidates] == [[("assistant", "So.")], [("assistant", "No.")]]
    assert (value.ranks, value.margin, value.prompts) == ((1.0, 2.0), None, None)
    assert ms_swift_row({**SWIFT, "margin": 0.5}, margin=True).margin == 0.5
    several = ms_swift_row({**SWIFT, "rejected_response": ["No.", "Never."]})
    assert several.ranks == (1.0, 2.0, 2.0) and turns(several.candidates[2]) == [("assistant", "Never.")]


def test_ms_swift_rejected_messages_share_the_prompt_or_have_one_of_their_own():
    row = {"messages": chat("Hi", "Hello", "Why?", "So."), "rejected_messages": chat("Hi", "Hello", "Why?", "No.")}
    assert [turns(c) for c in ms_swift_row(row).candidates] == [[("assistant", "So.")], [("assistant", "No.")]]
    value = ms_swift_row({**row, "rejected_messages": chat("Hi", "Go", "Why?", "No.")})
    assert [turns(p)[1] for p in value.prompts] == [("assistant", "Hello"), ("assistant", "Go")]
    assert isinstance(pair(value), Dropped) and len(joint(value)) == 1


def test_ms_swift_rejected_images_give_each_answer_its_own_prompt(tmp_path):
    row = {"messages": chat("<image>What?", "A cat."), "images": ["a.png"], "rejected_images": ["b.png"]}
    value = ms_swift_row(row, images=tmp_path)
    assert [p.messages[0].images[0].path for p in value.prompts] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert value.candidates[0] == value.candidates[1] and value.prompt == value.prompts[0]


def test_ms_swift_queries_and_renamed_columns_are_read():
    row = {
        "system": "Be kind.",
        "history": [["Hi", "Hello"]],
        "question": "Why?",
        "response": "So.",
        "rejected_response": "No.",
    }
    value = ms_swift_row(row, columns={"question": "query"})
    assert turns(value.prompt) == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]


def test_ms_swift_tool_calls_before_the_answer_belong_to_the_prompt():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    messages = [*chat("f?"), call, call, {"role": "tool_response", "content": "1"}, chat("", "One.")[1]]
    value = ms_swift_row({"messages": messages, "rejected_response": "Two.", "tools": [{"name": "f"}]})
    assert [m.role for m in value.prompt.messages] == ["user", "assistant", "tool"]
    assert len(value.prompt.messages[1].tool_calls) == 2 and value.prompt.tools[0]["type"] == "function"


def test_kto_rows_of_ms_swift_are_single_answers_with_their_label(tmp_path):
    rows = [{"messages": chat("Why?", "So."), "label": label} for label in (True, False)]
    imported = ms_swift(path=write_lines(tmp_path / "x.jsonl", rows))
    examples = Examples(imported.dataset, unpaired)
    assert [examples[n].side for n in (0, 1)] == [{"labels": 1.0}, {"labels": 0.0}]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": chat("Why?", "So.")}, "and the label nothing, want one of them"),
        ({"messages": chat("Why?", "So."), "label": 0.5}, "and the label 0.5, want one of them"),
        ({"messages": chat("Why?"), "rejected_response": "No."}, "do not end with the assistant"),
        ({"messages": "Why?", "rejected_response": "No."}, "for messages, want a list"),
        ({**SWIFT, "rejected_response": [1]}, r"got the rejected_response \[1\]"),
        ({**SWIFT, "rejected_response": []}, r"got the rejected_response \[\]"),
        ({**SWIFT, "videos": ["a.mp4"]}, "got videos"),
        ({"query": "Why?", "rejected_response": "No."}, "got nothing for response"),
    ],
)
def test_each_fault_of_an_ms_swift_row_is_told(row, fault):
    with pytest.raises(UserError, match=fault):
        ms_swift_row(row)


def test_lines_of_different_shapes_are_one_ms_swift_file_and_broken_ones_are_told_with_their_row(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, chat("", "So.")[1]]
    rows = [SWIFT, {"messages": parts, "rejected_response": ["No.", "Never."]}, {**SWIFT, "rejected_response": 5}]
    path = write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=r"x\.jsonl:3: got 5 for rejected_response, want a list"):
        ms_swift(path=path)
    imported = ms_swift(path=path, faulty="drop")
    assert [len(row.candidates) for row in rows_of(imported)] == [2, 3]
    assert [len(examples) for examples in [Examples(imported.dataset, pair)]] == [2]
    assert Examples(imported.dataset, pair)[1].samples[0].prompt.messages == (Message("user", "Why?"),)
