"""One turn of the loop for texts, by its verbs: answer, score, pairs or rank, train, answer with tuned weights, evaluate."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate
from test_ring import SEVERAL, launch

from mmalign import answer, evaluate, pairs, rank, score, train
from mmalign.answer import AnswerConfig
from mmalign.config import read_config
from mmalign.evaluate import EvaluateConfig
from mmalign.language.tiny import tiny_model, tiny_tokenizer
from mmalign.pairs import PairsConfig
from mmalign.rank import RankConfig
from mmalign.records import comparison, read
from mmalign.score import ScoreConfig

PROMPTS = [f"tell me of thing {number}" for number in range(64)]
ASKED = [f"what of {number}?" for number in range(40)]
SAMPLED = ["max_new_tokens=12", "batch_size=64", "device=cpu"]
ALIKE = ["num_candidates=1", "seed=7"]
LORA = {"rank": 8, "targets": ["lm_head", "o_proj", "down_proj"]}
IMPORTS = "import accelerate, datasets, peft, transformers"


class Share:
    """Share of the characters of a text that are among some."""

    judges = "texts"

    def __init__(self, name: str, wanted: str) -> None:
        self.name, self.wanted = name, wanted

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([sum(c in self.wanted for c in text) / max(len(text), 1) for text in texts])


def letters() -> Share:
    return Share("letters", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def vowels() -> Share:
    return Share("vowels", "aeiouAEIOU")


LETTERS, VOWELS = (f"{{name: '{__name__}:{name}'}}" for name in ("letters", "vowels"))


def answered(output: Path, asked: Sequence[str], *words: str) -> Path:
    prompts = f"prompts={json.dumps(list(asked))}"
    return answer.main(read_config(AnswerConfig, None, [*SAMPLED, prompts, f"output={output}", *words])).file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose logits are far enough apart for low-rank weights to turn them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, {"initializer_range": 0.2}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Answers sampled by two processes that are killed, the rest by one, and what a judge says of them."""
    folder = tmp_path_factory.mktemp("turn")
    words = [*SAMPLED, f"model={model}", f"prompts={json.dumps(PROMPTS)}", "output=answers"]
    job = {"verb": "answer", "words": words, "kill": ["answers/answers.journal.part-*", 64, True]}
    (folder / "several.py").write_text(re.sub("(?m)^(import accelerate.*|from diffusers .*)$", IMPORTS, SEVERAL))
    (folder / "jobs.json").write_text(json.dumps([job]))
    done = launch(folder, "several.py", "jobs.json")
    parts = list((folder / "answers").glob("answers.journal.part-*"))
    assert parts and not (folder / "answers" / "comparisons.jsonl").exists(), done.stderr[-3000:]
    rows = answered(folder / "answers", PROMPTS, f"model={model}")
    assert rows.read_bytes() == answered(folder / "whole", PROMPTS, f"model={model}").read_bytes(), "as if never killed"
    score.main(read_config(ScoreConfig, None, [f"data={rows}", f"scorers={LETTERS}", f"output={folder / 'scored.jsonl'}"]))
    return folder / "scored.jsonl"


def tuned(output: Path, model: Path, data: dict[str, Any], loss: dict[str, Any]) -> Path:
    forget_accelerate()
    values = {
        "output": str(output),
        "adapter": {"name": "text", "model": str(model), "lora": LORA},
        "data": data,
        "loss": loss,
        "training": {
            "steps": 40,
            "batch_size": 16,
            "checkpoint_every": 20,
            "keep_checkpoints": 2,
            "optimiser": {"name": "adamw", "learning_rate": 0.02},
        },
    }
    train.main(config_of(values))
    return output


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's, for low-rank weights on the output layer
def test_a_turn_makes_answers_better_also_for_a_judge_that_took_no_part_and_says_so(
    model: Path, scored: Path, tmp_path: Path
) -> None:
    lists = rank.main(read_config(RankConfig, None, [f"data={scored}", f"output={tmp_path / 'ranked.jsonl'}"])).output
    words = [f"path={scored}", "method.name=ranked", "method.scheme=best_worst", f"output={tmp_path / 'pairs.jsonl'}"]
    assert pairs.main(read_config(PairsConfig, None, words)).num_written > 40
    data = {"importer": {"name": "comparisons", "path": str(lists)}, "view": {"name": "ranked"}}
    run = tuned(tmp_path / "run", model, data, {"name": "rank_dpo", "beta": 0.05})
    before = answered(tmp_path / "before", ASKED, *ALIKE, f"model={model}")
    after = answered(tmp_path / "after", ASKED, *ALIKE, f"tuned={run}")
    between = answered(tmp_path / "between", ASKED, *ALIKE, f"tuned={run / 'checkpoint-20'}")
    words = [
        *(f"before={before}", f"after={after}", f"checkpoints={between}", f"output={tmp_path / 'report'}"),
        *(f"scorers={LETTERS}", f"held_out={VOWELS}", f"run={run}", "device=cpu"),
        *("pairs.importer.name=comparisons", f"pairs.importer.path={tmp_path / 'pairs.jsonl'}"),
    ]
    found = evaluate.main(read_config(EvaluateConfig, None, words)).evaluation
    assert found.headline.win_rate.low > 0.5
    assert found.held_out is not None and found.held_out.mean_after > found.held_out.mean_before
    assert [one.step for one in found.checkpoints] == [20] and found.last_step == 40
    assert found.pairs is not None and found.pairs.accuracy.low > 0.5
    row = comparison(read(after, least=1)[0], least=1)
    page = (tmp_path / "report" / "report.html").read_text()
    assert row.prompt.words() in page and "<th>step 20</th>" in page
    assert row.provenance[0]["tuned"] == str(run)
