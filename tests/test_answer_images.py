"""`mmalign answer` of prompts with images: the stock model's words, tuned weights, restarts, and what comes after."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from annotation_votes import judged_project, saying
from image_text_runs import rows_file, train_seen
from multimodal import picture

from mmalign.annotation.export import Settings, export
from mmalign.answer import AnswerConfig, Generator, main
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.evaluate import EvaluateConfig
from mmalign.evaluate import main as evaluate
from mmalign.importers import IMPORTERS
from mmalign.language.tiny import tiny_folder as text_folder
from mmalign.language.tiny import tiny_tokenizer
from mmalign.multimodal.opening import open_processor, open_sighted
from mmalign.records import Comparison, Content, Message, comparison, read
from mmalign.records import asked as wording
from mmalign.score import ScoreConfig
from mmalign.score import main as score
from mmalign.scorers.conversation import ConversationReader


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def asked(question: str, *images: str) -> dict[str, Any]:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"prompt": [{"role": "user", "content": parts if images else question}]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of one image, of two, of none; two that say the same of other images."""
    folder = tmp_path_factory.mktemp("prompts")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number).read())
    lines = [asked("what is it?", "0.png"), asked("what is it?", "1.png"), asked("why?"), asked("which?", "1.png", "2.png")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "prompts.jsonl"


def settings(prompts: Path, output: Path, **changes: Any) -> AnswerConfig:
    plain = AnswerConfig(
        model="tiny", prompts=str(prompts), num_candidates=2, max_new_tokens=5, batch_size=3, device="cpu", output=output
    )
    return replace(plain, **changes)


def greedy(prompts: Path, output: Path, **changes: Any) -> AnswerConfig:
    return settings(prompts, output, temperature=0.0, num_candidates=1, **changes)


def rows_of(folder: Path) -> list[Comparison]:
    return [comparison(row, least=1) for row in read(folder / "comparisons.jsonl", least=1)]


def words(folder: Path) -> list[list[str]]:
    return [[candidate.words() for candidate in row.candidates] for row in rows_of(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    own = ("config.yaml", "environment.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


def stock(model: Any, question: str, *images: Any) -> str:
    """What transformers alone says to a prompt."""
    processor = open_processor("tiny")
    shown = [{"type": "image", "image": image.open()} for image in images]
    chat = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    given = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**given, max_new_tokens=5, do_sample=False)
    said: str = processor.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def test_the_likeliest_answers_are_the_stock_models_and_the_rows_keep_their_images(prompts: Path, tmp_path: Path) -> None:
    main(greedy(prompts, tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert [[media.key() for media in row.prompt.media()] for row in rows] == [
        [picture(n).key() for n in some] for some in ((0,), (1,), (), (1, 2))
    ]
    model = open_sighted("tiny")
    for row, question, images in zip(
        rows, ("what is it?", "what is it?", "why?", "which?"), ((0,), (1,), (), (1, 2)), strict=True
    ):
        assert row.candidates[0].words() == stock(model, question, *map(picture, images))
    assert len({text for some in words(tmp_path / "out") for text in some}) > 2


@pytest.mark.parametrize("cut", [1, 25])
def test_a_killed_run_ends_byte_for_byte_as_if_never_stopped(prompts: Path, tmp_path: Path, cut: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(settings(prompts, whole))
    main(settings(prompts, killed))
    (killed / "comparisons.jsonl").unlink()
    lines = (killed / "answers.journal").read_bytes().splitlines(keepends=True)
    (killed / "answers.journal").write_bytes(b"".join(lines[:4]) + lines[4][:cut])
    assert main(settings(prompts, killed)).num_answers == len(lines) - 4
    assert contents(killed) == contents(whole)
    assert len({text for some in words(whole) for text in some}) > 5, "each answer has a seed of its own"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    loud = {"steps": 2, "checkpoint_every": 2, "optimiser": {"learning_rate": 0.1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return {
            "lora": train_seen(folder / "lora", training=loud),
            "full": train_seen(folder / "full", adapter={"lora": None}, training=loud),
        }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_tuned_weights_and_their_checkpoint_answer_as_stock_transformers_has_them(
    kind: str, prompts: Path, tmp_path: Path, runs: dict[str, Path]
) -> None:
    from transformers import AutoModelForImageTextToText

    for name, changes in {
        "end": {"model": None, "tuned": str(runs[kind])},
        "checkpoint": {"model": None, "tuned": str(runs[kind] / "checkpoint-2")},
        "base": {},
    }.items():
        main(greedy(prompts, tmp_path / name, **changes))
    assert words(tmp_path / "end") == words(tmp_path / "checkpoint") != words(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(runs[kind] / ("model" if kind == "full" else ""))
    assert words(tmp_path / "end")[0] == [stock(model.eval(), "what is it?", picture(0))]
    assert rows_of(tmp_path / "end")[0].provenance[0]["tuned"] == str(runs[kind])


def test_base_and_tuned_answer_in_one_row(prompts: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    one = {"num_candidates": 1, "temperature": 0.0}
    entries = (Generator(name="base", **one), Generator(name="tuned", tuned=str(runs["lora"]), **one))
    main(settings(prompts, tmp_path / "out", generators=entries))
    rows = rows_of(tmp_path / "out")
    assert [[origin["generator"] for origin in row.provenance] for row in rows] == [["base", "tuned"]] * 4


def test_distinct_prompts_of_rows_are_answered_with_their_images(prompts: Path, tmp_path: Path) -> None:
    main(settings(prompts, tmp_path / "first"))
    twice = (tmp_path / "first" / "comparisons.jsonl").read_text() * 2
    lines = [json.loads(line) | {"id": str(n)} for n, line in enumerate(twice.splitlines())]
    lines.append(
        {
            **lines[0],
            "id": "text",
            "prompt": {"text": "another question", "image": lines[0]["prompt"][0]["content"][0]["image"]},
        }
    )
    lines.append({**lines[-1], "id": "other", "prompt": {**lines[-1]["prompt"], "text": "one more"}})
    (tmp_path / "first" / "twice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["data.name=comparisons", f"data.path={tmp_path / 'first' / 'twice.jsonl'}", f"output={tmp_path / 'out'}"]
    config = read_config(AnswerConfig, None, ["model=tiny", "device=cpu", "max_new_tokens=3", "num_candidates=1", *given])
    assert main(config).num_prompts == 6, "two prompts of one image that say other words are two"
    rows = rows_of(tmp_path / "out")
    assert [len(row.prompt.media()) for row in rows] == [1, 1, 0, 2, 1, 1]
    assert rows[4].prompt.text == "another question" and rows[4].prompt.media()[0].key() == picture(0).key()


def test_models_that_see_nothing_are_refused_with_the_row(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: got a prompt with images, which .* does not see"):
        main(settings(prompts, tmp_path / "out", model=str(text_folder({}))))
    assert not (tmp_path / "out").exists()


def test_measures_of_texts_score_the_answers_and_the_rows_keep_their_images(prompts: Path, tmp_path: Path) -> None:
    main(settings(prompts, tmp_path / "out"))
    data, output = str(tmp_path / "out" / "comparisons.jsonl"), tmp_path / "scored.jsonl"
    score(read_config(ScoreConfig, None, [f"data={data}", "scorers=[text_length]", f"output={output}"]))
    rows = [comparison(row) for row in read(output)]
    assert len(rows) == 4 and all("text_length" in row.scores for row in rows)
    assert [media.key() for media in rows[3].prompt.media()] == [picture(1).key(), picture(2).key()]


def test_reward_models_of_texts_refuse_prompts_with_images() -> None:
    reader = ConversationReader(tiny_tokenizer(), "never", 64)
    messages = Content(messages=(Message("user", "what is it?", images=(picture(0),)),))
    plain = Content(text="what is it?", images=(picture(0),))
    for prompt in (messages, plain):
        with pytest.raises(UserError, match="a prompt with images, which a reward model of texts does not see"):
            reader(wording(prompt), "a disc")
    assert reader(wording(Content(text="what is it?")), "a disc")[1] > 0


def test_evaluate_compares_answers_to_images_and_shows_the_images(prompts: Path, tmp_path: Path, runs: dict[str, Path]) -> None:
    main(settings(prompts, tmp_path / "before", num_candidates=1))
    main(settings(prompts, tmp_path / "after", num_candidates=1, model=None, tuned=str(runs["lora"])))
    sides = [f"{side}={tmp_path / side / 'comparisons.jsonl'}" for side in ("before", "after")]
    more = [f"run={runs['lora']}", "pairs.importer.name=comparisons", f"pairs.importer.path={rows_file('pairs')}", "device=cpu"]
    told = evaluate(read_config(EvaluateConfig, None, [*sides, "scorers=[text_length]", f"output={tmp_path / 'out'}", *more]))
    assert (told.evaluation.num_pairs, told.evaluation.num_prompts) == (4, 4), "the same words under two images are two prompts"
    assert told.evaluation.pairs is not None and told.evaluation.pairs.accuracy.num_pairs == 8
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 4 and "shown with the prompt" in page


@pytest.mark.parametrize("name", ["trl", "comparisons"])
def test_answers_to_images_are_judged_and_exported_with_their_images(prompts: Path, tmp_path: Path, name: str) -> None:
    main(settings(prompts, tmp_path / "out"))
    rows = [row for row in rows_of(tmp_path / "out") if row.prompt.media()]
    store, project = judged_project(tmp_path, rows, [[saying("a"), saying("b"), saying("a")]], kind="text")
    done = export(store, project, tmp_path / "data", Settings(format=name))
    assert done.importer is not None
    found = [comparison(row) for row in IMPORTERS[done.importer](path=str(done.path)).dataset]
    assert [[media.key() for media in row.prompt.media()] for row in found] == [
        [media.key() for media in row.prompt.media()] for row in rows
    ]
    best = [row.candidates[(row.ranks or (1.0,)).index(1.0)].words() for row in found]
    assert best == [row.candidates[n % 2].words() for n, row in enumerate(rows)]
