"""The cache of reference log-probabilities of prompts with images: equal numbers, images told apart, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from image_text_runs import seen_tree, seen_weights, train_seen
from multimodal import picture, sample
from runs import SGD, config_of, forget_accelerate, largest_difference, metrics_of

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.options import Lora
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.multimodal.degradations import drop
from mmalign.prepare import main as prepare
from mmalign.records import Example

BLANK = {"degradation": {"name": "blank"}}


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def fill(output: Path, **changes: Any) -> Any:
    forget_accelerate()
    return prepare(config_of(seen_tree(output, **changes)))


def test_training_from_the_cache_is_training_without_it_and_holds_no_copy(tmp_path: Path) -> None:
    adapter = {**BLANK, "lora": None}
    changes: dict[str, Any] = {"loss": {"name": "mdpo"}, "training": {"steps": 3, "optimiser": SGD}}
    told = fill(tmp_path / "filled", **changes, adapter={**adapter, "cache": str(tmp_path / "cache")})
    assert told.num_references == 8 and told.num_bytes > 0
    cached = train_seen(tmp_path / "cached", **changes, adapter={**adapter, "cache": str(tmp_path / "cache")})
    plain = train_seen(tmp_path / "plain", **changes, adapter=adapter)
    assert largest_difference(seen_weights(cached), seen_weights(plain)) <= 1e-5
    losses = [[row["loss"] for row in metrics_of(run)] for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    again = fill(tmp_path / "again", **changes, adapter={**adapter, "cache": str(tmp_path / "cache")})
    assert again.num_bytes == told.num_bytes


def test_another_image_under_the_same_words_is_another_record(tmp_path: Path) -> None:
    settings = ImageTextAdapter(model="tiny", lora=Lora(rank=2), cache=str(tmp_path / "cache"))
    rows = [tuple(sample("what?", answer, picture(seed)) for answer in ("red", "blue")) for seed in (0, 1)]
    examples = [Example(id=str(n), samples=samples) for n, samples in enumerate(rows)]
    asked = frozenset({"policy", "reference"})
    filling = settings.open(asked=asked, needs_reference=True, caching=0)
    assert filling.cache is not None
    filling.cache.fill_references(filling, examples[:1], 2, torch.no_grad)
    filling.cache.close()
    policy = settings.open(asked=asked, needs_reference=True)
    prepared = policy.prepare(policy.collate([policy.item(examples[0], 0)]))
    with policy.reference() as network:
        reference, _ = prepared.inputs.refer(network)
    assert prepared.reference is not None
    torch.testing.assert_close(prepared.reference["policy"], reference["policy"], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="lacks texts of this run"):
        policy.prepare(policy.collate([policy.item(examples[1], 0)]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "drawn anew": (
        {"loss": {"name": "mdpo"}, "adapter": {"degradation": {"name": "crop"}}},
        "degradation crop, which is drawn anew in every epoch",
    ),
    "divergence": ({"loss": {"name": "chip"}, "adapter": BLANK}, "a loss of divergence"),
    "greedy": ({"loss": {"name": "povid"}, "adapter": BLANK}, "a loss of greedy"),
    "anchored": ({"loss": {"name": "tpo_visual"}, "adapter": BLANK}, "a loss of anchored"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_cache_cannot_hold_is_refused(what: str, tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    adapter = {**changes["adapter"], "cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=message):
        fill(tmp_path / "run", loss=changes["loss"], adapter=adapter)
    assert not (tmp_path / "cache").exists()


def test_features_are_not_kept_of_a_tower_or_projector_that_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features: got a folder while tower or projector are trained"):
        ImageTextAdapter(model="tiny", features=str(tmp_path))
    ImageTextAdapter(model="tiny", features=str(tmp_path), projector=False)


def test_a_cache_serves_what_is_dropped(tmp_path: Path) -> None:
    choice = Choice(name="drop", target=drop)
    settings = ImageTextAdapter(model="tiny", lora=Lora(rank=2), cache=str(tmp_path), degradation=choice)
    settings._check_cache(frozenset({"degraded", "reference_degraded"}))
