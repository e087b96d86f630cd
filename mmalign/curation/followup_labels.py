"""Candidates ranked by what users would say next, as a language model expects it: FLR without training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mmalign.curation.edits import Edit, Relabelled
from mmalign.curation.followups import followup_reward
from mmalign.curation.memory import Memory, key_of
from mmalign.curation.reader import Reader
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, Dropped, Message, Sample
from mmalign.records.table import in_batches

PLEASED = ("Thank you, that helps a lot.", "Exactly what I wanted to know.", "That is clear now.", "Great, go on.")
DISPLEASED = (
    "That is not what I asked.",
    "That is wrong.",
    "I still do not understand.",
    "You said that already, and it does not help.",
)


def followups(
    rows: Sequence[Comparison],
    journal: Path | None = None,
    *,
    model: str,
    positive: tuple[str, ...] = PLEASED,
    negative: tuple[str, ...] = DISPLEASED,
    label: str = "followups",
    revision: str | None = None,
    max_length: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 2,
    device: str = "auto",
) -> Relabelled:
    """Candidates ranked by how much likelier pleased users' follow-ups are than displeased ones.

    r = mean log p(pleased | dialogue, response) - mean log p(displeased | dialogue, response)

    What the chat template writes before a user's turn is scored with each follow-up, and goes out in the difference.

    Source: FLR (arXiv 2409.13948), which has a set of follow-ups for each category; these are our own.

    Args:
        journal: where rewards are kept as they come, so that an interrupted run goes on. Not a setting.
        model: folder or hub id; a chat model.
        positive, negative: what users say next.
        label: name of the judge as whom the rewards are kept.
        revision: of a hub id.
        max_length: tokens; rows that are longer are left out. None: what the model reads.
        dtype: of the weights.
        batch_size: rows at a time, all follow-ups of all their candidates.
        device: auto, cpu, cuda ...

    Raises:
        UserError: no such model, no follow-ups, rows with images, a batch size below 1.
    """
    if not positive or not negative or batch_size < 1:
        raise UserError(
            f"followups: got {len(positive)} positive and {len(negative)} negative ones and batch_size {batch_size}, want at "
            "least one of each."
        )
    settings: dict[str, Any] = {"model": model, "revision": revision, "dtype": dtype}
    said = {"positive": list(positive), "negative": list(negative)}
    memory = Memory(journal=journal, judge=label, settings={"judge": "followups", **settings, **said})
    known = memory.known()
    due = {key: row for row in rows if (key := key_of(row)) not in known}
    num_read = 0
    if due:
        reader = Reader.open("followups", **settings, weights=None, system_prompt=None, max_length=max_length, device=device)
        encoded = reader.encode({key: _samples(row, (*positive, *negative)) for key, row in due.items()})
        num_read = len(encoded)
        for keys in tqdm(list(in_batches(encoded, batch_size)), desc="followups", unit="batch", disable=None):
            sums = reader.sums([encoded[key] for key in keys])
            rewards = [_rewards(one, len(positive), len(negative)) for one in sums]
            known |= memory.add([due[key] for key in keys], rewards, [{}] * len(keys))
    outcomes: list[tuple[Edit, ...] | Dropped] = []
    for row in rows:
        found = known.get(key_of(row))
        if found is None:
            outcomes.append(Dropped("longer than the model reads, or than max_length"))
            continue
        scores = tuple(found["scores"])
        ranks = tuple(1.0 + sum(other > score for other in scores) for score in scores)
        outcomes.append((Edit(scores={label: scores}, labels={"ranks": ranks, "prob": None}, note={"model": model}),))
    return Relabelled(outcomes=outcomes, told=(f"{num_read} rows read by {model}, {len(rows) - len(due)} known before",))


def _samples(row: Comparison, followups: Sequence[str]) -> list[Sample]:
    """Every follow-up after every candidate."""
    samples = []
    for number, candidate in enumerate(row.candidates):
        prompt = row.prompt_of(number)
        if prompt.messages or candidate.messages:
            asked = prompt.messages or (Message(role="user", text=prompt.text or ""),)
            answer = candidate.messages or (Message(role="assistant", text=(row.prefix or "") + (candidate.text or "")),)
            before = replace(prompt, text=None, messages=(*asked, *answer))
            samples += [Sample(prompt=before, completion=Content(messages=(Message("user", one),))) for one in followups]
        else:
            before = Content(text=f"{prompt.text}{row.prefix or ''}{candidate.text}\n\n")
            samples += [Sample(prompt=before, completion=Content(text=one)) for one in followups]
    return samples


def _rewards(sums: Sequence[float], num_positive: int, num_negative: int) -> tuple[float, ...]:
    size = num_positive + num_negative
    each = [sums[start : start + size] for start in range(0, len(sums), size)]
    return tuple(followup_reward(one[:num_positive], one[num_positive:]) for one in each)
