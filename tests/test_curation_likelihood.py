"""`mmalign relabel` with method likelihood: a language model's log-probabilities as columns, and what is selected by them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.language.opening import add_lora, open_model, save_lora
from mmalign.language.tiny import tiny_model, tiny_tokenizer
from mmalign.records import Comparison, Content, Message, comparison, read, write
from mmalign.relabel import RelabelConfig
from mmalign.relabel import main as relabel_main
from mmalign.row_files import Curated
from mmalign.select import SelectConfig
from mmalign.select import main as select_main

END = "<|endoftext|>"


def saved(folder: Path, seed: int) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, {"initializer_range": 0.3}, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return saved(folder / "base", 0), saved(folder / "tuned", 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    talk = Content(messages=(Message("user", "Add 1 and 1."),))
    rows = [
        Comparison(
            id="text", prompt=Content(text="Say hi: "), candidates=(Content(text="hi"), Content(text="no, go")), ranks=(1, 2)
        ),
        Comparison(id="talk", prompt=talk, candidates=(Content(text="2"), Content(text="It is three.")), ranks=(1, 2)),
        Comparison(
            id="step", prompt=talk, prefix="First ", candidates=(Content(text="add"), Content(text="subtract")), ranks=(1, 2)
        ),
    ]
    return write(rows, tmp_path / "rows.jsonl")


def likelihood(data: Path, output: Path, model: Path | str, label: str, **more: Any) -> Curated:
    method = json.dumps({"name": "likelihood", "model": str(model), "label": label, **more})
    return relabel_main(read_config(RelabelConfig, None, [f"path={data}", f"method={method}", f"output={output}"]))


def rows_of(path: Path) -> list[Comparison]:
    return [comparison(one) for one in read(path)]


def by_hand(model: Path, before: str, after: str) -> tuple[float, int]:
    """Sum of log p of the tokens of `after`, by stock transformers."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    given, whole = (tokenizer(text)["input_ids"] for text in (before, before + after))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([whole])).logits[0].double()
    logps = logits.log_softmax(-1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
    return float(logps[len(given) - 1 :].sum()), len(whole) - len(given)


@pytest.mark.parametrize("mean", [False, True])
def test_the_column_is_the_log_probability_of_each_response(
    data: Path, tmp_path: Path, models: tuple[Path, Path], mean: bool
) -> None:
    likelihood(data, tmp_path / "out.jsonl", models[0], "base", mean=mean, batch_size=2)
    text, talk, step = rows_of(tmp_path / "out.jsonl")
    chat = "<|im_start|>user\nAdd 1 and 1.<|im_end|>\n<|im_start|>assistant\n"
    expected = [
        (text, [by_hand(models[0], "Say hi: ", answer + END) for answer in ("hi", "no, go")]),
        (talk, [by_hand(models[0], chat, f"{answer}<|im_end|>\n") for answer in ("2", "It is three.")]),
        (step, [by_hand(models[0], f"{chat}First ", answer) for answer in ("add", "subtract")]),
    ]
    for row, values in expected:
        sums = [total / count if mean else total for total, count in values]
        assert row.scores["base"] == pytest.approx(sums, rel=1e-4), row.id
        [done] = row.provenance[0]["curation"]
        assert done["tokens"] == [count for _, count in values]
        assert row.ranks == (1.0, 2.0), "labels stay as they are"


def test_the_model_that_a_run_has_tuned_reads_with_its_weights(data: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    model = open_model(str(models[0]))
    add_lora(model, rank=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    run = save_lora(model, tmp_path / "run", str(models[0])).parent
    likelihood(data, tmp_path / "out.jsonl", models[0], "tuned", weights=str(run))
    text = rows_of(tmp_path / "out.jsonl")[0]
    expected = [by_hand(run, "Say hi: ", answer + END)[0] for answer in ("hi", "no, go")]
    assert text.scores["tuned"] == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(by_hand(models[0], "Say hi: ", "hi" + END)[0], rel=1e-2)


def test_a_second_run_asks_no_model_and_writes_the_same_bytes(data: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    model = shutil.copytree(models[0], tmp_path / "model")
    output = tmp_path / "out.jsonl"
    made = likelihood(data, output, model, "base")
    assert made.told == (f"3 rows read by {model}, 0 known before",)
    before = output.read_bytes()
    shutil.rmtree(model)
    output.unlink()
    made = likelihood(data, output, model, "base")
    assert made.told == (f"0 rows read by {model}, 3 known before",)
    assert output.read_bytes() == before
    with pytest.raises(UserError, match="likelihood: cannot open"):
        likelihood(data, output, model, "base", dtype="bfloat16")


def test_long_rows_are_left_out(data: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    made = likelihood(data, tmp_path / "out.jsonl", models[0], "base", max_length=30)
    assert [one.id for one in rows_of(tmp_path / "out.jsonl")] == ["text"]
    assert dict(made.dropped) == {"longer than the model reads, or than max_length": 2}


def test_davir_selects_by_two_models(data: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    likelihood(data, tmp_path / "one.jsonl", models[0], "base")
    likelihood(tmp_path / "one.jsonl", tmp_path / "two.jsonl", models[1], "tuned")
    rows = rows_of(tmp_path / "two.jsonl")
    scores = {one.id: 1 - one.scores["tuned"][0] / one.scores["base"][0] for one in rows}
    filters = "filters={name: davir, base: base, tuned: tuned, share: 0.34}"
    select_main(read_config(SelectConfig, None, [f"path={tmp_path / 'two.jsonl'}", filters, f"output={tmp_path / 'o.jsonl'}"]))
    assert [one.id for one in rows_of(tmp_path / "o.jsonl")] == [max(scores, key=lambda id: scores[id])]
    assert len(rows[0].provenance[0]["curation"]) == 2, "each step of the way is told"


def test_candidates_are_ranked_by_the_follow_ups_that_a_model_expects(
    data: Path, tmp_path: Path, models: tuple[Path, Path]
) -> None:
    pleased, displeased = ["Thanks.", "Good!"], ["No."]
    method = json.dumps({"name": "followups", "model": str(models[0]), "positive": pleased, "negative": displeased})
    output = tmp_path / "out.jsonl"
    relabel_main(read_config(RelabelConfig, None, [f"path={data}", f"method={method}", f"output={output}"]))
    text, talk, _ = rows_of(output)
    before = "<|im_start|>user\nAdd 1 and 1.<|im_end|>\n<|im_start|>assistant\n{}"
    after = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    for row, prompt, turn in ((text, "Say hi: {}\n\n", "{}" + END), (talk, before, after)):
        rewards = []
        for candidate in row.candidates:
            sums = {
                said: by_hand(models[0], prompt.format(candidate.text), turn.format(said))[0]
                for said in (*pleased, *displeased)
            }
            rewards.append((sums["Thanks."] + sums["Good!"]) / 2 - sums["No."])
        assert row.scores["followups"] == pytest.approx(rewards, rel=1e-3, abs=1e-3), row.id
        assert row.ranks == ((1.0, 2.0) if rewards[0] > rewards[1] else (2.0, 1.0))
    made = relabel_main(read_config(RelabelConfig, None, [f"path={data}", f"method={method}", f"output={output}"]))
    assert "0 rows read by" in made.told[0] and "3 known before" in made.told[0]
