import logging
import math
import re
import string

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear

from mmalign.errors import UserError
from mmalign.scorers.image_reward import (
    BlipSizes,
    RewardNetwork,
    image_reward,
    load_image_reward,
    transformers_name,
)

PROMPTS = ["a red ball", "two cats", "a red ball", "rain", "a long way home"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
TINY = BlipSizes(
    image_size=32,
    patch_size=8,
    vision_width=24,
    vision_layers=2,
    vision_heads=3,
    text_width=16,
    text_layers=2,
    text_heads=2,
    vocab_size=len(WORDS) + 2,
    max_positions=40,
    head_widths=(12, 8, 6, 4, 1),
)


def noise(height, width, seed=0):
    """Smooth noise far from black and white, so that two resizing codes agree to rounding."""
    values = np.random.default_rng(seed).integers(40, 216, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(48, 80, 1), noise(80, 48, 2), noise(32, 32, 3), noise(128, 128, 4), noise(66, 94, 5)]


def published_keys(sizes):
    """Names and shapes of ImageReward.pt as the authors' modules have them, written out from their code."""
    width, text, square = sizes.vision_width, sizes.text_width, sizes.image_size // sizes.patch_size
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, square**2 + 1, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, sizes.patch_size, sizes.patch_size),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
        **norm("blip.visual_encoder.norm", width),
        "blip.text_encoder.embeddings.position_ids": (1, sizes.max_positions),
        "blip.text_encoder.embeddings.word_embeddings.weight": (sizes.vocab_size, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (sizes.max_positions, text),
        **norm("blip.text_encoder.embeddings.LayerNorm", text),
        **dense("blip.vision_proj", width, 256),
        **dense("blip.text_proj", text, 256),
    }
    for number in range(sizes.vision_layers):
        block = f"blip.visual_encoder.blocks.{number}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= dense(f"{block}.attn.qkv", width, 3 * width) | dense(f"{block}.attn.proj", width, width)
        shapes |= dense(f"{block}.mlp.fc1", width, 4 * width) | dense(f"{block}.mlp.fc2", 4 * width, width)
    for number in range(sizes.text_layers):
        layer = f"blip.text_encoder.encoder.layer.{number}"
        for attention, source in (("attention", text), ("crossattention", width)):
            shapes |= dense(f"{layer}.{attention}.self.query", text, text)
            shapes |= dense(f"{layer}.{attention}.self.key", source, text)
            shapes |= dense(f"{layer}.{attention}.self.value", source, text)
            shapes |= dense(f"{layer}.{attention}.output.dense", text, text)
            shapes |= norm(f"{layer}.{attention}.output.LayerNorm", text)
        shapes |= dense(f"{layer}.intermediate.dense", text, 4 * text) | dense(f"{layer}.output.dense", 4 * text, text)
        shapes |= norm(f"{layer}.output.LayerNorm", text)
    widths = (text, *sizes.head_widths)
    for number, index in enumerate((0, 2, 4, 6, 7)):
        shapes |= dense(f"mlp.layers.{index}", widths[number], widths[number + 1])
    return shapes


def dense(name, source, target):
    return {f"{name}.weight": (target, source), f"{name}.bias": (target,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_weights(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_keys(sizes).items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        else:
            centre = 1.0 if re.search(r"(norm\d?|LayerNorm)\.weight$", name) else 0.0
            scale = 0.8 if name.startswith("mlp") else 0.3
            state[name] = centre + scale * torch.randn(shape, generator=generator)
    return state


def attend(state, query, key, value, heads, mask=None):
    def split(vectors):
        return vectors.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def published_raw_score(state, sizes, pixels, tokens, mask):
    """The authors' network worked out from the published names alone: no module of transformers is used."""

    def through(name, vectors):
        return linear(vectors, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(name, vectors, eps):
        return layer_norm(vectors, vectors.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    vit = "blip.visual_encoder"
    patches = torch.nn.functional.conv2d(
        pixels, state[f"{vit}.patch_embed.proj.weight"], state[f"{vit}.patch_embed.proj.bias"], stride=sizes.patch_size
    )
    image = torch.cat([state[f"{vit}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
    image = image + state[f"{vit}.pos_embed"]
    for number in range(sizes.vision_layers):
        block = f"{vit}.blocks.{number}"
        query, key, value = through(f"{block}.attn.qkv", normed(f"{block}.norm1", image, 1e-6)).chunk(3, dim=-1)
        image = image + through(f"{block}.attn.proj", attend(state, query, key, value, sizes.vision_heads))
        inner = gelu(through(f"{block}.mlp.fc1", normed(f"{block}.norm2", image, 1e-6)))
        image = image + through(f"{block}.mlp.fc2", inner)
    image = normed(f"{vit}.norm", image, 1e-6)

    bert = "blip.text_encoder"
    words = state[f"{bert}.embeddings.word_embeddings.weight"][tokens]
    places = state[f"{bert}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    text = normed(f"{bert}.embeddings.LayerNorm", words + places, 1e-12)
    for number in range(sizes.text_layers):
        layer = f"{bert}.encoder.layer.{number}"
        for attention, source, seen in (("attention", None, mask), ("crossattention", image, None)):
            name = f"{layer}.{attention}"
            other = text if source is None else source
            heads = [through(f"{name}.self.query", text), *(through(f"{name}.self.{x}", other) for x in ("key", "value"))]
            mixed = through(f"{name}.output.dense", attend(state, *heads, sizes.text_heads, seen))
            text = normed(f"{name}.output.LayerNorm", mixed + text, 1e-12)
        inner = through(f"{layer}.output.dense", gelu(through(f"{layer}.intermediate.dense", text)))
        text = normed(f"{layer}.output.LayerNorm", inner + text, 1e-12)
    score = text[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = through(f"mlp.layers.{index}", score)
    return score.squeeze(-1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, do_lower_case=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def build(tokenizer):
    def build(state=None, **settings):
        weights = published_weights(TINY) if state is None else state
        return load_image_reward(RewardNetwork(TINY), weights, tokenizer=tokenizer, device="cpu", **settings)

    return build


def test_image_reward_is_the_published_formula_worked_out_from_the_published_names(build):
    scorer = build()
    tokens = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = scorer.preprocess.of_images(IMAGES)
    raw = published_raw_score(published_weights(TINY), TINY, pixels, tokens.input_ids, tokens.attention_mask)
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.1
    torch.testing.assert_close(scorer(PROMPTS, IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_image_reward_keeps_the_first_token_and_knows_the_tokens_that_blip_added(build):
    scorer = build()
    tokens = scorer.tokenizer("a [ENC] cat").input_ids
    letters = ["[CLS]", "a", "[ENC]", "c", "##a", "##t", "[SEP]"]
    assert scorer.tokenizer.convert_ids_to_tokens(tokens) == letters
    assert scorer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS), len(WORDS) + 1]


def test_the_published_sizes_fit_the_published_keys_and_shapes():
    with torch.device("meta"):
        network = RewardNetwork(BlipSizes())
    named = {transformers_name(name): shape for name, shape in published_keys(BlipSizes()).items()}
    unused = named.pop(None)
    assert unused is not None
    assert named == {name: tuple(value.shape) for name, value in network.state_dict().items()}


def test_missing_unexpected_and_misshapen_keys_of_a_checkpoint_are_listed_together(build):
    state = published_weights(TINY)
    del state["blip.visual_encoder.blocks.1.attn.qkv.bias"], state["mlp.layers.7.weight"]
    state["blip.visual_encoder.blocks.9.norm1.weight"] = torch.zeros(24)
    state["blip.itm_head.weight"] = torch.zeros(2, 16)
    state["blip.text_encoder.embeddings.word_embeddings.weight"] = torch.zeros(3, 16)
    with pytest.raises(UserError, match=r"image_reward\.checkpoint") as caught:
        build(state)
    for part in (
        "2 missing: mlp.7.weight, vision.encoder.layers.1.self_attn.qkv.bias",
        "2 unexpected: blip.itm_head.weight, vision.encoder.layers.9.layer_norm1.weight",
        "text.embeddings.word_embeddings.weight [3, 16] (want [59, 16])",
    ):
        assert part in str(caught.value)


def test_image_reward_sees_pixels_as_a_plain_pil_version_prepares_them(build):
    scorer = build()
    for image in IMAGES:
        short = min(image.size)
        width, height = (int(32 * side / short) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        values = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float32) / 255
        plain = (values - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        ours = scorer.preprocess.of_images([image])[0]
        torch.testing.assert_close(ours, torch.from_numpy(plain).float().permute(2, 0, 1), atol=1e-6, rtol=0)


def test_image_reward_of_pixels_is_that_of_the_image_up_to_rounding(build):
    scorer = build()
    spread = scorer(["a"] * len(IMAGES), IMAGES).std()
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        # One 8-bit step is 1/255/0.26 = 0.015 after normalisation; two resizers may differ by one.
        torch.testing.assert_close(scorer.preprocess(pixels), scorer.preprocess.of_images([image]), atol=0.031, rtol=0)
        allowed = 1e-5 if image.size == (32, 32) else 0.2 * spread
        torch.testing.assert_close(scorer.score_pixels([prompt], pixels), scorer([prompt], [image]), atol=allowed, rtol=0)


def test_image_reward_reads_greyscale_palette_and_alpha_images_as_rgb(build):
    grey, opaque, palette = (IMAGES[0].convert(mode) for mode in ("L", "RGBA", "P"))
    pairs = [grey, grey.convert("RGB"), opaque, IMAGES[0], palette, palette.convert("RGB")]
    scores = build()(["a"] * 6, pairs)
    torch.testing.assert_close(scores[::2], scores[1::2], atol=1e-5, rtol=0)


def test_image_reward_is_the_same_in_any_batch_and_order(build):
    together, in_twos = build(batch_size=5)(PROMPTS, IMAGES), build(batch_size=2)(PROMPTS, IMAGES)
    turned = build()(PROMPTS[::-1], IMAGES[::-1]).flip(0)
    torch.testing.assert_close(in_twos, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=0)
    assert build()([], []).shape == (0,)


def test_image_reward_depends_on_image_and_prompt(build):
    scores = build()(["a cat", "a dog", "a cat"], [IMAGES[0], IMAGES[0], IMAGES[1]])
    assert (scores[0] - scores[1:]).abs().min() > 1e-3


def test_gradient_of_image_reward_reaches_the_pixels_and_climbing_it_raises_the_score(build):
    scorer = build()
    pixels = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.25).requires_grad_()
    before = scorer.score_pixels(PROMPTS[:2], pixels)
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    step = 0.01 * gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert (scorer.score_pixels(PROMPTS[:2], (pixels + step).detach()) > before).all()
    assert not any(value.requires_grad for value in scorer.network.parameters())


def test_prompts_are_cut_at_35_tokens_and_the_first_cut_is_told(build, caplog):
    scorer = build()
    just_fits, too_long = "a " * 32, "a " * 33
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        scores = scorer([just_fits + "b", just_fits + "c"], [IMAGES[0]] * 2)
        assert scores[0] != scores[1] and not caplog.records
        scores = scorer([too_long + "cat", too_long + "dog", "a cat"], [IMAGES[0]] * 3)
        scorer([too_long], IMAGES[:1])
    assert scores[0] == scores[1] != scores[2]
    assert [record.getMessage()[:65] for record in caplog.records] == [
        "image_reward: 2 of 3 prompts are longer than 35 tokens; what lies"
    ]


def test_a_tokenizer_of_other_words_or_none_is_a_user_fault(tmp_path):
    from transformers import BertTokenizer

    BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL)}).save_pretrained(tmp_path / "small")
    for name, want in (("small", r"with 7 words, .* want 59"), ("nowhere", r"want a folder or hub id")):
        with pytest.raises(UserError, match=rf"image_reward\.tokenizer: got .*{name}.*{want}"):
            load_image_reward(RewardNetwork(TINY), published_weights(TINY), tokenizer=str(tmp_path / name))


def test_a_missing_checkpoint_is_told_before_the_network_is_built(tmp_path):
    with pytest.raises(UserError, match=r"image_reward\.checkpoint: got .*nowhere\.pt"):
        image_reward(checkpoint=str(tmp_path / "nowhere.pt"))


def test_numbers_of_prompts_and_images_must_agree(build):
    with pytest.raises(ValueError, match="image_reward: got 1 prompts and 2 images"):
        build()(["a"], IMAGES[:2])
