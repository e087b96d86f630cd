"""What `mmalign validate-data` finds in texts: sides that teach nothing, marks of templates, lengths, prompts said twice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Sample

# What chat templates write around turns. In a text that goes through a template they are written twice, or by the wrong one.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "ChatML": ("<|im_start|>", "<|im_end|>"),
    "Llama 2 or Mistral": ("[INST]", "[/INST]", "<<SYS>>"),
    "Llama 3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Zephyr or Phi": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "DeepSeek": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    "Human and Assistant": ("\n\nHuman:", "\n\nAssistant:"),
    "Alpaca": ("### Instruction:", "### Response:"),
}
ENDS = (
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
WORDS_OF_A_PROMPT = 5  # an answer may well begin with a shorter one


@dataclass
class TextFindings:
    """Findings of rows whose answers are texts or conversations: lists of places, and counts of lengths.

    Args:
        tokenizer: of the model, to count tokens and to look where a prompt ends. None: lengths are in words.
    """

    tokenizer: Any = None
    num_rows: int = 0
    equal_sides: list[str] = field(default_factory=list)
    user_turns: list[str] = field(default_factory=list)
    said_twice: list[str] = field(default_factory=list)
    not_prefix: list[str] = field(default_factory=list)
    marks: dict[str, list[str]] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    also_there: list[str] = field(default_factory=list)
    lengths: list[tuple[float, float]] = field(default_factory=list)

    def look(self, row: Comparison) -> None:
        """Note what is to be said of a row; rows whose candidates are images alone are passed over."""
        if (
            not any(c.messages or c.text is not None for c in (*row.candidates, *row.extras.values()))
            and not row.prompt.messages
        ):
            return
        self.num_rows += 1
        self._look_at_sides(row)
        self._look_at_marks(row)
        if row.candidates and (row.candidates[0].messages or row.candidates[0].text is not None):
            self.lengths += _decided(row, self._lengths(row))

    def _look_at_sides(self, row: Comparison) -> None:
        for (n, one), (m, other) in combinations(enumerate(row.candidates, 1), 2):
            if one == other and row.prompt_of(n - 1) == row.prompt_of(m - 1):
                self.equal_sides.append(f"{row.where}: candidates {n} and {m} are equal")
                break
        for n, answer in enumerate(row.candidates, 1):
            if any(message.role == "user" for message in answer.messages):
                self.user_turns.append(f"{row.where}: candidate {n}")
            prompt = row.prompt_of(n - 1).words().strip()
            if len(prompt.split()) >= WORDS_OF_A_PROMPT and answer.words().lstrip().startswith(prompt):
                self.said_twice.append(f"{row.where}: candidate {n}")

    def _look_at_marks(self, row: Comparison) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        special = tuple(getattr(self.tokenizer, "all_special_tokens", ()))
        for kind, marks in TEMPLATES.items():
            if found := _first(row, partial(_mark, marks)):
                part, mark = found
                other = ", which the tokenizer's template does not write" if template and mark.strip() not in template else ""
                self.marks.setdefault(kind, []).append(f"{row.where}: {mark.strip()!r} in {part}{other}")
        known = {mark for marks in TEMPLATES.values() for mark in marks}
        if found := _first(row, partial(_end, [mark for mark in (*ENDS, *special) if mark not in known])):
            self.ends.append(f"{row.where}: {found[1]!r} in {found[0]}")

    def _lengths(self, row: Comparison) -> list[float]:
        """Return the length of each answer, in words or tokens; note where the prompt's tokens change before an answer."""
        if self.tokenizer is None or any(content.media() for content in row.contents()):
            return [float(len(answer.words().split())) for answer in row.candidates]
        from mmalign.language.chat import Encoder

        encoder = Encoder(tokenizer=self.tokenizer)
        prompts = [row.prompt_of(n) for n in range(len(row.candidates))]
        samples = [Sample(prompt=p, completion=c, prefix=row.prefix) for p, c in zip(prompts, row.candidates, strict=True)]
        try:
            encoded = encoder(samples)
            alone = [len(encoder.prompt(prompt)) for prompt in prompts]
        except UserError as error:
            self.not_prefix.append(f"{row.where}: {error}")
            return []
        kept = [len(encoded.contexts[place]) + given for place, given in zip(encoded.context_of, encoded.given, strict=True)]
        changed = next(
            (n for n, (before, with_answer) in enumerate(zip(alone, kept, strict=True)) if with_answer < before), None
        )
        if changed is not None and row.prefix is None:
            last = alone[changed] - kept[changed]
            self.not_prefix.append(
                f"{row.where}: the last {last} of {alone[changed]} tokens change before candidate {changed + 1}"
            )
        return [float(length) for length in encoded.lengths]

    def table(self) -> Iterator[tuple[str, str]]:
        """Yield the lines of the report: name, value."""
        if not self.num_rows:
            return
        unit = "words" if self.tokenizer is None else "tokens"
        if self.lengths:
            num = len(self.lengths)
            longer, equal = (sum(map(test, self.lengths)) for test in (_chosen_longer, _equally_long))
            chosen, rejected = (fmean(side) for side in zip(*self.lengths, strict=True))
            yield (
                "length bias",
                f"the chosen is longer in {longer} of {num} pairs ({100 * longer / num:.1f} %), as long in {equal}; on average "
                f"{chosen:.1f} against {rejected:.1f} {unit}",
            )
        yield (
            "texts",
            ", ".join(f"{len(places)} rows with {name}" for name, places in self.concerns().items()) or "nothing found",
        )

    def concerns(self) -> dict[str, list[str]]:
        """Return what is worth a look: name -> places."""
        found = {
            "equal sides": self.equal_sides,
            "a prompt that its answers change": self.not_prefix,
            "turns of the user in an answer": self.user_turns,
            "the prompt again in an answer": self.said_twice,
            **{f"marks of the template of {kind}": places for kind, places in self.marks.items()},
            "marks of the beginning or end of a text": self.ends,
            "a prompt of the other data": self.also_there,
        }
        return {name: places for name, places in found.items() if places}


def _chosen_longer(lengths: tuple[float, float]) -> bool:
    return lengths[0] > lengths[1]


def _equally_long(lengths: tuple[float, float]) -> bool:
    return lengths[0] == lengths[1]


def _decided(row: Comparison, lengths: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield (length of the better, of the worse) of every pair that ranks, or else each scorer, decide."""
    orders: list[Sequence[float]] = list(row.scores.values())
    if row.prob is not None:
        orders = [(row.prob, 1 - row.prob)]
    elif row.ranks is not None:
        orders = [tuple(-rank for rank in row.ranks)]
    for values in orders if lengths else []:
        for (one, a), (other, b) in combinations(zip(values, lengths, strict=True), 2):
            if one != other:
                yield (a, b) if one > other else (b, a)


def _first(row: Comparison, find: Callable[[str], str | None]) -> tuple[str, str] | None:
    """Return (part, mark) of the first text of a row in which a mark is found."""
    named = [("the prompt", row.prompt), *((f"prompt {n}", p) for n, p in enumerate(row.prompts or (), 1))]
    named += [*((f"candidate {n}", c) for n, c in enumerate(row.candidates, 1)), *row.extras.items()]
    texts = [*((part, text) for part, content in named for text in _texts(content)), ("the prefix", row.prefix or "")]
    return next(((part, mark) for part, text in texts if (mark := find(text)) is not None), None)


def _texts(content: Content) -> list[str]:
    return [content.text or "", *(message.text for message in content.messages)]


def _mark(marks: Sequence[str], text: str) -> str | None:
    opened = f"\n\n{text}"  # a transcript may begin with its first speaker
    return next((mark for mark in marks if mark in opened), None)


def _end(marks: Sequence[str], text: str) -> str | None:
    """Return a mark in the text; <s>, which is also HTML, only at its beginning, and </s> at its end."""
    bare = text.strip()
    for mark in marks:
        there = bare.startswith(mark) if mark == "<s>" else bare.endswith(mark) if mark == "</s>" else mark in text
        if there:
            return mark
    return None
