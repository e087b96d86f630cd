"""Chat templates of processors: messages whose texts hold marks for images, as conversations of parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mmalign.errors import UserError
from mmalign.multimodal.seen import Kind
from mmalign.records import Content, Message
from mmalign.records.media import Media

# Noncharacters of Unicode, which no text holds: where an image and a video stand in the text of a message.
MARKS: dict[Kind, str] = {"image": "\ufdd0", "video": "\ufdd1"}
_ANY = re.compile("[" + "".join(MARKS.values()) + "]")
Shown = tuple[Kind, tuple[Media, ...]]  # an image; or a video, as one file or as its frames


class PartsTemplate:
    """A tokenizer whose conversations go through the chat template of a processor; all else is the tokenizer's.

    Args:
        processor: of transformers, with a tokenizer.
        placeholders: of an image and a video in texts that go through no template.
        fallback: template of a family whose processors bring none.
    """

    def __init__(self, processor: Any, placeholders: Mapping[Kind, str], fallback: str | None = None) -> None:
        """Take the processor's template, or its tokenizer's, or the fallback."""
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.placeholders = dict(placeholders)
        self.fallback = fallback

    def __getattr__(self, name: str) -> Any:
        """What a tokenizer has."""
        if name.startswith("__") or name in ("tokenizer", "processor"):
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], **settings: Any) -> Any:
        """Token ids, the family's placeholders in the place of marks."""
        placed = self.placed(texts) if isinstance(texts, str) else [self.placed(text) for text in texts]
        return self.tokenizer(placed, **settings)

    def placed(self, text: str) -> str:
        """A text with placeholders instead of marks."""
        for kind, mark in MARKS.items():
            text = text.replace(mark, self.placeholders.get(kind, ""))
        return text

    @property
    def chat_template(self) -> str | None:
        """The Jinja text."""
        own = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return own if own is not None else self.fallback

    @cached_property
    def ends_turns(self) -> bool:
        """Whether the template writes a special token behind an answer."""
        if self.chat_template is None:
            return True
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qzx"}]
        whole = self._rendered(conversation)
        special = set(self.tokenizer.all_special_tokens) | set(self.tokenizer.get_added_vocab())
        return any(token in whole[whole.rfind("qzx") + 3 :] for token in special)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        """A conversation as text; an answer that the template does not end loses the blanks behind it."""
        text = self._rendered(messages, **{name: value for name, value in settings.items() if name != "tokenize"})
        begins = settings.get("add_generation_prompt") or settings.get("continue_final_message")
        return text if begins or self.ends_turns else text.rstrip()

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
        told = [{**message, "content": _parts(message["content"])} for message in messages]
        text: str = self.processor.apply_chat_template(
            told, chat_template=self.chat_template, tokenize=False, **{k: v for k, v in settings.items() if v is not None}
        )
        return text


def marked(content: Content, *, as_video: bool) -> tuple[Content, tuple[Shown, ...]]:
    """A prompt whose texts hold marks where it showed something, and what it showed, in order.

    Args:
        content: the prompt.
        as_video: whether several images of a message, or of a prompt without messages, are the frames of one video.
    """
    shown: list[Shown] = []
    if not content.messages:
        text, found = _marked(content.text or "", content.images, (), as_video)
        return replace(content, text=text, images=()) if found else content, tuple(found)
    messages: list[Message] = []
    for message in content.messages:
        text, found = _marked(message.text, message.images, message.places, as_video)
        messages.append(replace(message, text=text, images=(), places=()) if found else message)
        shown += found
    return replace(content, messages=tuple(messages)), tuple(shown)


def _marked(text: str, images: Sequence[Media], places: Sequence[int], as_video: bool) -> tuple[str, list[Shown]]:
    if _ANY.search(text):
        raise UserError("prompt: got the noncharacter U+FDD0 or U+FDD1 in a text, which stands for an image here. Remove it.")
    if not images:
        return text, []
    places = places or (0,) * len(images)
    if as_video and len(images) > 1:
        at = places[0]
        return text[:at] + MARKS["video"] + text[at:], [("video", tuple(images))]
    found: list[Shown] = [("video" if media.num_frames() > 1 else "image", (media,)) for media in images]
    out, last = "", 0
    for at, (kind, _) in zip(places, found, strict=True):
        out += text[last:at] + MARKS[kind]
        last = at
    return out + text[last:], found


def _parts(text: Any) -> list[dict[str, Any]]:
    """The text of a message as the parts that templates of processors want."""
    parts: list[dict[str, Any]] = []
    kinds: dict[str, Kind] = {mark: kind for kind, mark in MARKS.items()}
    for piece in re.split(f"({_ANY.pattern})", text or ""):
        if piece in kinds:
            parts.append({"type": kinds[piece]})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
