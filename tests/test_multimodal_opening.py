"""Models that see, opened, tuned and saved: LoRA in the language model alone, parts that are trained, stock code that loads."""

import re
from pathlib import Path

import pytest
import torch
from multimodal import VIDEO_FAMILIES, encoder, parts, picture, sample

from mmalign.errors import UserError
from mmalign.language.opening import add_lora, save_full, save_lora
from mmalign.language.tiny import tiny_folder as text_folder
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.opening import (
    family_of,
    fit_processor,
    load_weights,
    loading_lines,
    lora_targets,
    open_processor,
    open_sighted,
    part_of,
    parts_note,
    passed_over,
    train_parts,
)
from mmalign.multimodal.processing import SightedEncoder
from mmalign.multimodal.tiny import tiny_folder, tiny_parts

FAMILY = pytest.mark.parametrize("family", FAMILIES)
LANGUAGE = re.compile(r"^model\.(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj$")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@FAMILY
def test_a_lora_tunes_the_language_model_and_neither_tower_nor_projector(family: str) -> None:
    model, _ = tiny_parts({"family": family})
    targets = lora_targets(model)
    assert targets and all(LANGUAGE.match(name) for name in targets)
    add_lora(model, rank=2, targets=targets)
    tuned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(tuned) == 2 * len(targets)
    assert all(part_of(name, FAMILIES[family]) == "language" for name in tuned)
    everywhere = lora_targets(tiny_parts({"family": family})[0], tower=True, projector=True)
    assert {part_of(name, FAMILIES[family]) for name in everywhere} >= {"language", "tower"}
    assert set(targets) < set(everywhere)


@FAMILY
def test_full_fine_tuning_trains_the_projector_and_not_the_tower_unless_asked(family: str) -> None:
    model, _ = tiny_parts({"family": family})

    def trained() -> set[str]:
        return {part_of(name, FAMILIES[family]) for name, p in model.named_parameters() if p.requires_grad}

    train_parts(model)
    assert trained() == {"language", "projector"}
    assert all(p.requires_grad for n, p in model.named_parameters() if part_of(n, FAMILIES[family]) != "tower")
    assert re.search(r"vision tower frozen \([\d,]+\)$", parts_note(model))
    train_parts(model, projector=False)
    assert trained() == {"language"}
    train_parts(model, tower=True)
    assert trained() == {"language", "projector", "tower"}


PASSED_OVER = {  # of the tiny tower's two layers and the norm behind them
    "llava": ("encoder.layers.1", "post_layernorm"),
    "llava_next": ("encoder.layers.1", "post_layernorm"),
    "llava_onevision": ("post_layernorm",),
}


@FAMILY
def test_layers_of_the_tower_that_no_feature_depends_on_are_not_trained(family: str) -> None:
    model, _ = tiny_parts({"family": family})
    [image] = encoder(family)([sample("what?", "red", picture(0, 32, 32))]).media[0].images[:1]
    unused = passed_over(model, (image,))
    inner = f"model.{FAMILIES[family].tower}."
    beginnings = tuple(f"{inner}{name}." for name in PASSED_OVER.get(family, ()))
    tower = [name for name, _ in model.named_parameters() if part_of(name, FAMILIES[family]) == "tower"]
    assert unused == {name for name in tower if name.startswith(beginnings)} and len(unused) < len(tower)
    train_parts(model, tower=True, unused=unused)
    [found] = FAMILIES[family].features(model, [image])
    sum(part.sum() for part in (found.tokens, *found.deep)).backward()
    for name in tower:
        parameter = model.get_parameter(name)
        assert (parameter.grad is not None) == parameter.requires_grad == (name not in unused), name
    layers = lora_targets(model, tower=True, unused=unused)
    assert not {f"{name}.weight" for name in layers} & unused
    assert {part_of(name, FAMILIES[family]) for name in layers} == {"language", "tower"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_a_saved_lora_and_a_saved_model_are_loaded_by_stock_code_and_gone_on_from(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny = {"family": family}
    model, processor = open_sighted("tiny", tiny=tiny), open_processor("tiny", tiny=tiny)
    add_lora(model, rank=2, targets=lora_targets(model))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    encode = SightedEncoder(processor=processor, model_type=family, family=FAMILIES[family], config=model.config)
    ids = torch.tensor([encode([sample("what?", "red")]).contexts[0]])
    tuned = model(input_ids=ids).logits
    save_lora(model, tmp_path / "lora", str(tiny_folder(tiny)))
    processor.save_pretrained(tmp_path / "lora")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(stock(input_ids=ids).logits, tuned)
    again = open_sighted("tiny", tiny=tiny)
    load_weights(again, tmp_path / "lora")
    torch.testing.assert_close(again(input_ids=ids).logits, tuned)
    assert "frozen" in parts_note(again)

    whole = open_sighted("tiny", tiny=tiny)
    train_parts(whole)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    save_full(whole, processor, tmp_path / "run" / "model")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(stock(input_ids=ids).logits, whole(input_ids=ids).logits)
    other = open_sighted("tiny", tiny=tiny)
    load_weights(other, tmp_path / "run")
    torch.testing.assert_close(other(input_ids=ids).logits, whole(input_ids=ids).logits)
    loaded = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    twin = SightedEncoder(processor=loaded, model_type=family, family=FAMILIES[family], config=model.config)
    assert twin([sample("what?", "red", picture(0))]) == encode([sample("what?", "red", picture(0))])
    assert str(tmp_path / "run" / "model") in loading_lines(tmp_path / "run" / "model")


@FAMILY
def test_a_tiny_folder_gives_the_model_and_processor_that_were_written(family: str) -> None:
    folder = str(tiny_folder({"family": family}))
    model, processor = open_sighted(folder), open_processor(folder)
    made, _ = parts(family)
    assert family_of(model) is FAMILIES[family]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), made.get_parameter(name))
    images = (picture(0), picture(1)) if family in VIDEO_FAMILIES else (picture(0),)
    encoders = [
        SightedEncoder(processor=one, model_type=family, family=FAMILIES[family], config=model.config)
        for one in (processor, parts(family)[1])
    ]
    first, second = (encode([sample("what?", "red", *images)]) for encode in encoders)
    assert first == second


def test_tiny_models_are_changed_by_name() -> None:
    model, processor = tiny_parts({"family": "llava", "hidden_size": 64, "vision_num_hidden_layers": 3, "image_size": 48})
    assert model.config.text_config.hidden_size == 64
    assert model.config.vision_config.num_hidden_layers == 3
    assert processor.image_processor.crop_size["height"] == 48 == model.config.vision_config.image_size
    with pytest.raises(UserError, match="Did you mean llava"):
        tiny_parts({"family": "lava"})


def test_layers_outside_the_parts_that_are_tuned_are_no_targets() -> None:
    model, _ = tiny_parts({"family": "llava"})
    chosen = lora_targets(model, ["q_proj", "v_proj"])
    assert len(chosen) == 4 and all(".language_model." in name for name in chosen)
    with pytest.raises(UserError, match="ends no linear layer's name in language"):
        lora_targets(model, ["linear_1"])
    assert lora_targets(model, ["linear_1"], projector=True) == ["model.multi_modal_projector.linear_1"]


def test_what_does_not_see_is_refused(tmp_path: Path) -> None:
    folder = str(text_folder())
    with pytest.raises(UserError, match="no processor of images"):
        open_processor(folder)
    with pytest.raises(UserError, match="as a model of images and texts"):
        open_sighted(folder)
    with pytest.raises(UserError, match=r"adapter\.processor: cannot open"):
        open_processor(str(tmp_path / "absent"))


def test_a_processor_that_leaves_its_patches_to_the_config_is_told() -> None:
    model, processor = tiny_parts({"family": "llava"})
    processor.patch_size = processor.vision_feature_select_strategy = None
    fit_processor(processor, model)
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (8, "default")


def test_a_llava_with_the_tower_of_another_family_is_refused() -> None:
    model, _ = tiny_parts({"family": "llava"})
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(UserError, match="got a llava with a tower of type pixtral"):
        family_of(model)


def test_a_package_that_a_processor_wants_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    _, stand_in = parts("smolvlm")
    with monkeypatch.context() as there:
        there.setattr(processing_smolvlm, "num2words", str)
        video = SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
        SmolVLMProcessor(
            image_processor=stand_in.image_processor, tokenizer=stand_in.tokenizer, video_processor=video
        ).save_pretrained(tmp_path)
        assert type(open_processor(str(tmp_path))).__name__ == "SmolVLMProcessor"
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(UserError, match=r"num2words.*pip install mmalign\[smolvlm\]"):
        open_processor(str(tmp_path))
