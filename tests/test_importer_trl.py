import io
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.importers import extract_prompt, to_trl, trl, unpair
from mmalign.importers.trl import GIVEN
from mmalign.importers.trl_format import chatml, trl_row
from mmalign.records import (
    Comparison,
    Content,
    Dropped,
    Examples,
    Media,
    Message,
    comparison,
    joint,
    pair,
    read,
    step,
    unpaired,
    write,
)

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
GOOD, BAD = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "Go away"}
KIND = [("system", "Be kind."), ("user", "Hi")]
CASES = json.loads((Path(__file__).parent / "golden/text/data_cases.json").read_text())
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(red):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def imported(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = trl(path=str(path), **settings)
    return [comparison(row, least=0) for row in found.dataset], found.faults


def only(tmp_path, row, **settings):
    (value,), _ = imported(tmp_path, row, **settings)
    return value


def told(content):
    return content.text if content.text is not None else [(m.role, m.text) for m in content.messages]


# --- the pure functions: numbers of TRL 1.16, executed ---------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["trl_extract_prompt"]["cases"])
def test_the_shared_beginning_is_the_prompt_as_in_trl(case):
    found = extract_prompt(case["input"]["chosen"], case["input"]["rejected"])
    assert dict(zip(("prompt", "chosen", "rejected"), found, strict=True)) == case["output"]


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "p", "chosen": " c", "rejected": [" r", " s"]}, "p", [" c", " r", " s"]),
        ({"prompt": "p", "chosen": [" c"], "rejected": [" r"]}, "p", [" c", " r"]),
        ({"chosen": "it is blue", "rejected": ["it is green", "it was red"]}, "it", [" is blue", " is green", " was red"]),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [[BAD], [GOOD]]},
            [("user", "Hi")],
            [[("assistant", "Hello!")], [("assistant", "Go away")], [("assistant", "Hello!")]],
        ),
        (
            {
                "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                "rejected": [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": one}] for one in ("No", "Go")],
            },
            [("user", "Hi")],
            [[("assistant", "Hello!")], [("assistant", "No")], [("assistant", "Go")]],
        ),
    ],
)
def test_several_rejected_answers_are_one_row_ranked_alike_below_the_chosen_one(tmp_path, row, prompt, answers):
    value = only(tmp_path, row)
    assert (told(value.prompt), [told(one) for one in value.candidates]) == (prompt, answers)
    assert value.ranks == (1.0,) + (2.0,) * (len(answers) - 1)
    made = pair(value, pairs="best_vs_rest")
    assert [told(one.samples[1].completion) for one in made] == answers[1:]
    assert {str(told(one.samples[0].completion)) for one in made} == {str(answers[0])}


def test_scores_of_several_rejected_answers_are_one_each(tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": ["r", "s"], "chosen_score": 3.0}
    assert only(tmp_path, {**row, "rejected_score": [2.0, 1.0]}).scores == {"score": (3.0, 2.0, 1.0)}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: got 2 scores of 3 answers, want one each"):
        only(tmp_path, {**row, "rejected_score": 2.0})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: got prob for 3 answers, want it for two"):
        only(tmp_path, {**row, "rejected_score": [2.0, 1.0], "prob": 0.8})


@pytest.mark.parametrize(
    "chosen, rejected", [("ab", "ab"), ("ab", "abc"), ("a b", "c"), ("", ""), (" x", " y"), ("a  x", "a  y")]
)
def test_extraction_loses_no_character(chosen, rejected):
    prompt, better, worse = extract_prompt(chosen, rejected)
    assert (prompt + better, prompt + worse) == (chosen, rejected)


def test_equal_sides_leave_empty_completions_and_one_space_moves():
    assert extract_prompt("same", "same") == ("same", "", "")
    assert extract_prompt([USER, GOOD], [USER, GOOD]) == ([USER, GOOD], [], [])
    assert extract_prompt("a  x", "a  y") == ("a ", " x", " y")
    assert extract_prompt(" x", " y") == ("", " x", " y")


def test_unpairing_gives_all_chosen_then_all_rejected_as_in_trl():
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": "d", "rejected": "s"}]
    assert unpair(rows) == CASES["trl_unpair"]["output"]
    assert [row["id"] for row in unpair([{**row, "id": row["prompt"]} for row in rows])] == ["p", "q", "p", "q"]


def test_from_and_value_become_role_and_content_as_in_trl():
    case = CASES["trl_chatml"]
    before = json.dumps(case["input"])
    assert chatml(case["input"]) == case["output"] and json.dumps(case["input"]) == before
    assert chatml({**case["input"], "n": 1})["n"] == 1


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prompt, candidates",
    [
        ({"prompt": "p", "chosen": " c", "rejected": " r"}, "p", [" c", " r"]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", [" blue.", " green."]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [("user", "Hi")], None),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [("user", "Hi")], None),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [("user", "Hi")], None),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, [("user", "Hi")], None),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [("user", "Hi")], None),
        ({"prompt": [USER], "chosen": "Hello!", "rejected": "Go away"}, [("user", "Hi")], None),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [("user", "Hi")], None),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": GOOD, "rejected": BAD}, [("user", "Hi")], None),
        ({"prompt": "Hi", "system": "Be kind.", "chosen": "Hello!", "rejected": "Go away"}, KIND, None),
        ({"prompt": [SYSTEM, USER], "system": "Be kind.", "chosen": [GOOD], "rejected": [BAD]}, KIND, None),
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(tmp_path, row, prompt, candidates):
    value = only(tmp_path, row)
    answers = candidates or [[("assistant", "Hello!")], [("assistant", "Go away")]]
    assert told(value.prompt) == prompt and [told(c) for c in value.candidates] == answers
    assert value.ranks == (1, 2) and value.id == "trl-1" and value.where.endswith("rows.jsonl:1")


SHALL, YES = {"role": "assistant", "content": "Shall I?"}, {"role": "user", "content": "yes"}


@pytest.mark.parametrize(
    "shared, prompt",
    [
        ([SHALL, YES], [("user", "Hi"), ("assistant", "Shall I?"), ("user", "yes")]),
        ([SHALL], [("user", "Hi"), ("assistant", "Shall I?")]),
        ([{"role": "assistant", "content": "Hi"}, YES], [("user", "Hi"), ("assistant", "Hi"), ("user", "yes")]),
        ([SYSTEM, SHALL, YES], [*KIND, ("assistant", "Shall I?"), ("user", "yes")]),
        ([SYSTEM, USER], KIND),
        ([{"from": "human", "value": "Hi"}], [("user", "Hi")]),
        ([{"role": "user", "content": "Hi\n"}], [("user", "Hi\n")]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [("user", "Hi")]),
        ([USER, SHALL, YES], [("user", "Hi"), ("assistant", "Shall I?"), ("user", "yes")]),
        ([YES, SHALL, USER], [("user", "yes"), ("assistant", "Shall I?"), ("user", "Hi")]),
    ],
)
def test_the_text_of_a_prompt_is_left_out_only_where_both_answers_begin_with_it(tmp_path, shared, prompt):
    value = only(tmp_path, {"prompt": "Hi", "chosen": [*shared, GOOD], "rejected": [*shared, BAD]})
    assert told(value.prompt) == prompt
    assert [told(one) for one in value.candidates] == [[("assistant", "Hello!")], [("assistant", "Go away")]]


def test_the_columns_beside_a_pair_are_kept(tmp_path):
    row = {
        "id": 7,
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "prob": 0.8,
        "margin": 2,
        "weight": 0.5,
        "rationale": "why",
        "chosen_score": 9,
        "rejected_score": 4.5,
        "prefix": "Step 1.",
        "tools": json.dumps([TOOL]),
    }
    value = only(tmp_path, row)
    assert (value.id, value.prob, value.ranks, value.margin, value.weight) == ("7", 0.8, None, 2.0, 0.5)
    assert value.scores == {"score": (9.0, 4.5)} and value.prefix == "Step 1." and value.prompt.tools == (TOOL,)
    assert told(value.extras["rationale"]) == "why"
    assert pair(value, margin="gap", by="score")[0].side == {"margin": 4.5, "weight": 0.5}


def test_a_beta_of_its_own_goes_from_a_row_to_the_loss(tmp_path):
    import torch

    from mmalign.adapters.side import side_tensors
    from mmalign.losses import LOSSES, dpo
    from mmalign.objective import Objective, Term

    plain = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows, _ = imported(tmp_path, {**plain, "beta_scale": 3.0}, plain)
    examples = [pair(row)[0] for row in rows]
    assert [example.side for example in examples] == [{"beta_scale": 3.0}, {}]
    scale = side_tensors([dict(example.side) for example in examples])["beta_scale"]
    policy, reference = torch.tensor([[1.0, -1.0]] * 2), torch.zeros(2, 2)
    objective = Objective([Term(name="dpo", loss=dpo, settings={"beta": 0.5})])
    losses = objective({"policy": policy}, {"policy": reference}, {"beta_scale": scale}).losses
    for found, beta in zip(losses, (1.5, 0.5), strict=True):
        assert found.item() == pytest.approx(dpo(policy[:1], reference[:1], beta=beta).losses.item(), rel=1e-6)
    assert all(comparison(row) in rows for row in read(write(rows, tmp_path / "kept.parquet")))
    assert all(comparison(row) in rows for row in read(write(rows, tmp_path / "kept.jsonl")))
    with pytest.raises(UserError, match=r"the data have beta_scale .* which ipo would pass over"):
        Objective([Term(name="ipo", loss=LOSSES["ipo"], settings={})]).check({"beta_scale": 1.0}, 2)


def test_unpaired_rows_carry_their_label(tmp_path):
    rows, _ = imported(tmp_path, *({"prompt": [USER], "completion": [GOOD], "label": label} for label in (True, False)))
    assert [unpaired(row)[0].side for row in rows] == [{"labels": 1.0}, {"labels": 0.0}]


def test_a_pair_and_its_unpaired_rows_teach_the_same(tmp_path):
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": "d", "rejected": "s"}]
    whole, _ = imported(tmp_path, *pairs)
    parts, _ = imported(tmp_path, *unpair(pairs))

    def told_of(rows):
        examples = [example for row in rows for example in unpaired(row)]
        return {(e.samples[0].prompt.text, e.samples[0].completion.text, e.side["labels"]) for e in examples}

    assert told_of(whole) == told_of(parts) and len(told_of(parts)) == 4


def test_each_step_goes_on_from_those_before_it(tmp_path):
    row = {"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4", "So 4"], "labels": [True, False, 0]}
    rows, _ = imported(tmp_path, row)
    assert [(r.prefix, told(r.candidates[0])) for r in rows] == [
        (None, "1+1=2"),
        ("1+1=2\n", "2+1=4"),
        ("1+1=2\n2+1=4\n", "So 4"),
    ]
    assert [unpaired(r, ends_turn=False)[0].side["labels"] for r in rows] == [1, 0, 0]
    assert [r.id for r in rows] == ["trl-1-0", "trl-1-1", "trl-1-2"]


def test_a_step_pair_has_its_prefix(tmp_path):
    value = only(tmp_path, {"prompt": "p", "prefix": "Step 1.\n", "chosen": "good", "rejected": "bad"})
    assert [(s.prefix, s.ends_turn) for s in step(value)[0].samples] == [("Step 1.\n", False)] * 2


def test_lists_come_with_scores_or_ranks(tmp_path):
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2]},
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": {"x": [1, 3, 2], "y": [0, 0, 1]}},
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1, 2]},
    ]
    scored, judged, ranked = imported(tmp_path, *rows)[0]
    assert scored.scores == {"score": (1, 3, 2)} and sorted(judged.scores) == ["x", "y"] and ranked.ranks == (3, 1, 2)


def test_joint_rows_have_a_prompt_on_each_side(tmp_path):
    row = {"chosen": {"prompt": "p1", "completion": "c"}, "rejected": {"prompt": "p2", "completion": "r"}}
    value = only(tmp_path, row)
    assert [told(p) for p in value.prompts] == ["p1", "p2"]
    assert [s.prompt.text for s in joint(value)[0].samples] == ["p1", "p2"]
    assert isinstance(pair(value), Dropped)


def test_the_last_answer_of_a_conversation_is_its_completion(tmp_path):
    rows = [
        {"messages": [USER, GOOD]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"messages": [USER]},
        {"prompt": [USER]},
        {"prompt": "p", "completion": "c"},
    ]
    whole, named, question, prompt, plain = imported(tmp_path, *rows)[0]
    assert [told(c) for c in whole.candidates] == [told(c) for c in named.candidates] == [[("assistant", "Hello!")]]
    assert (question.candidates, prompt.candidates) == ((), ()) and told(question.prompt) == told(prompt.prompt) == [
        ("user", "Hi")
    ]
    assert (told(plain.prompt), told(plain.candidates[0])) == ("p", "c")


def test_images_of_the_column_stand_where_trl_puts_them(tmp_path):
    for n in (1, 2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    answers = {"chosen": [GOOD], "rejected": [BAD]}
    placed = [{"type": "text", "text": "left "}, {"type": "image"}, {"type": "text", "text": "right"}, {"type": "image"}]
    rows = [
        {"prompt": [SYSTEM, USER], "images": ["1.png", "2.png"], **answers},
        {"prompt": [USER], "image": "1.png", **answers},
        {"prompt": [{"role": "user", "content": placed}], "images": ["1.png", "2.png"], **answers},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "2.png"}]}], **answers},
    ]
    first, single, inline, named = imported(tmp_path, *rows)[0]
    reds = [
        [Image.open(io.BytesIO(m.read())).getpixel((0, 0))[0] for m in row.prompt.media()]
        for row in (first, single, inline, named)
    ]
    assert reds == [[1, 2], [1], [1, 2], [2]]
    assert [len(m.images) for m in first.prompt.messages] == [0, 2] and first.prompt.messages[1].places == ()
    assert (inline.prompt.messages[0].text, inline.prompt.messages[0].places) == ("left right", (5, 10))


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"chosen": "same", "rejected": "same"}, "candidate 1: got an empty completion"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "candidate 1: got an empty completion"),
        ({"chosen": [USER], "rejected": [USER, GOOD]}, "candidate 1: got an empty completion"),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, "candidate 2: got an empty completion"),
        ({"prompt": " ", "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "p", "chosen": "c"}, "got no rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": [BAD]}, "want chosen and rejected of one form"),
        ({"prompt": "p", "completion": "c", "label": "yes"}, "want true or false"),
        ({"prompt": "p", "completions": ["a"], "labels": [True, False]}, "got 1 completions and 2 labels"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "prob": 2}, "want a probability"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "big"}, "for margin, want a number"),
        ({"prompt": [{"content": "x"}], "chosen": [GOOD], "rejected": [BAD]}, "want a message with role"),
        (
            {"prompt": [SYSTEM, USER], "system": "Be rude.", "chosen": [GOOD], "rejected": [BAD]},
            "another one in the conversation",
        ),
        ({"prompt": [USER], "images": ["gone.png"], "chosen": [GOOD], "rejected": [BAD]}, "gone.png is missing"),
        ({"prompt": [GOOD], "images": ["rows.jsonl"], "chosen": [GOOD], "rejected": [BAD]}, "got 1 images and 0 places"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": "{"}, "want a list of JSON schemas"),
        ({"question": "p", "answer": "c"}, "got the columns question, answer"),
        ([1], "got a JSON list"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_row_and_the_others_are_kept(tmp_path, row, problem):
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows, faults = imported(tmp_path, good, row, good, faulty="drop")
    assert len(rows) == 2 and len(faults) == 1
    assert faults[0].where == f"{tmp_path / 'rows.jsonl'}:2" and problem in faults[0].problem
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        imported(tmp_path, good, row)


# --- where they lie --------------------------------------------------------------------------------------------------

TABLE = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score_chosen": 2.0, "score_rejected": 1.0, "source": "web"},
    {
        "prompt": [SYSTEM, {**USER, "name": "ann"}],
        "chosen": [BAD],
        "rejected": [GOOD],
        "score_chosen": 5.0,
        "score_rejected": None,
    },
]


@pytest.mark.parametrize("form", ["parquet", "json", "jsonl", "folder", "saved", "saved with splits"])
def test_every_place_of_a_table_gives_the_same_rows(tmp_path, form, caplog):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(TABLE)
    path = tmp_path / "data"
    if form == "parquet":
        table.to_parquet(path := tmp_path / "x.parquet")
    elif form == "json":
        (path := tmp_path / "x.json").write_text(json.dumps(TABLE))
    elif form == "jsonl":
        (path := tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    elif form == "folder":
        path.mkdir()
        table.to_parquet(path / "train-0.parquet")
        table.select([0]).to_parquet(path / "test-0.parquet")
    else:
        (table if form == "saved" else DatasetDict(train=table, test=table.select([0]))).save_to_disk(path)
    with caplog.at_level(logging.INFO, "mmalign"):
        rows = [comparison(row) for row in trl(path=str(path)).dataset]
    assert [told(row.prompt) for row in rows] == [[("user", "Hi")], KIND]
    assert rows[1].prompt.messages[1] == Message("user", "Hi", name="ann") and rows[0].prompt.messages[0].name is None
    assert [row.scores for row in rows] == [{"score": (2.0, 1.0)}, {}]
    if form in ("parquet", "folder", "saved"):
        assert "columns that are not read: source" in caplog.text
    if form in ("folder", "saved with splits"):
        assert len(trl(path=str(path), split="test").dataset) == 1


def test_a_part_of_a_data_set_is_named_by_its_card_or_its_folder(tmp_path):
    from datasets import Dataset

    card = "configs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}/train.parquet\n" for n in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        Dataset.from_list([{"prompt": name, "chosen": "c", "rejected": "r"}]).to_parquet(tmp_path / name / "train.parquet")
    for part in ({"subset": "long"}, {"folder": "long"}):
        (row,) = trl(path=str(tmp_path), **part).dataset
        assert comparison(row).prompt.text == "long"


def test_tool_calls_and_tools_of_a_table_lose_the_keys_that_others_gave_them(tmp_path):
    from datasets import Dataset

    def calling(name, arguments):
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
        }

    rows = [
        {"prompt": [USER], "chosen": [calling("f", {"x": 1})], "rejected": [BAD], "tools": [TOOL]},
        {"prompt": [USER], "chosen": [calling("g", {"y": "z"})], "rejected": [BAD], "tools": [{**TOOL, "strict": True}]},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    first, second = [comparison(row) for row in trl(path=str(tmp_path / "x.parquet")).dataset]
    calls = [row.candidates[0].messages[0].tool_calls[0]["function"] for row in (first, second)]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "z"}}]
    assert first.prompt.tools == (TOOL,) and second.prompt.tools == ({**TOOL, "strict": True},)


@pytest.mark.parametrize("given", [{"think": True, "date": "Monday"}, '{"think": true, "date": "Monday"}'])
def test_what_the_chat_template_is_given_in_a_row_goes_with_its_prompt(tmp_path, given):
    pair_row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    (row, plain), _ = imported(tmp_path, {**pair_row, "chat_template_kwargs": given}, pair_row)
    assert row.prompt.template_kwargs == {"think": True, "date": "Monday"} and row.prompt.tools == ()
    assert plain.prompt.template_kwargs == {} and plain.prompt.key() != row.prompt.key()


def test_of_a_table_each_row_keeps_what_it_gives_the_chat_template_itself(tmp_path):
    from datasets import Dataset

    given = [{"think": True}, {"date": "Monday"}]
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "chat_template_kwargs": one} for one in given]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    assert [comparison(row).prompt.template_kwargs for row in trl(path=str(tmp_path / "x.parquet")).dataset] == given


def test_examples_of_an_import_are_read_row_by_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{n}", "chosen": "c", "rejected": "r"}) for n in range(5)))
    examples = Examples(trl(path=str(path)).dataset, pair)
    assert [example.samples[0].prompt.text for example in examples] == [f"p{n}" for n in range(5)]


# --- back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_what_is_written_for_trl_is_read_as_it_was(tmp_path, name):
    rows = [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "margin": 1.0, "weight": 2.0, "tools": [TOOL]},
        {"prompt": [USER], "chosen": [BAD], "rejected": [GOOD], "margin": 0.5, "weight": 1.0, "rationale": "why"},
        {"prompt": [USER], "chosen": [BAD], "rejected": [GOOD], "margin": 0.5, "weight": 1.0, GIVEN: {"think": False}},
    ]
    before, _ = imported(tmp_path, *rows)
    written = to_trl([pair(row)[0] for row in before], tmp_path / name)
    after = [comparison(row) for row in trl(path=str(written)).dataset]
    for one, other in zip(before, after, strict=True):
        assert [told(c) for c in one.contents()] == [told(c) for c in other.contents()]
        assert (one.margin, one.weight, one.prompt.tools) == (other.margin, other.weight, other.prompt.tools)
        assert one.prompt.template_kwargs == other.prompt.template_kwargs


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_any_text_survives_the_way_to_trl_and_back(tmp_path, name):
    texts = ["a b\n", "\r\nx", "\u2028 y", "\x85z\x0b", "日本 😀", '"\\', "<image>"]
    rows = [
        Comparison(
            id=f"{n}", prompt=Content(text=text), candidates=(Content(text=f"{text}!"), Content(text="no")), ranks=(1, 2)
        )
        for n, text in enumerate(texts)
    ]
    written = to_trl([pair(row)[0] for row in rows], tmp_path / name)
    again = [comparison(row) for row in trl(path=str(written)).dataset]
    assert [told(c) for row in again for c in row.contents()] == [told(c) for row in rows for c in row.contents()]


def test_texts_stay_texts_and_a_prefix_ends_the_prompt():
    row = Comparison(
        id="a", prompt=Content(text="p"), candidates=(Content(text="c"), Content(text="r")), prob=0.2, prefix=" s1"
    )
    assert trl_row(pair(row)[0]) == {"prompt": "p s1", "chosen": "r", "rejected": "c", "prob": 0.8}
    talk = Comparison(
        **{**vars(row), "prompt": Content(messages=(Message("user", "p"),)), "prob": None, "scores": {"j": (1.0, 2.0)}}
    )
    written = trl_row(pair(talk, with_scores=True)[0])
    assert written["prompt"][-1] == {"role": "assistant", "content": " s1"}
    assert written["chosen"] == [{"role": "assistant", "content": "r"}]
    assert (written["chosen_score"], written["rejected_score"]) == (2.0, 1.0)


def test_images_go_into_parquet_and_not_into_jsonl(tmp_path):
    pictured = Message("user", "a b", images=(Media(data=png(1)), Media(data=png(2))), places=(0, 2))
    answers = tuple(Content(messages=(Message("assistant", text),)) for text in ("c", "r"))
    example = pair(Comparison(id="a", prompt=Content(messages=(pictured,)), candidates=answers, ranks=(1, 2)))[0]
    (back,) = [comparison(row) for row in trl(path=str(to_trl([example], tmp_path / "x.parquet"))).dataset]
    message = back.prompt.messages[0]
    assert (message.text, message.places, [m.read() for m in message.images]) == ("a b", (0, 2), [png(1), png(2)])
    with pytest.raises(UserError, match=r"Write \.parquet"):
        to_trl([example], tmp_path / "x.jsonl")


def test_what_trl_has_no_form_for_is_refused(tmp_path):
    prompts = (Content(text="p1"), Content(text="p2"))
    row = Comparison(
        id="a", prompt=prompts[0], candidates=(Content(text="c"), Content(text="r")), prompts=prompts, ranks=(1, 2)
    )
    with pytest.raises(UserError, match="want a pair with one prompt"):
        to_trl(joint(row), tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"want \.jsonl or \.parquet"):
        to_trl([], tmp_path / "x.csv")
