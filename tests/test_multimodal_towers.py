"""A tower that is not trained runs once a step for a policy and its frozen copy, whatever their projectors do."""

import copy
from typing import Any

import pytest
import torch
from multimodal import VIDEO_FAMILIES, encoder, parts, picture, sample
from test_image_text_network import ROWS, STAKES, WIDE, shared, shown
from tiny_causal import gradients, relative_errors

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.options import Lora
from mmalign.adapters.text_tokens import tokens_of
from mmalign.language.network import TokenNetwork
from mmalign.multimodal import towers as rooms
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.network import Sight
from mmalign.multimodal.opening import part_of
from mmalign.multimodal.towers import Towers
from mmalign.records import Example

FAMILY = pytest.mark.parametrize("family", FAMILIES)


def network_of(family: str, towers: Towers | None, *, scale: float = 1.0) -> TokenNetwork:
    """A network of a copy of the family's model, whose projector is trained and was moved away."""
    model = copy.deepcopy(parts(family)[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, FAMILIES[family]) == "projector")
        if parameter.requires_grad:
            parameter.data.mul_(scale)
    return TokenNetwork(model, pack=family != "mllama", sight=Sight(model, FAMILIES[family], shown(family), None, towers))


def layout_of(family: str) -> Any:
    return shared(family).packed() if family != "mllama" else shared(family).padded()


def count_tower(network: TokenNetwork, family: str) -> list[int]:
    """Grows by one whenever a layer with weights of the tower runs."""
    tower = network.model.model.get_submodule(FAMILIES[family].tower)
    inner = [path.removeprefix(f"{FAMILIES[family].tower}.") for path in FAMILIES[family].projectors]
    calls: list[int] = []
    for name, layer in tower.named_modules():
        if isinstance(layer, torch.nn.Linear) and not any(name.startswith(path) for path in inner):
            layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


@FAMILY
def test_another_networks_projector_takes_what_the_tower_said_before(family: str) -> None:
    towers = Towers()
    first, second = network_of(family, towers), network_of(family, towers, scale=1.1)
    plain = network_of(family, None, scale=1.1)
    assert first.sight is not None
    first.sight.forget()
    layout = layout_of(family)
    calls = count_tower(second, family)
    with torch.no_grad():
        first(layout)
    logps = second(layout)["logps"]
    assert not calls
    wanted = plain(layout)["logps"]
    torch.testing.assert_close(logps, wanted, rtol=0, atol=0)
    got = gradients(second.model, (logps * STAKES).sum())
    assert max(relative_errors(got, gradients(plain.model, (wanted * STAKES).sum())).values()) < 1e-12
    first.sight.forget()
    with torch.no_grad():
        torch.testing.assert_close(second(layout)["logps"], wanted.detach(), rtol=0, atol=0)
    assert calls
    assert "forward" not in vars(second.model.model.get_submodule(FAMILIES[family].tower))


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_and_images_of_one_step_are_remembered_apart(family: str) -> None:
    encode = encoder(family, as_video=True)
    frames = [picture(n, 40, 40) for n in range(4)]
    layout = tokens_of(
        [encode([sample("what moves?", "a disc", *frames), sample("which?", "one", WIDE)])], 2, wanted=frozenset()
    )
    packed, towers = layout.packed(), Towers()
    first, second, plain = network_of(family, towers), network_of(family, towers), network_of(family, None)
    calls = count_tower(second, family)
    with torch.no_grad():
        first(packed)
        torch.testing.assert_close(second(packed)["logps"], plain(packed)["logps"], rtol=0, atol=0)
    assert not calls


def test_other_images_and_another_precision_are_not_taken_for_these() -> None:
    towers = Towers()
    network, plain = network_of("llava", towers), network_of("llava", None)
    layout, less = shared("llava").packed(), shared("llava", ROWS[:1]).packed()
    with torch.no_grad():
        network(layout)
        torch.testing.assert_close(network(less)["logps"], plain(less)["logps"], rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(network(layout)["logps"], plain(layout)["logps"], rtol=0, atol=0)


def test_little_is_remembered_beside_the_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MOST_BYTES", 1)
    towers = Towers()
    network = network_of("llava", towers)
    with torch.no_grad():
        for rows in (ROWS, ROWS[:1], ROWS):
            network(shared("llava", rows).packed())
    assert len(towers._memo) == 1


def test_a_fault_in_a_tower_leaves_it_as_it_was() -> None:
    network = network_of("llava", Towers())
    assert network.sight is not None
    network.sight.forget()
    tower = network.model.model.vision_tower
    tower.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        network(shared("llava").packed())
    assert "forward" not in vars(tower)


def patchings(*models: Any) -> list[int]:
    """Grows by one whenever pixels are made to patches."""
    calls: list[int] = []
    for model in models:
        [patches] = (layer for layer in model.model.vision_tower.modules() if isinstance(layer, torch.nn.Conv2d))
        patches.register_forward_hook(lambda *_: calls.append(1))
    return calls


def take_step(policy: Any, row: Example) -> None:
    """The passes of a step: of the policy, then of the reference."""
    inputs = policy.prepare(policy.collate([policy.item(row, 0)])).inputs
    inputs.measures(policy.network)
    with policy.reference() as reference, torch.no_grad():
        inputs.measures(reference)


@pytest.mark.parametrize(("tower", "times"), [(False, 1), (True, 2)])
def test_a_step_of_full_fine_tuning_runs_a_frozen_tower_once(
    tower: bool, times: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    policy: Any = ImageTextAdapter(model="tiny", lora=None, tower=tower).open(needs_reference=True)
    with policy.reference() as reference:
        calls = patchings(policy.network.model, reference.model)
    row = Example(id="row", samples=(sample("what?", "red", WIDE), sample("what?", "a blue one", WIDE)))
    take_step(policy, row)
    assert len(calls) == times


def test_a_lora_whose_projector_is_trained_runs_the_tower_once_for_both(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    policy: Any = ImageTextAdapter(model="tiny", lora=Lora(rank=2), projector=True).open(needs_reference=True)
    calls = patchings(policy.network.model)
    row = Example(id="row", samples=(sample("what?", "red", WIDE), sample("what?", "a blue one", WIDE)))
    take_step(policy, row)
    assert len(calls) == 1
