"""What the diffusion adapter computes once: latents and frames of images, text embeddings, reference logps of seeded draws."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.adapters.images import Framed
from mmalign.adapters.opening import DTYPES
from mmalign.adapters.prompts import Prompt, framed_source, prompt_of
from mmalign.cache import TensorStore, content_key, weights_fingerprint
from mmalign.config import resolved
from mmalign.noise import Schedule
from mmalign.records import Content, Example, Media

if TYPE_CHECKING:
    from mmalign.adapters.diffusion_policy import DiffusionPolicy

logger = logging.getLogger(__name__)

T = TypeVar("T")
Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CachedFrames:
    """Sizes and crops of the cached images: what SDXL's conditioning needs when no image is read."""

    def __init__(self, store: TensorStore) -> None:
        """Wrap a store of (original height, width, crop top, left)."""
        self.store = store

    def get(self, key: str, target: tuple[int, int]) -> Framed:
        """The frame of one image, without pixels."""
        height, width, top, left = self.store.get([key])["frame"][0].tolist()
        nothing = torch.empty((3, 0, 0), dtype=torch.uint8)
        return Framed(pixels=nothing, original=(height, width), crop=(top, left), target=target)


class Cache:
    """The stores under one folder, as one policy reads and fills them."""

    def __init__(self, policy: DiffusionPolicy, folder: Path, fingerprints: dict[str, Any], part: int) -> None:
        """Use `opened_cache`."""
        settings = policy.settings
        dtype = DTYPES[settings.cache_dtype]
        latent = (policy.latent_shape, dtype)
        if settings.buckets is not None:  # of any bucket, as rows of the longest
            shapes = [policy.encoding.latent_shape(size) for size in settings.buckets.all()]
            latent = ((shapes[0][0], max(math.prod(shape[1:]) for shape in shapes)), dtype)
        blank = {"": torch.zeros(3, *settings.size, dtype=torch.uint8)}
        example = policy.encoding.encode_prompts([prompt_of("", "" if policy.family.edits else None)], blank)
        prompt_fields: Fields = {name: (tuple(value.shape[1:]), dtype) for name, value in example.items()}
        frame_fields: Fields = {"frame": ((4,), torch.int64)}
        stores: dict[str, tuple[Fields, Any]] = {
            "images": ({"mean": latent, "std": latent}, fingerprints["images"]),
            "frames": (frame_fields, fingerprints["frames"]),
            "prompts": (prompt_fields, fingerprints["prompts"]),
        }
        self.folder = folder
        self.part = part
        self.fingerprints = fingerprints
        self.settings = settings
        opened = {
            name: TensorStore.open_or_create(folder / name, fields=fields, fingerprint=fingerprint, part=part)
            if part >= 0
            else TensorStore.open(folder / name, fields=fields, fingerprint=fingerprint)
            for name, (fields, fingerprint) in stores.items()
        }
        self.images, self.prompts = opened["images"], opened["prompts"]
        self._frames = CachedFrames(opened["frames"])
        self.frames: CachedFrames | None = self._frames if part < 0 else None
        self.references: TensorStore | None = None
        if settings.draws is not None and (folder / "references").exists() and part < 0:
            self.references = TensorStore.open(folder / "references", fingerprint=fingerprints["references"])

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of images, frames and prompts."""
        return self.images.num_bytes + self._frames.store.num_bytes + self.prompts.num_bytes

    def latents(self, names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Mean and std of the latents of these images, which have this shape."""
        found = self.images.get(names)
        if self.settings.buckets is None:
            return found
        return {name: value[..., : math.prod(shape[1:])].reshape(-1, *shape) for name, value in found.items()}

    def prompts_of(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The conditions of these prompts, in float32 or the cached precision."""
        return self.prompts.get([content_key(*prompt) for prompt in prompts])

    def reference(self, keys: Sequence[str], draws: Sequence[int]) -> Float[Tensor, "batch k"] | None:
        """The reference logps of these draws, None where none were computed."""
        if self.references is None:
            return None
        bank = self.references.get(keys)["logps"]
        return bank[torch.arange(len(keys)), torch.tensor(list(draws))]

    def fill(self, policy: DiffusionPolicy, examples: Iterable[Example]) -> None:
        """Encode every image (both orientations if flips are on) and prompt that the cache lacks."""
        flips = (False, True) if self.settings.flip else (False,)
        for group in _groups(examples, 8 if self.settings.frames is None else 1):
            self._fill_prompts(policy, group)
            wanted: dict[str, tuple[Content, bool, tuple[int, int]]] = {}
            for example in group:
                size = policy.reader.size_of(example)
                for one in policy.reader.contents(example):
                    wanted |= {policy.reader.cache_key(one.key(), flip, size): (one, flip, size) for flip in flips}
            missing = self._frames.store.missing(list(wanted))
            framed = [policy.reader.cut(one, size, flip=flip) for one, flip, size in map(wanted.__getitem__, missing)]
            if missing:
                encoded = [policy.encoding.encode(one.pixels[None]) for one in framed]
                self.images.add(missing, {name: torch.cat([self._row(one[name]) for one in encoded]) for name in encoded[0]})
                frames = torch.tensor([[*one.original, *one.crop] for one in framed])
                self._frames.store.add(missing, {"frame": frames})
        self.frames = self._frames
        policy.reader = replace(policy.reader, frames=self._frames)

    def counts(self) -> dict[str, int]:
        """How much is there beside reference logps."""
        return {"num_images": len(self.images), "num_prompts": len(self.prompts)}

    def fill_references(self, policy: DiffusionPolicy, examples: Iterable[Example], num_candidates: int, autocast: Any) -> None:
        """Compute the reference's logps of every seeded draw of every example that lacks them."""
        draws = self.settings.draws
        assert draws is not None
        store = TensorStore.open_or_create(
            self.folder / "references",
            fields={"logps": ((draws, num_candidates), torch.float32)},
            fingerprint=self.fingerprints["references"],
            part=self.part,
        )
        with policy.reference() as network, store:
            for group in _groups(examples, 4 if self.settings.buckets is None else 1):
                keys = [policy.item(example, 0)["key"] for example in group]
                todo = set(store.missing(keys))
                chosen = {key: example for key, example in zip(keys, group, strict=True) if key in todo}
                if not chosen:
                    continue
                banks = []
                for draw in range(draws):
                    batch = policy.collate([policy.item(example, draw) for example in chosen.values()])
                    with torch.no_grad(), autocast():
                        banks.append(policy.prepare(batch).inputs.logps(network).float().cpu())
                store.add(list(chosen), {"logps": torch.stack(banks, dim=1)})

    def close(self) -> None:
        """Give the locks of a writer back."""
        for store in (self.images, self._frames.store, self.prompts):
            store.close()

    def _row(self, latent: Float[Tensor, "one c *dims"]) -> Float[Tensor, "one c *stored"]:
        """A latent as the store keeps it: of its own shape, or with buckets flat and with zeros behind it."""
        stored = latent.cpu().to(DTYPES[self.settings.cache_dtype])
        if self.settings.buckets is None:
            return stored
        flat = stored.flatten(2)
        return torch.nn.functional.pad(flat, (0, self.images.fields["mean"][0][1] - flat.shape[2]))

    def _fill_prompts(self, policy: DiffusionPolicy, examples: Sequence[Example]) -> None:
        """Those of these examples; where prompts are dropped, also the empty one that stands for them."""
        prompts: dict[str, Prompt] = {}
        sources: dict[str, Media] = {}
        for example in examples:
            source = policy.reader.source(example)
            name = None if source is None else source.key()
            if source is not None and name is not None:
                sources[name] = source
            for text in {example.samples[0].prompt.text or "", *([""] if self.settings.prompt_dropout else [])}:
                prompts[content_key(*prompt_of(text, name))] = prompt_of(text, name)
        todo = {key: prompts[key] for key in sorted(self.prompts.missing(list(prompts)))}
        if todo:
            wanted = {key for _, *keys in todo.values() for key in keys}
            pixels = {key: framed_source(sources[key], self.settings.size) for key in wanted}
            encoded = policy.encoding.encode_prompts(list(todo.values()), pixels)
            dtype = DTYPES[self.settings.cache_dtype]
            self.prompts.add(list(todo), {name: value.cpu().to(dtype) for name, value in encoded.items()})


def opened_cache(policy: DiffusionPolicy, frozen: torch.dtype, mixed_precision: str, part: int | None) -> Cache:
    """Open the adapter's cache folder for reading, or for filling by process number `part`.

    Raises:
        UserError: there is none, or it was made with other weights, tokenizers, sizes, precision or draws; every difference is
            named.
    """
    settings = policy.settings
    pipe = policy.pipe
    geometry: dict[str, Any] = {"resolution": list(settings.size), "crop": settings.crop}
    if settings.frames is not None:
        geometry["frames"] = settings.frames
    if settings.buckets is not None:
        geometry["buckets"] = [list(size) for size in settings.buckets.all()]
    encoders = {name: getattr(pipe, name) for name in policy.family.encoders[1:] if getattr(pipe, name, None)}
    scaling = {name: pipe.vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
    scaling |= {name: pipe.vae.config[name] for name in ("latents_mean", "latents_std") if name in pipe.vae.config}
    images = {"vae": weights_fingerprint(pipe.vae), **scaling, **geometry}
    prompts = {name: weights_fingerprint(encoder) for name, encoder in encoders.items()}
    tokenizers = {name: getattr(pipe, name) for name in policy.family.tokenizers if getattr(pipe, name, None)}
    prompts |= {name: _tokenizer_fingerprint(tokenizer) for name, tokenizer in tokenizers.items()}
    if policy.family.edits:
        prompts |= images  # the condition holds the latents of the source
    fingerprints: dict[str, Any] = {"frames": geometry, "images": images, "prompts": prompts}
    if settings.draws is not None:
        fingerprints["references"] = {
            "network": weights_fingerprint(policy.denoiser),
            "images": images,
            "prompts": prompts,
            "precision": f"{frozen} {mixed_precision}",
            "draws": settings.draws,
            "seed": policy.seed,
            "schedule": [_schedule_fingerprint(one) for one in policy.schedules.values()],
            "timesteps": resolved(settings.timesteps),
            "weights": resolved(settings.weights) if settings.weights is not None else None,
            **{
                name: getattr(settings, name)
                for name in ("noise", "timestep", "latents", "flip", "prompt_dropout", "cache_dtype", "guidance_embedding")
            },
        }
    return Cache(policy, Path(settings.cache or ""), fingerprints, -1 if part is None else part)


def _schedule_fingerprint(schedule: Schedule) -> str:
    """What is predicted, and the first of the sha256 of the noise levels."""
    levels = (schedule.alpha, schedule.sigma, schedule.network_timesteps)
    key = content_key(*(level.double().cpu().numpy().tobytes().hex() for level in levels))
    return f"{schedule.prediction} {key[:16]}"


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """The sha256 of vocabulary and rules, padding token and length; not of how the last call padded and cut.

    Of a processor: that of its tokenizer, and how it reads images.
    """
    from transformers import ProcessorMixin

    if isinstance(tokenizer, ProcessorMixin):
        images = json.dumps(tokenizer.image_processor.to_dict(), sort_keys=True, default=str)
        return content_key(_tokenizer_fingerprint(tokenizer.tokenizer), images)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    return content_key(json.dumps(rules), tokenizer.pad_token_id, tokenizer.model_max_length)


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
