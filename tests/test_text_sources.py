"""Sources that write texts: pairs of the policy's own answers under a scorer, and self-play against an opponent."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate, largest_difference, metrics_of
from safetensors.torch import load_file

from mmalign.errors import UserError
from mmalign.experiment import build_objective, open_policy, read_examples
from mmalign.scorers.text_measures import TextMeasure
from mmalign.sources import Order
from mmalign.train import main

CHATS = "configs/smoke_data/chats.jsonl"
ONLINE = {"name": "online_pairs", "scorer": "text_length", "num_candidates": 2, "max_new_tokens": 6}
SELF_PLAY = {"name": "self_play", "segment": 4}
TRAINING = {"steps": 4, "batch_size": 2, "optimiser": {"name": "adamw", "learning_rate": 1e-2}, "checkpoint_every": 2}
PLAIN = SimpleNamespace(num_processes=1, process_index=0, device="cpu", mixed_precision="no", autocast=torch.no_grad)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))
    monkeypatch.chdir(Path(__file__).parents[1])


def tree_of(output: Path, source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "adapter": {"name": "text", "model": "tiny", "lora": {"rank": 4}, **more.pop("adapter", {})},
        "data": {
            "importer": {"name": "trl", "path": more.pop("path", CHATS)},
            "view": "prompts" if source["name"] == "online_pairs" else "best",
        },
        "source": source,
        "loss": more.pop("loss", {"name": "dpo", "beta": 0.1}),
        "training": {**TRAINING, **more.pop("training", {})},
        **more,
    }


def run(output: Path, source: dict[str, Any], **more: Any) -> Path:
    forget_accelerate()
    main(config_of(tree_of(output, source, **more)))
    return output


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def opened(
    tmp_path: Path, source: dict[str, Any], *, process: int = 0, num_processes: int = 1, **more: Any
) -> tuple[Any, Any, Order]:
    """The stream as one of several processes opens it, its policy, and the order."""
    config = config_of(tree_of(tmp_path / "out", source, **more))
    examples = read_examples(config.data)[0]
    policy = open_policy(config, examples, build_objective(config, examples), PLAIN)
    accelerator = SimpleNamespace(**{**vars(PLAIN), "num_processes": num_processes, "process_index": process})
    stream = config.source.build().open(examples, policy, accelerator=accelerator, seed=config.seed)
    size = config.training.batch_size // num_processes
    shape = {
        "num_examples": len(examples),
        "batch_size": size,
        "accumulation": config.training.accumulation,
        "seed": config.seed,
    }
    return stream, policy, Order(**shape, num_processes=num_processes, process=process)


def texts_of(prepared: Any, policy: Any) -> list[str]:
    return [policy.tokenizer.decode(ids) for ids in prepared.inputs.tokens.continuations]


# Both


@pytest.mark.parametrize(
    "source", [{**ONLINE, "every": 2, "num_candidates": 3}, {**SELF_PLAY, "buffer": 5}], ids=lambda s: s["name"]
)
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(tmp_path: Path, source: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", source)
    run(tmp_path / "parts", source, training={"steps": 2})
    parts = run(tmp_path / "parts", source, resume="latest")
    assert largest_difference(weights_of(whole), weights_of(parts)) == 0
    assert max(float(one.abs().max()) for name, one in weights_of(whole).items() if "lora_B" in name) > 0
    losses = [[one["loss"] for one in metrics_of(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("source", [ONLINE, SELF_PLAY], ids=lambda s: s["name"])
def test_adapters_and_views_that_do_not_fit_are_refused(tmp_path: Path, source: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="adapter that writes no answers"):
        run(tmp_path / "a", source, adapter={"name": "text_reward"}, loss="bradley_terry")
    with pytest.raises(UserError, match=r"adapter\.cache"):
        run(tmp_path / "b", source, adapter={"cache": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"a scorer of texts|want one answer an example"):
        changed = {**source, "scorer": "brightness"} if source is ONLINE else source
        view = {"data": {"importer": {"name": "trl", "path": CHATS}, "view": "pair" if source is SELF_PLAY else "prompts"}}
        run(tmp_path / "c", changed, **view)


# Online pairs


def test_answers_are_the_same_whatever_process_writes_them(tmp_path: Path) -> None:
    stream, _, order = opened(tmp_path, {**ONLINE, "num_candidates": 3}, training={"batch_size": 4})
    draws = list(enumerate(next(Order(num_examples=8, batch_size=4, accumulation=1, seed=0).micro_batches(0, 1))))
    together, scores = stream._judged(draws)
    apart = [stream._judged(draws[rank::2]) for rank in range(2)]
    assert sorted((pair for found, _ in apart for pair in found), key=lambda pair: pair.place) == together
    assert sorted(scores) == sorted(score for _, found in apart for score in found)
    stream.round = 1
    assert stream._judged(draws)[0] != together
    assert order.per_step == 4


def test_a_pair_is_the_scorers_best_and_worst_answer_and_answers_alike_are_none(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, {**ONLINE, "num_candidates": 4})
    prepared = next(stream.batches(order, 0, 1))
    best, worst = texts_of(prepared, policy)[0::2], texts_of(prepared, policy)[1::2]
    counts = [stream.scorer([""] * 2, texts) for texts in (best, worst)]
    assert (counts[0] > counts[1]).all()
    assert 0 < prepared.notes["online/valid"] <= 1 and prepared.notes["online/gap"] > 0
    stream.pool, stream.scorer = [], TextMeasure(name="same", measure=lambda text: 1.0)
    with pytest.raises(UserError, match="preferred no answer to another"):
        next(stream.batches(order, 1, 2))


def test_pairs_of_several_steps_are_written_at_once(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, {**ONLINE, "every": 3, "num_candidates": 4})
    rounds = []
    for _ in stream.batches(order, 0, 3):
        rounds.append((stream.round, len(stream.pool)))
    assert rounds[0][1] > 0 and rounds[1][0] == rounds[0][0]
    assert policy.extras == ()


def test_selm_gets_an_answer_of_the_reference(tmp_path: Path) -> None:
    loss = [{"name": "dpo", "beta": 0.01}, {"name": "selm", "beta": 0.01}]
    stream, policy, order = opened(tmp_path, ONLINE, loss=loss)
    first = next(stream.batches(order, 0, 1))
    assert first.inputs.extras == ("exploration",) and first.inputs.measures(policy.network)["exploration"].shape == (2, 1)
    prompts, keys = [stream.examples[n].samples[0].prompt for n in (1, 2)], [(0, -1), (1, -1)]
    before = stream._written(prompts, keys, by_reference=True)
    assert stream._written(prompts, keys) == before
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert stream._written(prompts, keys, by_reference=True) == before
    assert stream._written(prompts, keys) != before


def test_online_pairs_teach_what_the_scorer_likes(tmp_path: Path) -> None:
    source = {**ONLINE, "scorer": {"name": "test_text_sources:digits"}, "num_candidates": 4, "max_new_tokens": 8}
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{word}:", "chosen": " a", "rejected": " b"}) + "\n" for word in ("one", "two"))
    )
    training = {"steps": 20, "batch_size": 8, "checkpoint_every": None, "optimiser": {"name": "adamw", "learning_rate": 1e-2}}
    output = run(tmp_path / "out", source, path=str(rows), training=training, adapter={"lora": None})
    scores = [one["online/score"] for one in metrics_of(output)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1


def digits() -> TextMeasure:
    """How many ASCII letters or digits a text has."""
    return TextMeasure(name="digits", measure=lambda text: float(sum(one.isascii() and one.isalnum() for one in text)))


# Self-play


def test_only_a_segment_of_an_answer_is_written_anew_and_its_end_stays(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, SELF_PLAY, training={"batch_size": 8})
    prepared = next(stream.batches(order, 0, 1))
    ids = [list(map(int, one)) for one in prepared.inputs.tokens.continuations]
    for chosen, rejected in zip(ids[0::2], ids[1::2], strict=True):
        start = next(n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        behind = next(n for n, (a, b) in enumerate(zip(chosen[::-1], rejected[::-1], strict=False)) if a != b)
        assert len(chosen) - start - behind <= 4 and len(rejected) - start - behind <= 4
        assert policy.tokenizer.decode(chosen[-2:]) == policy.tokenizer.decode(rejected[-2:]) == "<|im_end|>\n"
    assert prepared.inputs.num_candidates == 2 and prepared.notes["self_play/buffer"] == 8 * prepared.notes["self_play/new"]


def test_whole_answers_are_written_anew_where_there_are_no_segments(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, {**SELF_PLAY, "segment": None, "max_new_tokens": 5})
    prepared = next(stream.batches(order, 0, 1))
    rejected = [len(one) for one in prepared.inputs.tokens.continuations[1::2]]
    assert max(rejected) <= 5 + 2
    assert all(
        part.kept == [] and part.tokens == 5
        for part in [stream._parts(policy.item(stream.examples[0], 0)["encoded"], "0" * 64)]
    )


def test_what_was_drawn_more_often_is_drawn_less_likely(tmp_path: Path) -> None:
    stream, _, order = opened(tmp_path, SELF_PLAY, training={"batch_size": 8})
    next(stream.batches(order, 0, 1))
    times = [0, 1, 3, 0, 0, 0, 0, 0][: len(stream.pairs)]
    drawn = torch.zeros(len(times))
    for step in range(4000):
        for pair, count in zip(stream.pairs, times, strict=True):
            pair.drawn = count
        drawn[stream.pairs.index(stream._draw(1, step)[0])] += 1
    weights = torch.tensor([1 / (count + 1) for count in times])
    torch.testing.assert_close(drawn / 4000, weights / weights.sum(), rtol=0, atol=0.025)
    stream.pairs = stream.pairs[:2]
    five = stream._draw(5, 0)
    assert sorted(sum(one is pair for one in five) for pair in stream.pairs) == [2, 3]


def test_the_buffer_forgets_its_oldest_pairs_and_none_keeps_only_the_steps_own(tmp_path: Path) -> None:
    for buffer, most in ((5, 5), (None, 2)):
        stream, _, order = opened(tmp_path, {**SELF_PLAY, "buffer": buffer})
        sizes = []
        for _ in stream.batches(order, 0, 4):
            sizes.append(len(stream.pairs))
        assert max(sizes) <= most and sizes[-1] == most


def test_the_opponent_lags_behind_the_policy_by_its_decay(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, {**SELF_PLAY, "opponent": {"decay": 0.5}})
    start = [parameter.detach().clone() for parameter in policy.parameters()]
    for step, _ in enumerate(stream.batches(order, 0, 3)):
        for own, first in zip(stream.opponent.weights, start, strict=True):
            lag = {0: 0.0, 1: 0.5, 2: 1.25}[step]  # 0.5 * 1, then 0.5 * 0.5 + 0.5 * 2
            torch.testing.assert_close(own, first + lag, rtol=0, atol=1e-5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 1
    for parameter, first in zip(policy.parameters(), start, strict=True):
        torch.testing.assert_close(parameter.detach(), first + 3, rtol=0, atol=1e-5)


def test_the_opponent_writes_not_the_policy(tmp_path: Path) -> None:
    stream, policy, order = opened(tmp_path, SELF_PLAY)
    before = stream._rewritten(order, 0, 0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert stream._rewritten(order, 0, 0) == before
    stream.opponent.follow(policy.parameters())
    assert stream._rewritten(order, 0, 0) != before


def test_self_play_raises_the_datas_answers_over_the_opponents(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = tmp_path / "rows.jsonl"
    words = ("sun", "moon", "rain", "wind")
    rows.write_text(
        "".join(
            json.dumps({"prompt": "Say:", "chosen": " " + " ".join(draw.choices(words, k=2)), "rejected": " ?"}) + "\n"
            for _ in range(32)
        )
    )
    training = {"steps": 12, "batch_size": 4, "checkpoint_every": None}
    output = run(tmp_path / "out", SELF_PLAY, path=str(rows), training=training, adapter={"lora": None})
    metrics = metrics_of(output)
    assert metrics[-1]["rewards/margins"] > 1 and metrics[-1]["logps/ratio_chosen"] > metrics[-1]["logps/ratio_rejected"]
