import json

import pytest
from PIL import Image, ImageDraw

from mmalign.errors import UserError
from mmalign.scorers.composition_prompts import (
    COLOURS,
    OBJECTS,
    RELATIONS,
    TASKS,
    Composition,
    Thing,
    composition_prompts,
    parse_composition,
    plural,
    write_composition_prompts,
)
from mmalign.scorers.composition_rules import (
    Detection,
    crop,
    judge,
    kept_detections,
    overlap,
    pixel_colour,
    stands,
)

SAMPLES = {
    "a photo of a dog": ("single_object", Composition(things=(Thing(name="dog"),))),
    "a photo of an apple and a cup": ("two_objects", Composition(things=(Thing(name="apple"), Thing(name="cup")))),
    "a photo of two people": ("counting", Composition(things=(Thing(name="person", count=2),))),
    "a photo of ten benches": ("counting", Composition(things=(Thing(name="bench", count=10),))),
    "a photo of an orange": ("single_object", Composition(things=(Thing(name="orange"),))),
    "a photo of an orange orange": ("colours", Composition(things=(Thing(name="orange", colour="orange"),))),
    "A photo of a black teddy bear.": ("colours", Composition(things=(Thing(name="teddy bear", colour="black"),))),
    "a photo of a traffic light left of a cat": (
        "position",
        Composition(things=(Thing(name="traffic light"), Thing(name="cat")), relation="left of"),
    ),
    "a photo of a red apple and a green cup": (
        "colour_attribution",
        Composition(things=(Thing(name="apple", colour="red"), Thing(name="cup", colour="green"))),
    ),
}


@pytest.mark.parametrize("prompt", SAMPLES)
def test_a_prompt_says_what_its_image_must_show(prompt):
    task, wanted = SAMPLES[prompt]
    assert parse_composition(prompt) == wanted
    assert wanted.task == task
    assert wanted.prompt == prompt.lower().removesuffix(".")


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("two dogs", "want one or two phrases after 'a photo of'"),
        ("a photo of a dog and a cat and a cow", "want one or two phrases"),
        ("a photo of a dgo", "want a known object instead of 'dgo', perhaps 'dog'"),
        ("a photo of a dog on a bench", "want a known object instead of 'dog on a bench'"),
        ("a photo of two dog", "want a known object instead of 'dog', perhaps 'dogs'"),
        ("a photo of dogs", "want a, an or a number from two to ten before 'dogs'"),
        ("a photo of eleven dogs", "want a, an or a number from two to ten"),
        ("a photo of two red dogs", "want a known object instead of 'red dogs'"),
        ("a photo of a dog and a dog", "want two different objects, one of each"),
        ("a photo of two dogs and a cat", "want two different objects, one of each"),
        ("a photo of a red dog and a cat", "want a colour for both"),
        ("a photo of a red dog left of a blue cat", "want a colour for both of two objects joined by 'and'"),
    ],
)
def test_a_prompt_outside_the_grammar_is_one_clear_user_fault(prompt, want):
    with pytest.raises(UserError) as caught:
        parse_composition(prompt)
    assert f"composition: got the prompt {prompt!r}, {want}" in str(caught.value)


def test_written_prompts_are_read_back_and_are_distinct_and_even():
    prompts = composition_prompts(per_task=30, seed=1)
    assert [each.task for each in prompts] == [task for task in TASKS for _ in range(30)]
    assert len({each.prompt for each in prompts}) == len(prompts)
    for each in prompts:
        assert parse_composition(each.prompt) == each
    assert {each.relation for each in prompts if each.task == "position"} == set(RELATIONS)
    assert {thing.count for each in prompts if each.task == "counting" for thing in each.things} == {2, 3, 4}
    assert {thing.colour for each in prompts for thing in each.things} >= set(COLOURS)
    assert not any(thing.name == "person" and thing.colour for each in prompts for thing in each.things)


def test_prompts_depend_on_the_seed_only_and_a_small_task_gives_all_it_has():
    assert composition_prompts(per_task=5, seed=3) == composition_prompts(per_task=5, seed=3)
    assert composition_prompts(per_task=5, seed=3) != composition_prompts(per_task=5, seed=4)
    few = composition_prompts(per_task=10_000, objects=("dog", "cat", "cow"))
    counts = {task: sum(each.task == task for each in few) for task in TASKS}
    assert counts == {
        "single_object": 3,
        "two_objects": 6,
        "counting": 9,
        "colours": 30,
        "position": 24,
        "colour_attribution": 540,
    }


def test_every_object_has_one_plural_of_its_own():
    plurals = [plural(name) for name in OBJECTS]
    assert len(set(plurals)) == len(set(OBJECTS)) == len(OBJECTS)
    assert plural("wine glass") == "wine glasses" and plural("knife") == "knives" and plural("toothbrush") == "toothbrushes"


def test_prompts_are_written_beside_what_is_expected_and_generate_reads_them(tmp_path):
    from mmalign.generate import read_prompts

    path = write_composition_prompts(tmp_path / "prompts.jsonl", per_task=2, seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert read_prompts(str(path)) == [row["prompt"] for row in rows]
    position = next(row for row in rows if row["task"] == "position")
    assert position["relation"] in RELATIONS and {"name", "count", "colour"} == set(position["objects"][0])
    with pytest.raises(UserError, match=r"want a file that ends in \.jsonl"):
        write_composition_prompts(tmp_path / "prompts.txt")


def seen(name, box, score=0.9):
    return Detection(name=name, score=score, box=tuple(float(side) for side in box))


def verdict(prompt, *detections, colours=None, **settings):
    rules = {"threshold": 0.3, "max_overlap": 0.5, "margin": 0.1, **settings}
    return judge(parse_composition(prompt), detections, lambda detection: (colours or {})[detection.name], **rules)


DOG, CAT = seen("dog", (0, 40, 20, 60)), seen("cat", (80, 40, 100, 60))


def test_one_object_must_be_there():
    assert verdict("a photo of a dog", DOG).passed
    assert verdict("a photo of a dog", DOG, seen("dog", (50, 0, 60, 10))).passed
    missing = verdict("a photo of a dog")
    assert not missing.passed and missing.reason == "want at least a dog, found 0"
    assert not verdict("a photo of a dog", seen("dog", (0, 0, 9, 9), score=0.3)).passed  # above, not at, the threshold


def test_two_objects_must_both_be_there():
    assert verdict("a photo of a dog and a cat", CAT, DOG).passed
    assert verdict("a photo of a dog and a cat", DOG).reason == "want at least a cat, found 0"
    assert verdict("a photo of a dog and a cat", DOG, seen("cat", DOG.box)).passed  # names do not suppress each other


def test_a_counted_object_must_be_there_exactly_so_often():
    dogs = [seen("dog", (30 * place, 0, 30 * place + 20, 20), score=0.9 - 0.1 * place) for place in range(4)]
    assert verdict("a photo of three dogs", *dogs[:3]).passed
    assert verdict("a photo of three dogs", *dogs[:2]).reason == "want 3 dogs, found 2"
    assert verdict("a photo of three dogs", *dogs).reason == "want 3 dogs, found 4"
    assert verdict("a photo of three dogs", *dogs, threshold=0.65).passed


def test_boxes_of_one_object_that_overlap_count_once():
    twice = seen("dog", (2, 40, 22, 60), score=0.8)  # 18 x 20 of 22 x 20 shared: 0.818
    assert overlap(DOG.box, twice.box) == pytest.approx(18 / 22)
    assert not verdict("a photo of two dogs", DOG, twice).passed
    assert verdict("a photo of two dogs", DOG, twice, max_overlap=0.82).passed
    half = seen("dog", (10, 40, 30, 60), score=0.8)  # a third shared
    assert verdict("a photo of two dogs", DOG, half).passed


def test_suppression_is_by_the_surest_box_that_counts():
    chain = [seen("dog", (step, 0, step + 10, 10), score) for step, score in ((0, 0.7), (3, 0.8), (6, 0.9))]
    # The middle one falls to the surest; the first overlaps the surest by 4/16 only and stays.
    kept = kept_detections(chain, threshold=0.3, max_overlap=0.5)
    assert [detection.box[0] for detection in kept] == [6.0, 0.0]
    assert kept_detections(chain, threshold=0.85, max_overlap=0.5) == [chain[2]]


def test_boxes_apart_or_empty_overlap_by_nothing():
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1


def test_the_surest_box_must_have_the_colour():
    assert verdict("a photo of a red dog", DOG, colours={"dog": "red"}).passed
    wrong = verdict("a photo of a red dog", DOG, colours={"dog": "blue"})
    assert not wrong.passed and wrong.reason == "want a red dog, found a blue one"
    assert verdict("a photo of a red dog").reason == "want at least a dog, found 0"


def test_each_object_must_have_its_own_colour():
    prompt = "a photo of a red dog and a green cat"
    assert verdict(prompt, DOG, CAT, colours={"dog": "red", "cat": "green"}).passed
    swapped = verdict(prompt, DOG, CAT, colours={"dog": "green", "cat": "red"})
    assert swapped.reason == "want a red dog, found a green one; want a green cat, found a red one"
    assert not verdict(prompt, DOG, colours={"dog": "red"}).passed


@pytest.mark.parametrize(
    ("relation", "box"),
    [("left of", (10, 40, 20, 60)), ("right of", (80, 40, 90, 60)), ("above", (40, 0, 60, 10)), ("below", (40, 80, 60, 90))],
)
def test_the_surest_boxes_must_stand_as_asked(relation, box):
    middle = seen("cat", (40, 40, 60, 60))
    for asked in RELATIONS:
        result = verdict(f"a photo of a dog {asked} a cat", seen("dog", box), middle)
        assert result.passed == (asked == relation)
        assert result.passed or result.reason == f"want the dog {asked} the cat, found it {relation} it"
    assert not verdict(f"a photo of a dog {relation} a cat", seen("dog", box)).passed
    elsewhere = seen("dog", (40, 40, 60, 60), score=0.95)
    assert "at the place of it" in verdict(f"a photo of a dog {relation} a cat", seen("dog", box), elsewhere, middle).reason


def test_a_position_needs_more_than_the_margin_and_at_most_sixty_degrees():
    still, near, far = (0, 0, 10, 10), (-2, 0, 8, 10), (-2.1, 0, 7.9, 10)  # the margin is 0.1 (10 + 10) = 2
    assert not stands(near, "left of", still, margin=0.1)
    assert stands(far, "left of", still, margin=0.1)
    diagonal, steep = (-50, -50, -40, -40), (-28, -50, -18, -40)  # 45 degrees; 28 across to 50 up is more than 60 from left
    assert stands(diagonal, "left of", still, margin=0.1) and stands(diagonal, "above", still, margin=0.1)
    assert not stands(steep, "left of", still, margin=0.1) and stands(steep, "above", still, margin=0.1)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 20, 30), "red"),
        ((255, 140, 0), "orange"),
        ((255, 230, 0), "yellow"),
        ((30, 160, 60), "green"),
        ((20, 60, 230), "blue"),
        ((128, 0, 128), "purple"),
        ((255, 105, 180), "pink"),
        ((255, 192, 203), "pink"),
        ((110, 60, 20), "brown"),
        ((10, 10, 12), "black"),
        ((250, 250, 245), "white"),
        ((128, 128, 128), "grey"),
    ],
)
def test_colour_of_pixels_by_the_stated_rule(rgb, name):
    assert pixel_colour(Image.new("RGB", (8, 8), rgb), (0, 0, 8, 8)) == name


def test_colour_is_that_of_most_pixels_in_the_middle_of_the_box():
    image = Image.new("RGB", (100, 100), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 79, 79), fill=(220, 20, 30))
    assert pixel_colour(image, (0.0, 0.0, 100.0, 100.0)) == "red"
    assert pixel_colour(image, (-20.0, -20.0, 20.0, 20.0)) == "white"
    draw.rectangle((20, 20, 79, 79), fill=(120, 120, 120))
    draw.rectangle((45, 45, 55, 55), fill=(20, 60, 230))
    assert pixel_colour(image, (0.0, 0.0, 100.0, 100.0)) == "blue"  # grey does not vote


def test_a_crop_stays_within_the_image_and_is_never_empty():
    image = Image.new("RGB", (10, 20))
    assert crop(image, (2.0, 4.0, 6.0, 12.0)).size == (4, 8)
    assert crop(image, (2.0, 4.0, 6.0, 12.0), share=0.5).size == (2, 4)
    assert crop(image, (-5.0, -5.0, 50.0, 50.0)).size == (10, 20)
    assert crop(image, (3.2, 3.2, 3.3, 3.3)).size == (1, 1)
    assert crop(image, (10.0, 20.0, 10.0, 20.0)).size == (1, 1)
