"""What feeds the diffusion step: the latent store against a flat memmap, and reading a pair against the public loader."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusion_toy import Size, jpeg_pairs
from measuring import Ratio, gate_equal, interleaved
from PIL import Image
from torch import Tensor

from mmalign.adapters.reading import Reader
from mmalign.cache import TensorStore, content_key
from mmalign.models.diffusion import find_family
from mmalign.records import Example

PUBLIC = "public loader"
OURS = "mmalign"
LATENT = (4, 64, 64)  # 32 KB in float16: SD 1.5 at 512 pixels


def latent_store(size: Size, work: Path, rounds: int) -> dict[str, Ratio]:
    """Random batches of 16 records by key from a TensorStore, against the same rows of one flat memmap."""
    generator = torch.Generator().manual_seed(0)
    records = torch.randn((size.records, *LATENT), generator=generator).half()
    keys = [content_key(number) for number in range(size.records)]
    store = TensorStore.create(work / "store", fields={"latents": (LATENT, torch.float16)}, fingerprint={})
    for first in range(0, size.records, 256):
        store.add(keys[first : first + 256], {"latents": records[first : first + 256]})
    store.close()
    (work / "flat.bin").write_bytes(records.numpy().tobytes())
    store = TensorStore.open(work / "store", fingerprint={})
    flat = np.memmap(work / "flat.bin", np.float16, mode="r", shape=(size.records, *LATENT))
    places = torch.randint(size.records, (min(64, size.records // 16), 16), generator=generator).tolist()
    named = [[keys[place] for place in batch] for batch in places]

    def from_store() -> Iterator[Tensor]:
        return (store.get(batch)["latents"] for batch in named)

    def from_flat() -> Iterator[Tensor]:
        return (torch.from_numpy(flat[batch]) for batch in places)

    for ours, peer in zip(from_store(), from_flat(), strict=True):
        gate_equal("latent store", ours, peer)
    steps: dict[str, Callable[[], object]] = {
        "flat memmap": lambda: [float(part[0, 0, 0, 0]) for part in from_flat()],
        "latent store": lambda: [float(part[0, 0, 0, 0]) for part in from_store()],
        "flat memmap, the same twice": lambda: [float(part[0, 0, 0, 0]) for part in from_flat()],
    }
    for step in steps.values():
        step()
    return interleaved(steps, peer="flat memmap", rounds=rounds)


def pair_loading(side: int, target: int, rounds: int) -> dict[str, Ratio]:
    """From JPEG bytes to a pair that leaves for the device: `item` and `collate` of our reader, against the public loader.

    Ours leaves as 8-bit pixels, which the device scales; a row of its own adds the scaling on the same core. Where nothing is
    resized the pixels must be equal; elsewhere the two resize differently (Lanczos on 8 bits, bilinear in float32).
    """
    examples = jpeg_pairs(side, 4)
    reader = Reader(
        size=(target, target), crop="center", flip=False, draws=None, seed=0, size_condition=find_family("sd15").size_condition
    )

    def ours(example: Example) -> Tensor:
        pixels: Tensor = reader.collate([reader.item(example, 0)])["pixels"]
        return pixels

    def scaled(example: Example) -> Tensor:
        return ours(example).float() / 127.5 - 1

    def public(example: Example) -> Tensor:
        return public_loader([sample.completion.images[0].read() for sample in example.samples], target)

    if side == target:
        gate_equal("pair loading", scaled(examples[0]), public(examples[0]))
    steps: dict[str, Callable[[], object]] = {
        PUBLIC: lambda: [public(example) for example in examples],
        OURS: lambda: [ours(example) for example in examples],
        f"{OURS}, scaled on the host": lambda: [scaled(example) for example in examples],
    }
    for step in steps.values():
        step()
    return interleaved(steps, peer=PUBLIC, rounds=rounds)


def public_loader(jpegs: list[bytes], target: int) -> Tensor:
    """The pair as the public scripts' loader makes it: decode, float32 tensor, resize, crop, normalise, all on the host.

    Source: diffusers' train_diffusion_dpo research script, as described: image 0 is decoded once more, to be looked at.
    """
    from torchvision.transforms import v2

    change = v2.Compose([v2.Resize(target, interpolation=v2.InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(target)])
    first = v2.functional.pil_to_tensor(Image.open(io.BytesIO(jpegs[0])).convert("RGB"))
    assert first.ndim == 3
    images = [v2.functional.pil_to_tensor(Image.open(io.BytesIO(one)).convert("RGB")).float() / 255 for one in jpegs]
    return torch.stack([v2.functional.normalize(change(one), [0.5] * 3, [0.5] * 3) for one in images])
