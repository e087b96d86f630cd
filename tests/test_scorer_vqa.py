import logging
import math
import string

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import UserError
from mmalign.scorers.vqa import vqa_score

PROMPTS = ["a red ball", "two cats", "a red ball", "rain", "a long way home"]
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def noise(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(48, 80, 1), noise(80, 48, 2), noise(32, 32, 3), noise(56, 56, 4), noise(33, 47, 5)]


def byte_tokenizer(controls, **special):
    """Byte-level BPE whose only words of more than a letter are `Yes` and ` Yes`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Y", "e"), ("Ye", "s"), ("Ġ", "Yes")]
    words = [*letters, "Ye", "Yes", "ĠYes"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "bos_token" in special:  # put before every text, as Llama's does, unless the text has it already
        start = special["bos_token"]
        tokenizer.add_special_tokens([start])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=controls, **special)


def text_shape(vocab_size):
    return {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def save(network, config, processor, folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer(QWEN_CONTROLS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.3}
    config = Qwen2VLConfig(
        text_config={**text_shape(len(tokenizer)), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 16 * 16, "max_pixels": 32 * 32}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    return save(Qwen2VLForConditionalGeneration, config, processor, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer(["<image>"], bos_token="<s>", eos_token="</s>")
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_shape(len(tokenizer))},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return save(LlavaForConditionalGeneration, config, processor, tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", *string.ascii_lowercase, *'".?']
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(words) + 2, "bos_token_id": len(words), "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**shape, **ids, "encoder_hidden_size": 16, "max_position_embeddings": 64, "initializer_range": 0.5},
        vision_config={**shape, "image_size": 16, "patch_size": 8, "initializer_range": 0.5},
    )
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    folder = tmp_path_factory.mktemp("blip")
    return save(BlipForQuestionAnswering, config, BlipProcessor(images, tokenizer), folder)


def t5_under_blip(name, folder):
    """BLIP-2 or InstructBLIP over a T5; the latter's Q-Former reads the question too."""
    import transformers

    tokenizer = byte_tokenizer(["<image>"], eos_token="</s>", pad_token="<pad>")
    more = [byte_tokenizer([], eos_token="</s>", pad_token="<pad>")] if name == "InstructBlip" else []
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, *more, num_query_tokens=3)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape["initializer_range"] = 0.5
    text = {
        "model_type": "t5",
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 2,
        "initializer_factor": 3.0,
    }
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{name}Config")(
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        qformer_config={**shape, "encoder_hidden_size": 16, **ids},
        text_config={**text, **ids, "decoder_start_token_id": tokenizer.pad_token_id},
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return save(getattr(transformers, f"{name}ForConditionalGeneration"), config, processor, folder)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    return t5_under_blip("Blip2", tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="module")
def instruct_blip(tmp_path_factory):
    return t5_under_blip("InstructBlip", tmp_path_factory.mktemp("instruct_blip"))


@pytest.fixture(params=["qwen", "llava", "blip", "blip2", "instruct_blip"])
def build(request):
    """Builds the scorer on one of the five tiny random models."""
    folder = request.getfixturevalue(request.param)
    return lambda **settings: vqa_score(model=folder, device="cpu", **settings)


def stock_probability(folder, prompt, image, tokens):
    """Of the answer's tokens in turn, one unpadded forward of the stock chat model each."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    network = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION.replace("{prompt}", prompt)}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    probability = 1.0
    for token in processor.tokenizer.convert_tokens_to_ids(tokens):
        with torch.no_grad():
            probability *= float(network(**inputs).logits[0, -1].softmax(dim=-1)[token])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[int(name == "attention_mask")]])], dim=1)
    return probability


@pytest.mark.parametrize(
    ("kind", "answer", "tokens"),
    [
        ("qwen", "Yes", ["Yes"]),
        ("qwen", "No", ["N", "o"]),
        ("llava", "Yes", ["ĠYes"]),  # the template writes a space before the assistant's words
        ("llava", "No", ["Ġ", "N", "o"]),
    ],
)
def test_vqa_score_of_a_chat_model_is_the_probability_of_the_answer(kind, answer, tokens, request):
    folder = request.getfixturevalue(kind)
    scores = vqa_score(model=folder, answer=answer, device="cpu")(PROMPTS, IMAGES)
    expected = [stock_probability(folder, *pair, tokens) for pair in zip(PROMPTS, IMAGES, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-9)
    assert (scores > 0).all() and (scores < 1).all() and scores.std() > 0


@pytest.mark.parametrize(("answer", "tokens"), [("Yes", ["yes"]), ("no", ["n", "##o"])])
def test_vqa_score_of_blip_is_the_probability_of_the_answer_after_the_decoders_start(blip, answer, tokens):
    from transformers import BlipForQuestionAnswering, BlipProcessor

    network, processor = BlipForQuestionAnswering.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    ids = [network.config.text_config.bos_token_id, *processor.tokenizer.convert_tokens_to_ids(tokens)]
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        inputs = processor(images=image, text=QUESTION.replace("{prompt}", prompt), return_tensors="pt")
        with torch.no_grad():
            image_features = network.vision_model(inputs.pixel_values)[0]
            question = network.text_encoder(inputs.input_ids, encoder_hidden_states=image_features)[0]
            logits = network.text_decoder(torch.tensor([ids]), encoder_hidden_states=question).logits[0]
        logps = logits.log_softmax(dim=-1)
        expected.append(math.exp(sum(float(logps[place, ids[place + 1]]) for place in range(len(tokens)))))
    scores = vqa_score(model=blip, answer=answer, device="cpu")(PROMPTS, IMAGES)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["blip2", "instruct_blip"])
@pytest.mark.parametrize(("answer", "tokens"), [("Yes", ["Yes"]), ("No", ["N", "o"])])
def test_vqa_score_over_an_encoder_is_the_probability_after_the_decoders_start(kind, answer, tokens, request):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = request.getfixturevalue(kind)
    network, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer.convert_tokens_to_ids(["<pad>", *tokens])
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        inputs = processor(images=image, text=QUESTION.replace("{prompt}", prompt), return_tensors="pt")
        with torch.no_grad():
            logps = network(**inputs, decoder_input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected.append(math.exp(sum(float(logps[place, ids[place + 1]]) for place in range(len(tokens)))))
    scores = vqa_score(model=folder, answer=answer, device="cpu")(PROMPTS, IMAGES)
    assert scores.std() > 0
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-9)


def test_vqa_score_is_the_same_in_any_batch_and_order(build):
    together, in_twos = build(batch_size=5)(PROMPTS, IMAGES), build(batch_size=2)(PROMPTS, IMAGES)
    turned = build(batch_size=3)(PROMPTS[::-1], IMAGES[::-1]).flip(0)
    torch.testing.assert_close(in_twos, together, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(turned, together, rtol=1e-3, atol=1e-9)
    assert build()([], []).shape == (0,)


def test_vqa_score_reads_greyscale_and_alpha_images_as_rgb(build):
    grey, opaque = IMAGES[0].convert("L"), IMAGES[0].convert("RGBA")
    scores = build()(["a"] * 4, [grey, grey.convert("RGB"), opaque, IMAGES[0]])
    torch.testing.assert_close(scores[::2], scores[1::2], rtol=1e-4, atol=1e-9)


def test_vqa_score_depends_on_prompt_image_and_template(build):
    asked = [build()(["a cat", "a dog"], [IMAGES[0]] * 2), build(template="{prompt}?")(["a cat", "a cat"], IMAGES[:2])]
    scores = torch.cat(asked)
    assert len(set(scores.tolist())) == 4


def test_braces_in_a_prompt_are_text(build):
    assert build()(["a {cat} {} {prompt"], IMAGES[:1]).isfinite().all()


def test_blip_cuts_questions_at_its_context(blip):
    scorer = vqa_score(model=blip, device="cpu", template="{prompt}")
    scores = scorer(["a " * 70 + "cat", "a " * 70 + "dog"], [IMAGES[0]] * 2)
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("dtype", "allowed"), [("bfloat16", 0.5), ("float32", 1e-4)])
def test_weights_of_another_type_give_about_the_same_score(llava, dtype, allowed):
    full = vqa_score(model=llava, device="cpu")(PROMPTS, IMAGES)
    torch.testing.assert_close(vqa_score(model=llava, device="cpu", dtype=dtype)(PROMPTS, IMAGES), full, rtol=allowed, atol=0)


@pytest.mark.parametrize("settings", [{"template": "is it good?"}, {"answer": " "}])
def test_a_template_without_the_prompt_or_an_empty_answer_is_a_user_fault(settings):
    with pytest.raises(UserError, match=r"vqa_score\.template, vqa_score\.answer: got .* want a question with \{prompt\}"):
        vqa_score(model="anything", **settings)


def test_a_missing_model_is_a_user_fault(tmp_path):
    with pytest.raises(UserError, match=r"vqa_score\.model: got .*nowhere"):
        vqa_score(model=str(tmp_path / "nowhere"))


def test_a_control_token_in_a_prompt_is_a_user_fault(qwen):
    with pytest.raises(UserError, match=r"control token '<\|image_pad\|>' in .* want plain text"):
        vqa_score(model=qwen, device="cpu")(["a <|image_pad|>"], IMAGES[:1])


def test_a_model_without_a_chat_template_is_a_user_fault(qwen, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(qwen).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(qwen)
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"Qwen2VLForConditionalGeneration .* want a BlipForQuestionAnswering, or a model with an"
    ):
        vqa_score(model=str(tmp_path))


def test_a_chat_template_that_thinks_first_is_a_user_fault(qwen, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(qwen).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(qwen)
    processor.chat_template = QWEN_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not go on from .* does not think before it answers"):
        vqa_score(model=str(tmp_path), device="cpu")


def test_weights_that_a_folder_lacks_are_listed(blip, tmp_path, caplog):
    from transformers import AutoProcessor, BlipForQuestionAnswering

    network = BlipForQuestionAnswering.from_pretrained(blip)
    state = {name: value for name, value in network.state_dict().items() if "query" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    AutoProcessor.from_pretrained(blip).save_pretrained(tmp_path)
    with caplog.at_level(logging.CRITICAL), pytest.raises(UserError, match=r"vqa_score\.model: .* missing: .*query\.bias"):
        vqa_score(model=str(tmp_path))
