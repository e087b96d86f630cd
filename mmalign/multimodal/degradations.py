"""What is shown instead of a prompt's images: nothing, a blank, a crop, noise, masked pixels, another image, clips in disorder.

Drawn once for (seed, epoch, example): policy and reference see the same, and so do all candidates.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from mmalign.errors import UserError
from mmalign.records import Content
from mmalign.records.clips import Corruption, moved
from mmalign.records.frames import animation
from mmalign.records.media import Media

T = TypeVar("T")
STEPS = 1000  # of the noise schedule


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How what a prompt shows is spoilt: in the prompt itself, or in the pixels that the processor made of it.

    Args:
        of_prompt: `(prompt, draw, other)` -> prompt; other is another row's prompt.
        of_pixels: `(pixels, mean, std, draw)` -> pixels, normalised as `(v - mean) / std`.
        drawn: whether it differs from draw to draw.
        wants_other: whether it takes another row's prompt.
    """

    of_prompt: Callable[[Content, Generator, Content | None], Content] | None = None
    of_pixels: Callable[[Tensor, Tensor, Tensor, Generator], Tensor] | None = None
    drawn: bool = False
    wants_other: bool = False


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One draw of a degradation.

    Args:
        degradation: what is done.
        seed: of the draw.
        other: another row's prompt, where the degradation takes one.
    """

    degradation: Degradation
    seed: int = 0
    other: Content | None = field(default=None, compare=False)

    @property
    def of_pixels(self) -> tuple[int, ...] | None:
        """What tells pixels of this draw from others of the same image; None: they are as the processor made them."""
        if self.degradation.of_pixels is None:
            return None
        return (id(self.degradation), self.seed if self.degradation.drawn else 0)

    def prompt(self, content: Content) -> Content:
        """The prompt that is shown."""
        change = self.degradation.of_prompt
        return content if change is None else change(content, _generator(self.seed), self.other)

    def pixels(
        self, values: Float[Tensor, "n channels m"], mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]
    ) -> Float[Tensor, "n channels m"]:
        """The pixels that are shown, of those that the processor made: one draw for every image of a prompt."""
        change = self.degradation.of_pixels
        if change is None:
            return values
        return change(values, mean[:, None], std[:, None], _generator(self.seed)).to(values)


def drawn(degradation: Degradation, *, seed: int, epoch: int, example: str, other: Content | None = None) -> Condition:
    """The draw that belongs to an example in an epoch, however batches are split.

    Raises:
        UserError: the degradation takes another row's prompt, and there is none.
    """
    if degradation.wants_other and other is None:
        raise UserError(f"{example}: adapter.degradation: swap wants another row with images. Add rows, or choose another one.")
    digest = hashlib.sha256(f"{seed} {epoch if degradation.drawn else 0} {example}".encode()).digest()
    return Condition(degradation=degradation, seed=int.from_bytes(digest[:7], "big"), other=other)


def _generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


# --- in the prompt ------------------------------------------------------------------------------------------------------


def without_images(prompt: Content, draw: Generator | None = None, other: Content | None = None) -> Content:
    """The prompt without its images, and so without their placeholders; its words stay as they are."""
    messages = tuple(replace(message, images=(), places=()) for message in prompt.messages)
    return replace(prompt, images=(), messages=messages)


def cropped(image: Image.Image, draw: Generator, *, least: float = 0.01, most: float = 0.2) -> Image.Image:
    """A random part of an image, scaled up to its size.

    Its share of the area is uniform in [least, most], the logarithm of its aspect ratio uniform between those of 3:4 and 4:3.

    Source: mDPO, arXiv 2406.11839; published in luka-group/mDPO on preprocessed pixels, with a fresh draw in each forward pass;
        here on the image, with one draw for policy and reference. Scaled as torchvision's RandomResizedCrop does, bilinearly.
    Args:
        least, most: shares of the area. Published: 0.01 and 0.2.
    """
    width, height = image.size
    share, ratio, x, y = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
    area = width * height * (least + (most - least) * share)
    aspect = math.exp(math.log(3 / 4) + math.log(16 / 9) * ratio)
    w = min(max(round(math.sqrt(area * aspect)), 1), width)
    h = min(max(round(math.sqrt(area / aspect)), 1), height)
    left, top = round(x * (width - w)), round(y * (height - h))
    return image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BILINEAR)


def disordered(frames: Sequence[T], draw: Generator, *, how: Corruption, clips: int) -> list[T]:
    """Frames of a video that are dropped, reversed or shuffled; fewer than two frames stay as they are.

    Source: TEMPLE, AAAI 2026: answers to such videos are the rejected ones. Frames stand for clips.
    Args:
        how: drop keeps one frame in `clips`, at random; reverse turns groups of frames round; shuffle brings them into a random
            order that is not theirs.
        clips: groups that the frames make. Published: 16, 8, 4, 2, one stage of training each.
    """
    if len(frames) < 2:
        return list(frames)
    seed = int(torch.randint(2**40, (1,), generator=draw))
    return [frames[place] for place in moved(len(frames), how, clips, seed)]


def _crop(prompt: Content, draw: Generator, other: Content | None, *, least: float = 0.01, most: float = 0.2) -> Content:
    return _each(prompt, lambda media: _png([cropped(f, draw, least=least, most=most) for f in media.frames()], media))


def _swap(prompt: Content, draw: Generator, other: Content | None) -> Content:
    """The images of another row, over and over where it has fewer."""
    others = () if other is None else other.media()
    if not others:
        raise UserError("adapter.degradation: swap got another row without images, want one with them.")
    left = iter(range(len(prompt.media())))
    return _each(prompt, lambda media: others[next(left) % len(others)])


def _clips(prompt: Content, draw: Generator, other: Content | None, *, how: Corruption, clips: int) -> Content:
    def of(images: tuple[Media, ...]) -> tuple[Media, ...]:
        if len(images) != 1:
            return tuple(disordered(images, draw, how=how, clips=clips))
        media = images[0]
        moves = media.num_frames() > 1
        return (_png(disordered(media.frames(), draw, how=how, clips=clips), media),) if moves else images

    messages = []
    for message in prompt.messages:
        images = of(message.images)
        messages.append(replace(message, images=images, places=message.places[: len(images)]))
    return replace(prompt, images=of(prompt.images), messages=tuple(messages))


def _each(prompt: Content, change: Callable[[Media], Media]) -> Content:
    """The prompt with every image changed, in order."""
    images = tuple(change(media) for media in prompt.images)
    messages = tuple(replace(message, images=tuple(map(change, message.images))) for message in prompt.messages)
    return replace(prompt, images=images, messages=messages)


def _png(frames: Sequence[Image.Image], media: Media) -> Media:
    """Images as media, without loss."""
    if len(frames) > 1:
        rate = media.frame_rate()
        how = {} if rate is None else {"frame_ms": round(1000 / rate)}
        return Media(data=animation(frames, **how), where=media.where)
    stream = io.BytesIO()
    frames[0].save(stream, "PNG", compress_level=1)
    return Media(data=stream.getvalue(), where=media.where)


# --- in the pixels ------------------------------------------------------------------------------------------------------


@functools.cache
def noise_schedule() -> Float[Tensor, " steps"]:
    """sqrt(alpha_bar) of each of the 1000 steps of noise on images.

    b_i = sigmoid(linspace(-6, 6, 1000)_i) * (0.005 - 1e-5) + 1e-5,  alpha_bar_t = prod_{i <= t} (1 - b_i)

    Source: POVID, arXiv 2402.11411, YiyangZhou/POVID; the same in CHiP, TPO and bootstrapped preference optimisation.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64)) * (0.005 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0).sqrt()


def noised(pixels: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], *, t: int = 500) -> Float[Tensor, "*shape"]:
    """sqrt(alpha_bar_t) * v + sqrt(1 - alpha_bar_t) * noise.

    Args:
        pixels: in [0, 1] (POVID), or normalised (CHiP).
        noise: of a standard normal distribution.
        t: step from 0 to 999. Published: 500 (POVID, CHiP, TPO), 900 (bootstrapped).
    """
    root = noise_schedule()[t]
    return (root * pixels + (1 - root**2).sqrt() * noise).to(pixels.dtype)


def _noise(
    pixels: Tensor, mean: Tensor, std: Tensor, draw: Generator, *, t: int, space: Literal["pixels", "normalised"]
) -> Tensor:
    noise = torch.randn(pixels.shape, generator=draw)
    if space == "normalised":
        return noised(pixels, noise, t=t)
    return (noised(pixels * std + mean, noise, t=t) - mean) / std


def _blank(pixels: Tensor, mean: Tensor, std: Tensor, draw: Generator) -> Tensor:
    """The nearest colour of 8 bits: exact zeros are taken for padding by Idefics3."""
    return ((mean * 255).round() / 255 - mean).div(std).expand_as(pixels).contiguous()


def _masked(pixels: Tensor, mean: Tensor, std: Tensor, draw: Generator, *, p: float) -> Tensor:
    hidden = torch.rand(pixels.shape[0], 1, pixels.shape[2], generator=draw) < p
    return torch.where(hidden, _blank(pixels, mean, std, draw), pixels)


# --- the table ------------------------------------------------------------------------------------------------------


def drop() -> Degradation:
    """No image, and no placeholder: the prompt's words alone, as blind responses are made."""
    return Degradation(of_prompt=without_images)


def blank() -> Degradation:
    """Every pixel in the processor's mean colour: V-DPO's zeros."""
    return Degradation(of_pixels=_blank)


def crop(*, least: float = 0.01, most: float = 0.2) -> Degradation:
    """A small part, scaled up: mDPO. See `cropped`."""
    if not 0 < least <= most <= 1:
        raise ValueError(f"least, most: got {least} and {most}, want 0 < least <= most <= 1.")
    return Degradation(of_prompt=functools.partial(_crop, least=least, most=most), drawn=True)


def noise(*, t: int = 500, space: Literal["pixels", "normalised"] = "pixels") -> Degradation:
    """Gaussian noise of step t at the size that the model sees. See `noised`.

    Args:
        t: step from 0 to 999. Published: 500.
        space: pixels: in [0, 1], before normalisation (POVID); normalised: after it (CHiP).
    """
    if not 0 <= t < STEPS:
        raise ValueError(f"t: got {t}, want 0 to {STEPS - 1}.")
    return Degradation(of_pixels=functools.partial(_noise, t=t, space=space), drawn=True)


def pixel_mask(*, p: float = 0.3) -> Degradation:
    """Each pixel in the mean colour with probability p, all channels together: OPA-DPO.

    The colour is the processor's mean, as in `blank`. The published code has the mean of all of an image's values in place of
    every channel, and hides a share of p of its pixels exactly.

    Args:
        p: published 0.3.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p: got {p}, want more than 0, and at most 1.")
    return Degradation(of_pixels=functools.partial(_masked, p=p), drawn=True)


def swap() -> Degradation:
    """Another row's images."""
    return Degradation(of_prompt=_swap, wants_other=True)


def clips(*, how: Corruption = "shuffle", clips: int = 4) -> Degradation:
    """A video's frames dropped, reversed or shuffled: TEMPLE. Still images stay as they are. See `disordered`."""
    if clips < 2:
        raise ValueError(f"clips: got {clips}, want 2 or more.")
    return Degradation(of_prompt=functools.partial(_clips, how=how, clips=clips), drawn=how != "reverse")


def check_degradation(build: Callable[[], Degradation], name: str = "degradation") -> Degradation:
    """Make a degradation; settings that mean nothing are told with the name of the setting that has them.

    Args:
        build: makes it.
        name: of the setting.
    Raises:
        ValueError: see above.
    """
    try:
        return build()
    except ValueError as fault:
        raise ValueError(f"{name}.{fault}") from fault


DEGRADATIONS: dict[str, Callable[..., Degradation]] = {
    "drop": drop,
    "blank": blank,
    "crop": crop,
    "noise": noise,
    "pixel_mask": pixel_mask,
    "swap": swap,
    "clips": clips,
}
