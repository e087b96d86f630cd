import io
import json
import random

import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import comparisons
from mmalign.records import (
    Comparison,
    Content,
    Examples,
    Fault,
    Media,
    Message,
    comparison,
    entry_of,
    faults_of,
    features,
    message_of,
    outlines,
    pair,
    read,
    to_dataset,
    to_row,
    unpaired,
    write,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(red):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(stream, "PNG")
    return Media(data=stream.getvalue())


def rich(id="a"):
    """A row with everything a conversation can have."""
    prompt = Content(
        messages=(
            Message("system", "Be brief."),
            Message("user", "left  right?\n", images=(png(1), png(2)), places=(0, 5), name="ann"),
            Message("assistant", tool_calls=(CALL, CALL)),
            Message("tool", '{"t": 3}', name="weather", extra={"tool_call_id": "x1"}),
        ),
        tools=(TOOL,),
    )
    answers = tuple(Content(messages=(Message("assistant", text, extra={"thinking": "hm"}),)) for text in ("3°", "no 日本"))
    return Comparison(
        id=id,
        prompt=prompt,
        candidates=answers,
        ranks=(1, 2),
        prefix=" Step 1.\n",
        extras={"rationale": Content(text="because"), "gold": Content(messages=(Message("assistant", "3"),))},
    )


def joint():
    texts = [Content(text=t) for t in ("p1", "p2", "r1", "r2")]
    return Comparison(id="j", prompt=texts[0], candidates=tuple(texts[2:]), prompts=tuple(texts[:2]), ranks=(2, 1))


def plain():
    return Comparison(id="t", prompt=Content(text="1 + 1 ="), candidates=(Content(text=" 2"), Content(text=" 3")), prob=0.9)


def whole(value):
    """The row with the bytes of its media, which is what two ways of storing them have in common."""
    return [
        [media.read() for content in value.contents() for media in content.media()],
        *(
            [(c.text, c.tools, [(m.role, m.text, m.places, m.name, m.tool_calls, m.extra) for m in c.messages])]
            for c in value.contents()
        ),
        (value.id, value.ranks, value.prob, value.prefix, list(value.extras), value.prompts is None),
    ]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.tar", "x"])
def test_conversations_round_trip_through_every_format(tmp_path, name):
    rows = [rich(), joint(), plain()]
    again = [comparison(row) for row in read(write(rows, tmp_path / name))]
    assert [whole(row) for row in again] == [whole(row) for row in rows]
    twice = [comparison(row) for row in read(write(again, tmp_path / f"again-{name}"))]
    assert [whole(row) for row in twice] == [whole(row) for row in rows]


ALPHABET = ("a", " ", "\n", "\r\n", "\t", "é", "日", "😀", '"', "\\", "\u2028", "\x85", "\x0b", "<image>", "{", "\0")


def any_text(draw):
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, 12)))


def any_content(draw, role):
    """A text or a conversation of any shape that is not empty."""
    if draw.random() < 0.4:
        return Content(text="x" + any_text(draw))
    messages = []
    for _ in range(draw.randint(1, 3)):
        text = "x" + any_text(draw)
        images = tuple(png(draw.randint(0, 255)) for _ in range(draw.randint(0, 2)))
        places = tuple(sorted(draw.randint(0, len(text)) for _ in images))
        calls = tuple({"function": {"name": any_text(draw), "n": draw.randint(0, 9)}} for _ in range(draw.randint(0, 2)))
        extra = {"thinking": any_text(draw)} if draw.random() < 0.3 else {}
        name = any_text(draw) if draw.random() < 0.3 else None
        messages.append(Message(role, text, images, name, calls, places if any(places) else (), extra))
    tools = tuple({"type": "function", "name": any_text(draw)} for _ in range(draw.randint(0, 2)))
    return Content(messages=tuple(messages), tools=tools if role == "user" else ())


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.tar"])
def test_any_conversation_round_trips(tmp_path, name):
    draw = random.Random(0)
    rows = []
    for n in range(40):
        k = draw.randint(2, 3)
        rows.append(
            Comparison(
                id=f"{n}",
                prompt=any_content(draw, "user"),
                candidates=tuple(any_content(draw, "assistant") for _ in range(k)),
                ranks=tuple(map(float, range(k))),
                prompts=tuple(any_content(draw, "user") for _ in range(k)) if draw.random() < 0.3 else None,
                prefix=any_text(draw) if draw.random() < 0.3 else None,
                extras={"gold": any_content(draw, "assistant")} if draw.random() < 0.3 else {},
            )
        )
    again = [comparison(row) for row in read(write(rows, tmp_path / name))]
    assert [whole(row) for row in again] == [whole(row) for row in rows]


def test_a_row_is_a_value_of_the_table_and_back():
    for row in (rich(), joint(), plain()):
        assert comparison(to_row(row)) == row
        assert comparison(to_dataset([row])[0]) == row


def test_a_line_of_jsonl_is_written_as_a_person_would_write_it(tmp_path):
    write([plain(), rich()], tmp_path / "x.jsonl")
    first, second = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert first == {"id": "t", "prompt": "1 + 1 =", "candidates": [" 2", " 3"], "prob": 0.9}
    assert second["candidates"][0] == [{"role": "assistant", "content": "3°", "thinking": "hm"}]
    assert second["prompt"]["tools"] == [TOOL]
    kinds = [(part["type"], part.get("text")) for part in second["prompt"]["messages"][1]["content"]]
    assert kinds == [("image", None), ("text", "left "), ("image", None), ("text", " right?\n")]


def test_an_outline_has_the_words_and_the_number_of_images_but_no_image(tmp_path):
    write([rich(), joint(), plain()], tmp_path / "x.parquet")
    for outline, row in zip(outlines(read(tmp_path / "x.parquet")), (rich(), joint(), plain()), strict=True):
        assert whole(outline)[1:] == whole(row)[1:] if not row.prompt.media() else True
        assert [len(c.media()) for c in outline.contents()] == [len(c.media()) for c in row.contents()]
        assert all(media.data is None and media.path is None for c in outline.contents() for media in c.media())
        assert [c.words() for c in outline.contents()] == [c.words() for c in row.contents()]


def test_a_table_written_before_there_were_conversations_is_read_where_it_lies(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    since = ("prompts", "prefix", "extras", "where")
    old = Features({name: kind for name, kind in features(conversations=False).items() if name not in since})
    row = {name: value for name, value in to_row(plain()).items() if name in old}
    row["prompt"] = {"text": "a cat", "images": []}
    row["candidates"] = [{"text": None, "images": [{"bytes": png(n).data, "path": None}]} for n in (1, 2)]
    pq.write_table(pa.Table.from_pylist([row], schema=old.arrow_schema), tmp_path / "old.parquet")
    table = read(tmp_path / "old.parquet")
    assert set(table.features["prompt"]) == {"text", "images"}  # a cast would have copied every image
    value = comparison(table[0])
    assert value.prompt == Content(text="a cat") and value.candidates[1] == Content(images=(png(2),))
    assert (value.prefix, value.prompts, value.extras) == (None, None, {})
    assert [len(c.images) for row in outlines(table) for c in row.candidates] == [1, 1]
    assert len(Examples(table, pair)) == 1


@pytest.mark.parametrize("parts", [["T"], ["I", "T"], ["T", "I"], ["I", "I"], ["T", "I", "T", "I"], ["I", "T", "I", "I", "T"]])
def test_parts_of_a_message_keep_their_order(parts):
    content, pictures = [], []
    for n, kind in enumerate(parts):
        if kind == "I":
            pictures.append(png(n))
            content.append({"type": "image", "image": n})
        else:
            content.append({"type": "text", "text": f"<{n}>"})
    entry = {"role": "user", "content": content}
    message = message_of(entry, png)
    assert message.images == tuple(pictures)
    numbers = {media: n for n, kind in enumerate(parts) if kind == "I" for media in [png(n)]}
    again = entry_of(message, numbers.get)
    assert again["content"] == (content if pictures else "<0>")


def test_image_parts_without_an_image_take_those_of_the_column_in_order():
    entry = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a"}, {"type": "image"}]}
    assert message_of(entry, images=iter((png(1), png(2)))).images == (png(1), png(2))
    with pytest.raises(TypeError, match="more image parts than images"):
        message_of(entry, images=iter((png(1),)))


def test_keys_that_a_table_gave_a_message_without_a_value_are_dropped():
    entry = {"role": "user", "content": "hi", "name": None, "tool_calls": None, "thinking": None}
    assert message_of(entry) == Message("user", "hi")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    made = message_of({"role": "assistant", "content": None, "tool_calls": [call]})
    assert made.tool_calls[0]["function"]["arguments"] == {"a": 1} and made.text == ""


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"content": "x"}, "want a message with role and content"),
        ({"role": "user", "content": 3}, "want a text or a list of parts"),
        ({"role": "user", "content": [{"type": "audio"}]}, "want one of type text, image, image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "want a text in it"),
        ({"role": "user", "content": "x", "tool_calls": ["f"]}, "tool_calls as objects"),
    ],
)
def test_what_is_no_message_is_told_with_what_was_wanted(entry, told, tmp_path):
    with pytest.raises(TypeError, match=told):
        message_of(entry)
    line = {"prompt": [entry], "candidates": ["a", "b"], "ranks": [1, 2]}
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "p", "candidates": ["a", "b"]}) + "\n" + json.dumps(line))
    faults: list[Fault] = []
    assert len(read(tmp_path / "x.jsonl", faults=faults)) == 1
    assert faults[0].where.endswith("x.jsonl:2") and told in faults[0].problem


@pytest.mark.parametrize(
    "change, told",
    [
        ({"candidates": (Content(text=" \n"), Content(text="b"))}, "candidate 1: got an empty completion"),
        (
            {"candidates": (Content(text="a"), Content(messages=(Message("assistant", ""),)))},
            "candidate 2: got an empty completion",
        ),
        ({"candidates": (Content(), Content(text="b"))}, "candidate 1 has neither text nor image"),
        ({"prompt": Content(messages=(Message("user", " "),))}, "got an empty prompt"),
        ({"prompt": Content(messages=(Message("", "x"),))}, "message without a role"),
        ({"prompt": Content(text="x", messages=(Message("user", "x"),))}, "text beside messages"),
        ({"prompts": (Content(text="x"),)}, "got 1 prompts for 2 candidates"),
        ({"prompts": (Content(text="x"), Content(text=""))}, "candidate 2: got an empty prompt"),
        ({"extras": {"rationale": Content(text="")}}, "got an empty rationale"),
        ({"prompt": Content(messages=(Message("user", "x", (png(1), png(2)), places=(1, 0)),))}, "got the places (1, 0)"),
    ],
)
def test_faults_of_conversations_are_told(change, told):
    faults = faults_of(Comparison(**{**vars(plain()), **change}))
    assert len(faults) == 1 and told in faults[0]


def test_an_answer_that_only_calls_a_tool_is_not_empty():
    call = Content(messages=(Message("assistant", tool_calls=(CALL,)),))
    assert not faults_of(Comparison(id="c", prompt=Content(text="p"), candidates=(call, Content(text="no"))))


def test_equal_content_has_an_equal_key_and_any_change_another():
    contents = [
        Content(text="a"),
        Content(text="b"),
        Content(messages=(Message("user", "a"),)),
        Content(messages=(Message("assistant", "a"),)),
        Content(messages=(Message("user", "a"),), tools=(TOOL,)),
        Content(messages=(Message("user", "a", images=(png(1),)),)),
        Content(messages=(Message("user", "a", images=(png(2),)),)),
    ]
    assert len({content.key() for content in contents}) == len(contents)
    assert rich().prompt.key() == rich().prompt.key()
    assert Content(text="caption", images=(png(1),)).key() == png(1).key()


def test_other_words_are_another_data_set():
    def fingerprint(row):
        return Examples(to_dataset([row]), pair).fingerprint

    changed = Comparison(**{**vars(plain()), "candidates": (Content(text=" 2"), Content(text=" 4"))})
    told = Comparison(**{**vars(plain()), "prompt": Content(messages=(Message("user", "1 + 1 ="),))})
    prefixed = Comparison(**{**vars(plain()), "prefix": "so"})
    assert len({fingerprint(row) for row in (plain(), changed, told, prefixed)}) == 4


def test_an_empty_completion_in_a_file_is_a_fault_with_its_row(tmp_path):
    rows = [
        {"prompt": "p", "candidates": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "p", "candidates": ["a", ""], "ranks": [1, 2]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    imported = comparisons(path=str(tmp_path / "x.jsonl"), faulty="drop")
    assert len(imported.dataset) == 1 and str(imported.faults[0]).startswith(f"{tmp_path}/x.jsonl:2: candidate 2: got an empty")
    with pytest.raises(UserError, match="empty completion"):
        comparisons(path=str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_answers_judged_alone_are_kept_where_the_importer_is_told(tmp_path, name):
    alone = Comparison(id="a", prompt=Content(text="p"), candidates=(Content(text="c"),), scores={"label": (1.0,)})
    path = str(write([alone, plain()], tmp_path / name))
    assert len(comparisons(path=path, least=1).dataset) == 2
    left = comparisons(path=path, faulty="drop")
    assert len(left.dataset) == 1 and "got 1 candidate" in left.faults[0].problem
    examples = Examples(comparisons(path=path, least=1).dataset.select([0]), unpaired)
    assert examples[0].side == {"labels": 1.0}
