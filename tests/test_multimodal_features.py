"""Features of images on disk: found by what they depend on alone, whole whoever writes at once, never taken when damaged."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import encoder, picture, sample

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.adapters.image_text_opening import _store
from mmalign.adapters.options import Lora
from mmalign.errors import UserError
from mmalign.multimodal.families import Features
from mmalign.multimodal.features import TOLD, FeatureStore
from mmalign.multimodal.tiny import tiny_parts

HERE = torch.device("cpu")


def features(seed: int = 0, count: int = 4) -> Features:
    draw = torch.Generator().manual_seed(seed)
    return Features(tokens=torch.randn(count, 8, generator=draw), deep=(torch.randn(count, 8, generator=draw),))


def test_what_was_put_is_what_is_had_and_nothing_else(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    assert store.get("k1", 4, HERE) is None
    store.put("k1", features())
    found = store.get("k1", 4, HERE)
    assert found is not None and torch.equal(found.tokens, features().tokens) and torch.equal(found.deep[0], features().deep[0])
    assert FeatureStore(tmp_path, "b" * 64).get("k1", 4, HERE) is None
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_a_damaged_file_and_one_of_other_tokens_are_refused_by_name(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "a" * 64)
    store.put("k1", features())
    with pytest.raises(UserError, match=r"k1\.safetensors lacks the 5 tokens of its image"):
        store.get("k1", 5, HERE)
    [path] = tmp_path.rglob("k1.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"k1\.safetensors is damaged .*Remove it"):
        store.get("k1", 4, HERE)


def test_a_folder_that_tells_of_another_model_is_refused(tmp_path: Path) -> None:
    FeatureStore(tmp_path, "a" * 64)
    with pytest.raises(UserError, match=f"{TOLD} tells of another model"):
        FeatureStore(tmp_path, "a" * 63 + "b")


def test_several_writers_of_one_image_leave_it_whole(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path, "a" * 64) for _ in range(4)]

    def write(number: int) -> bool:
        stores[number % 4].put("k1", features(number))
        found = stores[(number + 1) % 4].get("k1", 4, HERE)
        assert found is not None
        return any(torch.equal(found.tokens, features(n).tokens) for n in range(24))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(24)))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_the_key_of_an_image_holds_its_pixels_the_processors_settings_and_the_family() -> None:
    def key(family: str = "llava", seed: int = 0, **settings: Any) -> str:
        encoded = encoder(family, settings=settings)([sample("what?", "red", picture(seed, 60, 40))])
        return str(encoded.media[0].images[0].key)

    assert key() == key()
    keys = [
        key(),
        key(seed=1),
        key(do_center_crop=False, size={"height": 32, "width": 32}),
        key(do_normalize=False),
        key(family="paligemma"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_store_belongs_to_weights_config_and_precision_and_not_to_the_language_model(tmp_path: Path) -> None:
    model, _ = tiny_parts({"family": "llava"})
    settings = ImageTextAdapter(model="tiny", lora=Lora(rank=2), features=str(tmp_path))

    def folder(changed: Any, precision: str = "no") -> str:
        return _store(settings, changed, precision).folder.name

    spoken, towered, projected, chosen = (copy.deepcopy(model) for _ in range(4))
    with torch.no_grad():
        spoken.model.language_model.embed_tokens.weight.add_(1)
        next(towered.model.vision_tower.parameters()).add_(1e-3)
        next(projected.model.multi_modal_projector.parameters()).add_(1e-3)
    chosen.config.vision_feature_layer = -1
    others = [folder(towered), folder(projected), folder(chosen), folder(model, "bf16")]
    assert folder(model) == folder(spoken) and len({folder(model), *others}) == 5
