"""Prompts that say exactly what an image must show: written by a small grammar, read back by the same grammar."""

import difflib
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.errors import UserError

TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
MOST_COUNTED = 4  # in prompts that are written; up to ten are read
NEVER_COLOURED = ("person",)  # in prompts that are written
OBJECTS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant"),
    *("bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "kite", "snowboard"),
    *("surfboard", "skateboard", "baseball bat", "baseball glove", "tennis racket", "bottle", "wine glass", "cup", "fork"),
    *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "bed", "toilet", "laptop", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator"),
    *("book", "clock", "vase", "teddy bear", "toothbrush", "hair drier", "potted plant", "dining table"),
)
IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives"}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object that a prompt asks for, how many of it, and of what colour if one is named."""

    name: str
    count: int = 1
    colour: str | None = None

    def phrase(self) -> str:
        """`two dogs`, `an orange cat`."""
        if self.count > 1:
            return f"{next(word for word, number in NUMBERS.items() if number == self.count)} {plural(self.name)}"
        return with_article(self.name if self.colour is None else f"{self.colour} {self.name}")


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What an image must show: one thing, or two, the first standing in `relation` to the second if one is named."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """`a photo of a dog left of a cat`; `parse_composition` reads it back."""
        return "a photo of " + f" {self.relation or 'and'} ".join(thing.phrase() for thing in self.things)

    @property
    def task(self) -> str:
        """One of TASKS."""
        if len(self.things) == 2:
            coloured = self.things[0].colour is not None
            return "position" if self.relation else "colour_attribution" if coloured else "two_objects"
        [thing] = self.things
        return "counting" if thing.count > 1 else "colours" if thing.colour else "single_object"

    def plain(self) -> dict[str, Any]:
        """As a line of JSON: the prompt, its task, and what is expected."""
        return {
            "prompt": self.prompt,
            "task": self.task,
            "objects": [vars(thing) for thing in self.things],
            "relation": self.relation,
        }


def parse_composition(prompt: str, *, objects: Sequence[str] = OBJECTS) -> Composition:
    """What a prompt of the grammar asks for; capitals and a full stop at the end do not matter.

        prompt = "a photo of" (one | counted | coloured | one joint one | coloured "and" coloured)
        one = ("a" | "an") object;  coloured = ("a" | "an") colour object;  counted = ("two" ... "ten") plural
        joint = "and" | "left of" | "right of" | "above" | "below"

    The two objects of a prompt differ.

    Args:
        prompt: such as `a photo of two dogs`, `a photo of a red apple and a green cup`, `a photo of a dog left of a cat`.
        objects: what may be named, in the singular.

    Raises:
        UserError: the prompt is not of this grammar; the message says which part, and the nearest object.
    """
    text = prompt.strip().lower().removesuffix(".")
    rest = text.removeprefix("a photo of ")
    parts = re.split(rf" (and|{'|'.join(RELATIONS)}) ", rest)
    if rest == text or len(parts) > 3:
        raise _outside(prompt, "one or two phrases after 'a photo of'")
    things = tuple(_thing(phrase, prompt, objects) for phrase in parts[::2])
    relation = parts[1] if len(parts) == 3 and parts[1] != "and" else None
    if len(things) == 2:
        if things[0].name == things[1].name or any(thing.count > 1 for thing in things):
            raise _outside(prompt, "two different objects, one of each")
        if (things[0].colour is None) != (things[1].colour is None) or (relation and things[0].colour):
            raise _outside(prompt, "a colour for both of two objects joined by 'and', else for neither")
    return Composition(things=things, relation=relation)


def composition_prompts(*, per_task: int = 100, seed: int = 0, objects: Sequence[str] = OBJECTS) -> list[Composition]:
    """Distinct prompts of each of the six tasks in turn, drawn evenly; all that there are where a task has fewer.

    In the manner of GenEval (Ghosh et al. 2023), but neither its prompts nor its checker: results do not compare.

    Args:
        per_task: how many of each; GenEval has 80 to 100.
        seed: of the draw.
        objects: three or more, in the singular.
    """
    colourable = [name for name in objects if name not in NEVER_COLOURED]
    one = {name: Thing(name=name) for name in objects}
    coloured = [Thing(name=name, colour=colour) for name in colourable for colour in COLOURS]
    pairs = [(one[a], one[b]) for a, b in itertools.permutations(objects, 2)]
    counts = range(2, MOST_COUNTED + 1)
    space: dict[str, list[tuple[tuple[Thing, ...], str | None]]] = {
        "single_object": [((thing,), None) for thing in one.values()],
        "two_objects": [(pair, None) for pair in pairs],
        "counting": [((Thing(name=name, count=count),), None) for name in objects for count in counts],
        "colours": [((thing,), None) for thing in coloured],
        "position": [(pair, relation) for pair in pairs for relation in RELATIONS],
    }
    rng = random.Random(seed)
    found = {}
    for task, every in space.items():
        drawn = rng.sample(every, min(per_task, len(every)))
        found[task] = [Composition(things=things, relation=relation) for things, relation in drawn]
    # Half a million pairs of coloured things: drawn, not listed. Two thirds of the draws are usable or more.
    apart = (len(colourable) * (len(colourable) - 1)) * (len(COLOURS) * (len(COLOURS) - 1))
    attributed: dict[Composition, None] = {}
    while len(attributed) < min(per_task, apart):
        a, b = rng.sample(coloured, 2)
        if a.name != b.name and a.colour != b.colour:
            attributed[Composition(things=(a, b))] = None
    found["colour_attribution"] = list(attributed)
    return [composition for task in TASKS for composition in found[task]]


def write_composition_prompts(path: str | Path, *, per_task: int = 100, seed: int = 0) -> Path:
    """Write `composition_prompts` as JSON lines for `mmalign generate`, each prompt beside what is expected of its image.

    Args:
        path: a file that ends in .jsonl; written whole or not at all.
        per_task, seed: as for `composition_prompts`.

    Raises:
        UserError: another ending, or the folder cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".jsonl":
        raise UserError(f"path: got {str(path)!r}, want a file that ends in .jsonl. Rename it.")
    lines = (json.dumps(composition.plain()) for composition in composition_prompts(per_task=per_task, seed=seed))
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"path: got {str(path)!r}, which cannot be written ({error}). Choose another place.") from error
    return path


def plural(name: str) -> str:
    """`bench` gives `benches`, `wine glass` gives `wine glasses`, `person` gives `people`."""
    return IRREGULAR.get(name) or name + ("es" if re.search(r"(s|x|z|ch|sh)$", name) else "s")


def with_article(noun: str) -> str:
    """`an apple`, `a red apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _thing(phrase: str, prompt: str, objects: Sequence[str]) -> Thing:
    first, _, noun = phrase.partition(" ")
    if first in NUMBERS:
        singular = {plural(name): name for name in objects}
        return Thing(name=singular[_known(noun, list(singular), prompt)], count=NUMBERS[first])
    if first not in ("a", "an"):
        raise _outside(prompt, f"a, an or a number from two to ten before {phrase!r}")
    colour, _, rest = noun.partition(" ")
    if noun not in objects and colour in COLOURS:  # "an orange" is a fruit, "an orange cat" is not
        return Thing(name=_known(rest, objects, prompt), colour=colour)
    return Thing(name=_known(noun, objects, prompt))


def _known(noun: str, nouns: Sequence[str], prompt: str) -> str:
    if noun not in nouns:
        near = difflib.get_close_matches(noun, nouns, n=1)
        raise _outside(prompt, f"a known object instead of {noun!r}" + (f", perhaps {near[0]!r}" if near else ""))
    return noun


def _outside(prompt: str, want: str) -> UserError:
    return UserError(
        f"composition: got the prompt {prompt!r}, want {want}. Only prompts such as 'a photo of two dogs', 'a photo of a red "
        "apple and a green cup' or 'a photo of a dog left of a cat' can be checked; write_composition_prompts makes them, and "
        "more_objects adds objects."
    )
