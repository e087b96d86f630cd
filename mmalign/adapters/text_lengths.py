"""How long the texts of a data set are, in tokens: told before a run, and examples of like length for padded rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from mmalign.language.chat import Encoded
from mmalign.records import Example, Sample

logger = logging.getLogger(__name__)

LEAST_IN_GROUP = 32  # examples of like length
SURVEYED = 4096  # examples that are tokenised before a run, to tell lengths and what is cut
Encodes = Any  # language.chat.Encoder, or one with its interface
AT_ONCE = 256  # examples in one call of the tokenizer


def mean_length(encoder: Encodes, examples: Sequence[Example], most: int = SURVEYED) -> float:
    """Mean number of tokens of the best answers: of all examples, or of `most` that are spread evenly over them."""
    lengths = [one.lengths[0] for one in _encoded(encoder, [e.samples[:1] for e in _looked_at(examples, most)])]
    return sum(lengths) / len(lengths)


def length_note(encoder: Encodes, examples: Sequence[Example], most: int = SURVEYED) -> str:
    """Lengths of prompts and answers, and how many are cut, of all examples or of `most` that are spread evenly over them."""
    looked = _looked_at(examples, most)
    prompts: list[int] = []
    if looked[0].samples[0].completion.is_empty():  # of a source that has them written
        prompts = [len(encoder.prompt(example.samples[0].prompt)) for example in looked]
        return f"tokens     prompts {_spread(prompts)}; answers are the policy's own"
    answers: list[int] = []
    cut_prompts = cut_responses = alike = changed = 0
    for one in _encoded(encoder, [e.samples for e in looked]):
        prompts += [len(one.contexts[c]) + given for c, given in zip(one.context_of, one.given, strict=True)]
        answers += one.lengths
        cut_prompts += one.cut_prompts
        cut_responses += one.cut_responses
        changed += one.changed
        alike += len(set(zip(one.context_of, one.continuations, strict=True))) < len(one.continuations)
    if changed:
        logger.warning(
            "adapter.chat_template: it leaves something out of %d of %d answers, or writes it otherwise (reasoning, say); what "
            "is left out is not trained on. Give a template that writes all of an answer, or answers as it writes them.",
            *(changed, len(answers)),
        )
    equal = f"; {alike} examples with equal answers once they are tokens" if alike else ""
    of = "" if len(looked) == len(examples) else f" (of {len(looked)} examples, spread over the data)"
    most_prompt, most_answer = encoder.max_prompt_length, encoder.max_response_length
    cut_prompt = "no prompt" if most_prompt is None else f"{cut_prompts} of {len(prompts)} prompts to {most_prompt}"
    cut_answer = "no answer" if most_answer is None else f"{cut_responses} answers to {most_answer}"
    return f"tokens     prompts {_spread(prompts)}, answers {_spread(answers)}; cut: {cut_prompt}, {cut_answer}{equal}{of}"


def groups_of_like_length(examples: Sequence[Example], count: int) -> tuple[tuple[int, ...], ...]:
    """Indices of examples in up to `count` groups of like length, by characters; none where groups would be small."""
    count = min(count, len(examples) // LEAST_IN_GROUP)
    if count <= 1:
        return ()
    sizes = [len(e.samples[0].prompt.words()) + max(len(s.completion.words()) for s in e.samples) for e in examples]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    bounds = [round(n * len(order) / count) for n in range(count + 1)]
    return tuple(tuple(sorted(order[a:b])) for a, b in pairwise(bounds))


def _looked_at(examples: Sequence[Example], most: int) -> list[Example]:
    count = min(len(examples), most)
    return [examples[i * len(examples) // count] for i in range(count)]


def _encoded(encoder: Encodes, rows: Sequence[Sequence[Sample]]) -> Iterator[Encoded]:
    for start in range(0, len(rows), AT_ONCE):
        yield from encoder.all(rows[start : start + AT_ONCE])


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]} (median {ordered[len(ordered) // 2]})"
