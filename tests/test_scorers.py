import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mmalign.errors import UserError
from mmalign.scorers import SCORERS
from mmalign.scorers.digits import (
    ANNOTATOR_ROWS,
    DIGIT_WORDS,
    JUDGE_ROWS,
    fitted_annotator,
    fitted_judge,
    prompted_digit,
)

PROMPTS = ["a red ball", "two cats", "a red ball", "rain", "a long way home"]
SIDE = 16  # pixels of the tiny CLIPs


def noise(height, width, seed=0):
    """Smooth noise, so that two resizing codes agree to rounding."""
    values = np.random.default_rng(seed).integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(24, 40, 1), noise(40, 24, 2), noise(16, 16, 3), noise(64, 64, 4), noise(33, 47, 5)]


@pytest.fixture(scope="session")
def transformers_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    entries = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={entry: index for index, entry in enumerate(entries)}, merges=[], model_max_length=77)
    start, end = len(entries) - 2, len(entries) - 1
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(entries), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config={**shape, **ids}, vision_config={**shape, **vision}, projection_dim=8)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    folder = tmp_path_factory.mktemp("transformers_clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def open_clip_folder(folder, **preprocess):
    import open_clip
    from safetensors.torch import save_file

    model = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    config = {"model_cfg": model, "preprocess_cfg": {"mean": list(mean), "std": list(std), **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.CLIP(**model).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def open_clip_clip(tmp_path_factory):
    return open_clip_folder(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(params=["clip_score", "clip_score_open_clip"])
def build(request):
    """Builds one of the two CLIP scorers on its tiny random model."""
    folder = request.getfixturevalue({"clip_score": "transformers_clip"}.get(request.param, "open_clip_clip"))
    return lambda **settings: SCORERS[request.param](model=folder, device="cpu", **settings)


def test_every_scorer_has_only_settings_and_bears_its_name_in_the_table():
    for name in ("brightness", "colourfulness", "digit_judge", "digit_legibility", "sharpness"):
        assert SCORERS[name]().name == name


def test_clip_score_is_the_clamped_cosine_in_three_scales(build):
    cosine, hundred, paper = (build(scale=scale)(PROMPTS, IMAGES) for scale in ("cosine", "torchmetrics", "paper"))
    assert (cosine.min() < 0) and (cosine.max() > 0) and (cosine.abs() < 1).all()
    torch.testing.assert_close(hundred, 100 * cosine.clamp(min=0))
    torch.testing.assert_close(paper, 2.5 * cosine.clamp(min=0))


def test_clip_score_equals_the_one_worked_out_from_the_stock_classes(transformers_clip):
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(transformers_clip).eval()
    processor = CLIPProcessor.from_pretrained(transformers_clip)
    inputs = processor(text=PROMPTS, images=IMAGES, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    expected = (output.text_embeds * output.image_embeds).sum(dim=-1)
    scores = SCORERS["clip_score"](model=transformers_clip, scale="cosine", device="cpu")(PROMPTS, IMAGES)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_open_clip_score_equals_the_one_worked_out_from_the_stock_functions(open_clip_clip):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(open_clip_clip)
    pixels = torch.stack([transform(image) for image in IMAGES])
    with torch.no_grad():
        logits, _ = model.eval().get_logits(pixels, open_clip.get_tokenizer(open_clip_clip)(PROMPTS))
        expected = logits.diagonal() / model.logit_scale.exp()
    scores = SCORERS["clip_score_open_clip"](model=open_clip_clip, scale="cosine", device="cpu")(PROMPTS, IMAGES)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_clip_score_is_the_same_in_any_batch_and_order(build):
    together = build(scale="cosine", batch_size=5)(PROMPTS, IMAGES)
    in_twos = build(scale="cosine", batch_size=2)(PROMPTS, IMAGES)
    turned = build(scale="cosine")(PROMPTS[::-1], IMAGES[::-1]).flip(0)
    torch.testing.assert_close(in_twos, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(turned, together, atol=1e-6, rtol=0)
    assert build()([], []).shape == (0,)


def test_clip_score_reads_greyscale_palette_and_alpha_images_as_rgb(build):
    scorer = build(scale="cosine")
    grey = IMAGES[0].convert("L")
    opaque = IMAGES[0].convert("RGBA")
    palette = IMAGES[0].convert("P")
    scores = scorer(["a"] * 6, [grey, grey.convert("RGB"), opaque, IMAGES[0], palette, palette.convert("RGB")])
    torch.testing.assert_close(scores[::2], scores[1::2], atol=1e-6, rtol=0)


def test_clip_score_of_pixels_is_that_of_the_image_up_to_rounding(build):
    scorer = build(scale="cosine")
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        ours = scorer.preprocess_pixels(pixels)
        stock = scorer.preprocess_images([image])
        assert ours.shape == stock.shape == (1, 3, SIDE, SIDE)
        # One 8-bit step is 1/255/0.26 = 0.015 after normalisation; two resizers may differ by one.
        torch.testing.assert_close(ours, stock, atol=0.031, rtol=0)
        torch.testing.assert_close(scorer.score_pixels([prompt], pixels), scorer([prompt], [image]), atol=0.02, rtol=0)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_open_clip_pixels_follow_the_resize_mode_of_the_checkpoint(resize_mode, tmp_path):
    model = open_clip_folder(tmp_path, resize_mode=resize_mode)
    scorer = SCORERS["clip_score_open_clip"](model=model, device="cpu")
    image = IMAGES[0]
    ours = scorer.preprocess_pixels(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours, scorer.preprocess_images([image]), atol=0.031, rtol=0)


def test_gradient_of_clip_score_reaches_the_pixels_and_climbing_it_raises_the_score(build):
    scorer = build(scale="cosine")
    pixels = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.25).requires_grad_()
    before = scorer.score_pixels(PROMPTS[:2], pixels)
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    step = 0.02 * gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert (scorer.score_pixels(PROMPTS[:2], (pixels + step).detach()) > before).all()


def test_prompts_are_cut_at_77_tokens_and_the_cut_is_logged(build, caplog):
    scorer = build(scale="cosine")
    long = "a " * 75
    with caplog.at_level(logging.INFO, logger="mmalign"):
        scores = scorer([long + "cat", long + "dog", "a cat"], [IMAGES[0]] * 3)
    assert scores[0] == scores[1] != scores[2]
    assert "2 of 3 prompts fill all 77 tokens" in caplog.text


def test_clip_score_of_a_missing_folder_says_what_it_wants(tmp_path):
    with pytest.raises(UserError, match=r"clip_score\.model: got .*nowhere.*want a folder"):
        SCORERS["clip_score"](model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("settings", [{"model": "ViT-B-32"}, {"model": "local-dir:x", "pretrained": "openai"}])
def test_open_clip_never_scores_with_random_or_unused_weights(settings):
    with pytest.raises(UserError, match=r"clip_score_open_clip\.pretrained"):
        SCORERS["clip_score_open_clip"](**settings)


def test_open_clip_with_an_unknown_model_or_folder_is_a_user_fault(tmp_path):
    with pytest.raises(UserError, match="open_clip can load"):
        SCORERS["clip_score_open_clip"](model=f"local-dir:{tmp_path / 'nowhere'}")


def test_unknown_device_is_a_user_fault(transformers_clip):
    with pytest.raises(UserError, match="device: got 'gpu0', want auto"):
        SCORERS["clip_score"](model=transformers_clip, device="gpu0")


def scans(rows):
    """Real scans as the quickstart's images: 32x32 RGB, ink bright."""
    data, digits = load_digits(return_X_y=True)
    grey = (data[rows].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    images = [Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for scan in grey]
    return images, digits[rows]


def caption(digit):
    return f"a handwritten digit {DIGIT_WORDS[digit]}"


def test_annotator_and_judge_are_fitted_on_disjoint_scans():
    rows = np.arange(1797)
    annotator, judge = set(rows[ANNOTATOR_ROWS]), set(rows[JUDGE_ROWS])
    assert not annotator & judge
    assert len(annotator) + len(judge) == 1797
    # The judge keeps its support vectors: each must be one of its own rows and none of the annotator's.
    data, _ = load_digits(return_X_y=True)
    vectors = {vector.tobytes() for vector in fitted_judge().support_vectors_}
    assert vectors <= {scan.tobytes() for scan in data[JUDGE_ROWS]}
    assert not vectors & {scan.tobytes() for scan in data[ANNOTATOR_ROWS]}
    # The mean of the annotator's multinomial gradient over its own rows is at the optimum, over the other rows it is not.
    assert _gradient_norm(ANNOTATOR_ROWS) < 0.05 * _gradient_norm(JUDGE_ROWS)


def _gradient_norm(rows):
    """Of the penalised log-likelihood of the annotator's weights on these rows: zero only on those it was fitted on."""
    data, digits = load_digits(return_X_y=True)
    model = fitted_annotator()
    residual = model.predict_proba(data[rows]) - np.eye(10)[digits[rows]]
    return np.abs(0.01 * residual.T @ data[rows] + model.coef_).max()


def test_digit_scorers_read_scans_they_have_not_seen():
    images, digits = scans(slice(0, 200, 2))
    prompts = [caption(digit) for digit in digits]
    legibility = SCORERS["digit_legibility"]()(prompts, images)
    assert (legibility <= 0).all() and legibility.exp().mean() > 0.8
    unseen, labels = scans(slice(1, 201, 2))
    assert SCORERS["digit_judge"]()([caption(digit) for digit in labels], unseen).mean() > 0.95


def test_digit_scorers_prefer_the_prompted_digit_to_another():
    images, digits = scans(slice(0, 100, 2))
    right, wrong = [caption(digit) for digit in digits], [caption((digit + 1) % 10) for digit in digits]
    legibility, judge = SCORERS["digit_legibility"](), SCORERS["digit_judge"]()
    assert (legibility(right, images) > legibility(wrong, images)).float().mean() > 0.95
    assert judge(wrong, images).mean() < 0.05
    assert set(judge(right + wrong, images * 2).tolist()) == {0.0, 1.0}


def test_digit_scores_do_not_depend_on_the_batch():
    images, digits = scans(slice(0, 12, 2))
    prompts = [caption(digit) for digit in digits]
    scorer = SCORERS["digit_legibility"]()
    alone = torch.cat([scorer([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)])
    torch.testing.assert_close(scorer(prompts, images), alone)


def test_prompted_digit_is_one_english_word():
    assert prompted_digit("A Handwritten digit SEVEN.") == 7
    with pytest.raises(UserError, match="prompt 'a someone': got no digit"):
        prompted_digit("a someone")
    with pytest.raises(UserError, match="got 2 digits"):
        prompted_digit("one or two")


def image_of(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def test_brightness_weighs_the_channels_by_bt601():
    colours = [[[255, 0, 0]]], [[[0, 255, 0]]], [[[0, 0, 255]]], [[[255, 255, 255]]]
    scores = SCORERS["brightness"]()(["", "", "", ""], [image_of(colour) for colour in colours])
    torch.testing.assert_close(scores, torch.tensor([0.299, 0.587, 0.114, 1.0]))


def test_colourfulness_of_a_red_and_a_grey_image_is_worked_by_hand():
    # Red: rg = 255, yb = 127.5, no variance: 0.3 sqrt(255^2 + 127.5^2) = 85.5296.
    # Half red, half black: means half as large, deviations 127.5 and 63.75: sqrt(20320.3) + 85.5296 / 2 = 185.3141.
    red, half = image_of([[[255, 0, 0]] * 2] * 2), image_of([[[255, 0, 0], [0, 0, 0]]])
    scores = SCORERS["colourfulness"]()(["", "", ""], [red, half, Image.new("L", (3, 3), 90)])
    torch.testing.assert_close(scores, torch.tensor([85.5296, 185.3141, 0.0]), atol=1e-3, rtol=0)


def test_sharpness_of_one_bright_pixel_is_worked_by_hand():
    # 4x4, one pixel of 100 at (1, 1): Laplacians of the inner 2x2 are -400, 100, 100, 0: variance 42500.
    grey = np.zeros((4, 4), dtype=np.uint8)
    grey[1, 1] = 100
    sharp, blurred = noise(32, 32), noise(32, 32).resize((8, 8)).resize((32, 32))
    scores = SCORERS["sharpness"]()([""] * 4, [Image.fromarray(grey), Image.new("RGB", (2, 9)), sharp, blurred])
    torch.testing.assert_close(scores[:2], torch.tensor([42500.0, 0.0]))
    assert scores[2] > 2 * scores[3]
