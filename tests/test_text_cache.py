"""The cache of reference log-probabilities of texts: one serves every loss, beta and learning rate, and no other model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config_of, forget_accelerate, largest_difference, metrics_of
from text_runs import PAIRS, model_folder, rows_file, text_tree, text_weights, train_text
from text_tokenizers import tokenizer_of

from mmalign.errors import UserError
from mmalign.prepare import PreparedData
from mmalign.prepare import main as prepare

LOSSES_OF_ONE_CACHE: dict[str, Any] = {
    "dpo": {"name": "dpo", "beta": 0.3},
    "ld_dpo": {"name": "ld_dpo", "alpha": 0.2},
    "ld_dpo, another alpha": {"name": "ld_dpo", "alpha": 0.8, "beta": 0.05},
    "wpo": {"name": "wpo"},
    "ipo": {"name": "ipo"},
}


def fill(output: Path, cache: Path, **changes: Any) -> PreparedData:
    forget_accelerate()
    adapter = {**changes.pop("adapter", {}), "cache": str(cache)}
    return prepare(config_of(text_tree(output, adapter=adapter, **changes)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled with the pairs by `mmalign prepare` for DPO."""
    folder = tmp_path_factory.mktemp("cache")
    told = fill(folder / "run", folder / "cache")
    assert told.num_references == len(PAIRS) and told.num_bytes > 0
    return folder / "cache"


@pytest.mark.parametrize("name", LOSSES_OF_ONE_CACHE)
def test_training_from_the_cache_is_training_without_it(name: str, cache: Path, tmp_path: Path) -> None:
    changes = {"loss": LOSSES_OF_ONE_CACHE[name], "training": {"steps": 3}}
    cached = train_text(tmp_path / "cached", adapter={"cache": str(cache)}, **changes)
    plain = train_text(tmp_path / "plain", **changes)
    assert largest_difference(text_weights(cached), text_weights(plain)) <= 2e-4  # Adam amplifies the rounding of sums
    losses = [[row["loss"] for row in metrics_of(run)] for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)


def test_a_full_fine_tune_reads_the_cache_of_a_lora_and_holds_no_copy(cache: Path, tmp_path: Path) -> None:
    from mmalign.adapters.text import TextAdapter

    cached = train_text(tmp_path / "cached", adapter={"cache": str(cache), "lora": None})
    plain = train_text(tmp_path / "plain", adapter={"lora": None})
    losses = [[row["loss"] for row in metrics_of(run)] for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    policy = TextAdapter(model=str(model_folder()), cache=str(cache)).open(needs_reference=True)
    with pytest.raises(ValueError, match="opened without one"), policy.reference():
        pass


def test_rows_are_found_whatever_they_are_batched_with(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    assert tokenizer.encode("the cat")[: len(tokenizer.encode("the ca"))] != tokenizer.encode("the ca")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (*PAIRS, ("the ca", "t", "! two"), ("the ca", "!", "t"))]
    data = {"importer": {"name": "trl", "path": str(rows_file(rows, "merged"))}}
    fill(tmp_path / "run", tmp_path / "cache", data=data)
    for batch_size in (1, 3, 10):
        training = {"batch_size": batch_size, "steps": 10 // batch_size + 1}
        train_text(tmp_path / f"run{batch_size}", adapter={"cache": str(tmp_path / "cache")}, data=data, training=training)


def test_a_cache_filled_again_gets_nothing_twice_and_more_rows_are_added(cache: Path, tmp_path: Path) -> None:
    before = fill(tmp_path / "again", cache).num_bytes
    assert fill(tmp_path / "once more", cache).num_bytes == before
    rows = [{"prompt": "four is", "chosen": " eight", "rejected": " a mat"}]
    data = {"importer": {"name": "trl", "path": str(rows_file(rows, "more"))}}
    assert fill(tmp_path / "more", cache, data=data).num_bytes > before
    train_text(tmp_path / "run", adapter={"cache": str(cache)}, data=data, training={"batch_size": 1})


def test_a_changed_row_is_told_before_the_run_writes_anything(cache: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": c + "!", "rejected": r} for p, c, r in PAIRS]
    data = {"importer": {"name": "trl", "path": str(rows_file(rows, "changed"))}}
    with pytest.raises(UserError, match=r"adapter.cache: .* lacks texts of this run. Fill it with mmalign prepare"):
        train_text(tmp_path / "run", adapter={"cache": str(cache)}, data=data)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_cache_of_other_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cache.*"):
        train_text(tmp_path / "run", adapter={"cache": str(cache), "model": str(model_folder("qwen3"))})


def test_a_cache_of_another_way_to_run_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"packed=True.*packed=False|packed=False.*packed=True"):
        train_text(tmp_path / "run", adapter={"cache": str(cache), "pack": False})


def test_ktos_mismatched_answers_are_not_cached(cache: Path, tmp_path: Path) -> None:
    kto = {"loss": {"name": "kto"}, "data": {"view": "unpaired"}}
    with pytest.raises(UserError, match=r"adapter.mismatched to false"):
        train_text(tmp_path / "run", adapter={"cache": str(cache)}, **kto)
    train_text(tmp_path / "run", adapter={"cache": str(cache), "mismatched": False}, **kto)


def test_a_cache_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter.cache: .* does not exist. Fill it with mmalign prepare"):
        train_text(tmp_path / "run", adapter={"cache": str(tmp_path / "nothing")})


@pytest.mark.parametrize("pack", [True, False])
def test_joint_rows_and_long_answers_come_back_token_by_token(pack: bool, tmp_path: Path) -> None:
    from mmalign.adapters.options import Lora
    from mmalign.adapters.text import TextAdapter
    from mmalign.records import Content, Example, Sample

    long = " the cat sat on the mat and" * 12  # more than one record
    texts = ("name a colour", " blue" + long), ("say", " hello" + long), ("the ca", "t"), ("the ca", "! two")
    samples = [Sample(prompt=Content(text=p), completion=Content(text=a)) for p, a in texts]
    examples = [Example(id=str(n), samples=(samples[n], samples[n + 1])) for n in (0, 2)]
    folder = tmp_path / "cache"
    settings = TextAdapter(model=str(model_folder()), lora=Lora(rank=2), cache=str(folder), pack=pack)
    asked = frozenset({"joint", "reference_joint", "reference_shared"})
    filling = settings.open(asked=asked, needs_reference=True, caching=0)
    filling.cache.fill_references(filling, examples, 2, torch.no_grad)
    filling.cache.close()
    policy = settings.open(asked=asked, needs_reference=True)
    for group in (examples, examples[:1], examples[1:]):
        prepared = policy.prepare(policy.collate([policy.item(example, 0) for example in group]))
        with policy.reference() as network:
            reference, _ = prepared.inputs.refer(network)
        assert prepared.reference.keys() == reference.keys() == {"policy", "joint", "shared"}
        for name, value in reference.items():
            torch.testing.assert_close(prepared.reference[name], value, rtol=1e-5, atol=1e-3)


def test_a_cache_of_references_is_refused_where_the_reference_moves(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.cache: got .* a moving reference, which cannot use it\. Set cache to null"):
        train_text(tmp_path / "run", adapter={"cache": str(cache)}, training={"moving_reference": {"every": 2}})


def test_sums_of_long_answers_are_rounded_once(tmp_path: Path) -> None:
    from mmalign.adapters.text import TextAdapter
    from mmalign.records import Content, Example, Sample

    texts = [" the cat sat on the mat and" * 120, " two dogs ran after it and" * 120]
    samples = tuple(Sample(prompt=Content(text="tell me"), completion=Content(text=text)) for text in texts)
    example = Example(id="long", samples=samples)
    settings = TextAdapter(
        model=str(model_folder()), cache=str(tmp_path / "cache"), max_prompt_length=None, max_response_length=None
    )
    filling = settings.open(needs_reference=True, caching=0)
    filling.cache.fill_references(filling, [example], 2, torch.no_grad)
    filling.cache.close()
    policy = settings.open(needs_reference=True)
    inputs = policy.prepare(policy.collate([policy.item(example, 0)])).inputs
    kept, slot = policy.cache._read(inputs.tokens).double(), inputs.tokens.packed().slot
    want = torch.zeros(2, dtype=torch.float64).index_add(0, slot, kept)
    assert want.min() < -2048  # the distance of float32 numbers is .00024 there
    assert torch.equal(policy.cache.measures(inputs)["policy"][0], want.float())
