"""Prompts with images as token ids: templates, turns, prefixes, settings of processors, conditions, workers."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from multimodal import arguments, encoder, parts, picture, sample, sequence, token_logps
from tokenizers import models

from mmalign.adapters.text_lengths import length_note
from mmalign.errors import UserError
from mmalign.multimodal.degradations import Condition, blank, crop, drawn, drop, noise, swap
from mmalign.records import Content, Example, Message, Sample
from mmalign.records.media import Media

WIDE, TALL = picture(0, 60, 40), picture(1, 40, 70)
VICUNA = (  # as LLaVA-1.5's, which ends no answer
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def with_template(family: str, template: str | None) -> object:
    processor = copy.copy(parts(family)[1])
    processor.chat_template = template
    return processor


def decoded(family: str, ids: list[int]) -> str:
    text: str = parts(family)[1].tokenizer.decode(ids)
    return text


def test_an_answer_that_its_template_does_not_end_gets_the_token_that_ends_texts_and_no_blank_before_it() -> None:
    encode = encoder("llava", processor=with_template("llava", VICUNA))
    ids, seen = sequence(encode([sample("what?", "red", WIDE)]), 0)
    images = "<image>" * 16
    assert decoded("llava", ids) == f"<|endoftext|>USER: {images}\nwhat? ASSISTANT: red<|im_end|>"
    assert encode([sample("what?", "red")]).continuations == encode([sample("what?", "red", WIDE)]).continuations
    never = replace(encode, eos="never")
    assert decoded("llava", sequence(never([sample("what?", "red", WIDE)]), 0)[0]).endswith("ASSISTANT: red")
    assert seen is not None and seen.images[0].num_tokens == 16


def test_an_image_stands_where_its_message_puts_it_and_histories_stay() -> None:
    said = (
        Message(role="user", text="hello"),
        Message(role="assistant", text="yes?"),
        Message(role="user", text="look: here", images=(WIDE,), places=(6,)),
    )
    encode = encoder("qwen2_vl", system_prompt="Be kind.")
    ids, seen = sequence(encode([Sample(prompt=Content(messages=said), completion=Content(text="a cat"))]), 0)
    assert seen is not None
    images = "<|image_pad|>" * seen.images[0].num_tokens
    assert decoded("qwen2_vl", ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n"
        f"<|im_start|>user\nlook: <|vision_start|>{images}<|vision_end|>here<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
    )


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen3_vl"])
def test_a_prefix_is_run_and_not_scored(family: str) -> None:
    whole = encoder(family)([sample("what?", "it is red", WIDE)])
    split = encoder(family)([replace(sample("what?", "red", WIDE), prefix="it is ")])
    assert sequence(split, 0)[0] == sequence(whole, 0)[0]
    assert split.lengths == (whole.lengths[0] - len("it is "),)
    assert split.media[0].images == whole.media[0].images


@pytest.mark.parametrize("images", [(WIDE,), ()], ids=["image", "text"])
def test_what_an_answer_begins_with_is_no_part_of_the_prompt_that_sees_itself(images: tuple[Media, ...]) -> None:
    model, _ = parts("paligemma")
    scores = []
    for one in (sample("what?", "it is red", *images), replace(sample("what?", "red", *images), prefix="it is ")):
        ids, seen = sequence(encoder("paligemma")([one]), 0)
        assert seen is not None
        with torch.no_grad():
            logits = model(**arguments("paligemma", ids, seen)).logits[0]
        scores.append(token_logps(logits, torch.tensor(ids), len("red") + 1))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-9)


def test_a_prompt_whose_last_token_an_answer_changes_keeps_its_image() -> None:
    _, processor = parts("llava")
    processor = copy.deepcopy(processor)
    backend = processor.tokenizer.backend_tokenizer
    vocab = {**backend.get_vocab(with_added_tokens=False), "rr": len(processor.tokenizer)}
    backend.model = models.BPE(vocab=vocab, merges=[("r", "r")])
    plain = [
        Sample(prompt=Content(text="color", images=(WIDE,)), completion=Content(text=answer)) for answer in ("red", "blue")
    ]
    encoded = encoder("llava", processor=processor)(plain)
    texts = [processor.tokenizer.decode(sequence(encoded, n)[0]) for n in range(2)]
    images = "<image>" * 16
    assert texts == [f"<|endoftext|>{images}\ncolor{answer}<|im_end|>" for answer in ("red", "blue")]
    assert encoded.given == (0, 1) and vocab["rr"] in encoded.continuations[0]
    [seen] = encoded.media
    assert seen.token_types is not None and len(seen.token_types) == len(encoded.contexts[0])


def test_a_template_that_writes_images_otherwise_once_they_are_answered_is_refused() -> None:
    turned = "{% if add_generation_prompt %}Q<image>{% else %}T<image>{{ messages[-1].content[-1].text }}{% endif %}"
    encode = encoder("llava", processor=with_template("llava", turned))
    with pytest.raises(UserError, match=r"adapter\.chat_template"):
        encode([sample("what?", "red", WIDE)])
    with pytest.raises(UserError, match="the tokenizer has none"):
        encoder("llava", processor=with_template("llava", None))([sample("what?", "red", WIDE)])


def test_settings_of_the_processor_are_passed_on() -> None:
    large = sample("what?", "red", picture(3, 90, 90))
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 2 * 28 * 28}
    by_size, by_pixels, stock = (
        encoder("qwen2_vl", settings=settings)([large]) for settings in ({"size": sizes}, {"max_pixels": 2 * 28 * 28}, {})
    )
    assert by_size == by_pixels
    assert by_size.media[0].images[0].num_tokens < stock.media[0].images[0].num_tokens
    whole = encoder("idefics3", settings={"do_image_splitting": False})([sample("what?", "red", WIDE)]).media[0].images[0]
    tiles = encoder("idefics3")([sample("what?", "red", WIDE)]).media[0].images[0]
    assert whole.tensors["pixel_values"].shape[1] == 1 < tiles.tensors["pixel_values"].shape[1]


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("idefics3", {"do_image_spliting": False}, "Did you mean do_image_splitting"),
        ("llava", {"max_pixels": 100}, "got max_pixels, which LlavaProcessor does not know"),
        ("qwen2_vl", {"max_pixels": 100, "size": 3}, "want size alone"),
    ],
)
def test_settings_that_a_processor_would_pass_over_are_refused(family: str, settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        encoder(family, settings=settings)([sample("what?", "red", WIDE)])


def test_names_of_the_template_are_given_to_it() -> None:
    template = "{% if loud %}!{% endif %}" + parts("llava")[1].chat_template
    encode = encoder("llava", processor=with_template("llava", template), template_kwargs={"loud": True})
    assert decoded("llava", encode([sample("what?", "red", WIDE)]).contexts[0]).startswith("<|endoftext|>!<|im_start|>")


def test_what_a_processor_or_model_cannot_show_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl:9: .*damaged image"):
        encoder("llava")([sample("what?", "red", Media(data=b"no image", where="pairs.jsonl:9"))])
    frames = (picture(0), picture(1))
    with pytest.raises(UserError, match="got a video, which llava does not see"):
        encoder("llava", as_video=True)([sample("what?", "red", *frames)])
    with pytest.raises(UserError, match="positions for 30"):
        encoder("llava", positions=30)([sample("what?", "red", WIDE)])


def test_conditions_show_one_prompt_in_several_ways() -> None:
    one, other = Condition(degradation=noise(), seed=1), Condition(degradation=noise(), seed=2)
    swapped = Condition(degradation=swap(), other=sample("so?", "no", TALL).prompt)
    conditions = [None, None, one, one, other, Condition(degradation=drop()), Condition(degradation=blank()), swapped]
    samples = [sample("what?", answer, WIDE) for answer in ("red", "blue") * 4]
    encoded = encoder("llava")(samples, conditions)
    assert encoded.context_of == (0, 0, 1, 1, 2, 3, 4, 5)
    assert encoded.media[3] is None and encoded.contexts[3] == encoder("llava")([sample("what?", "red")]).contexts[0]
    assert len({seen.key for seen in encoded.media if seen is not None}) == 5
    assert {len(encoded.contexts[n]) for n in (0, 1, 2, 4, 5)} == {len(encoded.contexts[0])}
    assert encoded.media[5].images == encoder("llava")([sample("what?", "red", TALL)]).media[0].images
    again = encoder("llava")(samples, conditions)
    assert again == encoded
    pixels = [seen.images[0].tensors["pixel_values"] for seen in encoded.media if seen is not None]
    assert pixels[3].abs().max() < 0.01  # the mean colour


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "llava_next", "internvl", "gemma3", "mllama"])
def test_pixels_are_spoilt_at_the_size_that_the_model_sees(family: str) -> None:
    [clean] = encoder(family)([sample("what?", "red", WIDE)]).media[0].images
    for degradation in (noise(t=999, space="normalised"), blank()):
        shown = encoder(family)([sample("what?", "red", WIDE)], [Condition(degradation=degradation)]).media[0]
        [spoilt] = shown.images
        assert spoilt.num_tokens == clean.num_tokens and spoilt.key != clean.key
        values, before = spoilt.tensors["pixel_values"], clean.tensors["pixel_values"]
        assert values.shape == before.shape and values.dtype == before.dtype
        if degradation.drawn:
            torch.testing.assert_close((values - 0.285 * before).std(), torch.tensor(0.958), atol=0.03, rtol=0)
        if family == "qwen2_vl":  # a still image is shown twice
            first, second = values.reshape(len(values), 3, 2, -1).unbind(2)
            torch.testing.assert_close(first, second)


def test_an_image_that_is_cropped_differs_and_keeps_its_size() -> None:
    condition = drawn(crop(), seed=0, epoch=1, example="a")
    [clean, cropped] = encoder("llava_next")([sample("what?", "red", WIDE)] * 2, [None, condition]).media
    assert clean.images[0].tensors["image_sizes"].equal(cropped.images[0].tensors["image_sizes"])
    assert clean.images[0].key != cropped.images[0].key


def test_encoders_go_to_workers_and_tell_lengths() -> None:
    encode = encoder("qwen2_5_vl", max_prompt_length=100, max_response_length=5)
    samples = [sample("what?", "red", WIDE), sample("what?", "a blue one", WIDE)]
    assert pickle.loads(pickle.dumps(encode))(samples) == encode(samples)
    note = length_note(encode, [Example(id="a", samples=tuple(samples))])
    assert "answers 5 to 5" in note and "1 answers to 5" in note
