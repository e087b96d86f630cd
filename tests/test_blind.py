"""`mmalign blind` with tiny models: what is asked, rows that train, kills, filters, what is refused."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_ring import SEVERAL, launch

from mmalign.blind import BlindConfig, Blinded, main
from mmalign.blind_model import opened_speaker
from mmalign.blind_rows import Filters, blind_prompt, likeness, of_text, question, with_blind
from mmalign.cli import VERBS
from mmalign.config import Table
from mmalign.errors import UserError
from mmalign.language.generation import generate_ids
from mmalign.language.network import TokenNetwork
from mmalign.language.tiny import tiny_folder as text_folder
from mmalign.likelihoods import Tokens
from mmalign.metrics.refusals import refuses, sees_nothing
from mmalign.multimodal.degradations import DEGRADATIONS, drawn
from mmalign.multimodal.network import Sight
from mmalign.multimodal.opening import open_processor, open_sighted
from mmalign.multimodal.tiny_families import BUILDERS
from mmalign.records import Comparison, Content, Dropped, Media, Message, comparison, pair, read, write
from mmalign.records.views import blind

IMPORTS = "import accelerate, datasets, peft, transformers"


def png(value: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def answer(text: str) -> Content:
    return Content(messages=(Message("assistant", text),))


def asked(*texts: str, picture: bytes | None = b"") -> Content:
    """A conversation whose last turn of the user shows a picture."""
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    if picture is not None:
        turns[-1] = replace(turns[-1], images=(Media(data=picture or png()),))
    return Content(messages=tuple(turns))


def row(number: int, prompt: Content, **known: Any) -> Comparison:
    known = {"ranks": (2.0, 1.0)} | known
    return Comparison(id=f"r{number}", prompt=prompt, candidates=(answer("no"), answer("yes it is")), **known)


ROWS = (
    row(0, asked("What is it?")),
    row(1, asked("Who?", "A man.", "Where is he?", picture=png(1))),
    row(2, asked("What is it?", picture=png(2)), ranks=None, scores={"judge": (0.5, 0.1)}),
    row(3, asked("Why?", picture=None)),
    row(4, asked("", picture=png(3))),
    row(5, asked("Is it red?", picture=png(4)), weight=2.0),
)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(ROWS, tmp_path_factory.mktemp("data") / "rows.parquet")


def settings(data: Path, output: Path, **changes: Any) -> BlindConfig:
    plain = BlindConfig(model="tiny", path=str(data), output=output, max_new_tokens=4, batch_size=2, device="cpu")
    return replace(plain, **changes)


def rows_of(result: Blinded) -> list[Comparison]:
    return [comparison(one) for one in read(result.file)]


def contents(folder: Path) -> dict[str, bytes]:
    own = ("config.yaml", "environment.json")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in own}


# What is asked


def test_the_image_is_taken_out_and_no_word_is_changed() -> None:
    prompt = blind_prompt(ROWS[1])
    assert isinstance(prompt, Content) and not prompt.media()
    assert [(m.role, m.text, m.places) for m in prompt.messages] == [
        ("user", "Who?", ()),
        ("assistant", "A man.", ()),
        ("user", "Where is he?", ()),
    ]
    plain = Content(text="What?", images=(Media(data=png()),))
    assert blind_prompt(row(9, plain)) == Content(text="What?")


def test_rows_that_have_nothing_to_hide_or_nothing_to_ask_are_told_apart() -> None:
    assert blind_prompt(ROWS[3]) == Dropped("no image in the prompt") and of_text(ROWS[3])
    assert blind_prompt(ROWS[4]) == Dropped("nothing asked beside the image")
    assert blind_prompt(row(9, ROWS[0].prompt, prefix="So")) == Dropped("a prefix that answers go on from")
    own = row(9, ROWS[0].prompt, prompts=(ROWS[0].prompt, ROWS[1].prompt))
    assert blind_prompt(own) == Dropped("a prompt of its own for each candidate")
    painted = replace(ROWS[0], candidates=(Content(images=(Media(data=png()),)),) * 2)
    assert blind_prompt(painted) == Dropped("candidates that are images, not answers") == question(painted, shown=True)
    assert not of_text(replace(painted, prompt=ROWS[3].prompt))
    assert not any(map(of_text, (ROWS[0], ROWS[4], own, row(9, asked("", picture=None)), row(9, Content()))))


def test_a_row_of_text_alone_is_asked_as_it_stands_and_left_alone_where_images_are_shown() -> None:
    assert question(ROWS[3]) == ROWS[3].prompt and question(ROWS[3], shown=True) is None
    for shown in (False, True):
        assert question(ROWS[3], shown=shown, keep_texts=False) == Dropped("no image in the prompt")
    assert question(ROWS[0], shown=True) == ROWS[0].prompt and question(ROWS[0]) == blind_prompt(ROWS[0])
    assert question(row(9, ROWS[3].prompt, prefix="So")) == Dropped("a prefix that answers go on from")


def test_a_blind_candidate_stands_last_with_the_worst_and_scores_stay_told() -> None:
    origin = {"model": "m", "seed": 1}
    value = with_blind(ROWS[2], ["b"], [origin])
    assert value.ranks == (1.0, 2.0, 2.0) and value.scores == {} and value.candidates[2] == answer("b")
    assert value.provenance == ({"scores": {"judge": 0.5}}, {"scores": {"judge": 0.1}}, {"source": "blind", **origin})
    soft = with_blind(row(1, ROWS[0].prompt, ranks=None, prob=0.25), ["b", "c"], [origin, origin])
    assert soft.ranks == (2.0, 1.0, 2.0, 2.0) and soft.prob is None
    assert [p.get("prob") for p in soft.provenance] == [0.25, 0.75, None, None]
    assert with_blind(row(1, ROWS[0].prompt, ranks=None), ["b"], [origin]).ranks is None


# A run


def test_a_run_appends_what_the_stock_model_says_without_the_image(data: Path, tmp_path: Path) -> None:
    result = main(settings(data, tmp_path / "out"))
    rows = rows_of(result)
    assert [value.id for value in rows] == ["r0", "r1", "r2", "r3", "r5"]
    assert (result.num_rows, result.num_prompts, result.num_answers, result.num_text_only) == (5, 4, 4, 1)
    assert dict(result.dropped) == {"nothing asked beside the image": 1}
    blind_ones = [value.candidates[2].words() for value in rows]
    assert blind_ones[0] == blind_ones[2] and all(blind_ones), "rows that ask the same share an answer"
    assert [bool(value.prompt.media()) for value in rows] == [True, True, True, False, True], "the image stays in the row"
    origin = rows[0].provenance[2]
    assert (origin["source"], origin["model"], origin["temperature"], origin["max_new_tokens"]) == ("blind", "tiny", 0.0, 4)
    assert rows[4].weight == 2.0 and set(origin["versions"]) == {"mmalign", "torch", "transformers", "peft"}

    model, processor = open_sighted("tiny"), open_processor("tiny")
    for number, asked_for in ((1, blind_prompt(ROWS[1])), (3, ROWS[3].prompt)):
        assert isinstance(asked_for, Content)
        chat = [{"role": m.role, "content": [{"type": "text", "text": m.text}]} for m in asked_for.messages]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        said = processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert blind_ones[number] == said
    assert "next: mmalign train ... loss=blind_bpo data.view=blind" in str(result) and "1 left out: nothing asked" in str(
        result
    )
    assert "  1 of them of text alone, with what the base answers" in str(result)


def test_rows_of_text_alone_train_with_the_others_or_are_left_out(data: Path, tmp_path: Path) -> None:
    rows = rows_of(main(settings(data, tmp_path / "out")))
    assert not any(isinstance(blind(value), Dropped) for value in rows), "every row is an example of the view"
    origins = [value.provenance[-1] for value in rows]
    assert all(origin["source"] == "blind" for origin in origins)
    without = main(settings(data, tmp_path / "without", text_only="drop"))
    assert dict(without.dropped) == {"nothing asked beside the image": 1, "no image in the prompt": 1}
    assert (without.num_rows, without.num_text_only) == (4, 0) and "of text alone" not in str(without)
    assert [value.candidates for value in rows_of(without)] == [value.candidates for value in rows if value.id != "r3"]


def test_the_rows_are_those_of_the_views_that_train_on_them(data: Path, tmp_path: Path) -> None:
    rows = rows_of(main(settings(data, tmp_path / "out", num_candidates=2, temperature=1.0)))
    examples = blind(rows[0])
    assert not isinstance(examples, Dropped)
    assert [[s.completion.words() for s in e.samples][:2] for e in examples] == [["yes it is", "no"]] * 2
    assert examples[0].samples[2] != examples[1].samples[2]
    pairs = pair(rows[0], pairs="best_vs_rest")  # the released recipe: every rejected answer in a pair of its own
    assert not isinstance(pairs, Dropped) and len(pairs) == 3


def test_a_run_in_pieces_ends_byte_for_byte_as_one_without_a_stop(data: Path, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    first = main(settings(data, pieces, limit=1))
    assert (first.num_rows, first.num_answers) == (1, 1)
    with open(pieces / "blind.journal", "ab") as journal:
        journal.write(b'{"prompt": 1, "ans')  # as a kill leaves it
    second = main(settings(data, pieces))
    assert second.num_answers == 3 and main(settings(data, pieces)).num_answers == 0
    main(settings(data, whole))
    assert contents(whole) == contents(pieces)


def test_two_processes_one_killed_end_byte_for_byte_as_one(data: Path, tmp_path: Path) -> None:
    words = ["model=tiny", f"path={data}", "max_new_tokens=4", "batch_size=1", "device=auto"]
    jobs = [
        {"verb": "blind", "words": [*words, "output=killed"], "kill": ["killed/blind.journal.part-*", 1, True]},
        {"verb": "blind", "words": [*words, "output=two"]},
    ]
    (tmp_path / "several.py").write_text(re.sub("(?m)^(import accelerate.*|from diffusers .*)$", IMPORTS, SEVERAL))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(tmp_path, "several.py", "jobs.json")
    assert (tmp_path / "two" / "comparisons.parquet").is_file(), done.stderr[-3000:]
    assert done.stdout.count("4 new answers") == 1, "the main process tells what both made"
    whole = settings(data, tmp_path / "whole", batch_size=1)
    main(whole)
    main(replace(whole, output=tmp_path / "killed"))
    assert contents(tmp_path / "two") == contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_answers_do_not_depend_on_what_they_are_batched_with(data: Path, tmp_path: Path) -> None:
    texts = [
        [
            value.candidates[-1].words()
            for value in rows_of(main(settings(data, tmp_path / str(size), batch_size=size, temperature=1.0)))
        ]
        for size in (1, 3)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) == 4


def test_a_plain_language_model_answers_too(data: Path, tmp_path: Path) -> None:
    folder = text_folder({})
    rows = rows_of(main(settings(data, tmp_path / "out", model=str(folder), format="jsonl")))
    assert len(rows) == 5 and all(value.candidates[2].words() for value in rows)


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_answers_without_an_image(data: Path, tmp_path: Path, family: str) -> None:
    result = main(settings(data, tmp_path / "out", tiny={"family": family}, temperature=1.0, max_new_tokens=12))
    assert result.num_rows == 5


def test_rows_whose_candidates_nobody_has_ordered_are_told(data: Path, tmp_path: Path) -> None:
    both = write([ROWS[0], replace(ROWS[1], ranks=None)], tmp_path / "some.parquet")
    result = main(settings(both, tmp_path / "out"))
    assert (result.num_rows, result.num_unordered) == (2, 1) and "1 of them without an order" in str(result)
    assert isinstance(blind(rows_of(result)[1]), Dropped) and "without an order" not in str(
        main(settings(data, tmp_path / "all"))
    )


# Under degraded images


def test_answers_under_noise_are_no_blind_ones_and_every_row_has_its_own(data: Path, tmp_path: Path) -> None:
    noise = Table(DEGRADATIONS).choose("noise", t=900)
    config = settings(data, tmp_path / "out", degradation=noise, tiny={"family": "qwen2_vl"}, max_new_tokens=3)
    result = main(config)
    rows = rows_of(result)
    assert [value.id for value in rows] == ["r0", "r1", "r2", "r3", "r4", "r5"], "every row is answered by itself"
    assert result.num_answers == 5 and len(rows[3].candidates) == 2, "and one of text alone stays as it was"
    assert rows[3].ranks == ROWS[3].ranks and rows[3].provenance == ({}, {})
    assert "  1 of them of text alone, as they were" in str(result)
    origin = rows[0].provenance[2]
    assert (origin["source"], origin["degradation"]["name"], origin["degradation"]["t"]) == ("degraded", "noise", 900)
    assert blind(rows[0]) == Dropped("no blind candidate, want one made by mmalign blind")
    assert "data.view.pairs=best_vs_rest" in str(result) and main(config).num_answers == 0


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_says_under_noise_what_the_network_that_is_trained_finds_likeliest(tmp_path: Path, family: str) -> None:
    config = BlindConfig(model="tiny", tiny={"family": family}, path="none", output=tmp_path / "out")
    speaker = opened_speaker(config.answerer, torch.device("cpu"))
    pictures = [Media(data=png(value, (40, 28))) for value in (40, 200)]
    one = Content(messages=(Message("user", "what is it", images=(pictures[0],)),))
    two = Content(messages=(Message("user", "see and how", images=tuple(pictures), places=(4, 4)),))
    noisy = drawn(DEGRADATIONS["noise"](t=900), seed=0, epoch=0, example="r1")
    sight = Sight(speaker.model, speaker.encoder.family, speaker.encoder.shown(one))
    network = TokenNetwork(speaker.model, pack=False, sight=sight)
    for prompt, condition in ((one, None), (one, noisy), (two, None)):
        question, (ids, seen) = speaker.asked(prompt, condition), speaker.encoder.shown(prompt, condition)
        (said,) = generate_ids(speaker.model, [question.ids], max_new_tokens=4, pad=0, shown=question.shown)
        told = (torch.tensor(ids),), (torch.tensor(said),)
        tokens = Tokens(contexts=told[0], continuations=told[1], context_of=(0,), media=(seen,))
        assert question.ids == list(ids) and network.likeliest(tokens.padded()).tolist() == said


def test_what_cannot_be_shown_degraded_is_refused(data: Path, tmp_path: Path) -> None:
    noise = Table(DEGRADATIONS).choose("noise")
    with pytest.raises(UserError, match=r"rows\.parquet:1: model: got .*, which sees nothing, want a model that sees"):
        main(settings(data, tmp_path / "out", model=str(text_folder({})), degradation=noise))
    with pytest.raises(ValueError, match="degradation: got swap, which takes another row's image"):
        settings(data, tmp_path / "out", degradation=Table(DEGRADATIONS).choose("swap"))


# Filters


def test_filters_are_off_by_default_and_never_answer_anything_again(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = main(settings(data, output))
    (said,) = {value.candidates[2].words() for value in rows_of(made) if value.id == "r1"}
    rows = [replace(ROWS[1], candidates=(answer("no"), answer(f" {said.upper()} "))), ROWS[0]]
    other = write(rows, tmp_path / "other.parquet")
    plain = main(settings(other, tmp_path / "two"))
    filtered = main(settings(other, tmp_path / "two", filters=Filters(like_chosen=1.0)))
    assert (plain.num_rows, filtered.num_rows, filtered.num_answers) == (2, 1, 0)
    assert filtered.dropped["a blind answer like the chosen one"] == 1


def test_refusals_and_answers_that_see_nothing_are_told_by_keywords() -> None:
    filters = Filters(refusals=True)
    assert filters.reason("I\u2019m  SORRY, but no.", "x") == "a blind answer that declines"
    assert filters.reason("I cannot see any image here.", "x") == "a blind answer that says it sees no image"
    assert filters.reason("A red car.", "x") is None and Filters().reason("I'm sorry", "x") is None
    assert (
        refuses("As an AI model, no")
        and not refuses("A sorry sight", ("i'm sorry",))
        and sees_nothing("Please upload the image")
        and sees_nothing("As a language model I don\u2019t see  any image.")
        and not sees_nothing("You can see the image of a dog, which I view images of daily.")
    )


def test_likeness_is_the_share_that_is_the_same() -> None:
    assert likeness("A  cat\n", "a cat") == 1.0
    assert likeness("abcd", "abxy") == 0.5


# What is refused


def test_unusable_settings_and_data_are_told(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"path": None}, r"path: got both or neither"),
        ({"num_candidates": 2}, r"num_candidates: got 2 with temperature 0"),
        ({"limit": 0}, "limit: got 0"),
        ({"filters": Filters(like_chosen=0.0)}, r"filters\.like_chosen: got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(data, tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=r"degradation\.t: got 1000, want 0 to 999"):
        settings(data, tmp_path / "out", degradation=Table(DEGRADATIONS).choose("noise", t=1000))
    with pytest.raises(UserError, match=r"by: got nobody, want one of auto, judge, ranks"):
        main(settings(data, tmp_path / "out", by="nobody"))
    nothing = write([ROWS[3]], tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"got no row to make blind \(no image in the prompt: 1\)"):
        main(settings(nothing, tmp_path / "out"))
    with pytest.raises(UserError, match="model: cannot open nowhere"):
        main(settings(data, tmp_path / "out", model="nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_folder_made_with_other_settings_or_of_other_files_is_not_touched(data: Path, tmp_path: Path) -> None:
    main(settings(data, tmp_path / "out", limit=1))
    with pytest.raises(UserError, match=r"was made with other settings: .*max_new_tokens"):
        main(settings(data, tmp_path / "out", max_new_tokens=5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and holds no blinding\.json"):
        main(settings(data, tmp_path / "mine"))
    damaged = tmp_path / "out" / "blind.journal"
    damaged.write_text(json.dumps({"prompt": 0}) + "\n")
    with pytest.raises(UserError, match=r"blind\.journal:1: got a line that blind did not write"):
        main(settings(data, tmp_path / "out"))


def test_the_verb_is_told_on_the_command_line() -> None:
    assert VERBS["blind"][:2] == ("mmalign.blind", "BlindConfig")
