"""One contract for every family that sees: what the encoder makes of samples is what the processor makes of whole texts."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from multimodal import arguments, encoder, in_one_go, parts, picture, sample, sequence, token_logps
from torch.nn.functional import pad

from mmalign.errors import UserError
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.tiny_families import BUILDERS, template
from mmalign.records import Content, Media, Message, Sample

FAMILY = pytest.mark.parametrize("family", FAMILIES)
WIDE, TALL, SQUARE = picture(0, 60, 40), picture(1, 40, 70), picture(2, 32, 32)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def test_every_family_has_a_tiny_model() -> None:
    assert list(BUILDERS) == list(FAMILIES)


@FAMILY
def test_a_conversational_pair_is_what_the_processor_makes_of_prompt_and_answer_in_one_go(family: str) -> None:
    model, _ = parts(family)
    encoded = encoder(family)([sample("what?", answer, WIDE) for answer in ("red", "a blue one")])
    assert len(encoded.contexts) == 1
    for number, answer in enumerate(("red", "a blue one")):
        ids, seen = sequence(encoded, number)
        whole = in_one_go(family, "what?", answer, [WIDE])
        assert ids == whole["input_ids"][0].tolist()
        ours = arguments(family, ids, seen)
        for name in ("token_type_ids", "cross_attention_mask", "image_sizes", "image_grid_thw"):
            if name in whole:
                torch.testing.assert_close(ours[name].long(), whole[name].long())
        torch.testing.assert_close(model(**ours).logits, model(**whole).logits, **CLOSE)


@FAMILY
def test_two_images_of_different_sizes_keep_their_order_and_their_tensors(family: str) -> None:
    model, _ = parts(family)
    ids, seen = sequence(encoder(family)([sample("which?", "one", TALL, WIDE)]), 0)
    whole = in_one_go(family, "which?", "one", [TALL, WIDE])
    assert ids == whole["input_ids"][0].tolist()
    assert seen is not None and len(seen.images) == 2 and seen.images[0].key != seen.images[1].key
    torch.testing.assert_close(model(**arguments(family, ids, seen)).logits, model(**whole).logits, **CLOSE)
    turned = replace(seen, images=seen.images[::-1])
    if seen.images[0].num_tokens == seen.images[1].num_tokens:
        other = model(**arguments(family, ids, turned)).logits
        assert (other - model(**whole).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_images_of_several_turns_stand_where_the_template_puts_them(family: str) -> None:
    model, processor = parts(family)
    said = (
        Message(role="user", text="what?", images=(TALL,)),
        Message(role="assistant", text="a thing"),
        Message(role="user", text="and this here?", images=(WIDE,), places=(4,)),
    )
    ids, seen = sequence(encoder(family)([Sample(prompt=Content(messages=said), completion=Content(text="red"))]), 0)
    image = {"type": "image"}
    conversation = [
        {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a thing"}]},
        {"role": "user", "content": [{"type": "text", "text": "and "}, image, {"type": "text", "text": "this here?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    whole = written(processor, conversation, (TALL, WIDE))
    assert ids == whole["input_ids"][0].tolist()
    torch.testing.assert_close(model(**arguments(family, ids, seen)).logits, model(**whole).logits, **CLOSE)


def written(processor: Any, conversation: list[dict[str, Any]], images: tuple[Media, ...], **settings: Any) -> dict[str, Any]:
    """What a processor makes of a conversation that shows images."""
    text = processor.apply_chat_template(conversation, tokenize=False)
    begins = not text.startswith(processor.tokenizer.bos_token)
    opened = [[media.open() for media in images]]
    out = processor(text=[text], images=opened, add_special_tokens=begins, return_tensors="pt", **settings)
    out.pop("attention_mask")
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in out.items()}


PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4}
TILED: dict[str, tuple[str, dict[str, Any], list[int]]] = {  # the images of a prompt, and how many tokens each has
    "crops of Gemma 3 are images of their own": (
        "gemma3",
        {**PAN_AND_SCAN, "pan_and_scan_min_ratio_to_activate": 1.2},
        [4, 4, 4, 4, 4],
    ),
    "Idefics3 without tiles": ("idefics3", {"do_image_splitting": False}, [4, 4]),
    "InternVL with fewer tiles": ("internvl", {"max_patches": 2}, [12, 4]),
    "Qwen with fewer patches": ("qwen2_vl", {"size": {"shortest_edge": 784, "longest_edge": 2 * 784}}, [2, 1]),
}


@pytest.mark.parametrize("what", TILED)
def test_images_are_divided_as_settings_of_the_processor_have_it(what: str) -> None:
    family, settings, counts = TILED[what]
    model, processor = parts(family)
    images = (picture(4, 120, 40), SQUARE)
    ids, seen = sequence(encoder(family, settings=settings)([sample("which?", "one", *images)]), 0)
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
    ]
    whole = written(processor, conversation, images, **settings)
    assert seen is not None and [image.num_tokens for image in seen.images] == counts
    assert ids == whole["input_ids"][0].tolist()
    torch.testing.assert_close(model(**arguments(family, ids, seen)).logits, model(**whole).logits, **CLOSE)


@FAMILY
def test_features_of_images_are_those_that_the_model_puts_in_their_places(family: str) -> None:
    model, _ = parts(family)
    encode = encoder(family)
    ids, seen = sequence(encode([sample("which?", "one", TALL, WIDE)]), 0)
    _, alone = sequence(encode([sample("which?", "one", WIDE)]), 0)
    assert seen is not None and alone is not None and seen.token_types is not None
    met: list[torch.Tensor] = []

    def note(module: object, args: object, given: dict[str, torch.Tensor]) -> None:
        met.append(given["cross_attention_states" if family == "mllama" else "inputs_embeds"])

    inner = model.model.text_model if family in ("idefics3", "smolvlm") else model.model.language_model
    handle = inner.register_forward_pre_hook(note, with_kwargs=True)
    model(**arguments(family, ids, seen))
    handle.remove()
    found = FAMILIES[family].features(model, [image_in_double(image) for image in (*alone.images, *seen.images)])
    ours = torch.cat([one.tokens for one in found[len(alone.images) :]])
    theirs = met[0].flatten(0, 1) if family == "mllama" else met[0][0, : len(seen.token_types)][seen.token_types > 0]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    if family != "mllama":
        assert [len(one.tokens) for one in found[1:]] == [image.num_tokens for image in seen.images]
    if family != "llava_onevision":  # which sees less of an image that has company
        torch.testing.assert_close(found[0].tokens, found[2].tokens, **CLOSE)
        assert alone.images[0].key == seen.images[1].key


def image_in_double(image):  # type: ignore[no-untyped-def]
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in image.tensors.items()}
    return replace(image, tensors=tensors)


@FAMILY
def test_rows_with_images_without_and_with_images_of_each_arm_are_one_context_each(family: str) -> None:
    encoded = encoder(family)(
        [
            sample("what?", "red", WIDE),
            sample("what?", "blue", TALL),
            sample("what?", "red"),
            sample("what?", "blue", WIDE),
            sample("why?", "so", WIDE),
        ]
    )
    assert encoded.context_of == (0, 1, 2, 0, 3)
    keys = [None if seen is None else tuple(image.key for image in seen.images) for seen in encoded.media]
    assert keys[0] == keys[3] and keys[0] != keys[1] and not keys[2]
    assert all(len(encoded.contexts) == len(encoded.media) for _ in keys)
    one, other = (encoder(family)([sample("what?", "red", media)]) for media in (WIDE, TALL))
    assert sequence(encoded, 0) == sequence(one, 0)
    assert sequence(encoded, 1)[1] == sequence(other, 0)[1]
    assert encoded.continuations[0] == encoded.continuations[2]


@FAMILY
def test_rows_are_encoded_together_as_each_is_alone(family: str) -> None:
    rows = [
        [sample("what?", "red", WIDE), sample("what?", "a blue one", WIDE)],
        [sample("which?", "one", TALL, SQUARE), sample("what?", "one", WIDE)],
        [sample("why?", "so")],
    ]
    together = encoder(family).all(rows)
    assert together == [encoder(family)(row) for row in rows]
    shown = [image for one in together for seen in one.media if seen is not None for image in seen.images]
    same = [image for image in shown if image.key == shown[0].key]
    assert len(same) >= 2 and all(image.tensors.keys() == same[0].tensors.keys() for image in same)
    for image in same:
        assert all(tensor.equal(same[0].tensors[name]) for name, tensor in image.tensors.items())


@FAMILY
def test_a_blind_row_has_neither_image_nor_placeholder(family: str) -> None:
    model, processor = parts(family)
    encoded = encoder(family)([sample("what?", "red")])
    ids, seen = sequence(encoded, 0)
    assert not set(FAMILIES[family].ids(processor)) & set(ids)
    assert seen is None or (family == "paligemma" and not seen.images)
    given = arguments(family, ids, seen)
    assert set(given) <= {"input_ids", "token_type_ids"}
    assert model(**given).logits.shape[:2] == (1, len(ids))
    if family != "paligemma":  # whose processor refuses texts alone
        assert ids == in_one_go(family, "what?", "red", [])["input_ids"][0].tolist()


@FAMILY
def test_a_batch_scores_as_single_rows_whichever_side_is_padded(family: str) -> None:
    model, processor = parts(family)
    encoded = encoder(family)([sample("what?", "red", WIDE), sample("what is it?", "a long one", WIDE)])
    rows = [sequence(encoded, n) for n in range(2)]
    given = [arguments(family, ids, seen) for ids, seen in rows]
    length = max(len(ids) for ids, _ in rows)
    alone = [token_logps(model(**one).logits[0], one["input_ids"][0], 3) for one in given]
    for side in ("right", "left"):
        together = {}
        for name in given[0]:
            if name in ("input_ids", "token_type_ids", "position_ids", "cross_attention_mask"):
                along = 2 if name == "position_ids" else 1
                together[name] = torch.cat([padded(one[name], along, length, side) for one in given], along - 1)
            else:
                joined = torch.cat([one[name] for one in given])
                together[name] = joined
        there = torch.ones(2, length, dtype=torch.long)
        for row, (ids, _) in enumerate(rows):
            part = slice(len(ids), length) if side == "right" else slice(0, length - len(ids))
            together["input_ids"][row, part] = processor.tokenizer.pad_token_id
            there[row, part] = 0
        logits = model(**together, attention_mask=there).logits
        for row, (ids, _) in enumerate(rows):
            part = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
            theirs = token_logps(logits[row, part], torch.tensor(ids), 3)
            torch.testing.assert_close(theirs, alone[row], rtol=1e-6, atol=1e-6)


def padded(tensor: torch.Tensor, along: int, length: int, side: str) -> torch.Tensor:
    amount = length - tensor.shape[along]
    behind = (0, 0) * (tensor.dim() - 1 - along)
    return pad(tensor, (*behind, 0, amount) if side == "right" else (*behind, amount, 0))


@FAMILY
def test_answers_are_cut_from_their_end_and_prompts_with_images_are_refused_with_counts(family: str) -> None:
    whole = encoder(family)([sample("what?", "a long answer", WIDE)])
    cut = encoder(family, max_response_length=4)([sample("what?", "a long answer", WIDE)])
    assert cut.continuations[0] == whole.continuations[0][:4] and cut.cut_responses == 1
    assert cut.contexts == whole.contexts
    seen = whole.media[0]
    of_images = sum(image.num_tokens for image in seen.images)
    limit = len(whole.contexts[0]) - 1
    told = rf"{limit + 1} tokens, {limit + 1 - of_images} of text and {of_images} of 1 images, want at most {limit}"
    with pytest.raises(UserError, match=told):
        encoder(family, max_prompt_length=limit)([sample("what?", "red", WIDE)])
    with pytest.raises(UserError, match=told):
        encoder(family, max_prompt_length=limit).shown(sample("what?", "red", WIDE).prompt)
    assert encoder(family, max_prompt_length=limit + 1)([sample("what?", "a long answer", WIDE)]) == whole
    blind = sample("what is it that one asks here?", "red")
    most = len(encoder(family)([blind]).contexts[0]) - 4
    shortened = encoder(family, max_prompt_length=most)([blind])
    assert shortened.cut_prompts == 1 and len(shortened.contexts[0]) == most


@FAMILY
def test_answers_end_with_the_token_that_ends_texts(family: str) -> None:
    _, processor = parts(family)
    encoded = encoder(family)([sample("what?", "red", WIDE), sample("what?", "red")])
    for ids in encoded.continuations:
        assert ids.count(processor.tokenizer.eos_token_id) == 1
        assert processor.tokenizer.eos_token_id in ids[-2:]


@FAMILY
def test_empty_answers_and_placeholders_in_texts_are_refused(family: str) -> None:
    _, processor = parts(family)
    with pytest.raises(UserError, match="got an empty answer"):
        encoder(family)([sample("what?", " ", WIDE)])
    with pytest.raises(UserError, match="stands for an image"):
        encoder(family)([sample(f"what {processor.image_token}?", "red", WIDE)])
    with pytest.raises(UserError, match="stands for an image"):
        encoder(family)([sample("what?", f"red {processor.image_token}", WIDE)])
    with pytest.raises(UserError, match="got an answer with images"):
        answer = Content(messages=(Message(role="assistant", text="here", images=(WIDE,)),))
        encoder(family)([Sample(prompt=Content(text="what?"), completion=answer)])


@FAMILY
def test_a_plain_text_with_an_image_begins_with_its_placeholder(family: str) -> None:
    _, processor = parts(family)
    plain = Sample(prompt=Content(text="what?", images=(WIDE,)), completion=Content(text="red"))
    ids, seen = sequence(encoder(family)([plain]), 0)
    assert seen is not None and len(seen.images) == 1
    assert processor.tokenizer.decode(ids).replace(" ", "").endswith("red" + processor.tokenizer.eos_token)
    assert encoder(family).prompt(plain.prompt) == list(encoder(family)([plain]).contexts[0])


TYPED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "mllama")


@pytest.mark.parametrize("family", TYPED)
def test_leaving_out_what_goes_with_the_ids_changes_the_numbers(family: str) -> None:
    model, _ = parts(family)
    ids, seen = sequence(encoder(family)([sample("what?", "a long answer", SQUARE if family == "mllama" else WIDE)]), 0)
    right = arguments(family, ids, seen)
    names = {"gemma3": "token_type_ids", "paligemma": "token_type_ids", "mllama": "cross_attention_mask"}
    name = names.get(family, "position_ids")
    wrong = {key: value for key, value in right.items() if key != name}
    if name == "position_ids":
        wrong["position_ids"] = torch.arange(len(ids)).expand(3, 1, -1)
    off = (model(**right).logits[:, -5:] - model(**wrong).logits[:, -5:]).abs().max()
    assert off > 1e-3


@pytest.mark.parametrize(("family", "wrong"), [("gemma3", 1), ("paligemma", 0)])
def test_answers_of_the_other_token_type_see_their_own_future(family: str, wrong: int) -> None:
    model, _ = parts(family)
    ids, seen = sequence(encoder(family)([sample("what?", "a long answer", WIDE)]), 0)
    assert seen is not None and seen.token_types is not None
    start = len(seen.token_types)
    right = arguments(family, ids, seen)
    bad = {**right, "token_type_ids": right["token_type_ids"].clone()}
    bad["token_type_ids"][:, start:] = wrong
    for given, leaks in ((right, False), (bad, True)):
        changed = {**given, "input_ids": given["input_ids"].clone()}
        changed["input_ids"][0, -1] = 65
        off = (model(**given).logits[0, start:-1] - model(**changed).logits[0, start:-1]).abs().max()
        assert bool(off > 1e-6) == leaks


@pytest.fixture
def smolvlm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SmolVLM's own processor, which wants a package that only spells the numbers of frames."""
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    _, stand_in = parts("smolvlm")
    tokenizer = copy.deepcopy(stand_in.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<video>"]}, replace_extra_special_tokens=False)
    side = stand_in.image_processor.max_image_size["longest_edge"]
    return SmolVLMProcessor(
        image_processor=stand_in.image_processor,
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(size={"longest_edge": side}, max_image_size={"longest_edge": side}),
        image_seq_len=stand_in.image_seq_len,
        chat_template=template("<image>", "<video>"),
    )


def test_the_processor_of_smolvlm_writes_images_as_the_tiny_one_does(smolvlm: Any) -> None:
    samples = [sample("which?", "one", TALL, WIDE), sample("which?", "none")]
    assert encoder("smolvlm", processor=smolvlm)(samples) == encoder("smolvlm")(samples)


def test_frames_of_a_video_are_whole_images_to_smolvlm(smolvlm: Any) -> None:
    model, _ = parts("smolvlm")
    frames = (picture(5, 32, 32), picture(6, 32, 32))
    ids, seen = sequence(encoder("smolvlm", processor=smolvlm, as_video=True)([sample("what?", "red", *frames)]), 0)
    assert seen is not None and len(seen.images) == 2
    assert "series of 2 frames" in smolvlm.tokenizer.decode(ids)
    found = FAMILIES["smolvlm"].features(model, [image_in_double(image) for image in seen.images])
    assert [len(one.tokens) for one in found] == [image.num_tokens for image in seen.images]
    with pytest.raises(UserError, match="got a video, which smolvlm does not see"):
        encoder("smolvlm", as_video=True)([sample("what?", "red", *frames)])


def test_a_text_that_begins_with_an_image_begins_as_the_processor_of_mllama_has_it() -> None:
    _, processor = parts("mllama")
    plain = Sample(prompt=Content(text="what?", images=(WIDE,)), completion=Content(text="red"))
    encoded = encoder("mllama")([plain])
    theirs = processor(text=["<|image|>what?"], images=[[WIDE.open()]], add_special_tokens=False)["input_ids"][0]
    assert list(encoded.contexts[0]) == theirs
