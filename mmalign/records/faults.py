"""What is wrong with a comparison, in sentences."""

import math

from mmalign.records.rows import Comparison


def faults_of(value: Comparison, least: int = 2) -> list[str]:
    """Return what is wrong with a comparison, one sentence a fault; an empty list when nothing is.

    Args:
        least: candidates it must have; below 2 for single images and prompts alone, in which nothing is compared.
    """
    k = len(value.candidates)
    problems = []
    if value.prompt.is_empty():
        problems.append("got an empty prompt, want a text. Write one or remove the row.")
    if k < least:
        problems.append(
            f"got {k} candidate{'s' if k != 1 else ''}, want at least {least}. Add the missing one or remove the row."
        )
    for n, candidate in enumerate(value.candidates, 1):
        if candidate.text is None and not candidate.images and not candidate.messages:
            problems.append(f"candidate {n} has neither text nor image. Add one or remove the row.")
        elif candidate.is_empty():
            problems.append(f"candidate {n}: got an empty completion, want a text. Write one or remove the row.")
    numbers = {f"scores of {judge}": values for judge, values in value.scores.items()}
    if value.ranks is not None:
        numbers["ranks"] = value.ranks
    for name, values in numbers.items():
        if len(values) != k:
            problems.append(f"got {len(values)} {name} for {k} candidates, want one each.")
        elif not all(v is not None and math.isfinite(v) for v in values):
            problems.append(f"got {name} {tuple(values)}, want finite numbers. Judge the row again or remove it.")
    if value.provenance and len(value.provenance) != k:
        problems.append(f"got {len(value.provenance)} provenance entries for {k} candidates, want one each.")
    return problems + _faults_of_conversations(value) + _fault_of_order(value, k) + _faults_of_side(value)


def _faults_of_conversations(value: Comparison) -> list[str]:
    problems = []
    prompts = value.prompts or ()
    if value.prompts is not None and len(prompts) != len(value.candidates):
        problems.append(f"got {len(prompts)} prompts for {len(value.candidates)} candidates, want one each.")
    problems += [f"candidate {n}: got an empty prompt, want a text." for n, p in enumerate(prompts, 1) if p.is_empty()]
    problems += [
        f"got an empty {name}, want a text. Write one or leave it out." for name, c in value.extras.items() if c.is_empty()
    ]
    for content in value.contents():
        if content.messages and content.text is not None:
            problems.append("got a text beside messages, want one of the two. Make the text a message.")
        if any(not message.role for message in content.messages):
            problems.append("got a message without a role, want one (system, user, assistant, tool). Name it.")
        for message in content.messages:
            if message.places and (
                len(message.places) != len(message.images) or list(message.places) != sorted(message.places)
            ):
                problems.append(f"got the places {message.places} for {len(message.images)} images, want one each, in order.")
    return problems


def _fault_of_order(value: Comparison, k: int) -> list[str]:
    if value.prob is None:
        return []
    if k != 2:
        return [f"got prob for {k} candidates; prob is P(candidate 1 beats candidate 2). Give ranks instead."]
    if not 0 <= value.prob <= 1:
        return [f"got prob {value.prob}, want a probability from 0 to 1 (0.5 for a tie). Correct the label."]
    if value.ranks is not None and len(value.ranks) == 2:
        by_ranks = (value.ranks[0] < value.ranks[1]) - (value.ranks[0] > value.ranks[1])
        by_prob = (value.prob > 0.5) - (value.prob < 0.5)
        if by_ranks != by_prob:
            return [f"prob {value.prob} and ranks {value.ranks} disagree. Keep the one that is right."]
    return []


def _faults_of_side(value: Comparison) -> list[str]:
    scale = value.beta_scale
    wrong = scale is not None and not (math.isfinite(scale) and scale > 0)
    return [
        f"got {name} {number}, want a finite number that is not negative."
        for name, number in (("weight", value.weight), ("margin", value.margin))
        if number is not None and not (math.isfinite(number) and number >= 0)
    ] + ([f"got beta_scale {scale}, want a finite number above zero."] if wrong else [])
