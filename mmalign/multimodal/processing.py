"""From samples with images to token ids and tensors: the processor once for every distinct prompt, answers by ids alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.language.chat import Encoded, Encoder, Eos
from mmalign.multimodal.degradations import Condition
from mmalign.multimodal.families import Family
from mmalign.multimodal.seen import Kind, Seen, SeenImage, image_key, seen_key
from mmalign.multimodal.settings import processor_settings
from mmalign.multimodal.templates import PartsTemplate, Shown, marked
from mmalign.records import Content, Sample

Ids = tuple[int, ...]
COUNTS = tuple(one.name for one in fields(Encoded) if one.type == "int")  # how many were cut, and the like


@dataclass(frozen=True)
class _Prompt:
    """A sample as it is shown: marks for images in its texts, what they show, and the condition that it is shown under."""

    sample: Sample
    shown: tuple[Shown, ...]
    condition: Condition | None

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for what is shown equally."""
        if not self.shown:
            return ()
        drawn = None if self.condition is None else self.condition.of_pixels
        return (drawn, *((kind, *(media.key() for media in files)) for kind, files in self.shown))


@dataclass(frozen=True, kw_only=True)
class SightedEncoder:
    """How samples whose prompts show images become token ids and tensors; the interface of `language.chat.Encoder`.

    A prompt goes through the processor once, however many answers it has; answers are tokenised as `Encoder` does and appended
    by ids. Prompts that show something are never cut, answers from their end only. A prompt from which a condition removes the
    images loses the placeholders too.

    Args:
        processor: of transformers, with its tokenizer.
        model_type: of the model's config, which names its family.
        family: facts of it.
        config: of the model.
        template, template_kwargs, system_prompt, max_response_length: see `Encoder`.
        eos: as `Encoder`; auto also ends a conversation's answer where the template does not (LLaVA-1.5).
        max_prompt_length: tokens, those of images included; longer prompts of text alone lose their beginning, others are
            refused. None: no limit.
        positions: see `Encoder`.
        as_video: whether several images of a message are the frames of one video; a file of several frames always is one.
        num_frames: of a video with more of them, this many, evenly spaced; None: all.
        settings: further arguments of the processor: `max_pixels`, `do_image_splitting` ...
    """

    processor: Any
    model_type: str
    family: Family
    config: Any
    template: Literal["auto", "always"] = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    eos: Eos = "auto"
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    positions: int | None = None
    as_video: bool = False
    num_frames: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, samples: Sequence[Sample], conditions: Sequence[Condition | None] | None = None) -> Encoded:
        """Token ids of samples; those of one prompt that show the same are in one context.

        Args:
            samples: of one row.
            conditions: of each sample, what its prompt is shown under; None: as it is.
        Raises:
            UserError: an empty answer, an image in one, placeholders in a text, a prompt with images that is too long, or what
                the model does not see.
        """
        return self.all([samples], None if conditions is None else [conditions])[0]

    def all(
        self, rows: Sequence[Sequence[Sample]], conditions: Sequence[Sequence[Condition | None]] | None = None
    ) -> list[Encoded]:
        """The same for several rows, in one call of the tokenizer."""
        under = conditions or [[None] * len(row) for row in rows]
        prompts = [[self._prompt(*one) for one in zip(*pair, strict=True)] for pair in zip(rows, under, strict=True)]
        groups: list[list[list[int]]] = []
        for row in prompts:
            members: dict[tuple[Any, ...], list[int]] = {}
            for number, prompt in enumerate(row):
                members.setdefault(prompt.key, []).append(number)
            groups.append(list(members.values()))
        alike = [[row[n] for n in group] for row, found in zip(prompts, groups, strict=True) for group in found]
        encoded = iter(self._encoded(alike))
        memo: dict[tuple[Any, ...], tuple[list[int], list[int], Seen | None]] = {}
        out = []
        for row, found in zip(prompts, groups, strict=True):
            parts = [self._seeing([row[n] for n in group], next(encoded), memo) for group in found]
            out.append(self._joined(found, parts))
        return out

    def prompt(self, content: Content) -> list[int]:
        """Token ids of a prompt alone, as the model begins its answer."""
        return self.shown(content)[0]

    def shown(self, content: Content, condition: Condition | None = None) -> tuple[list[int], Seen | None]:
        """Token ids of a prompt alone, and what it shows."""
        prompt = self._prompt(Sample(prompt=content, completion=Content(text="a")), condition)
        if not prompt.shown:
            ids = self._inner.prompt(prompt.sample.prompt)
            return ids, self._seen(ids, (), None)
        expanded, _, seen = self._processed(self._unlimited.text(prompt.sample), prompt)
        self._check_length(len(expanded), seen)
        return expanded, seen

    def arguments(self, content: Content, condition: Condition | None = None) -> dict[str, Tensor]:
        """What a model's `generate` takes for one prompt: ids, mask, and the processor's tensors of what it shows."""
        ids, seen = self.shown(content, condition)
        told = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if seen is None or not seen.images:
            return told
        prompt = self._prompt(Sample(prompt=content, completion=Content(text="a")), condition)
        outputs = self._outputs(self.tokenizer.placed(self._unlimited.text(prompt.sample)), prompt)[0]
        types = seen.token_types if self.family.answer_type == 0 else None
        for name, tensor in outputs.items():
            if name in ("token_type_ids", "mm_token_type_ids"):
                told[name] = torch.zeros(1, len(ids), dtype=torch.long) if types is None else types[None]
            elif name == "cross_attention_mask" and seen.crossed is not None:
                told[name] = seen.crossed[None]
            elif name not in told and name != "labels":
                kind: Kind = "video" if name.endswith("_videos") else "image"
                told[name] = self._changed(name, tensor, kind, condition)
        return told

    # --- samples as texts -------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PartsTemplate:
        """The processor's tokenizer, whose conversations go through the processor's template."""
        return PartsTemplate(self.processor, self.family.placeholders, self.family.template)

    @cached_property
    def _inner(self) -> Encoder:
        ends = self.eos != "auto" or self.tokenizer.ends_turns
        return Encoder(
            tokenizer=self.tokenizer,
            template="always" if self.family.template else self.template,
            template_kwargs=self.template_kwargs,
            system_prompt=self.system_prompt,
            eos=self.eos if ends else "always",
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
            begun=not self.family.template,
        )

    @cached_property
    def _unlimited(self) -> Encoder:
        return replace(self._inner, max_prompt_length=None)

    def _prompt(self, sample: Sample, condition: Condition | None) -> _Prompt:
        if sample.completion.media():
            raise UserError("got an answer with images, want a text. Use a prompt for each candidate to compare images.")
        content = sample.prompt if condition is None else condition.prompt(sample.prompt)
        self._check_texts(content, sample)
        marked_content, shown = marked(content, as_video=self.as_video)
        unknown = next((kind for kind, _ in shown if kind not in self._media_tokens), None)
        if unknown is not None:
            raise UserError(f"got a {unknown}, which {self.model_type} does not see. Use another model, or single frames.")
        return _Prompt(replace(sample, prompt=marked_content), shown, condition)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return processor_settings(self.processor, self.settings)

    @cached_property
    def _placeholder_ids(self) -> set[int]:
        """Token ids that stand for an image or a video, or for a part of one."""
        single = self.processor.tokenizer.convert_tokens_to_ids(list(self._media_tokens.values()))
        return {*single, *self.family.ids(self.processor)}

    def _check_texts(self, content: Content, sample: Sample) -> None:
        for kind, token in self._media_tokens.items():
            for text in (content.words(), sample.prefix or "", sample.completion.words()):
                if token in text:
                    raise UserError(
                        f"got {token!r} in a text, which stands for {'an image' if kind == 'image' else 'a video'} here. "
                        "Give images as parts of messages, which are placed without it, and remove it from the text."
                    )

    @cached_property
    def _media_tokens(self) -> dict[Kind, str]:
        """What stands for images and videos in texts that the processor is given; the tiny SmolVLM's knows no videos."""
        named = {kind: getattr(self.processor, f"{kind}_token", None) for kind in self.family.placeholders}
        return {kind: token for kind, token in named.items() if token is not None}

    # --- texts as ids -----------------------------------------------------------------------------------------------

    def _encoded(self, groups: Sequence[Sequence[_Prompt]]) -> list[Encoded]:
        """Of groups that show the same, the ids with single placeholders."""
        out: list[Encoded | None] = [None] * len(groups)
        for encoder, sighted in ((self._inner, False), (self._unlimited, True)):
            chosen = [n for n, group in enumerate(groups) if bool(group[0].shown) == sighted]
            if chosen:
                found = encoder.all([[prompt.sample for prompt in groups[n]] for n in chosen])
                for n, one in zip(chosen, found, strict=True):
                    out[n] = one
        return [one for one in out if one is not None]

    def _seeing(self, group: Sequence[_Prompt], encoded: Encoded, memo: dict[tuple[Any, ...], Any]) -> Encoded:
        """A group's ids with the placeholders that its images fill, and what they show."""
        contexts: list[Ids] = []
        media: list[Seen | None] = []
        for place, plain in enumerate(encoded.contexts):
            prompt = group[encoded.context_of.index(place)]
            begun = self._begun_answer(prompt)
            if not prompt.shown:
                contexts.append(plain)
                media.append(self._seen(plain, (), None, begun - encoded.given[encoded.context_of.index(place)]))
                continue
            text = self._unlimited.text(prompt.sample)
            known = (text, begun, prompt.key)
            if known not in memo:
                memo[known] = self._processed(text, prompt)
            expanded, single, seen = memo[known]
            lost = len(single) - len(plain)  # tokens at the end of the prompt that its answers are tokenised with
            tail = single[len(plain) :]
            if tuple(single[: len(plain)]) != plain or self._placeholder_ids & set(tail) or expanded[-lost:][:lost] != tail:
                raise UserError(
                    "adapter.chat_template: it writes a prompt with images otherwise once it is answered. Give another one."
                )
            kept = expanded[: len(expanded) - lost]
            contexts.append(tuple(kept))
            media.append(seen if not lost else self._seen(kept, seen.images, seen.crossed, begun - lost))
            self._check_length(len(kept), seen)
        return replace(encoded, contexts=tuple(contexts), media=tuple(media))

    def _joined(self, groups: Sequence[Sequence[int]], parts: Sequence[Encoded]) -> Encoded:
        """A row whose samples were encoded group by group, in its own order."""
        placed = {number: (part, n) for group, part in zip(groups, parts, strict=True) for n, number in enumerate(group)}
        members = [placed[number] for number in range(len(placed))]
        owners = dict.fromkeys((id(part), part.context_of[n]) for part, n in members)
        number_of = {owner: number for number, owner in enumerate(owners)}
        by_id = {id(part): part for part in parts}
        contexts = [by_id[part].contexts[n] for part, n in owners]
        media = [by_id[part].media[n] for part, n in owners]
        continuations = [part.continuations[n] for part, n in members]
        context_of = [number_of[id(part), part.context_of[n]] for part, n in members]
        others = [part.others[n] if part.others else () for part, n in members]
        longest = max(len(contexts[c]) + len(ids) for c, ids in zip(context_of, continuations, strict=True))
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"got a prompt and an answer of {longest} tokens, and the model has positions for {self.positions}. Lower "
                "adapter.max_response_length, or show smaller images."
            )
        return Encoded(
            tuple(contexts),
            tuple(continuations),
            tuple(context_of),
            tuple(part.given[n] for part, n in members),
            media=tuple(media) if any(seen is not None for seen in media) else (),
            others=tuple(others) if any(others) else (),
            **{name: sum(getattr(part, name) for part in parts) for name in COUNTS},
        )

    def _check_length(self, length: int, seen: Seen | None) -> None:
        if self.max_prompt_length is None or length <= self.max_prompt_length or seen is None or not seen.images:
            return
        of_images = sum(image.num_tokens for image in seen.images)
        raise UserError(
            f"got a prompt of {length} tokens, {length - of_images} of text and {of_images} of {len(seen.images)} images, want "
            f"at most {self.max_prompt_length}: prompts with images are not cut. Raise adapter.max_prompt_length, show smaller "
            "images (adapter.processor), or filter the row."
        )

    # --- what the processor makes ---------------------------------------------------------------------------------

    def _processed(self, text: str, prompt: _Prompt) -> tuple[list[int], list[int], Seen]:
        """Ids with images expanded and with single placeholders, both as they begin; and what they show."""
        text = self.tokenizer.placed(text)
        outputs, rest = self._outputs(text, prompt)
        ids: list[int] = self.family.expanded(outputs["input_ids"][0].tolist(), self.processor)
        parts = self.family.parts(outputs, ids, self.processor)
        if rest:
            ids += self.processor.tokenizer(rest, add_special_tokens=False)["input_ids"]
        single = self._begun(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        images = tuple(self._image(kind, tensors, count, prompt.condition) for kind, tensors, count in parts)
        begun = self._begun(ids)
        crossed = self.family.crossed(outputs, len(begun) - len(ids))
        seen = self._seen(begun, images, crossed, self._begun_answer(prompt))
        assert seen is not None
        of_images = 0 if seen.token_types is None else int((seen.token_types > 0).sum())
        if of_images != sum(image.num_tokens for image in images):
            raise UserError(
                f"got {of_images} tokens for images whose features fill {sum(image.num_tokens for image in images)}: the "
                "processor does not go with the model. Name the model's own one."
            )
        return begun, single, seen

    def _outputs(self, text: str, prompt: _Prompt) -> tuple[Any, str]:
        """What the processor makes of a prompt as a text, and what of the text does not go through it."""
        head, rest = self.family.divided(text)
        settings: dict[str, Any] = {"add_special_tokens": False, **self._settings}
        try:
            given = self.family.given(prompt.shown, self.num_frames)
            return self.processor(text=[head], return_tensors="pt", **given, **settings), rest
        except (ValueError, TypeError, IndexError) as fault:
            where = prompt.shown[0][1][0].place()
            raise UserError(
                f"{where}: the processor refuses the prompt ({fault}). Correct the image or the settings."
            ) from fault

    def _begun(self, ids: list[int]) -> list[int]:
        """A prompt behind what every text begins with, which Mllama's processor puts behind an image that begins a text."""
        beginning = list(self._inner.beginning) if self._inner.begun else []
        first = next((n for n, token in enumerate(ids) if token not in self._placeholder_ids), 0)
        there = any(ids[start : start + len(beginning)] == beginning for start in (0, first))
        return ids if there else beginning + ids

    def _image(self, kind: Kind, tensors: dict[str, Tensor], count: int, condition: Condition | None) -> SeenImage:
        tensors = {name: self._changed(name, tensor, kind, condition) for name, tensor in tensors.items()}
        key = image_key(self.model_type, kind, tensors)
        return SeenImage(key=key, kind=kind, tensors=tensors, num_tokens=count)

    def _changed(self, name: str, tensor: Tensor, kind: Kind, condition: Condition | None) -> Tensor:
        """Pixels as a condition shows them; other tensors as they are."""
        if condition is None or condition.degradation.of_pixels is None or not name.startswith("pixel_values"):
            return tensor
        maker = self.processor.image_processor if kind == "image" else self.processor.video_processor
        mean, std = (torch.tensor(getattr(maker, key)) for key in ("image_mean", "image_std"))
        changed = condition.pixels(self.family.apart(tensor, self.processor, kind), mean, std)
        return self.family.together(changed, tensor)

    def _begun_answer(self, prompt: _Prompt) -> int:
        """Tokens at the end of a context that the answer begins with, which no token of the question sees."""
        prefix = prompt.sample.prefix
        return len(self.processor.tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else 0

    def _seen(
        self, ids: Sequence[int], images: tuple[SeenImage, ...], crossed: Tensor | None, answered: int = 0
    ) -> Seen | None:
        types = self._types(ids)
        asked = len(ids) - max(answered, 0)
        blocks = tuple((start, min(stop, asked)) for start, stop in self.family.blocks(types) if start < asked)
        if not images and not blocks:
            return None
        return Seen(
            key=seen_key(images, blocks),
            images=images,
            token_types=types,
            positions=self.family.positions(types, images, self.config) if images else None,
            blocks=blocks,
            crossed=None if crossed is None else crossed[: len(ids)],
        )

    def _types(self, ids: Sequence[int]) -> Tensor:
        """0 text, 1 image, 2 video."""
        kinds = np.zeros(len(ids), dtype=np.int64)
        for token, kind in self.family.ids(self.processor).items():
            kinds[np.asarray(ids) == token] = kind
        return torch.from_numpy(kinds)
