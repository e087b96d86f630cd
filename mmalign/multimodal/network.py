"""How a language model sees: images encoded once, in the places of their placeholders, beside a network of token layouts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.errors import UserError
from mmalign.likelihoods import Layout, Tokens
from mmalign.multimodal.families import Family, Features
from mmalign.multimodal.features import FeatureStore
from mmalign.multimodal.opening import part_of
from mmalign.multimodal.seen import Seen, SeenImage
from mmalign.multimodal.towers import Towers

TYPED = "token_type_ids"  # the argument that tells a model which tokens see each other in both directions
WITHIN_WINDOWS = frozenset({"gemma3"})  # families whose sliding windows hold for such tokens too
MOST_BYTES = 2**28  # of remembered features, beside those of the layout at hand


class Sight:
    """What a model that sees is given beside the ids of a layout.

    The features of an image are remembered where vision tower and projector are frozen, so that policy, reference and all
    candidates share them; where the tower alone is frozen, what it says is (`Towers`); else an image is encoded once a pass.

    Args:
        model: of a known family, as it will be trained.
        family: its facts.
        shown: a prompt that shows an image, as the encoder makes it; for probes, and for passes that show nothing.
        store: features on disk; only where the tower is frozen.
        towers: what frozen towers say, where projectors are trained; networks with the same tower share it.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        shown: tuple[Sequence[int], Seen],
        store: FeatureStore | None = None,
        towers: Towers | None = None,
    ) -> None:
        """Find out whether features take a gradient."""
        self.family, self.store, self.towers = family, store, towers
        self.kind = model.config.model_type
        self.shown = (tuple(shown[0]), shown[1])
        self._memo: OrderedDict[tuple[Any, ...], Features] = OrderedDict()
        self._num_bytes = 0
        self._of_pass: dict[str, Features] | None = None  # while a layout is run in several groups
        with torch.enable_grad():
            [found] = self._encoded(model, self.shown[1].images[:1])
        self.frozen = not any(part.requires_grad for part in (found.tokens, *found.deep))
        self.num_encoded = 0
        across = tuple(f".layers.{n}." for n in getattr(model.config.get_text_config(), "cross_attention_layers", ()))
        self._passed_over = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (part_of(name, family) != "language" or any(one in name for one in across))
        ]

    @property
    def within_windows(self) -> bool:
        """Whether a sliding window also bounds tokens that see each other in both directions."""
        return self.kind in WITHIN_WINDOWS

    @property
    def crosses(self) -> bool:
        """Whether the model attends to images across, beside its own tokens (Mllama)."""
        return self.shown[1].crossed is not None

    def probe(self, vocab: int) -> Tokens:
        """A few random tokens after a prompt with an image and one without, continuations of several lengths."""
        ids, seen = self.shown
        draw = torch.Generator().manual_seed(0)
        words = [torch.randint(vocab, (length,), generator=draw) for length in (3, 4, 1, 3, 4, 2)]
        special = {token for token, kind in zip(ids, self._types(seen, len(ids)), strict=True) if kind}
        plain, *answers = [torch.tensor([0 if int(token) in special else int(token) for token in word]) for word in words]
        spans = self.family.blocks(torch.zeros(len(plain), dtype=torch.long))
        alone = Seen(key="", images=(), blocks=spans) if spans else None
        contexts, media = (torch.tensor(ids), plain), (seen, alone)
        return Tokens(contexts=contexts, continuations=tuple(answers), context_of=(0, 0, 1, 0, 1), media=media)

    def alike(self, layout: Layout) -> Iterator[tuple[Int[Tensor, " some"], Layout]]:
        """Padded rows in groups that the model can run together: Mllama's rows by the shape of what they attend to across.

        Yields: of each group the rows, and the layout that runs them, whose `at` is that of the whole. What is encoded for one
            of them serves those that follow.
        """
        groups: dict[Any, list[int]] = {}
        for row, seen in enumerate(layout.media or (None,) * len(layout.ids)):
            crossed = None if seen is None or seen.crossed is None else tuple(seen.crossed.shape[1:])
            groups.setdefault(crossed, []).append(row)
        self._of_pass = {}
        try:
            for rows in groups.values():
                there = torch.tensor(rows).to(layout.ids.device)
                part = replace(
                    layout,
                    ids=layout.ids[there],
                    positions=layout.positions[there],
                    mask=None if layout.mask is None else layout.mask[there],
                    media=None if layout.media is None else tuple(layout.media[row] for row in rows),
                    begins=tuple(layout.begins[row] for row in rows),
                )
                yield there, part
        finally:
            self._of_pass = None

    def blocks(self, layout: Layout) -> dict[int, tuple[tuple[int, int], ...]]:
        """Of the contexts of a packed row, by number, the tokens that see each other in both directions."""
        return {number: seen.blocks for number, seen in enumerate(layout.media or ()) if seen is not None and seen.blocks}

    def arguments(self, model: Any, layout: Layout, takes: frozenset[str]) -> dict[str, Any]:
        """Keyword arguments of the model's backbone for a layout, which take the place of others.

        Args:
            model: of transformers.
            layout: on the model's device.
            takes: names of the backbone's arguments.
        """
        media = layout.media or ()
        told: dict[str, Any] = {}
        if TYPED in takes and not layout.segments:
            told[TYPED] = self._told_types(layout)
        if any(seen is not None and seen.positions is not None for seen in media):
            told["position_ids"] = _rotary_positions(layout)
        elif self.kind == "paligemma":
            told["position_ids"] = layout.positions + 1
        images = [image for seen in media if seen is not None for image in seen.images]
        if not images:
            return told
        features = self.features(model, images)
        if self.crosses:
            return told | self._crossed(layout, features)
        return told | self._merged(model, layout, features)

    def features(self, model: Any, images: Sequence[SeenImage]) -> list[Features]:
        """Of each image, what tower and projector make of it; equal ones are encoded once."""
        how = _autocast(_device(model))
        distinct = {image.key: image for image in images}
        known = {key: one for key, one in (self._of_pass or {}).items() if key in distinct}
        if self.frozen:
            for key, image in ((key, image) for key, image in distinct.items() if key not in known):
                found = self._memo.get((key, how))
                if found is None and self.store is not None:
                    found = self.store.get(key, image.num_tokens, _device(model))
                if found is not None:
                    known[key] = found
        missing = [image for key, image in distinct.items() if key not in known]
        if missing:
            new = dict(zip((image.key for image in missing), self._encoded(model, missing), strict=True))
            self.num_encoded += len(missing)
            if self.frozen and self.store is not None:
                for key, one in new.items():
                    self.store.put(key, one)
            known |= new
        if self._of_pass is not None:
            self._of_pass |= known
        if self.frozen:
            self._remember({(key, how): one for key, one in known.items()})
        return [known[image.key] for image in images]

    def logits(self, model: Any, layout: Layout) -> Float[Tensor, "rows length vocab"]:
        """The model's own logits of padded rows that show one image or none, each run alone and given its pixels."""
        length = layout.ids.shape[1]
        typed = self._told_types(layout)
        rows = []
        for row, seen in enumerate(layout.media or (None,) * len(layout.ids)):
            told: dict[str, Any] = {TYPED: typed[row : row + 1]} if self.family.typed == TYPED else {}
            if seen is not None and seen.images:
                told |= seen.images[0].to(layout.ids.device).tensors
                if self.family.typed not in (None, TYPED) and seen.token_types is not None:
                    more = torch.zeros(length - len(seen.token_types), dtype=seen.token_types.dtype)
                    told[str(self.family.typed)] = torch.cat([seen.token_types, more])[None].to(layout.ids.device)
                if seen.crossed is not None:
                    told["cross_attention_mask"] = self._crossings(seen, length)[None].to(layout.ids.device)
            rows.append(model(input_ids=layout.ids[row : row + 1], use_cache=False, **told).logits)
        return torch.cat(rows)

    def touched(self, model: Any, layout: Layout) -> Tensor | None:
        """Zero, with a graph to every trained weight that a layout may pass over: those of tower and projector where it shows
        nothing, of a tower's last layers where features are taken before them, of layers that attend to images across.

        Processes that train together wait for each other's gradients: none may do without.
        """
        if not self._passed_over or not torch.is_grad_enabled():
            return None
        return torch.stack([parameter.sum() for parameter in self._passed_over]).sum() * 0.0

    def forget(self) -> None:
        """Remember no features."""
        if self.towers is not None:
            self.towers.forget()
        self._memo.clear()
        self._num_bytes = 0

    def _encoded(self, model: Any, images: Sequence[SeenImage]) -> list[Features]:
        device = _device(model)
        seen = [image.to(device) for image in images]
        if self.towers is None:
            return self.family.features(model, seen)
        how = (next(model.model.get_submodule(self.family.tower).parameters()).dtype, *_autocast(device))
        with self.towers.known(model, self.family, (tuple(image.key for image in images), how)):
            return self.family.features(model, seen)

    def _remember(self, used: dict[tuple[Any, ...], Features]) -> None:
        for key, one in used.items():
            if key not in self._memo:
                self._memo[key] = one
                self._num_bytes += _num_bytes(one)
            self._memo.move_to_end(key)
        while self._num_bytes > MOST_BYTES and len(self._memo) > len(used):
            self._num_bytes -= _num_bytes(self._memo.popitem(last=False)[1])

    def _merged(self, model: Any, layout: Layout, features: list[Features]) -> dict[str, Any]:
        """Embeddings with features in the places of the placeholders; deepstack's go with them to the language model."""
        where = self._places(layout)
        ids = layout.ids.flatten()
        place = where.to(ids.device, non_blocking=True)
        ids = ids.index_fill(0, place, 0).view_as(layout.ids)  # placeholders may be outside the vocabulary
        embedded = model.get_input_embeddings()(ids)
        tokens = torch.cat([one.tokens for one in features]).to(embedded.dtype)
        if len(tokens) != len(where):
            raise UserError(
                f"adapter.model: got {len(tokens)} features of images for {len(where)} tokens that stand for them: the "
                "processor does not go with the model. Correct its patch_size, vision_feature_select_strategy and "
                "num_additional_image_tokens, or name the model's own processor."
            )
        filled = embedded.flatten(0, 1).index_copy(0, place, tokens).view_as(embedded)
        told: dict[str, Any] = {"input_ids": None, "inputs_embeds": filled}
        if features[0].deep:
            seen = torch.zeros(ids.numel(), dtype=torch.bool)
            seen[where] = True
            told["visual_pos_masks"] = seen.view(ids.shape).to(ids.device, non_blocking=True)
            told["deepstack_visual_embeds"] = [
                torch.cat(parts).to(embedded.dtype) for parts in zip(*(one.deep for one in features), strict=True)
            ]
        return told

    def _places(self, layout: Layout) -> Int[Tensor, " placeholders"]:
        """Flat indices into the ids, in the order of the features."""
        starts = [segment.start for segment in layout.segments] or [row * layout.ids.shape[1] for row in range(len(layout.ids))]
        found = [
            start + torch.from_numpy(np.flatnonzero(seen.token_types.numpy()))
            for start, seen in zip(starts, layout.media or (), strict=False)
            if seen is not None and seen.token_types is not None
        ]
        return torch.cat(found)

    def _types(self, seen: Seen, length: int) -> list[int]:
        return [0] * length if seen.token_types is None else seen.token_types.tolist()

    def _told_types(self, layout: Layout) -> Int[Tensor, "rows length"]:
        """Token types of padded rows: one kind within blocks, the answers' kind elsewhere."""
        other = self.family.answer_type
        types = torch.full(tuple(layout.ids.shape), other)
        for row, seen in enumerate(layout.media or ()):
            for start, stop in () if seen is None else seen.blocks:
                types[row, start:stop] = 1 - other
        return types.to(layout.ids.device, non_blocking=True)

    def _crossed(self, layout: Layout, features: list[Features]) -> dict[str, Any]:
        """What padded rows attend to across; each has as many images as the others."""
        masks = [self._crossings(seen, layout.ids.shape[1]) for seen in layout.media or () if seen is not None]
        return {
            "cross_attention_states": torch.cat([one.tokens for one in features]),
            "cross_attention_mask": torch.stack(masks).to(layout.ids.device, non_blocking=True),
        }

    def _crossings(self, seen: Seen, length: int) -> Int[Tensor, "length images tiles"]:
        """Of a context's tokens and of what follows it, which tiles they attend to across."""
        assert seen.crossed is not None
        return torch.cat([seen.crossed, seen.crossed[-1:].expand(length - len(seen.crossed), -1, -1)])


def _rotary_positions(layout: Layout) -> Int[Tensor, "3 rows length"]:
    """M-rope indices: those of the contexts, and from their maximum on those of the continuations, alike on all axes.

    Made on the host of nothing that lies on the device, which is not waited for.
    """
    media = layout.media or ()
    if not layout.segments:
        rows = [_continued(seen, layout.ids.shape[1]) for seen in media]
        return torch.stack(rows, 1).to(layout.ids.device, non_blocking=True)
    parts = []
    for number, segment in enumerate(layout.segments):
        owner = number if segment.after is None else segment.after
        before = 0 if segment.after is None else layout.segments[owner].stop - layout.segments[owner].start
        parts.append(_continued(media[owner], before + segment.stop - segment.start)[:, before:])
    return torch.cat(parts, 1)[:, None].to(layout.ids.device, non_blocking=True)


def _continued(seen: Seen | None, length: int) -> Int[Tensor, "3 length"]:
    """Indices of a context's tokens and of what follows it; places in the sequence where it shows nothing."""
    if seen is None or seen.positions is None or seen.next_position is None:
        return torch.arange(length).expand(3, -1)
    known = seen.positions.shape[1]
    after = torch.arange(seen.next_position, seen.next_position + max(length - known, 0)).expand(3, -1)
    return torch.cat([seen.positions[:, :length], after.to(seen.positions.dtype)], 1)


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _num_bytes(features: Features) -> int:
    return sum(part.numel() * part.element_size() for part in (features.tokens, *features.deep))
