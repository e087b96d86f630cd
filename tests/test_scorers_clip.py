"""Scorers over a CLIP, on tiny random models of the same classes: formulas, preprocessing, batches, gradients, checkpoints."""

import inspect
import json
import logging
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import (
    MEAN,
    OPEN_CLIP_MODEL,
    OPEN_CLIP_NAME,
    SIDE,
    STD,
    V2_KEYS,
    aesthetic_heads,
    hps_folder,
    open_clip_folder,
    transformers_clip,
    write_open_clip,
)
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Media, comparison, read, write
from mmalign.score import ScoreConfig, main
from mmalign.scorers import SCORERS, DifferentiableScorer, finite_scores
from mmalign.scorers.clip import open_clip_preprocess

PROMPTS = ["a red ball", "two cats", "a red ball", "rain", "a long way home"]
ALL = ["aesthetic", "clip_score", "clip_score_open_clip", "hps_v2", "pick_score"]
WITH_PROMPT = [name for name in ALL if name != "aesthetic"]


def noise(height, width, seed=0):
    """Smooth noise, so that two resizing codes agree to rounding."""
    values = np.random.default_rng(seed).integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(24, 40, 1), noise(40, 24, 2), noise(16, 16, 3), noise(64, 64, 4), noise(33, 47, 5)]
# Odd remainders, sides of the network's own size, enlargement, and strips.
SIZES = [(24, 40), (40, 24), (16, 16), (16, 31), (31, 16), (33, 47), (47, 35), (7, 9), (5, 90), (64, 48), (53, 20), (19, 64)]


def pixels_of(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


def plain_normalised(image):
    return (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD


def plain_centre_crop(image, side):
    """The shorter side to `side`, the longer one's fraction dropped, the crop's corner half a pixel up and left."""
    image = image.convert("RGB")
    shorter = min(image.size)
    width, height = (side * length // shorter for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def plain_letterbox(image, side):
    """The longer side to `side`, pasted into a black square; an odd pixel of black goes right and below."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


@pytest.fixture(scope="session")
def settings():
    """Scorer -> settings that build it on its tiny random model, with a scale that has a gradient everywhere."""
    clip = str(transformers_clip())
    return {
        "aesthetic": {"head": str(aesthetic_heads() / "v2.pth"), "model": clip},
        "clip_score": {"model": clip, "scale": "cosine"},
        "clip_score_open_clip": {"model": f"local-dir:{open_clip_folder()}", "scale": "cosine"},
        "hps_v2": {"checkpoint": str(hps_folder()), "model": OPEN_CLIP_NAME},
        "pick_score": {"model": clip, "processor": clip, "scale": "cosine"},
    }


@pytest.fixture
def build(settings):
    return lambda name, **more: SCORERS[name](**{**settings[name], "device": "cpu", **more})


def cosines():
    """From the stock classes alone, images by PIL: cosines, unit embeddings of images, logits."""
    folder = transformers_clip()
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPProcessor.from_pretrained(folder).tokenizer
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=IMAGES, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokenizer(PROMPTS, return_tensors="pt", padding=True), **pixels)
    return (output.text_embeds * output.image_embeds).sum(dim=-1), output.image_embeds, output.logits_per_image.diagonal()


def test_clip_score_is_the_clamped_cosine_of_the_stock_classes_in_three_scales(build):
    expected, _, _ = cosines()
    assert expected.min() < 0 < expected.max()
    for scale, formula in {
        "cosine": lambda cosine: cosine,
        "torchmetrics": lambda cosine: 100 * cosine.clamp(min=0),
        "paper": lambda cosine: 2.5 * cosine.clamp(min=0),
    }.items():
        torch.testing.assert_close(build("clip_score", scale=scale)(PROMPTS, IMAGES), formula(expected), atol=1e-4, rtol=1e-5)


def test_open_clip_score_equals_the_one_worked_out_from_the_stock_functions(build):
    name = f"local-dir:{open_clip_folder()}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([transform(image) for image in IMAGES])
    with torch.no_grad():
        logits, _ = model.eval().get_logits(pixels, open_clip.get_tokenizer(name)(PROMPTS))
        expected = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(build("clip_score_open_clip")(PROMPTS, IMAGES), expected, atol=1e-6, rtol=0)


def test_pick_score_is_the_logit_of_the_stock_classes_with_two_variants(build):
    cosine, _, logits = cosines()
    assert logits.abs().max() > 2 * cosine.abs().max()
    published = SCORERS["pick_score"](model=str(transformers_clip()), processor=str(transformers_clip()), device="cpu")
    torch.testing.assert_close(published(PROMPTS, IMAGES), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(build("pick_score", scale="logits/26")(PROMPTS, IMAGES), logits / 26, atol=1e-6, rtol=0)
    torch.testing.assert_close(build("pick_score")(PROMPTS, IMAGES), cosine, atol=1e-6, rtol=0)


def test_pick_score_reads_the_logit_scale_from_the_checkpoint(build, tmp_path):
    model = CLIPModel.from_pretrained(transformers_clip())
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(tmp_path)
    expected = 100 * build("pick_score")(PROMPTS, IMAGES)
    scores = build("pick_score", model=str(tmp_path), scale="logits")(PROMPTS, IMAGES)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("version", "file"), [("v2", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_hps_is_the_cosine_of_the_stock_model_on_letterboxed_images(version, file, build):
    model = open_clip.CLIP(**OPEN_CLIP_MODEL).eval()
    model.load_state_dict(torch.load(hps_folder() / file)["state_dict"])
    pixels = np.stack([plain_normalised(plain_letterbox(image, SIDE)).transpose(2, 0, 1) for image in IMAGES])
    with torch.no_grad():
        image, text, _ = model(torch.from_numpy(pixels).float(), open_clip.tokenize(PROMPTS))
    expected = (image * text).sum(dim=-1)
    torch.testing.assert_close(build("hps_v2", version=version)(PROMPTS, IMAGES), expected, atol=1e-6, rtol=0)
    named = build("hps_v2", checkpoint=str(hps_folder() / file), scale="leaderboard")
    torch.testing.assert_close(named(PROMPTS, IMAGES), 100 * expected, atol=1e-4, rtol=0)


def test_hps_versions_read_different_files(build):
    two, one = (build("hps_v2", version=version)(PROMPTS, IMAGES) for version in ("v2.1", "v2"))
    assert ((two - one).abs() > 1e-3).all()
    torch.testing.assert_close(build("hps_v2")(PROMPTS, IMAGES), two)


def test_aesthetic_v2_is_five_linear_layers_without_activation_on_the_unit_embedding(build):
    _, embeds, _ = cosines()
    state = torch.load(aesthetic_heads() / "v2.pth")
    expected = embeds
    for weight, bias in zip(V2_KEYS[::2], V2_KEYS[1::2], strict=True):
        expected = expected @ state[weight].T + state[bias]
    scores = build("aesthetic")(PROMPTS, IMAGES)
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, expected.squeeze(-1), atol=1e-5, rtol=0)


def test_aesthetic_v1_is_one_linear_layer_on_the_unit_embedding(build):
    _, embeds, _ = cosines()
    state = torch.load(aesthetic_heads() / "v1.pth")
    scores = build("aesthetic", version="v1", head=str(aesthetic_heads()), file="v1.pth")(PROMPTS, IMAGES)
    torch.testing.assert_close(scores, (embeds @ state["weight"].T + state["bias"]).squeeze(-1), atol=1e-5, rtol=0)


def test_aesthetic_does_not_read_the_prompt(build):
    scorer = build("aesthetic")
    assert torch.equal(scorer(PROMPTS, IMAGES), scorer([""] * 5, IMAGES))


def in_every_mode(image):
    translucent = image.convert("RGBA")
    translucent.putalpha(90)
    return [image.convert("L"), image.convert("P"), image.convert("LA"), image.convert("1"), translucent, image.convert("CMYK")]


@pytest.mark.parametrize("name", ["pick_score", "aesthetic", "clip_score"])
def test_transformers_scorers_see_a_plain_centre_crop(name, build):
    preprocess = build(name).clip.preprocess
    stock = CLIPImageProcessorPil.from_pretrained(transformers_clip())
    for image in [*(noise(*size, seed=1) for size in SIZES), *in_every_mode(noise(33, 47))]:
        seen = preprocess.of_images([image])[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(seen, plain_normalised(plain_centre_crop(image, SIDE)), atol=1e-6)
        # The stock processor makes images RGB itself, and so do we.
        theirs = stock(images=image.convert("RGB"), return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(seen, theirs, atol=1e-6)


def test_hps_sees_a_plain_letterbox(build):
    preprocess = build("hps_v2").clip.preprocess
    for image in [*(noise(*size, seed=1) for size in SIZES), *in_every_mode(noise(33, 47))]:
        seen = preprocess.of_images([image])[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(seen, plain_normalised(plain_letterbox(image, SIDE)), atol=1e-6)
    wide = preprocess.of_images([Image.new("RGB", (40, 20), "white")])[0, 0] * STD[0] + MEAN[0]
    torch.testing.assert_close(wide.mean(dim=1), torch.tensor([0.0] * 4 + [1.0] * 8 + [0.0] * 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("interpolation", "side"), [("bicubic", SIDE), ("bilinear", SIDE), ("bicubic", [SIDE, 24])])
def test_open_clip_scorers_see_what_open_clip_s_own_transform_gives(mode, interpolation, side):
    config = {"mean": MEAN, "std": STD, "size": side, "resize_mode": mode, "interpolation": interpolation}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**config), is_train=False)
    preprocess = open_clip_preprocess(config)
    for size in SIZES:
        image = noise(*size, seed=1)
        torch.testing.assert_close(preprocess.of_images([image])[0], transform(image), atol=1e-6, rtol=0)


def test_open_clip_scorer_follows_the_resize_mode_of_its_folder(tmp_path):
    folder = write_open_clip(tmp_path, resize_mode="longest")
    scorer = SCORERS["clip_score_open_clip"](model=f"local-dir:{folder}", device="cpu")
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    seen = scorer.clip.preprocess.of_images([Image.new("RGB", (32, 8), "white")])
    torch.testing.assert_close(seen[0, :, 0, 0], black, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hps_v2", "pick_score", "clip_score_open_clip"])
def test_pixels_are_preprocessed_as_the_image_up_to_two_steps_of_8_bits(name, build):
    preprocess = build(name).clip.preprocess
    for size in SIZES:
        image = noise(*size, seed=1)
        seen = preprocess(pixels_of(image))
        # One step is 1 / 255 / 0.26 = 0.015 after normalisation.
        torch.testing.assert_close(seen, preprocess.of_images([image]), atol=0.031, rtol=0)


def test_an_image_processor_that_no_clip_has_is_refused(build, tmp_path):
    processor = CLIPProcessor.from_pretrained(transformers_clip())
    processor.image_processor.crop_size = {"height": 12, "width": 12}
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pick_score\.model: got an image processor .*12.*want shortest_edge with a crop"):
        build("pick_score", processor=str(tmp_path))


@pytest.mark.parametrize("name", ALL)
def test_scores_are_the_same_in_any_batch_and_order(name, build):
    together = build(name, batch_size=5)(PROMPTS, IMAGES)
    in_twos = build(name, batch_size=2)(PROMPTS, IMAGES)
    turned = build(name)(PROMPTS[::-1], IMAGES[::-1]).flip(0)
    alone = torch.cat([build(name)([prompt], [image]) for prompt, image in zip(PROMPTS, IMAGES, strict=True)])
    for scores in (in_twos, turned, alone):
        torch.testing.assert_close(scores, together, atol=2e-6, rtol=0)
    assert together.std() > 1e-3
    assert build(name)([], []).shape == (0,)
    assert together.dtype == torch.float32 and not together.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_prompts_and_images_of_unequal_number_are_refused(name, build):
    scorer = build(name)
    with pytest.raises(ValueError, match=rf"{name}: got 1 prompts and 2 images"):
        scorer(["a"], IMAGES[:2])
    with pytest.raises(ValueError, match=rf"{name}: got 1 prompts and 3 images"):
        scorer.score_pixels(["a"], torch.rand(3, 3, 8, 8))


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.rand(3, 8, 8), torch.rand(1, 8, 8, 3)])
def test_pixels_of_8_bits_or_another_layout_are_refused(build, pixels):
    for name in ("pick_score", "aesthetic"):
        unchecked = inspect.unwrap(type(build(name)).score_pixels)  # without the checks of the tests, as users call it
        with pytest.raises(
            ValueError, match=rf"{name}: got pixels of shape .*, want \(n, 3, height, width\) of a floating type"
        ):
            unchecked(build(name), ["a"] * len(pixels), pixels)


@pytest.mark.parametrize("name", ALL)
def test_images_of_other_modes_score_as_their_rgb(name, build):
    images = in_every_mode(IMAGES[0])
    scores = build(name)(["a"] * 2 * len(images), [*images, *(image.convert("RGB") for image in images)])
    torch.testing.assert_close(scores[: len(images)], scores[len(images) :], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_blank_images_have_finite_scores_and_a_broken_network_is_told_with_the_image(name, build):
    scorer = build(name)
    blank = [Image.new("RGB", (20, 30), colour) for colour in ("black", "white")]
    assert finite_scores(scorer, ["a", ""], blank, ["1", "2"]).isfinite().all()
    tower = scorer.clip.image_tower
    scorer.clip.image_tower = lambda pixels: tower(pixels) * torch.tensor([1.0, math.nan])[:, None]
    with pytest.raises(UserError, match=rf"^row 2: got nan from scorer {name}"):
        finite_scores(scorer, ["a", "b"], IMAGES[:2], ["row 1", "row 2"])


@pytest.mark.parametrize("name", ALL)
def test_nan_in_one_image_s_pixels_is_seen_and_spoils_no_other_score(name, build):
    scorer = build(name)
    pixels = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    whole = scorer.score_pixels(PROMPTS[:2], pixels)
    pixels[0, 1, 10, 14] = math.nan
    broken = scorer.score_pixels(PROMPTS[:2], pixels)
    assert broken[0].isnan()
    torch.testing.assert_close(broken[1], whole[1])


@pytest.mark.parametrize("name", ALL)
def test_score_of_pixels_is_that_of_the_image_up_to_rounding(name, build):
    scorer = build(name)
    assert isinstance(scorer, DifferentiableScorer)
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        torch.testing.assert_close(
            scorer.score_pixels([prompt], pixels_of(image)), scorer([prompt], [image]), atol=0.02, rtol=0
        )


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_pixels_and_climbing_it_raises_the_score(name, build):
    scorer = build(name)
    pixels = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.25).requires_grad_()
    before = scorer.score_pixels(PROMPTS[:2], pixels)
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    step = 0.02 * gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert (scorer.score_pixels(PROMPTS[:2], (pixels + step).detach()) > before).all()


@pytest.mark.parametrize("name", ["hps_v2", "pick_score"])
def test_gradient_of_the_pixels_is_that_of_differences(name, build):
    scorer = build(name)
    pixels = (torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score_pixels(["a"], pixels).sum(), pixels)
    turn = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1))
    direction = 0.01 * gradient / gradient.abs().max() * turn
    up, down = (scorer.score_pixels(["a"], (pixels + sign * direction).detach()) for sign in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((gradient * direction).sum().item(), rel=0.02)


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_prompts_are_cut_at_77_tokens_which_one_warning_tells(name, build, caplog):
    scorer = build(name)
    fits = "a " * 75  # and start and end
    with caplog.at_level(logging.INFO, logger="mmalign"):
        whole = scorer([fits], [IMAGES[0]])
        assert not caplog.records
        scores = scorer([fits + "cat", fits + "dog", "a cat", fits + "cat"], [IMAGES[0]] * 4)
        scorer([fits + "bird"], [IMAGES[0]])
    assert scores[0] == scores[1] == scores[3] != scores[2]
    torch.testing.assert_close(scores[:1], whole)
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert f"{name}: 2 of 3 prompts are longer than 77 tokens" in caplog.text


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_each_distinct_prompt_is_encoded_once(name, build):
    scorer = build(name, batch_size=2)
    tower, rows = scorer.clip.text_tower, []

    def counted(tokens):
        rows.append(len(tokens))
        return tower(tokens)

    scorer.clip.text_tower = counted
    scorer(PROMPTS, IMAGES)
    assert rows == [2, 2]


@pytest.mark.parametrize("name", ["pick_score", "aesthetic", "clip_score"])
def test_features_given_as_tensors_by_transformers_4_score_the_same(name, build, monkeypatch):
    expected = build(name)(PROMPTS, IMAGES)
    seen = []

    def as_in_4(method):
        def features(self, inputs):
            output = method(self, inputs)
            seen.append(not isinstance(output, torch.Tensor))
            return output.pooler_output

        return features

    monkeypatch.setattr(CLIPModel, "get_image_features", as_in_4(CLIPModel.get_image_features))
    monkeypatch.setattr(CLIPModel, "get_text_features", as_in_4(CLIPModel.get_text_features))
    torch.testing.assert_close(build(name)(PROMPTS, IMAGES), expected)
    assert len(seen) == (1 if name == "aesthetic" else 2) and all(seen)


def test_networks_are_frozen_and_their_dropout_is_off(build, monkeypatch):
    made = []
    forward = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *a, **k: made.append(self) or forward(self, *a, **k))
    for name in ALL:
        build(name)(PROMPTS, IMAGES)
    assert any(isinstance(module, torch.nn.Dropout) for module in made)
    assert not any(module.training for module in made)
    assert not any(weight.requires_grad for module in made for weight in module.parameters())


def test_a_scorer_with_settings_judges_through_the_command_of_the_scores(settings, tmp_path):
    """`mmalign score` with two CLIP scorers by their YAML settings."""
    for number, image in enumerate(IMAGES[:2]):
        image.save(tmp_path / f"{number}.png")
    candidates = tuple(Content(images=(Media(path=str(tmp_path / f"{number}.png")),)) for number in range(2))
    rows = [Comparison(id="a", prompt=Content(text="a red ball"), candidates=candidates)]
    data = write(rows, tmp_path / "rows.jsonl")
    judges = [{"name": "hps_v2", **settings["hps_v2"]}, {"name": "pick_score", **settings["pick_score"]}]
    result = main(read_config(ScoreConfig, None, [f"data={data}", f"scorers={json.dumps(judges)}", "device=cpu"]))
    (row,) = (comparison(row) for row in read(result.output))
    for name in ("hps_v2", "pick_score"):
        scorer = SCORERS[name](**settings[name], device="cpu")
        assert row.scores[name] == pytest.approx(scorer(["a red ball"] * 2, IMAGES[:2]).tolist(), abs=1e-6)
