"""`mmalign answer` with a tiny model: rows that read back, seeds, kills, two processes, tuned weights, what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate
from test_ring import SEVERAL, launch

from mmalign import train
from mmalign.answer import AnswerConfig, Generator, main
from mmalign.config import command_line, read_config
from mmalign.errors import UserError
from mmalign.language.chat import Encoder
from mmalign.language.generation import NeverEmpty
from mmalign.language.opening import open_model
from mmalign.language.tiny import tiny_folder, tiny_tokenizer
from mmalign.models.sampling import image_seed
from mmalign.records import Comparison, comparison, read

IMPORTS = "import accelerate, datasets, peft, transformers"
PROMPTS = ("a red cube", "two dogs", "the sea", "why?", "a longer prompt than the others")


def settings(output: Path, **changes: Any) -> AnswerConfig:
    plain = AnswerConfig(
        model="tiny", prompts=PROMPTS, num_candidates=2, max_new_tokens=6, batch_size=3, device="cpu", output=output
    )
    return replace(plain, **changes)


def rows_of(folder: Path) -> list[Comparison]:
    return [comparison(row, least=1) for row in read(folder, least=1)]


def texts(folder: Path) -> list[list[str]]:
    return [[candidate.text or "" for candidate in row.candidates] for row in rows_of(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    own = ("config.yaml", "environment.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    main(settings(folder))
    return folder


def test_the_rows_read_back_with_prompts_answers_seeds_and_settings(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row.prompt.text for row in rows] == list(PROMPTS)
    assert [origin["seed"] for row in rows for origin in row.provenance] == [
        image_seed(0, i, n) for i in range(5) for n in (0, 1)
    ]
    origin = rows[1].provenance[0]
    assert (origin["generator"], origin["temperature"], origin["max_new_tokens"], origin["dtype"]) == (
        "tiny",
        1.0,
        6,
        "float32",
    )
    assert set(origin["versions"]) == {"mmalign", "torch", "transformers", "peft"}
    assert 1 <= origin["tokens"] <= 6
    assert all(text.strip() for answers in texts(whole) for text in answers)
    assert len({text for answers in texts(whole) for text in answers}) > 8, "each answer has a seed of its own"


def test_the_likeliest_answer_is_the_stock_models(tmp_path: Path) -> None:
    main(settings(tmp_path / "out", num_candidates=1, temperature=0.0, batch_size=2, max_new_tokens=4))
    model, tokenizer = open_model("tiny"), tiny_tokenizer()
    ids = torch.tensor([tokenizer(PROMPTS[2])["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    row = rows_of(tmp_path / "out")[2]
    assert row.candidates[0].text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("cut", [0, 1, 25])
def test_a_killed_run_ends_byte_for_byte_as_if_never_stopped_and_redoes_nothing(tmp_path: Path, whole: Path, cut: int) -> None:
    killed = tmp_path / "killed"
    main(settings(killed))
    (killed / "comparisons.jsonl").unlink()
    journal = killed / "answers.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
    (killed / "answers.journal.part-001").write_bytes(lines[8] + lines[9][:cut])
    assert main(settings(killed)).num_answers == len(lines) - 5
    assert contents(killed) == contents(whole)


def test_a_finished_run_samples_nothing_and_a_limit_changes_no_answer(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    assert main(settings(out, limit=2)).num_answers == 4
    assert texts(out) == texts(whole)[:2]
    assert main(settings(out, limit=2)).num_answers == 0
    assert main(settings(out)).num_answers == 6
    assert contents(out) == contents(whole)


def test_two_processes_make_what_one_makes_also_after_a_kill(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder()  # made before two processes look for it
    words = [
        "model=tiny",
        f"prompts={json.dumps(PROMPTS)}",
        "num_candidates=2",
        "max_new_tokens=6",
        "batch_size=3",
        "device=cpu",
    ]
    jobs = [
        {"verb": "answer", "words": [*words, "output=killed"], "kill": ["killed/answers.journal.part-*", 3, True]},
        {"verb": "answer", "words": [*words, "output=two"]},
    ]
    (tmp_path / "several.py").write_text(re.sub("(?m)^(import accelerate.*|from diffusers .*)$", IMPORTS, SEVERAL))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(tmp_path, "several.py", "jobs.json")
    assert (tmp_path / "two" / "comparisons.jsonl").is_file(), done.stderr[-3000:]
    assert contents(tmp_path / "two") == contents(whole)
    assert done.stdout.count("new answers") == 1, "the main process tells"
    main(settings(tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(whole)


def test_other_settings_or_files_in_the_folder_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(settings(out, limit=1))
    before = contents(out)
    for changes, told in [
        ({"temperature": 0.5}, r"generators\.tiny\.temperature: was 1\.0, is now 0\.5"),
        ({"batch_size": 2}, r"batch_size: was 3, is now 2"),
        ({"prompts": (*PROMPTS, "more")}, "prompts: was '5 prompts"),
        ({"seed": 1}, "seed: was 0, is now 1"),
    ]:
        with pytest.raises(UserError, match=told):
            main(settings(out, **changes))
    assert contents(out) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no answering\.json"):
        main(settings(tmp_path / "thesis"))
    (out / "answers.journal").write_text("garbage\n")
    with pytest.raises(UserError, match=r"answers\.journal:1: got a line that answer did not write"):
        main(settings(out, limit=1))


def test_conversations_of_json_lines_go_through_the_template_and_come_back_as_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    lines: list[Any] = [{"prompt": messages}, {"prompt": "plain"}, "bare", messages]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(settings(tmp_path / "out", prompts=str(tmp_path / "p.jsonl"), num_candidates=1, temperature=0.0))
    rows = rows_of(tmp_path / "out")
    assert [m.role for m in rows[0].prompt.messages] == ["system", "user"]
    assert [row.prompt.text for row in rows[1:3]] == ["plain", "bare"]
    assert rows[0].candidates == rows[3].candidates
    model, encoder = open_model("tiny"), Encoder(tokenizer=tiny_tokenizer())
    ids = torch.tensor([encoder.prompt(rows[0].prompt)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert rows[0].candidates[0].text == encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_prompts_of_rows_are_answered_once_each_and_name_their_row(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("one?", "two?", "one?")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "model=tiny",
        "data.name=trl",
        f"data.path={tmp_path / 'd.jsonl'}",
        "max_new_tokens=3",
        f"output={tmp_path / 'out'}",
    ]
    assert main(read_config(AnswerConfig, None, [*words, "device=cpu"])).num_prompts == 2
    found = rows_of(tmp_path / "out")
    assert [row.prompt.words() for row in found] == ["one?", "two?"]
    assert found[1].provenance[0]["prompt_id"] != found[0].provenance[0]["prompt_id"]


def test_several_models_answer_in_one_row_each_with_its_own_settings(tmp_path: Path, whole: Path) -> None:
    entries = (Generator(name="warm"), Generator(name="cold", temperature=0.0, num_candidates=1))
    main(settings(tmp_path / "out", generators=entries))
    rows = rows_of(tmp_path / "out")
    assert [[o["generator"] for o in row.provenance] for row in rows] == [["warm", "warm", "cold"]] * 5
    assert [answers[:2] for answers in texts(tmp_path / "out")] == texts(whole)


LORAS: dict[str, Any] = {"lora": {"rank": 2}, "full": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a full fine-tune of two steps, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": p, "chosen": "yes yes", "rejected": "no"} for p in PROMPTS]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lora in LORAS.items():
        forget_accelerate()
        values = {
            "output": str(folder / name),
            "adapter": {"name": "text", "model": "tiny", "lora": lora, "template": "always"},
            "data": {"importer": {"name": "trl", "path": str(folder / "d.jsonl")}},
            "loss": {"name": "simpo"},
            "training": {
                "steps": 2,
                "batch_size": 4,
                "checkpoint_every": 1,
                "keep_checkpoints": 2,
                "optimiser": {"name": "adamw", "learning_rate": 0.05},
            },
        }
        train.main(config_of(values))
    return {name: folder / name for name in LORAS}


@pytest.mark.parametrize("kind", LORAS)
def test_tuned_weights_and_their_checkpoints_answer_as_the_run_was_trained(
    tmp_path: Path, runs: dict[str, Path], kind: str
) -> None:
    run = runs[kind]
    places = {"1": run / "checkpoint-1", "2": run / "checkpoint-2", "end": run}
    for name, place in places.items():
        main(settings(tmp_path / name, model=None, tuned=str(place)))
    main(settings(tmp_path / "base", template="always"))
    assert texts(tmp_path / "2") == texts(tmp_path / "end") != texts(tmp_path / "1")
    assert texts(tmp_path / "base") != texts(tmp_path / "end")
    origin = rows_of(tmp_path / "1")[0].provenance[0]
    assert (origin["model"], origin["template"], origin["tuned"]) == ("tiny", "always", str(run / "checkpoint-1"))
    stock = str(run / "model") if kind == "full" else None
    if stock:
        main(settings(tmp_path / "stock", model=stock, template="always"))
        assert texts(tmp_path / "stock") == texts(tmp_path / "end")


def test_stock_peft_says_what_answer_says_of_a_lora(tmp_path: Path, runs: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    main(settings(tmp_path / "out", model=None, tuned=str(runs["lora"]), num_candidates=1, temperature=0.0, batch_size=1))
    model = AutoModelForCausalLM.from_pretrained(runs["lora"])
    encoder = Encoder(tokenizer=tiny_tokenizer(), template="always")
    row = rows_of(tmp_path / "out")[0]
    ids = torch.tensor([encoder.prompt(row.prompt)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert row.candidates[0].text == encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_weights_that_changed_and_places_without_any_are_refused(tmp_path: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"tuned: got .*, and there is no .*config\.yaml"):
        main(settings(tmp_path / "out", tuned=str(tmp_path)))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_bytes((runs["lora"] / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="holds no tuned weights yet"):
        main(settings(tmp_path / "out", tuned=str(tmp_path / "begun")))
    with pytest.raises(UserError, match="cannot open"):
        main(settings(tmp_path / "out", model=str(tmp_path / "absent")))
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_no_answer_ends_before_it_has_a_visible_character() -> None:
    tokenizer = tiny_tokenizer()
    end, space, letter = tokenizer.eos_token_id, *(tokenizer(text)["input_ids"][0] for text in (" ", "a"))
    held = NeverEmpty(tokenizer, [end], start=2)
    zeros = torch.zeros(3, len(tokenizer))
    first = held(torch.tensor([[letter, letter]] * 3), zeros)
    assert (first[:, end] == -torch.inf).all() and (first[:, letter] == 0).all()
    second = held(torch.tensor([[letter, letter, letter], [letter, letter, space], [letter, letter, end]]), zeros)
    assert (second[:, end] == -torch.inf).tolist() == [False, True, True]


def test_faults_of_the_settings_are_told_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"output={tmp_path / 'out'}"]
    for extra, told in [
        (["model=x"], "prompts: got both or neither of prompts and data"),
        (["prompts=[a]"], "model: got neither model nor tuned"),
        (["model=x", "prompts=[a]", "temperature=0"], "num_candidates: got 4 with temperature 0"),
        (["model=x", "prompts=[a]", "top_p=0"], "top_p: got"),
        (["model=x", "prompts=[a]", "num_candidates=0"], "num_candidates: got 0, want 1 or more"),
        (["model=x", "prompts=[a]", "generators=[{name: a}, {name: a}]"], "got the names a, a, want each once"),
    ]:
        assert command_line(AnswerConfig, main, [*words, *extra]) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"text": "a"}\n', r"p\.jsonl:1: got"),
        ('"a"\n{half\n', r"p\.jsonl:2: got no valid JSON"),
        ('{"prompt": " "}\n', r"p\.jsonl:1: got an empty prompt"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}\n', r"p\.jsonl:1: .*image"),
        ("", "got none, want at least one"),
    ],
)
def test_faulty_prompts_are_refused_with_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        main(settings(tmp_path / "out", prompts=str(tmp_path / "p.jsonl")))
    assert not (tmp_path / "out").exists()
