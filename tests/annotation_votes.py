"""Projects with votes in a real store, for tests of what comes out of it."""

import io
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import select

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.schema import ASSIGNMENT
from mmalign.annotation.store import Store
from mmalign.records import Comparison, Content, Media

PLAIN = {"overlap_share": 0.0, "gold_share": 0.0, "repeat_share": 0.0, "min_dwell_ms": 0, "order": "data"}
SIDES = {"a": ("left", "right"), "b": ("right", "left")}
Voter = Callable[[tuple[int, ...]], Verdict]


def encoded(seed: int, side: int = 32) -> bytes:
    """A PNG file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def opened(folder: Path) -> Store:
    """A store whose clock ticks a second a call and whose chance can be repeated."""
    seconds: Iterator[int] = itertools.count(1_700_000_000)
    return Store.open(str(folder / "votes.db"), clock=lambda: float(next(seconds)), rng=random.Random(0))


def protocol(**changes: Any) -> Protocol:
    return Protocol(**{**PLAIN, **changes})


def texts(number: int, *, answers: Sequence[str] = (" blue", " two is four"), **changes: Any) -> Comparison:
    """A row of texts, each candidate by a model of its own."""
    values = {
        "id": f"row{number}",
        "prompt": Content(text=f"name a colour {number}"),
        "candidates": tuple(Content(text=answer) for answer in answers),
        "provenance": tuple({"model": f"model {place}"} for place in range(len(answers))),
    }
    return Comparison(**{**values, **changes})


def images(number: int, *, count: int = 2, **changes: Any) -> Comparison:
    """A row of small images, each candidate by a model of its own."""
    values = {
        "id": f"row{number}",
        "prompt": Content(text=f"a red {number}"),
        "candidates": tuple(Content(images=(Media(data=encoded(10 * number + place)),)) for place in range(count)),
        "provenance": tuple({"model": f"model {place}"} for place in range(count)),
    }
    return Comparison(**{**values, **changes})


def saying(choice: str, *, strength: int | None = None, ranks: Sequence[int] | None = None) -> Voter:
    """A voter with this canonical verdict, who finds it on the screen in whatever order the candidates stand there."""

    def vote(order: tuple[int, ...]) -> Verdict:
        if ranks is not None:
            return Verdict(choice="ranks", ranks=tuple(ranks[candidate] for candidate in order))
        turned = order == (1, 0)
        told = -strength if strength is not None and turned else strength
        return Verdict(choice=SIDES[choice][turned] if choice in SIDES else choice, strength=told)

    return vote


def cast(store: Store, project: int, annotator: int, voter: Voter) -> None:
    """One vote on what the person is shown."""
    shown = store.take(project, annotator)
    assert shown is not None
    store.displayed(shown.assignment, annotator)
    with store.database.read() as connection:
        held = connection.execute(select(ASSIGNMENT.c.shown_order).where(ASSIGNMENT.c.id == shown.assignment)).scalar_one()
    verdict = voter(tuple(json.loads(held)))
    receipt = store.vote(shown.assignment, shown.revision, verdict, annotator, dwell_ms=1500)
    assert receipt.status == "stored", receipt


def judged_project(
    folder: Path, rows: Sequence[Comparison], votes: Sequence[Sequence[Voter]], *, kind: str = "text", **changes: Any
) -> tuple[Store, int]:
    """A project whose person n cast votes[n][i] on row i, in that order."""
    store = opened(folder)
    project = store.create_project("trial", kind, protocol(votes_per_item=max(1, len(votes)), **changes)).id
    added = store.add(project, rows)
    assert added.added == len(rows), added
    for number, own in enumerate(votes):
        annotator = store.add_account(f"person {number}").id
        for voter in own:
            cast(store, project, annotator, voter)
    return store, project
