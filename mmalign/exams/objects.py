"""CHAIR: objects that a caption names and the image does not show."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.errors import UserError
from mmalign.exams.files import json_of, rows_of, said, words_of
from mmalign.exams.yes_no import share

ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
IRREGULAR = {"men": "man", "women": "woman", "mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth"}


@dataclass(frozen=True)
class Names:
    """Words for objects: each name -> the object it stands for, names of two words, and all words that names are made of."""

    objects: Mapping[str, str]
    doubles: Mapping[str, str]
    parts: frozenset[str]

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Names":
        """From lines of names parted by commas, of which the first is the object's.

        To the names of two words are added CHAIR's own rules: a baby or adult animal is the animal, a passenger train the
        train, a bow tie a tie, a toilet seat a toilet; train tracks and home plates are neither train nor plate.
        """
        objects: dict[str, str] = {}
        for line in lines:
            names = [name.strip() for name in line.split(",") if name.strip()]
            objects |= {name: names[0] for name in names}
        doubles = {name: name for name in (*objects, "home plate", "train track") if " " in name}
        doubles |= {f"{young} {animal}": animal for young in ("baby", "adult") for animal in ANIMALS}
        doubles |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
        doubles |= {"bow tie": "tie", "toilet seat": "toilet"}
        return cls(objects, doubles, frozenset(part for name in (*objects, *doubles) for part in name.split()))

    def singular(self, word: str) -> str:
        """The word that is a name, or a part of one, when a plural's ending is taken off; else the word."""
        if word in IRREGULAR:
            return IRREGULAR[word]
        if word in self.parts:
            return word
        forms = (word.removesuffix(end) + stem for end, stem in ENDINGS if word.endswith(end) and len(word) > len(end) + 1)
        return next((form for form in forms if form in self.parts), word)

    def mentioned(self, caption: str) -> list[str]:
        """The objects that a caption names, in order, as often as it does.

        Source: Rohrbach et al. 2018, utils/chair.py.
        """
        words = [self.singular(word) for word in WORD.findall(caption.lower())]
        joined: list[str] = []
        place = 0
        while place < len(words):
            double = " ".join(words[place : place + 2])
            joined.append(self.doubles.get(double, words[place]))
            place += 2 if double in self.doubles else 1
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [self.objects[word] for word in joined if word in self.objects]


def chair(
    *,
    answers: str,
    synonyms: str,
    objects: str | None = None,
    instances: tuple[str, ...] = (),
    captions: tuple[str, ...] = (),
) -> dict[str, float]:
    """CHAIR: of all objects that captions name the share that is not there (i), and of all captions those that name one (s).

    Words are told by their ending from their plurals, not by a tagger: numbers may differ a little from the published code's,
    which takes `pattern` and `nltk`.

    Source: Rohrbach et al. 2018 (object hallucination in image captioning, arXiv 1809.02156).

    Args:
        answers: JSON with image_id and caption (or answer, text).
        synonyms: the published data/synonyms.txt: names parted by commas, one object a line.
        objects: JSON `{image_id: [objects]}`, what each image shows; or
        instances, captions: COCO's annotation files, of which the published code takes both, train and val.

    Raises:
        UserError: a file that cannot be read, nothing that tells what images show, or an image of which nothing is told.
    """
    names = Names.of(words_of(synonyms))
    rows = rows_of(answers)
    shown = _shown(names, objects, instances, captions)
    mentioned = wrong = hallucinated = named = 0
    for number, row in enumerate(rows, 1):
        image = str(row.get("image_id"))
        if image not in shown:
            raise UserError(f"{answers}:{number}: got the image_id {image}, of which nothing is told. Give its annotations.")
        found = names.mentioned(said(row, f"{answers}:{number}"))
        absent = [name for name in found if name not in shown[image]]
        mentioned, wrong = mentioned + len(found), wrong + len(absent)
        hallucinated, named = hallucinated + bool(absent), named + len(set(found) & shown[image])
    return {
        "chair_i": share(wrong, mentioned),
        "chair_s": share(hallucinated, len(rows)),
        "recall": share(named, sum(len(shown[str(row.get("image_id"))]) for row in rows)),
        "number": float(len(rows)),
    }


def _shown(names: Names, objects: str | None, instances: Sequence[str], captions: Sequence[str]) -> dict[str, set[str]]:
    if objects is None and not instances and not captions:
        raise UserError("chair: got neither objects nor instances nor captions, want what the images show. Name a file.")
    shown: dict[str, set[str]] = {}
    if objects is not None:
        told: Any = json_of(objects)
        for image, some in told.items():
            shown[str(image)] = {names.objects.get(name, name) for name in some}
    for path in instances:
        whole: Any = json_of(path)
        category = {one["id"]: one["name"] for one in whole["categories"]}
        for entry in whole["annotations"]:
            name = category[entry["category_id"]]
            shown.setdefault(str(entry["image_id"]), set()).add(names.objects.get(name, name))
    for path in captions:
        whole = json_of(path)
        for entry in whole["annotations"]:
            shown.setdefault(str(entry["image_id"]), set()).update(names.mentioned(entry["caption"]))
    return shown
