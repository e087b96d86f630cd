"""Videos in prompts: frames as arrays through the processors that take them, in their order and at their positions."""

import pytest
import torch
from multimodal import VIDEO_FAMILIES, encoder, parts, picture, sample, sequence
from PIL import Image

from mmalign.multimodal.degradations import DEGRADATIONS, drawn
from mmalign.multimodal.divisions import pictures
from mmalign.multimodal.families import FAMILIES
from mmalign.records.frames import animation
from mmalign.records.media import Media

FAMILY = pytest.mark.parametrize("family", VIDEO_FAMILIES)
FRAMES = tuple(picture(seed, 56, 56) for seed in range(4))


def filed(count: int = 4, frame_ms: int = 1000) -> Media:
    return Media(data=animation([media.open() for media in FRAMES[:count]], frame_ms=frame_ms), where="videos.jsonl:2")


def names(family: str) -> tuple[str, str]:
    return ("pixel_values" if family == "internvl" else "pixel_values_videos"), "video_grid_thw"


@FAMILY
def test_a_video_is_a_file_of_several_frames_or_its_frames(family: str) -> None:
    one = encoder(family)([sample("what?", "red", filed())])
    other = encoder(family, as_video=True)([sample("what?", "red", *FRAMES)])
    assert one == other
    pictures = encoder(family)([sample("what?", "red", *FRAMES)])
    assert len(one.media[0].images) == 1 or family == "internvl"
    assert len(pictures.media[0].images) == 4 and pictures.contexts != one.contexts


@pytest.mark.parametrize("frame_ms", [1000, 300])
@FAMILY
def test_a_video_gives_the_logits_of_what_its_processor_makes_in_one_go(family: str, frame_ms: int) -> None:
    model, processor = parts(family)
    ids, seen = sequence(encoder(family)([sample("what?", "a red one", filed(frame_ms=frame_ms))]), 0)
    assert seen is not None and seen.token_types is not None
    frames = [media.open() for media in FRAMES]
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a red one"}]},
        ],
        tokenize=False,
    )
    told = {"fps": 1000 / frame_ms, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    whole = processor(text=[text], videos=[frames], video_metadata=[told], do_sample_frames=False, return_tensors="pt")
    assert ids == whole["input_ids"][0].tolist()
    given = {name: t.double() if t.is_floating_point() else t for name, t in whole.items() if name != "second_per_grid_ts"}
    if "second_per_grid_ts" in whole:
        given["second_per_grid_ts"] = torch.as_tensor(whole["second_per_grid_ts"])
    ours = {"input_ids": torch.tensor([ids])}
    answer = len(ids) - len(seen.token_types)
    if seen.positions is not None:
        after = seen.next_position + torch.arange(answer)
        ours["position_ids"] = torch.cat([seen.positions, after.expand(3, -1)], dim=1)[:, None]
    for name in names(family):
        found = [image.tensors[name] for image in seen.images if name in image.tensors]
        if found:
            ours[name] = torch.cat(found).double() if name != "video_grid_thw" else torch.cat(found)
    torch.testing.assert_close(model(**ours).logits, model(**given).logits, rtol=1e-9, atol=1e-9)


@FAMILY
def test_features_of_a_video_fill_its_placeholders(family: str) -> None:
    model, _ = parts(family)
    encoded = encoder(family)([sample("what?", "red", filed()), sample("what?", "red", picture(9, 56, 56), filed(2))])
    for seen in encoded.media:
        assert seen is not None and seen.token_types is not None
        images = [
            type(image)(
                key=image.key,
                kind=image.kind,
                num_tokens=image.num_tokens,
                tensors={name: t.double() if t.is_floating_point() else t for name, t in image.tensors.items()},
            )
            for image in seen.images
        ]
        found = FAMILIES[family].features(model, images)
        assert [len(one.tokens) for one in found] == [image.num_tokens for image in images]
        assert sum(len(one.tokens) for one in found) == int((seen.token_types > 0).sum())
    kinds = [image.kind for image in encoded.media[1].images]
    assert kinds[0] == "image" and (kinds[1] == "video" or family == "internvl")


@FAMILY
def test_frames_in_another_order_are_another_video(family: str) -> None:
    keys = []
    for order in ((0, 1, 2, 3), (2, 3, 0, 1)):
        media = Media(data=animation([FRAMES[n].open() for n in order], frame_ms=1000))
        [*images] = encoder(family)([sample("what?", "red", media)]).media[0].images
        keys.append([image.key for image in images])
    assert keys[0] != keys[1]


def test_an_animation_of_one_frame_is_an_image() -> None:
    media = Media(data=animation([Image.new("RGB", (56, 56), (9, 9, 9))]))
    assert encoder("qwen2_vl")([sample("what?", "red", media)]).media[0].images[0].kind == "image"


@FAMILY
def test_of_a_long_video_frames_are_taken_evenly(family: str) -> None:
    few = encoder(family, num_frames=2)([sample("what?", "red", filed())])
    ends = encoder(family, as_video=True)([sample("what?", "red", FRAMES[0], FRAMES[3])])
    assert few.media[0].images[0].key == ends.media[0].images[0].key or family == "qwen2_5_vl"
    assert encoder(family, num_frames=9)([sample("what?", "red", filed())]) == encoder(family)(
        [sample("what?", "red", filed())]
    )
    if family == "qwen3_vl":  # which writes their times
        assert "<1.5 seconds>" in parts(family)[1].tokenizer.decode(few.contexts[0])
    if family == "qwen2_5_vl":
        pixels = [one.media[0].images[0].tensors for one in (few, ends)]
        assert pixels[0]["pixel_values_videos"].equal(pixels[1]["pixel_values_videos"])
        assert float(pixels[0]["second_per_grid_ts"][0]) == 2 * float(pixels[1]["second_per_grid_ts"][0])


def test_the_times_of_frames_are_those_of_their_file() -> None:
    seconds = {}
    for frame_ms in (1000, 250):
        encoded = encoder("qwen2_5_vl")([sample("what?", "red", filed(frame_ms=frame_ms))])
        seconds[frame_ms] = float(encoded.media[0].images[0].tensors["second_per_grid_ts"][0])
    assert seconds == {1000: 2.0, 250: 0.5}  # two frames are one place in time
    written = parts("qwen3_vl")[1].tokenizer.decode(
        encoder("qwen3_vl")([sample("what?", "red", filed(frame_ms=250))]).contexts[0]
    )
    assert "<0.1 seconds>" in written and "<0.6 seconds>" in written
    untold = encoder("qwen3_vl", as_video=True)([sample("what?", "red", *FRAMES)])
    assert "<2.5 seconds>" in parts("qwen3_vl")[1].tokenizer.decode(untold.contexts[0])  # one frame a second


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_the_rate_of_a_video_file_is_read_from_it(kind: str, codec: str) -> None:
    pytest.importorskip("av", reason="video files are decoded by PyAV, of the extra `video`")
    from test_video import film

    media = Media(data=film([one.open() for one in FRAMES], kind, codec))
    told = pictures([("video", (media,))])["video_metadata"][0]
    assert told["fps"] == pytest.approx(media.frame_rate()) == pytest.approx(16, rel=0.02)
    assert told["duration"] == pytest.approx(4 / 16, rel=0.02)


@pytest.mark.parametrize("name", ["crop", "clips"])
def test_a_video_that_is_changed_keeps_its_rate(name: str) -> None:
    condition = drawn(DEGRADATIONS[name](), seed=0, epoch=0, example="a")
    [changed] = condition.prompt(sample("what?", "red", filed(frame_ms=500)).prompt).media()
    assert changed.num_frames() == 4 and changed.frame_rate() == 2 and changed.key() != filed(frame_ms=500).key()
