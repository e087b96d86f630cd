"""From samples to token ids: chat templates, ends of turns, truncation, and where a prompt ends and its answer begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

from mmalign.errors import UserError
from mmalign.language.cuts import cut_conversation
from mmalign.language.turns import said_by_others
from mmalign.records import Content, Message, Sample

Eos = Literal["auto", "always", "never"]
GIVEN = ("messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "conversation")
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message, beside its text
ENCODING = ("__call__", "_encode_plus")  # of a tokenizer of transformers


Cut = Callable[[Sequence[int], int], list[int]]


@dataclass(frozen=True)
class Encoded:
    """Samples as token ids.

    Args:
        contexts: distinct prompts.
        continuations: one a sample: what follows its context.
        context_of: of each sample, the index of its context.
        given: of each continuation, how many of its first tokens are still prompt: they are run, not scored.
        others: of each continuation, places of further tokens that are run and not scored: what users and tools say within an
            answer of several messages. Empty: nothing anywhere.
        cut_prompts, cut_responses: how many were truncated.
        changed: how many answers the template left something out of, or wrote otherwise.
        media: of each context, what is shown in it; empty: nothing anywhere.
    """

    contexts: tuple[tuple[int, ...], ...]
    continuations: tuple[tuple[int, ...], ...]
    context_of: tuple[int, ...]
    given: tuple[int, ...]
    cut_prompts: int = 0
    cut_responses: int = 0
    media: tuple[Any | None, ...] = ()
    others: tuple[tuple[int, ...], ...] = ()
    changed: int = 0

    @property
    def scored(self) -> tuple[tuple[int, ...], ...]:
        """Places of the scored tokens of each continuation."""
        others = self.others or ((),) * len(self.given)
        return tuple(
            tuple(sorted({*range(given, len(ids))} - {*left_out}))
            for ids, given, left_out in zip(self.continuations, self.given, others, strict=True)
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of scored tokens of each continuation."""
        return tuple(map(len, self.scored))


@dataclass(frozen=True)
class _Written:
    """A sample as texts, or as token ids.

    Args:
        prompt, whole: the prompt; prompt and answer.
        ends: how: `templated`, `eos`, `plain` or `open`.
        turns: beginnings of `whole`: up to where others have the word in the answer, up to where they end, and so on.
        cut: (prompt's token ids, limit) -> what stays of a conversation that is too long; None: a text.
        changed: whether words of the answer are not in `whole`.
    """

    prompt: Any
    whole: Any
    ends: str
    turns: tuple[Any, ...] = ()
    cut: Cut | None = None
    changed: bool = False

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.prompt, self.whole, *self.turns)

    def others(self) -> tuple[int, ...]:
        """Of token ids: the places of what others say."""
        reached = [_common(turn, self.whole) if len(turn) < len(self.whole) else len(self.whole) for turn in self.turns]
        return tuple(place for start, stop in zip(reached[::2], reached[1::2], strict=True) for place in range(start, stop))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How samples become token ids.

    A prompt and its answer are tokenised as one text, as the model will see them; the answer begins at the first token that is
    not also one of the prompt alone. Conversations go through the tokenizer's chat template; an answer that is a text follows
    messages as the assistant's message. Samples with equal prompts share one context.

    Source: TRL 1.16's conventions; there all answers of a prompt are scored from where the first of them departs from it, here
        each from where it departs itself, so that its score does not depend on what it is compared with.
    Args:
        tokenizer: of transformers.
        template: auto: only messages go through the template. always: a prompt that is a text is taken for the user's message.
        template_kwargs: given to the template, by names of its own; what a prompt gives itself comes before it.
        system_prompt: put before conversations that have no system message.
        eos: auto: an answer that is a text and ends its turn gets the end-of-text token, messages end as their template ends
            them. always: messages too, where it is not there yet. never: none is added.
        max_prompt_length: tokens; longer prompts lose their beginning, conversations their first messages; the message that is
            cut keeps its header. None: no limit.
        max_response_length: tokens; longer answers lose their end, and so the token that ends them. None: no limit.
        positions: tokens that the model has positions for, prompt and answer together; more are refused. None: no limit.
        begun: whether conversations, too, begin with what the tokenizer puts before a text, where their template does not
            write it, as processors of images have it.
    """

    tokenizer: Any
    template: Literal["auto", "always"] = "auto"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    eos: Eos = "auto"
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    positions: int | None = None
    begun: bool = False

    def __post_init__(self) -> None:
        """Refuse values that the template would not read, or that are not the reader's to give.

        Raises:
            UserError: names the first of them.
        """
        for name in self.template_kwargs:
            if name in GIVEN:
                raise UserError(f"adapter.chat_template_kwargs: got {name}, which the data decide. Remove it.")
            template = self.tokenizer.chat_template
            if isinstance(template, str) and not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(
                    f"adapter.chat_template_kwargs: got {name}, which the chat template does not read. Correct or remove it."
                )

    def __call__(self, samples: Sequence[Sample]) -> Encoded:
        """Token ids of samples, those of one prompt in one context.

        Raises:
            UserError: an empty answer; a template that refuses a conversation; images, which a text model does not see.
        """
        return self.all([samples])[0]

    def all(self, rows: Sequence[Sequence[Sample]]) -> list[Encoded]:
        """The same for several rows, in one call of the tokenizer."""
        said = [self._all_written(row) for row in rows]
        texts = list(dict.fromkeys(text for row in said for one in row for text in one.parts))
        ids = dict(zip(texts, _token_ids(self.tokenizer, texts), strict=True))
        numbered = [
            [
                replace(one, prompt=ids[one.prompt], whole=ids[one.whole], turns=tuple(ids[turn] for turn in one.turns))
                for one in row
            ]
            for row in said
        ]
        return [self._row(row) for row in numbered]

    def prompt(self, content: Content) -> list[int]:
        """Token ids of a prompt alone, as the model begins its answer."""
        text, started = self._prompt_text(content)
        ids: list[int] = self.tokenizer([text], add_special_tokens=False)["input_ids"][0]
        cut = self._cut(text, content) if started else None
        return self._cut_prompt(self._begun(ids, started), cut)[0]

    def text(self, sample: Sample) -> str:
        """A sample's prompt as the tokenizer is given it, with the prefix of its answer; not what it puts before a text."""
        text: str = self._all_written([sample])[0].prompt
        return text

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        with_special, without = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
        for start in range(len(with_special) - len(without) + 1):
            if with_special[start : start + len(without)] == without:
                return tuple(with_special[:start])
        return ()

    def _all_written(self, samples: Sequence[Sample]) -> list[_Written]:
        """Samples as texts; one prompt of several is written once."""
        prompts: dict[tuple[int, bool], tuple[str, bool]] = {}
        out = []
        for sample in samples:
            key = id(sample.prompt), bool(sample.completion.messages)
            prompts[key] = prompts.get(key) or self._prompt_text(sample.prompt, answer=sample.completion)
            out.append(self._written(sample, *prompts[key]))
        return out

    def _written(self, sample: Sample, prompt: str, started: bool) -> _Written:
        """A sample whose prompt is this text, which went through the template or did not."""
        answer = sample.completion
        if answer.is_empty():
            raise UserError(f"{_shown(sample.prompt)}: got an empty answer, want a text. Write one or remove the row.")
        before = prompt + (sample.prefix or "")
        if not started:
            return _Written(before, before + answer.words(), "eos" if sample.ends_turn else "plain")
        cut = self._cut(before, sample.prompt)
        if not sample.ends_turn:
            return _Written(before, before + answer.words(), "open", cut=cut)
        said = self._messages(sample.prompt)
        answers = answer.messages or (Message(role="assistant", text=answer.text or ""),)
        if answers[0].role == "assistant":  # it goes on where the prompt and the prefix stop
            begun = sample.prefix or ""
            if _goes_on(said):
                begun, said = (said[-1].text or "") + begun, said[:-1]
            answers = (replace(answers[0], text=begun + (answers[0].text or "")), *answers[1:])
        render = partial(self._rendered, prompt=sample.prompt)
        whole = render((*said, *answers), ends=True)
        kept = self._kept(before, whole, said, answers)
        turns = said_by_others(whole, said, answers, render) if len(answers) > 1 else ()
        shift = len(kept) - len(whole)  # they differ in the prompt alone
        return _Written(
            before, kept, "templated", tuple(kept[: place + shift] for place in turns), cut, _changed(answers, kept)
        )

    def _kept(self, before: str, whole: str, said: Sequence[Message], answers: Sequence[Message]) -> str:
        """Prompt and answer, where a template writes the prompt otherwise once it is answered (the system message behind the
        last question, say): the prompt as the model meets it when it answers, and of the conversation what the answer begins.

        Raises:
            UserError: the answer is not to be found in the conversation either.
        """
        if whole.startswith(before):
            return whole
        shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
        lost = before[shared:]
        if not any(m.text.strip() and m.text.strip() in lost for m in said):
            return whole  # all that differs is how the answer is begun
        first = answers[0].text.strip()
        start = whole.rfind(first) if first else -1
        if start < shared:
            raise UserError(
                f"adapter.chat_template: it writes {_shown(Content(messages=tuple(said)))} otherwise once it is answered, and "
                "the answer cannot be told apart. Give another template."
            )
        gap = whole[len(whole[:start].rstrip()) : start]
        return before + ("" if before[-1:].isspace() else gap) + whole[start:]

    def _row(self, samples: list[_Written]) -> Encoded:
        contexts: list[tuple[int, ...]] = []
        owners: dict[tuple[int, ...], list[int]] = {}
        for number, sample in enumerate(samples):
            owners.setdefault(tuple(sample.prompt), []).append(number)
        place = [0] * len(samples)
        wholes: list[list[int]] = [[]] * len(samples)
        given = [0] * len(samples)
        others: list[tuple[int, ...]] = [()] * len(samples)
        cut_prompts = cut_responses = 0
        for key, members in owners.items():
            prompt, whole = self._bounded(list(key), [samples[n] for n in members])
            kept, lost = self._cut_prompt(prompt, samples[members[0]].cut)
            cut_prompts += len(members) * (lost > 0)
            for n, (ids, own, left_out) in zip(members, whole, strict=True):
                limit = None if self.max_response_length is None else own + self.max_response_length
                cut_responses += limit is not None and len(ids) > limit
                place[n], wholes[n], given[n] = len(contexts), ids[:limit], own
                others[n] = tuple(at for at in left_out if own <= at < len(wholes[n]))
            contexts.append(tuple(kept))
        longest = max(len(contexts[c]) + len(ids) for c, ids in zip(place, wholes, strict=True))
        if self.positions is not None and longest > self.positions:
            raise UserError(
                f"got a prompt and an answer of {longest} tokens, and the model has positions for {self.positions}. Lower "
                "adapter.max_prompt_length and max_response_length."
            )
        parts = (tuple(contexts), tuple(map(tuple, wholes)), tuple(place), tuple(given), cut_prompts, cut_responses)
        changed = sum(sample.changed for sample in samples)
        encoded = Encoded(*parts, others=tuple(others) if any(others) else (), changed=changed)
        if not all(encoded.lengths):
            raise UserError(
                "got an answer of which the assistant says nothing within adapter.max_response_length. Raise it, or remove the "
                "row."
            )
        return encoded

    def _bounded(
        self, prompt: list[int], samples: list[_Written]
    ) -> tuple[list[int], list[tuple[list[int], int, tuple[int, ...]]]]:
        """The context that all samples of a prompt share, and of each what follows, how much of that is prompt still, and the
        places in it of what others say.
        """
        own = [_common(prompt, sample.whole) for sample in samples]
        shared = min(own)
        context = self._begun(prompt[:shared], samples[0].ends in ("templated", "open"))
        return context, [
            (self._ended(one.whole[shared:], one.ends), length - shared, tuple(place - shared for place in one.others()))
            for one, length in zip(samples, own, strict=True)
        ]

    def _begun(self, ids: list[int], templated: bool) -> list[int]:
        """A prompt behind what every text begins with; never nothing, from which no first token could be predicted."""
        beginning = list(self.beginning)
        if (self.begun or not templated) and ids[: len(beginning)] != beginning:
            ids = beginning + ids
        if ids:
            return ids
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if start is None:
            raise UserError(
                "adapter.tokenizer: got an empty prompt, and the tokenizer has no token that begins or ends a text. Give "
                "prompts, or another tokenizer."
            )
        return [start]

    def _ended(self, ids: list[int], ends: str) -> list[int]:
        last = self.tokenizer.eos_token_id
        wanted = {"eos": self.eos != "never", "templated": self.eos == "always"}.get(ends, False)
        there = last in ids[-2:]  # a template may write a line break behind it
        return [*ids, last] if wanted and last is not None and not there else ids

    def _cut_prompt(self, ids: list[int], cut: Cut | None) -> tuple[list[int], int]:
        """The end of a prompt that is too long, behind the token that every text begins with."""
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return ids, 0
        if cut is not None:
            kept = cut(ids, limit)
            return kept, len(ids) - len(kept)
        beginning = self._begins(ids)
        return beginning + ids[len(ids) - max(limit - len(beginning), 0) :], len(ids) - limit

    def _cut(self, text: str, content: Content) -> Cut:
        """How a conversation, written as this text, is cut."""

        def cut(ids: Sequence[int], limit: int) -> list[int]:
            return cut_conversation(
                ids,
                limit,
                text=text,
                messages=self._messages(content),
                render=partial(self._rendered, prompt=content),
                tokens=partial(_token_ids, self.tokenizer),
                beginning=self._begins(ids),
            )

        return cut

    def _begins(self, ids: Sequence[int]) -> list[int]:
        """What every text begins with, where these tokens do."""
        beginning = list(self.beginning) or [self.tokenizer.bos_token_id]
        return beginning if list(ids[: len(beginning)]) == beginning else []

    def _prompt_text(self, content: Content, answer: Content | None = None) -> tuple[str, bool]:
        """The prompt as the model sees it, and whether it went through the template."""
        chat = bool(content.messages) or self.template == "always" or (answer is not None and bool(answer.messages))
        if content.media():
            raise UserError(f"{_shown(content)}: got images, which adapter: text does not see. Use a model of images.")
        if not chat and self.system_prompt is not None:
            raise UserError(
                f"adapter.system_prompt: got one, and {_shown(content)} is a plain text, which goes through no template. Set "
                "adapter.template to always, or system_prompt to null."
            )
        if not chat:
            return content.text or "", False
        if not content.messages and not (content.text or "").strip():
            raise UserError("prompt: got an empty one, want a message. Write one or remove the row.")
        messages = self._messages(content)
        return self._rendered(messages, prompt=content, ends=False), True

    def _messages(self, content: Content) -> tuple[Message, ...]:
        messages = content.messages or (Message(role="user", text=content.text or ""),)
        if self.system_prompt is not None and messages[0].role != "system":
            messages = (Message(role="system", text=self.system_prompt), *messages)
        return messages

    def _rendered(self, messages: Sequence[Message], *, prompt: Content, ends: bool) -> str:
        """A conversation as text; without `ends` up to where the assistant goes on."""
        decided = next((name for name in prompt.template_kwargs if name in GIVEN), None)
        if decided is not None:
            raise UserError(f"chat_template_kwargs: got {decided} in a row, which the conversation decides. Remove it there.")
        if self.tokenizer.chat_template is None:
            raise UserError(
                "adapter.chat_template: the tokenizer has none, and the data are conversations. Give one, or plain texts."
            )
        goes_on = not ends and _goes_on(messages)
        try:
            text: str = self.tokenizer.apply_chat_template(
                [_as_dict(message) for message in messages],
                tools=list(prompt.tools) or None,
                tokenize=False,
                add_generation_prompt=not ends and not goes_on,
                continue_final_message=goes_on,
                **{**self.template_kwargs, **prompt.template_kwargs},
            )
        except Exception as fault:  # jinja's errors have no common base with those that templates raise
            raise UserError(
                f"adapter.chat_template: it refuses the conversation {_shown(Content(messages=tuple(messages)))} ({fault}). "
                "Correct the roles, or give another template."
            ) from fault
        return text


def _goes_on(messages: Sequence[Message]) -> bool:
    """Whether an answer continues the last message: the assistant's, which is no call of a tool."""
    return messages[-1].role == "assistant" and not messages[-1].tool_calls


def _changed(answers: Sequence[Message], whole: str) -> bool:
    """Whether words of the assistant are not in the conversation as it was written; blanks do not count."""
    own = [message for message in answers if message.role == "assistant"]
    said = [text for one in own for text in (one.text, *(one.extra.get(name) for name in REASONING)) if isinstance(text, str)]
    lacking = [text for text in said if text.strip() not in whole]
    return bool(lacking) and any("".join(text.split()) not in "".join(whole.split()) for text in lacking)


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, nothing put before them; without offsets, which cost a fifth of the time, where transformers' own
    class leaves the encoding to the Rust tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast
    if not isinstance(tokenizer, own) or any(getattr(type(tokenizer), n) is not getattr(own, n) for n in ENCODING):
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _as_dict(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.text, **message.extra}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_calls:
        out["tool_calls"] = list(message.tool_calls)
    return out


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix; at least one token of `second` is left."""
    most = min(len(first), len(second) - 1)
    if first[:most] == second[:most]:
        return most
    return next((n for n in range(most) if first[n] != second[n]), most)


def _shown(content: Content) -> str:
    words = " ".join(content.words().split())
    return f"prompt {words[:60]!r}" if words else "a prompt without words"
