"""One step of Blind PO in every family: loss, gradients, images encoded once, what is saved and gone on from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import picture, sample
from torch import Tensor

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.options import Lora
from mmalign.losses import LOSSES
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.opening import part_of
from mmalign.records import Example

FAMILY = pytest.mark.parametrize("family", FAMILIES)
ASKED = frozenset({"policy", "reference"})
WIDE, TALL = picture(0, 60, 40), picture(1, 40, 70)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def opened(family: str, *, weights: Path | None = None, **settings: Any) -> Any:
    adapter = ImageTextAdapter(**{"model": "tiny", "tiny": {"family": family}, "lora": Lora(rank=2), **settings})
    return adapter.open(asked=ASKED, needs_reference=True, num_candidates=3, weights=weights)


def rows() -> list[Example]:
    """Chosen, rejected, blind: of a row with one image, of one with two, and of one that shows nothing."""
    answers = ("red", "a blue one", "no idea")
    shown = {"one": (WIDE,), "two": (TALL, WIDE), "none": ()}
    return [Example(id=n, samples=tuple(sample("what?", a, *media) for a in answers)) for n, media in shown.items()]


def measured(policy: Any) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of the policy, with a graph, and of the reference."""
    inputs = policy.prepare(policy.collate([policy.item(row, 0) for row in rows()])).inputs
    with policy.reference() as network:
        reference, inputs = inputs.refer(network)
    return inputs.measures(policy.network)["policy"], reference["policy"]


@FAMILY
def test_a_step_of_blind_po_moves_the_language_model_alone_and_goes_on_where_it_was_saved(family: str, tmp_path: Path) -> None:
    policy = opened(family)
    assert policy.network.packs == (family != "mllama")
    sight = policy.network.sight
    before = sight.num_encoded
    scores, reference = measured(policy)
    distinct = 3 if family == "llava_onevision" else 2  # which shows less of an image that has company
    assert sight.num_encoded - before == distinct, "policy, reference and all answers share what is encoded once"
    torch.testing.assert_close(scores, reference, rtol=0, atol=1e-3)
    assert scores.shape == (3, 3) and len({round(float(value), 3) for value in scores.detach().flatten()}) == 9
    loss = LOSSES["blind_bpo"](scores, reference, beta=0.1).losses.mean()
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-3)
    loss.backward()
    names = {id(parameter): name for name, parameter in policy.model.named_parameters()}
    assert all(part_of(names[id(one)], FAMILIES[family]) == "language" for one in policy.parameters())
    outer = [one for one in policy.parameters() if "lora_B" in names[id(one)]]
    assert outer and all(one.grad is not None and bool(one.grad.any()) for one in outer)
    with torch.no_grad():
        for one in outer:
            one -= 0.5 * one.grad / one.grad.norm()
    moved, still = measured(policy)
    torch.testing.assert_close(still, reference, rtol=0, atol=1e-3)
    assert (moved - reference).abs().max().item() > 1e-2
    after = LOSSES["blind_bpo"](moved, still, beta=0.1).losses.mean()
    assert after.item() < loss.item()
    policy.save(tmp_path)
    again, _ = measured(opened(family, weights=tmp_path))
    torch.testing.assert_close(again, moved, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama"])
def test_a_tower_that_is_asked_for_is_trained_where_features_depend_on_it(family: str) -> None:
    policy = opened(family, lora=None, tower=True)
    told = policy.plan()
    scores, reference = measured(policy)
    LOSSES["blind_bpo"](scores, reference, beta=0.1).losses.mean().backward()
    lacking = [name for name, one in policy.model.named_parameters() if one.requires_grad and one.grad is None]
    assert not lacking, "processes that train together wait for every gradient"
    frozen = {name for name, one in policy.model.named_parameters() if not one.requires_grad}
    assert bool(frozen) == (family == "llava") == ("of the tower stay as they are: no feature depends on them" in told)
    assert all(".vision_tower.encoder.layers.1." in name or ".post_layernorm." in name for name in frozen)


def test_low_rank_weights_lie_on_no_layer_that_features_do_not_depend_on() -> None:
    policy = opened("llava", tower=True)
    tower = [name for name, one in policy.model.named_parameters() if one.requires_grad and ".vision_tower." in name]
    assert tower and all(".layers.0." in name for name in tower)
    assert "stay as they are" in policy.plan()
