"""What is shown instead of images: against the authors' schedule, hand-worked values, and what is drawn once."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from multimodal import picture, sample
from PIL import Image

from mmalign.errors import UserError
from mmalign.multimodal.degradations import (
    DEGRADATIONS,
    Condition,
    clips,
    crop,
    cropped,
    disordered,
    drawn,
    drop,
    noise,
    noise_schedule,
    noised,
    pixel_mask,
    swap,
)
from mmalign.records import Content, Message
from mmalign.records.frames import animation
from mmalign.records.media import Media

GOLDEN = np.load(Path(__file__).parent / "golden" / "mllm" / "noise_schedule.npz")
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_noise_schedule_is_the_published_one() -> None:
    roots = noise_schedule()
    np.testing.assert_allclose(roots.numpy(), GOLDEN["alpha_bar_sqrt"], atol=3e-7)
    np.testing.assert_allclose((1 - roots**2).sqrt().numpy(), GOLDEN["one_minus_alpha_bar_sqrt"], atol=3e-6)
    assert [round(float(roots[t]), 3) for t in (500, 700, 900, 999)] == [0.863, 0.593, 0.365, 0.285]


def test_noised_pixels_are_those_of_the_authors_code() -> None:
    found = noised(torch.tensor(GOLDEN["x"]), torch.tensor(GOLDEN["noise"]), t=int(GOLDEN["step"]))
    np.testing.assert_allclose(found.numpy(), GOLDEN["y"], atol=1e-6)


def test_noise_in_pixels_is_that_before_normalisation() -> None:
    pixels = torch.rand(2, 3, 50, generator=generator())
    normalised = (pixels - MEAN[:, None]) / STD[:, None]
    condition = Condition(degradation=noise(t=700), seed=5)
    found = condition.pixels(normalised, MEAN, STD) * STD[:, None] + MEAN[:, None]
    wanted = noised(pixels, torch.randn(pixels.shape, generator=generator(5)), t=700)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    other = Condition(degradation=noise(t=700, space="normalised"), seed=5).pixels(normalised, MEAN, STD)
    torch.testing.assert_close(other, noised(normalised, torch.randn(pixels.shape, generator=generator(5)), t=700))


def test_masked_pixels_have_the_mean_colour_in_all_channels_together() -> None:
    pixels = torch.full((4, 3, 2000), 9.0)
    found = Condition(degradation=pixel_mask(p=0.3), seed=1).pixels(pixels, MEAN, STD)
    hidden = found != 9
    assert hidden[:, 0].equal(hidden[:, 1]) and hidden[:, 0].equal(hidden[:, 2])
    assert abs(hidden.float().mean() - 0.3) < 0.02
    assert found[hidden].abs().max() < 0.01  # 0 is the mean; 8 bits round it


def test_a_crop_keeps_between_1_and_20_percent_of_the_area() -> None:
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(200), np.arange(100)[:, None]
    image = Image.fromarray(pixels)
    shares = []
    for seed in range(40):
        found = np.asarray(cropped(image, generator(seed))).astype(int)
        assert found.shape == pixels.shape
        wide, high = (np.ptp(found[..., channel]) + 1 for channel in (0, 1))
        shares.append(wide * high / 20000)
        assert 0.6 < wide / high < 1.6
    assert 0.005 < min(shares) < 0.04 and 0.15 < max(shares) < 0.22


def test_nothing_is_left_of_an_image_that_is_dropped_and_all_of_the_words() -> None:
    said = (Message(role="user", text="look: there", images=(picture(0),), places=(6,)), Message(role="assistant", text="yes"))
    found = Condition(degradation=drop()).prompt(Content(messages=said))
    assert not found.media() and found.messages[0].places == ()
    assert [message.text for message in found.messages] == ["look: there", "yes"]
    assert not Condition(degradation=drop()).prompt(Content(text="what?", images=(picture(0),))).media()


def test_swapped_images_are_another_rows() -> None:
    prompt, other = (sample("what?", "red", *media).prompt for media in ((picture(0), picture(1)), (picture(2),)))
    found = drawn(swap(), seed=0, epoch=0, example="a", other=other).prompt(prompt)
    assert found.media() == (picture(2), picture(2)) and found.words() == "what?"
    with pytest.raises(UserError, match=r"a: .* wants another row"):
        drawn(swap(), seed=0, epoch=0, example="a")
    with pytest.raises(UserError, match="without images"):
        drawn(swap(), seed=0, epoch=0, example="a", other=Content(text="so?")).prompt(prompt)


def test_a_draw_belongs_to_seed_epoch_and_example() -> None:
    def of(**more: object) -> int:
        return drawn(crop(), **{"seed": 0, "epoch": 1, "example": "a", **more}).seed  # type: ignore[arg-type]

    assert of() == of()
    assert len({of(), of(seed=1), of(epoch=2), of(example="b")}) == 4
    fixed = [drawn(drop(), seed=0, epoch=epoch, example="a") for epoch in (1, 2)]
    assert fixed[0].seed == fixed[1].seed
    prompt = sample("what?", "red", picture(0, 90, 90)).prompt
    first, again, later = (drawn(crop(), seed=0, epoch=epoch, example="a").prompt(prompt) for epoch in (1, 1, 2))
    assert first == again != later


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (20 * number, 0, 0)) for number in range(count)]


def test_clips_are_dropped_reversed_and_shuffled() -> None:
    def order(how: str, seed: int = 0) -> list[int]:
        found = disordered(frames(8), generator(seed), how=how, clips=4)  # type: ignore[arg-type]
        return [frame.getpixel((0, 0))[0] // 20 for frame in found]  # type: ignore[index]

    assert order("reverse") == [6, 7, 4, 5, 2, 3, 0, 1]
    assert all(len(order("drop", seed)) == 2 and sorted(order("drop", seed)) == order("drop", seed) for seed in range(5))
    for seed in range(30):
        shuffled = order("shuffle", seed)
        assert sorted(shuffled) == list(range(8)) != shuffled
        assert all(shuffled[n] + 1 == shuffled[n + 1] for n in range(0, 8, 2))


def test_a_video_is_disordered_as_one_file_or_as_frames_and_still_images_stay() -> None:
    video = Media(data=animation(frames(4)))
    stills = []
    for frame in frames(4):
        stream = io.BytesIO()
        frame.save(stream, "PNG")
        stills.append(Media(data=stream.getvalue()))
    condition = Condition(degradation=clips(how="reverse", clips=4))
    for images in ((video,), tuple(stills)):
        prompt = sample("what?", "red", *images).prompt
        shown = [frame.getpixel((0, 0)) for media in condition.prompt(prompt).media() for frame in media.frames()]
        assert shown == [(60, 0, 0), (40, 0, 0), (20, 0, 0), (0, 0, 0)]
    still = sample("what?", "red", picture(0)).prompt
    assert condition.prompt(still) == still
    dropped = Condition(degradation=clips(how="drop", clips=2), seed=1)
    assert len(dropped.prompt(sample("what?", "red", *stills).prompt).media()) == 2


def test_settings_that_mean_nothing_are_refused() -> None:
    for name, settings in (
        ("noise", {"t": 1000}),
        ("pixel_mask", {"p": 0.0}),
        ("crop", {"least": 0.3, "most": 0.2}),
        ("clips", {"clips": 1}),
    ):
        with pytest.raises(ValueError, match="want"):
            DEGRADATIONS[name](**settings)
