"""What `mmalign evaluate` does where the rows hold texts: answers before and after training, compared by judges of texts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.asked import prompt_key
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, asked
from mmalign.records.stamps import replace_file
from mmalign.report import Checkpoint, Evaluation, PairFit, ScorerChange, TrainingDrift, scorer_change
from mmalign.report.answers import answers_page
from mmalign.report.lengths import LengthBias, length_and_variety, length_bias, words
from mmalign.scorers import finite_scores


def holds_texts(rows: Sequence[Comparison]) -> bool:
    """Whether any candidate is a text or a conversation without images."""
    return any(said_alone(candidate) for row in rows for candidate in row.candidates)


def said_alone(content: Content) -> bool:
    """Whether there are words in it and no images."""
    return not content.media() and bool(content.messages or content.text is not None)


def paired_texts(
    before: Sequence[Comparison], after: Sequence[Comparison], *, name: str = "after"
) -> tuple[list[Content], list[str], list[str]]:
    """Prompts, and answers of both sides as texts, by prompt and seed in the order of `before`; `name` is what to call `after`.

    Raises:
        UserError: an answer without a seed or with images, a prompt and seed given twice, or one that the other side lacks.
    """
    old, new = _by_prompt_and_seed(before), _by_prompt_and_seed(after)
    for side, present, absent in ((name, old, new), ("before", new, old)):
        missing = [key for key in present if key not in absent]
        if missing:
            prompt = present[missing[0]][0].words()
            raise UserError(
                f"{side}: got no answer for {len(missing)} of {len(present)} prompts and seeds, the first {prompt[:80]!r} with "
                f"seed {missing[0][1]}. Answer the same prompts with the same seeds on both sides."
            )
    return [prompt for prompt, _ in old.values()], [text for _, text in old.values()], [new[key][1] for key in old]


def _by_prompt_and_seed(rows: Sequence[Comparison]) -> dict[tuple[str, Any], tuple[Content, str]]:
    """(key of the prompt, seed) -> prompt and answer."""
    found: dict[tuple[str, Any], tuple[Content, str]] = {}
    for row in rows:
        origins = row.provenance or ({},) * len(row.candidates)
        for number, (candidate, origin) in enumerate(zip(row.candidates, origins, strict=True), 1):
            place = f"{row.where or row.id}: candidate {number}"
            if not isinstance(origin.get("seed"), int | str):
                raise UserError(
                    f"{place}: got no seed in its provenance, want one to pair it by. Answers of `mmalign answer` carry it."
                )
            if not said_alone(candidate):
                raise UserError(f"{place}: got images among texts, want one of the two. Evaluate them apart.")
            prompt = row.prompt_of(number - 1)
            key = (prompt_key(prompt), origin["seed"])
            if key in found:
                raise UserError(f"{place}: got its prompt with seed {key[1]} again, want it once. Remove the copy.")
            found[key] = (prompt, candidate.words())
    return found


def evaluate_texts(
    prompts: Sequence[Content],
    before: Sequence[str],
    after: Sequence[str],
    *,
    scorers: Sequence[Any],
    held_out: Sequence[Any] = (),
    interval: str = "wilson",
    tie_eps: float = 0.02,
    training: TrainingDrift | None = None,
    pairs: PairFit | None = None,
    checkpoints: Mapping[int, Sequence[str]] | None = None,
    last_step: int | None = None,
) -> Evaluation:
    """Compare two answers per entry, given to the same prompt with the same seed.

    Args:
        prompts, before, after: entry i of all three belongs together.
        scorers: judges of texts; the first one's win rate is the result.
        held_out: judges that took no part in making the preferences.
        interval: a name in statistics.INTERVALS.
        tie_eps: in standard deviations of the judge's scores before.
        training, pairs: to be told along.
        checkpoints: step -> answers paired with `before`.
        last_step: of the answers after, where it is known.

    Raises:
        UserError: nothing to compare, two judges of one name, or a score that is not finite.
    """
    judges = (*scorers, *held_out)
    _check(judges, len(scorers), len(prompts))
    sides = [
        *((step, f"checkpoint {step}", texts) for step, texts in sorted((checkpoints or {}).items())),
        (-1, "after", after),
    ]
    lengths = torch.tensor([_length(new) - _length(old) for old, new in zip(before, after, strict=True)])
    changes: dict[int, list[ScorerChange]] = {step: [] for step, _, _ in sides}
    biases: list[LengthBias | None] = []
    for number, judge in enumerate(judges):
        old = _scores(judge, prompts, before, "before")
        eps = tie_eps * float(old.std(correction=0))
        for step, side, texts in sides:
            new = _scores(judge, prompts, texts, side)
            outside = number >= len(scorers)
            changes[step].append(scorer_change(judge.name, old, new, eps=eps, interval=interval, held_out=outside))
        biases.append(length_bias(judge.name, new - old, lengths, eps=eps, interval=interval))
    final = changes.pop(-1)
    return Evaluation(
        num_pairs=len(prompts),
        num_prompts=len({prompt_key(prompt) for prompt in prompts}),
        interval=interval,
        scorers=tuple(final),
        checkpoints=tuple(Checkpoint(step=step, scorers=tuple(found)) for step, found in changes.items()),
        last_step=last_step,
        diversity_before=None,
        diversity_after=None,
        contrast_before=None,
        contrast_after=None,
        training=training,
        pairs=pairs,
        texts=length_and_variety(before, after, biases),
    )


def write_text_report(
    evaluation: Evaluation,
    prompts: Sequence[Content],
    columns: Sequence[tuple[str, Sequence[str]]],
    output: Path,
    *,
    title: str,
    num_shown: int,
) -> None:
    """Write results.json and report.html, each whole or not at all.

    Args:
        columns: (heading, answers) before, at each checkpoint, after.
        num_shown: pairs in the page.
    """
    output.mkdir(parents=True, exist_ok=True)

    def pictures(place: int) -> list[Image]:
        return [media.frames(1)[0] for media in prompts[place].media()]

    page = answers_page(
        evaluation,
        [prompt.words() for prompt in prompts],
        columns,
        title=title,
        num_shown=num_shown,
        keys=[prompt_key(prompt) for prompt in prompts],
        pictures=pictures,
    )
    replace_file(output / "results.json", (json.dumps(evaluation.results(), indent=2) + "\n").encode())
    replace_file(output / "report.html", page.encode())


def _length(text: str) -> float:
    return float(len(words(text)))


def _check(judges: Sequence[Any], num_scorers: int, num_pairs: int) -> None:
    names = [judge.name for judge in judges]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"scorers, held_out: got {', '.join(twice)} twice, want each judge once. A held-out judge is not among the scorers."
        )
    if not num_pairs or not num_scorers:
        raise UserError(f"evaluate: got {num_scorers} scorers and {num_pairs} pairs of answers, want at least one of each.")


def _scores(judge: Any, prompts: Sequence[Content], texts: Sequence[str], side: str) -> Float[Tensor, " n"]:
    places = [f"{side}, answer {number} ({prompt.words()[:80]!r})" for number, prompt in enumerate(prompts, 1)]
    return finite_scores(judge, [asked(prompt) for prompt in prompts], list(texts), places).double()
