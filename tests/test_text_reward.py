"""Reward models of texts: scores at the right token, whatever the padding; outputs that stock transformers loads; learning."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate, metrics_of

from mmalign.adapters.options import Lora
from mmalign.adapters.text_reward import HEADS, TextRewardAdapter, TextRewardPolicy
from mmalign.config import Table, read_config
from mmalign.errors import UserError
from mmalign.experiment import TrainConfig, read_examples
from mmalign.language.tiny import tiny_folder
from mmalign.likelihoods import padded_texts
from mmalign.losses.reward_models import mean_skew_scores, prompt_gate, skew_score
from mmalign.records import Example
from mmalign.train import main

CONFIGS = Path(__file__).parents[1] / "configs"
ANIMALS = (
    "ant",
    "bear",
    "cat",
    "deer",
    "eel",
    "fox",
    "goat",
    "hen",
    "ibis",
    "jay",
    "koala",
    "lion",
    "mole",
    "newt",
    "owl",
    "pig",
)
GPM = {"name": "gpm", "dim": 8, "prompt_gate": False}


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))
    monkeypatch.chdir(CONFIGS.parent)


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tree_of(output: Path, path: str, **more: Any) -> dict[str, Any]:
    adapter = {"name": "text_reward", "model": "tiny", **more.pop("adapter", {})}
    return {
        "output": str(output),
        "adapter": adapter,
        "data": {"importer": {"name": "trl", "path": path}},
        "loss": more.pop("loss", "bradley_terry"),
        "training": {
            "steps": 4,
            "batch_size": 2,
            "optimiser": {"name": "adamw", "learning_rate": 1e-3},
            "checkpoint_every": None,
            "log_every": 20,
            **more.pop("training", {}),
        },
    }


def opened(tmp_path: Path, **adapter: Any) -> tuple[TextRewardPolicy, list[Example]]:
    loss = "gpm" if adapter.get("head", {}).get("name") == "gpm" else "bradley_terry"
    config = config_of(tree_of(tmp_path / "out", "configs/smoke_data/chats.jsonl", adapter=adapter, loss=loss))
    return config.adapter.build().open(seed=3), list(read_examples(config.data)[0])


def batch_of(policy: TextRewardPolicy, examples: list[Example]) -> Any:
    return policy.prepare(policy.collate([policy.item(example, 0) for example in examples])).inputs


def trained(output: Path, path: str, **more: Any) -> Any:
    forget_accelerate()
    config = config_of(tree_of(output, path, **more))
    main(config)
    return config


def shares(config: TrainConfig, output: Path, path: str) -> float:
    """Of the pairs of a file, how many a saved run ranks as told."""
    examples = list(read_examples(config_of(tree_of(output, path)).data)[0])
    policy = config.adapter.build().open(seed=0)
    load(policy, output)
    with torch.no_grad():
        scores = batch_of(policy, examples).logps(policy.network)
    margins = scores[:, 0] if scores.shape[1] == 1 else scores[:, 0] - scores[:, 1]
    return float((margins > 0).float().mean())


def load(policy: TextRewardPolicy, output: Path) -> None:
    """The weights that a full fine-tune saved."""
    from safetensors.torch import load_file

    from mmalign.scorers.preference import HEAD_FILES

    policy.model.load_state_dict(load_file(output / "model" / "model.safetensors"))
    if not policy.scalar:
        policy.network.head.load_state_dict(load_file(output / "model" / HEAD_FILES[1]))


# What is scored


@pytest.mark.parametrize("head", [{"name": "scalar"}, {"name": "gpm", "dim": 4}], ids=str)
def test_a_score_does_not_depend_on_what_it_is_batched_and_padded_with(tmp_path: Path, head: dict[str, Any]) -> None:
    policy, examples = opened(tmp_path, head=head)
    together = batch_of(policy, examples).logps(policy.network)
    alone = torch.cat([batch_of(policy, [example]).logps(policy.network) for example in examples])
    assert together.shape == (8, 2 if head["name"] == "scalar" else 1) and together.dtype == torch.float32
    assert together.std() > 0
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_candidates_can_be_scored_one_at_a_time(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path)
    inputs = batch_of(policy, examples)
    parts = [inputs.candidates(slice(i, i + 1)).logps(policy.network) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts, 1), inputs.logps(policy.network), rtol=0, atol=1e-6)


def test_the_token_that_is_judged_is_the_last_one_and_the_end_of_text_counts(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "plain.jsonl", [{"prompt": "Say a word:", "chosen": " yes", "rejected": " nobody"}] * 2)
    config = config_of(tree_of(tmp_path / "out", path))
    policy = config.adapter.build().open()
    texts = batch_of(policy, list(read_examples(config.data)[0])[:1]).texts
    last = texts.ids[torch.arange(2), texts.last]
    assert last.tolist() == [policy.tokenizer.eos_token_id] * 2
    assert policy.tokenizer.decode(texts.ids[0, : texts.last[0]]) == "Say a word: yes"
    assert policy.tokenizer.decode(texts.ids[0, : texts.prompt_last[0] + 1]) == "Say a word:"
    assert policy.pad != policy.tokenizer.eos_token_id


def test_low_precision_weights_give_scores_in_float32_that_are_not_rounded(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, lora={"rank": 2}, dtype="bfloat16")
    scores = batch_of(policy, examples).logps(policy.network)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


def test_padded_texts_are_judged_where_transformers_looks() -> None:
    texts = padded_texts([[5, 6, 9], [5], [7, 0, 8, 0]], (1, 1, 2), 1, pad=0)
    assert texts.last.tolist() == [2, 0, 2] and texts.prompt_last.tolist() == [0, 0, 1]
    assert texts.ids.tolist() == [[5, 6, 9, 0], [5, 0, 0, 0], [7, 0, 8, 0]]


def test_a_preference_head_gives_what_the_losses_call_gate_and_skew_score(tmp_path: Path) -> None:
    policy, examples = opened(tmp_path, head={"name": "gpm", "dim": 6})
    texts = batch_of(policy, examples).texts
    network = policy.network
    embeddings, gate = network.embeddings(texts)
    hidden = policy.model(input_ids=texts.ids).last_hidden_state
    raw = network.head.embed(hidden[torch.arange(16), texts.last]).view(8, 2, 6)
    logits = network.head.gate(hidden[torch.arange(16), texts.prompt_last]).view(8, 2, 3)[:, 0] / 32**0.5
    expected = skew_score(raw[:, 0], raw[:, 1], prompt_gate(logits))
    torch.testing.assert_close(network(texts)[:, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gate[:, 0].mean(1), torch.ones(8))
    both = mean_skew_scores(embeddings, gate[:, 0], normalised=False)
    torch.testing.assert_close(both, torch.stack([expected, -expected], 1), rtol=0, atol=1e-6)


# What a run leaves


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_a_scalar_reward_model_loads_in_stock_transformers_with_its_scores(tmp_path: Path, lora: Any) -> None:
    config = trained(tmp_path / "run", "configs/smoke_data/chats.jsonl", adapter={"lora": lora}, training={"steps": 3})
    names: dict[str, Any] = {}
    policy = config.adapter.build().open(seed=config.seed)
    exec("import transformers\n" + policy.loading_lines(tmp_path / "run"), names)
    examples = list(read_examples(config.data)[0])
    texts = batch_of(policy, examples).texts
    before = policy.network(texts).detach()
    if lora is None:
        load(policy, tmp_path / "run")
    else:
        policy = config.adapter.build().open(seed=9, weights=tmp_path / "run")
    ours = policy.network(texts).detach().flatten()
    batch = names["tokenizer"].pad(
        {"input_ids": [ids[: end + 1].tolist() for ids, end in zip(texts.ids, texts.last, strict=True)]}, return_tensors="pt"
    )
    stock = names["model"].eval()(**batch).logits.detach()[:, 0]
    assert not torch.allclose(before.flatten(), ours, atol=1e-5)
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5)


def test_a_saved_adapter_names_its_base_by_the_whole_path_wherever_the_run_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(None)
    monkeypatch.chdir(base.parent)
    policy = TextRewardAdapter(model=base.name, lora=Lora(rank=2)).open()
    monkeypatch.chdir(tmp_path)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_losses_that_want_a_reference_and_rows_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which a reward model has not, want bradley_terry"):
        trained(tmp_path / "a", "configs/smoke_data/chats.jsonl", loss={"name": "dpo", "beta": 0.1})
    with pytest.raises(UserError, match=r"got gpm with adapter\.head scalar, want bradley_terry"):
        trained(tmp_path / "b", "configs/smoke_data/chats.jsonl", loss="gpm")
    with pytest.raises(UserError, match=r"got bradley_terry with adapter\.head gpm, want gpm"):
        trained(tmp_path / "c", "configs/smoke_data/chats.jsonl", adapter={"head": GPM})
    with pytest.raises(UserError, match="even number"):
        config_of(tree_of(tmp_path / "d", "x", adapter={"head": {"name": "gpm", "dim": 3}}))


@pytest.mark.parametrize(("head", "told"), [({"dim": 2}, True), ({"dim": 2, "normalise": False}, False), ({"dim": 4}, False)])
def test_two_normalised_dimensions_are_warned_of(head: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture) -> None:
    table = Table(HEADS)
    TextRewardAdapter(model="tiny", head=table.choose("gpm", **head)).open()
    assert ("dim 2 fall together where preferences go in circles" in caplog.text) == told


@pytest.mark.parametrize("name", ["smoke_reward_text", "smoke_gpm_text"])
def test_smoke_config_trains(name: str, tmp_path: Path) -> None:
    forget_accelerate()
    main(read_config(TrainConfig, CONFIGS / f"{name}.yaml", [f"output={tmp_path / 'run'}"]))
    assert len(metrics_of(tmp_path / "run")) == 4
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A reward model of texts on `tiny`" in card


# What is learnt


def test_a_reward_model_learns_to_prefer_longer_answers_it_has_not_seen(tmp_path: Path) -> None:
    draw = random.Random(0)

    def pair() -> dict[str, str]:
        short, long = (" ".join(draw.choices(ANIMALS, k=n)) for n in (draw.randint(1, 2), draw.randint(3, 4)))
        return {"prompt": "Name animals: ", "chosen": long, "rejected": short}

    train = rows_file(tmp_path / "train.jsonl", [pair() for _ in range(128)])
    held = rows_file(tmp_path / "held.jsonl", [pair() for _ in range(64)])
    training = {"steps": 30, "batch_size": 8, "optimiser": {"name": "adamw", "learning_rate": 3e-3}}
    config = trained(tmp_path / "run", train, training=training, loss={"name": "bradley_terry", "centring": 0.01})
    assert shares(config, tmp_path / "run", held) > 0.9


def test_a_preference_model_learns_a_cycle_that_no_scores_can_give(tmp_path: Path) -> None:
    beats = {"rock": "scissors", "scissors": "paper", "paper": "rock"}
    rows = [{"prompt": "I say", "chosen": f" {one}", "rejected": f" {other}"} for one, other in beats.items()]
    path = rows_file(tmp_path / "cycle.jsonl", rows)
    training = {"steps": 40, "batch_size": 3, "optimiser": {"name": "adamw", "learning_rate": 1e-3}}
    gpm = trained(tmp_path / "gpm", path, adapter={"head": GPM}, loss="gpm", training=training)
    scalar = trained(tmp_path / "scalar", path, training=training)
    assert shares(gpm, tmp_path / "gpm", path) > 0.95
    assert shares(scalar, tmp_path / "scalar", path) < 0.67
    assert metrics_of(tmp_path / "gpm")[-1]["loss"] < 0.2 < math.log(2) - 0.01 < metrics_of(tmp_path / "scalar")[-1]["loss"]
