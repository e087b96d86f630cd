"""The rules by which detections of an image satisfy a prompt or do not: plain geometry, no network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from mmalign.scorers.composition_prompts import COLOURS, Composition, plural, with_article

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image; down is positive
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A box in which the detector sees an object, and how surely, from 0 to 1."""

    name: str
    score: float
    box: Box


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an image shows what its prompt asks for, why if not, and what was found in it."""

    passed: bool
    task: str
    reason: str
    found: tuple[Detection, ...]


def kept_detections(detections: Sequence[Detection], *, threshold: float, max_overlap: float) -> list[Detection]:
    """Detections that count, the surest first.

    A detection counts if its score is above `threshold` and no surer one of the same name that counts overlaps it by more
    than `max_overlap`, intersection over union (greedy non-maximum suppression). Equal scores keep their order. Boxes of
    different names never suppress each other.
    """
    kept: list[Detection] = []
    for candidate in sorted(detections, key=lambda detection: -detection.score):
        rivals = (other for other in kept if other.name == candidate.name)
        if candidate.score > threshold and all(overlap(candidate.box, other.box) <= max_overlap for other in rivals):
            kept.append(candidate)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes: 0 apart, 1 the same."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def stands(a: Box, relation: str, b: Box, *, margin: float) -> bool:
    """Whether box a stands left of, right of, above or below box b, by their centres.

    d = centre of a - centre of b;  u: the unit vector of the relation;  size: width for left and right, height for above
    and below

    d . u > margin (size of a + size of b)  and  d . u > |d| / 2

    So a is far enough that way, and within 60 degrees of it; something up and to the left can be both. In the manner of
    GenEval, which takes the margin off d before it measures the angle.
    """
    x, y = DIRECTIONS[relation]
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    along = (ax - bx) * x + (ay - by) * y
    sizes = (a[2] - a[0] + b[2] - b[0]) if x else (a[3] - a[1] + b[3] - b[1])
    return along > margin * sizes and along > 0.5 * float(np.hypot(ax - bx, ay - by))


def judge(
    composition: Composition,
    detections: Sequence[Detection],
    colour_of: Callable[[Detection], str],
    *,
    threshold: float,
    max_overlap: float,
    margin: float,
) -> Verdict:
    """Whether the detections show the composition.

    Of those that count (`kept_detections`): a counted object is there exactly that many times, any other at least once.
    Colours and positions are those of the surest detection of each object.

    Args:
        composition: what the prompt asks for.
        detections: of its objects, in any order.
        colour_of: a name in COLOURS for what is in the box, or another word for none of them.
        threshold, max_overlap: see `kept_detections`.
        margin: see `stands`.
    """
    kept = kept_detections(detections, threshold=threshold, max_overlap=max_overlap)
    reasons = []
    surest: list[Detection] = []
    for thing in composition.things:
        found = [detection for detection in kept if detection.name == thing.name]
        if len(found) < thing.count or (thing.count > 1 and len(found) > thing.count):
            what = plural(thing.name) if thing.count > 1 else with_article(thing.name)
            reasons.append(f"want {thing.count if thing.count > 1 else 'at least'} {what}, found {len(found)}")
            continue
        surest.append(found[0])
        if thing.colour is not None and (colour := colour_of(found[0])) != thing.colour:
            reasons.append(f"want a {thing.colour} {thing.name}, found a {colour} one")
    if composition.relation and not reasons:
        a, b = surest
        if not stands(a.box, composition.relation, b.box, margin=margin):
            seen = [relation for relation in DIRECTIONS if stands(a.box, relation, b.box, margin=margin)]
            where = " and ".join(seen) or "at the place of"
            reasons.append(f"want the {a.name} {composition.relation} the {b.name}, found it {where} it")
    return Verdict(passed=not reasons, task=composition.task, reason="; ".join(reasons), found=tuple(kept))


def crop(image: Image, box: Box, *, share: float = 1.0) -> Image:
    """The middle `share` of each side of the box, at least one pixel, within the image."""
    left, right = _within((box[0] + box[2]) / 2, share * (box[2] - box[0]), image.width)
    top, bottom = _within((box[1] + box[3]) / 2, share * (box[3] - box[1]), image.height)
    return image.crop((left, top, right, bottom))


def pixel_colour(image: Image, box: Box) -> str:
    """The colour of most pixels in the middle half of each side of the box; `grey` if all are grey.

    By hue H in degrees, saturation S and value V from 0 to 1 (Smith's hexcone, 8-bit as PIL's HSV), the first that fits:

        black   V < 0.2                        orange  15 <= H < 45, brown if V < 0.6
        white   S < 0.15 and V >= 0.75         yellow  45 <= H < 70
        grey    S < 0.15, not counted          green   70 <= H < 170
        pink    S < 0.5, V >= 0.7, H < 15      blue    170 <= H < 260
                or H >= 345                    purple  260 <= H < 320
        red     H < 15 or H >= 345             pink    320 <= H < 345

    A rule of thumb for clear colours: what is seen around the object, its shadows and its background count too. A CLIP
    (`colour_model`) judges them as a person would describe them.
    """
    hsv = np.asarray(crop(image.convert("RGB"), box, share=0.5).convert("HSV"), dtype=np.float64).reshape(-1, 3)
    hue, saturation, value = hsv[:, 0] * (360 / 255), hsv[:, 1] / 255, hsv[:, 2] / 255
    reddish = (hue < 15) | (hue >= 345)
    rules = [
        ("black", value < 0.2),
        ("white", (saturation < 0.15) & (value >= 0.75)),
        ("grey", saturation < 0.15),
        ("pink", reddish & (saturation < 0.5) & (value >= 0.7)),
        ("red", reddish),
        ("brown", (hue < 45) & (value < 0.6)),
        ("orange", hue < 45),
        ("yellow", hue < 70),
        ("green", hue < 170),
        ("blue", hue < 260),
        ("purple", hue < 320),
        ("pink", hue < 345),
    ]
    names = np.select([rule for _, rule in rules], [name for name, _ in rules], default="grey")
    counts = {colour: int((names == colour).sum()) for colour in COLOURS}
    most = max(counts, key=lambda colour: counts[colour])
    return most if counts[most] else "grey"


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _within(centre: float, length: float, limit: int) -> tuple[int, int]:
    start = min(max(int(centre - length / 2), 0), limit - 1)
    return start, min(max(round(centre + length / 2), start + 1), limit)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
