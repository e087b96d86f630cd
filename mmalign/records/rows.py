"""Rows: Comparison, Judgement and what views make of them, as typed values."""

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from mmalign.errors import UserError
from mmalign.records.media import Media


@dataclass(frozen=True)
class Message:
    """One message of a conversation, in the words of chat templates.

    Args:
        role: system, user, assistant, tool, or another one that the template knows.
        text: what is said; an empty text beside tool calls or images is none.
        images: pictures in it, in order.
        places: for each image, before which character of the text it stands; empty: all before the text.
        name: who speaks, or the tool that answers.
        tool_calls: JSON objects, as chat templates want them: `{"type": "function", "function": {"name", "arguments"}}`.
        extra: any other key of the message that a template may read (tool_call_id, thinking, reasoning_content), as JSON.
    """

    role: str
    text: str = ""
    images: tuple[Media, ...] = ()
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    places: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def is_empty(self) -> bool:
        """Return whether it has neither words, nor images, nor tool calls."""
        return not self.text.strip() and not self.images and not self.tool_calls


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is shown or said: a text, images, or both; or a conversation, whose messages then hold all of it.

    A video is either one file of several frames (GIF, WebP, APNG, MP4, WebM), or several images: its frames in order.

    Args:
        messages: of a prompt: all before the answer. Of a candidate: the answer, most often one message of the assistant.
        tools: JSON schemas of the functions that may be called; they belong to the prompt.
        template_kwargs: of a prompt: what its chat template is given by names of its own, as `enable_thinking`, as JSON.
    """

    text: str | None = None
    images: tuple[Media, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    def is_empty(self) -> bool:
        """Return whether there is nothing in it: no image, no words, no tool call."""
        return not (self.text or "").strip() and not self.images and all(m.is_empty() for m in self.messages)

    def media(self) -> tuple[Media, ...]:
        """Return every image in it, those of messages too, in order."""
        return (*self.images, *(image for message in self.messages for image in message.images))

    def words(self) -> str:
        """Return all that is said, without roles: the text, or the texts of the messages with a line between them."""
        said = [m.text for m in self.messages if m.text]
        return "\n".join(said if self.text is None else [self.text, *said])

    def key(self) -> str:
        """Return a hash of the content: of the encoded images alone where there are some, that of the file where there is one.

        A caption beside images does not count; conversations count as a whole.
        """
        keys = [media.key() for media in self.images]
        if self.messages or self.tools or self.template_kwargs or (self.text is not None and not keys):
            said = [(m.role, m.text, m.places, m.name, m.tool_calls, m.extra) for m in self.messages]
            whole: list[Any] = [self.text, said, self.tools, [media.key() for media in self.media()]]
            whole += [self.template_kwargs] if self.template_kwargs else []
            return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()

    def num_frames(self) -> int:
        """Return the number of frames: of the one file, or of images.

        Raises:
            UserError: the file is missing or damaged.
        """
        return self.images[0].num_frames() if len(self.images) == 1 else len(self.images)

    def frames(self, count: int | None = None) -> list[Image]:
        """Decode the first `count` frames, or all, as RGB.

        Raises:
            UserError: a file is missing or damaged, or the images are not of one size.
        """
        if len(self.images) == 1:
            return self.images[0].frames(count)
        frames = [media.open() for media in self.images[:count]]
        other = next((n for n, frame in enumerate(frames) if frame.size != frames[0].size), None)
        if other is not None:
            sizes = " and ".join(f"{width} x {height}" for width, height in (frames[0].size, frames[other].size))
            raise UserError(f"{self.images[other].place()}: got frames of {sizes} in one video, want one size. Resize them.")
        return frames


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt with k >= 2 candidates in the order they were made, and what is known about their order.

    Args:
        scores: judge name -> one score a candidate, higher is better, in the judge's own units.
        ranks: one rank a candidate; 1 is best, equal is a tie.
        prob: P(candidate 0 beats candidate 1), pairs only; 0.5 is a tie.
        weight: weight of the row in the loss. None is 1.
        margin: by how much the better one is better, in reward units. None is 0.
        beta_scale: factor of the loss's beta for this row. None is 1.
        provenance: one dict a candidate (model, seed, guidance_scale ...), or empty.
        prompts: one prompt a candidate where each answers its own (joint pairs); None: all answer `prompt`.
        prefix: text that every candidate goes on from, as verified steps of a solution; given, never scored.
        extras: further completions of the prompt that are not compared, by name (rationale, exploration, gold).
        where: file and row it came from, for messages. Not part of equality.
    """

    id: str
    prompt: Content
    candidates: tuple[Content, ...]
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ranks: tuple[float, ...] | None = None
    prob: float | None = None
    weight: float | None = None
    margin: float | None = None
    beta_scale: float | None = None
    provenance: tuple[dict[str, Any], ...] = ()
    prompts: tuple[Content, ...] | None = None
    prefix: str | None = None
    extras: dict[str, Content] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def contents(self) -> tuple[Content, ...]:
        """Return all that is in it: prompt, prompts, candidates, extras."""
        return (self.prompt, *(self.prompts or ()), *self.candidates, *self.extras.values())

    def prompt_of(self, candidate: int) -> Content:
        """Return the prompt that a candidate answers."""
        return self.prompt if self.prompts is None else self.prompts[candidate]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judge's verdict on one comparison; verdicts are appended, never changed. A scorer is a judge that gives scores.

    Args:
        comparison: id of the comparison.
        judge: who judged: a person's or a scorer's name.
        ranks: 1 is best, equal is a tie. Either ranks or scores.
        scores: one a candidate, higher is better.
        details: anything else worth keeping (seconds, shown order, version).
    """

    comparison: str
    judge: str
    ranks: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One complete thing a model can be asked the likelihood of.

    Args:
        prompt, completion: a text or messages each; images for models of images.
        prefix: text between the two that is given and not scored: it follows the prompt's generation prompt.
        ends_turn: whether the completion is all that is said, so that the end of a turn counts; a step of a solution is not.
    """

    prompt: Content
    completion: Content
    prefix: str | None = None
    ends_turn: bool = True


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one loss term sees: k samples, best first, and side data under the names of the losses' data parameters.

    Args:
        extras: further completions that are not compared, by name (rationale, exploration, gold).
    """

    id: str
    samples: tuple[Sample, ...]
    side: dict[str, float | tuple[float, ...]] = field(default_factory=dict)
    extras: dict[str, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A view's answer for a row that it does not use, with the reason: `tie`, `not judged by ...`."""

    reason: str


@dataclass(frozen=True)
class Fault:
    """One unusable row: where it is and what is wrong, in one sentence."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Return `where: problem`."""
        return f"{self.where}: {self.problem}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean x?` for the nearest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""
