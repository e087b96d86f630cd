"""Views of answers to images: blind candidates, candidates with an image each, a better answer under a retrieved image."""

from typing import Any

import pytest

from mmalign.errors import UserError
from mmalign.records import VIEWS, Comparison, Content, Dropped, Examples, Media, Message, joint, pair, to_dataset
from mmalign.records.views import blind, clips, crossed, retrieved

BLIND = {"source": "blind", "model": "tiny"}


def answer(text: str) -> Content:
    return Content(messages=(Message("assistant", text),))


def asked(picture: bytes, text: str = "What is it?") -> Content:
    return Content(messages=(Message("user", text, images=(Media(data=picture),)),))


def row(*said: str, **known: Any) -> Comparison:
    return Comparison(id="r", prompt=asked(b"one"), candidates=tuple(map(answer, said)), **known)


def texts(examples: Any) -> list[list[str]]:
    return [[sample.completion.words() for sample in example.samples] for example in examples]


def test_the_blind_candidate_comes_last_wherever_it_stands_and_whatever_its_rank() -> None:
    value = row("b", "l", "w", ranks=(1, 3, 2), provenance=(BLIND, {}, {"model": "x"}))
    (example,) = blind(value)
    assert texts([example]) == [["w", "l", "b"]] and example.id == "r"
    assert all(sample.prompt.messages[0].images for sample in example.samples)
    assert texts(blind(row("w", "l", "b", scores={"judge": (2.0, 1.0, 9.0)}, provenance=({}, {}, BLIND)))) == [["w", "l", "b"]]


def test_several_rejected_candidates_stand_best_first_and_are_thinned_to_a_number() -> None:
    value = row("l2", "w", "l1", "l3", "b", ranks=(3, 1, 2, 4, 4), provenance=({}, {}, {}, {}, BLIND))
    assert texts(blind(value)) == [["w", "l1", "l2", "l3", "b"]]
    assert texts(blind(value, num_candidates=3)) == [["w", "l3", "b"]]
    assert texts(blind(value, num_candidates=4)) == [["w", "l2", "l3", "b"]]
    assert blind(value, num_candidates=6) == Dropped("5 candidates, want 6")
    with pytest.raises(UserError, match="got num_candidates 2, want 3 or more"):
        blind(value, num_candidates=2)


def test_several_blind_candidates_make_an_example_each() -> None:
    value = row("w", "l", "b", "c", ranks=(1, 2, 2, 2), weight=2.0, provenance=({}, {}, BLIND, BLIND))
    examples = blind(value)
    assert texts(examples) == [["w", "l", "b"], ["w", "l", "c"]]
    assert [e.id for e in examples] == ["r#2", "r#3"] and all(e.side == {"weight": 2.0, "blind": 1.0} for e in examples)


def test_rows_without_a_blind_candidate_an_order_or_a_worse_candidate_are_dropped() -> None:
    origins = ({}, {}, BLIND)
    assert blind(row("w", "l", ranks=(1, 2))) == Dropped("no blind candidate, want one made by mmalign blind")
    assert blind(row("w", "l", "b", ranks=(1, 1, 2), provenance=origins)) == Dropped("tie")
    assert blind(row("w", "l", "b", provenance=origins)) == Dropped("not judged")
    assert blind(row("w", "b", ranks=(1, 2), provenance=({}, BLIND))) == Dropped("1 candidates to compare, want 2 or more")


def own_images(*said: str, pictures: tuple[bytes, ...], **known: Any) -> Comparison:
    return row(*said, prompts=tuple(asked(picture) for picture in pictures), **known)


def test_crossed_keeps_the_order_of_the_row_and_each_image_with_its_answer() -> None:
    value = own_images("cat", "dog", "cow", pictures=(b"one", b"two", b"one"), ranks=(2, 1, 3))
    (example,) = crossed(value)
    assert texts([example]) == [["cat", "dog", "cow"]]
    assert [sample.prompt.media()[0].data for sample in example.samples] == [b"one", b"two", b"one"]
    assert crossed(row("cat", "dog")) == Dropped("one prompt for all candidates, want prompts, one each")


def test_retrieved_is_a_pair_beside_the_better_answer_under_another_image() -> None:
    value = own_images("worse", "better", "better", pictures=(b"one", b"one", b"two"), ranks=(2, 1, 3))
    (example,) = retrieved(value)
    assert texts([example]) == [["better", "worse"]]
    degraded = example.extras["degraded"]
    assert degraded.completion.words() == "better" and degraded.prompt.media()[0].data == b"two"
    assert [sample.prompt.media()[0].data for sample in example.samples] == [b"one", b"one"]


def test_retrieved_drops_rows_of_another_shape() -> None:
    repeated = Dropped("not one candidate repeated under a prompt of its own")
    assert retrieved(own_images("a", "b", "c", pictures=(b"1", b"1", b"2"), ranks=(1, 2, 3))) == repeated
    assert retrieved(row("a", "b", "a", ranks=(1, 2, 3))) == repeated
    of_worse = own_images("a", "b", "b", pictures=(b"1", b"1", b"2"), ranks=(1, 2, 3))
    assert retrieved(of_worse) == Dropped("a repeated candidate that is not the better one")


@pytest.mark.parametrize("name", ["pair", "crossed", "joint"])
def test_a_view_of_images_of_their_own_is_the_same_with_and_without_reading_them(name: str) -> None:
    table = to_dataset([own_images("cat", "dog", pictures=(b"one", b"two"), ranks=(1, 2))])
    if name == "pair":
        with pytest.raises(UserError, match="a prompt of its own for each candidate, want the view joint"):
            Examples(table, VIEWS[name])
    else:
        (example,) = Examples(table, VIEWS[name])
        assert [sample.prompt.media()[0].data for sample in example.samples] == [b"one", b"two"]


def test_one_prompt_that_is_written_out_for_each_candidate_is_one_prompt() -> None:
    prompts = (Content(text="q"), Content(text="q"))
    value = Comparison(id="t", prompt=prompts[0], candidates=(answer("a"), answer("b")), prompts=prompts, ranks=(1, 2))
    assert texts(pair(value)) == texts(joint(value)) == [["a", "b"]]


def video(*frames: bytes, text: str = "What happens?") -> Content:
    return Content(messages=(Message("user", text, images=tuple(Media(data=one) for one in frames)),))


FRAMES = tuple(bytes([65 + n]) for n in range(8))


def shown(sample: Any) -> str:
    return "".join(media.data.decode() for media in sample.prompt.media())


@pytest.mark.parametrize(("how", "magnitude", "wanted"), [("reverse", 4, "GHEFCDAB"), ("reverse", 16, "HGFEDCBA")])
def test_clips_show_the_better_answer_under_a_corrupted_video_too(how: Any, magnitude: int, wanted: str) -> None:
    value = Comparison(id="v", prompt=video(*FRAMES), candidates=(answer("l"), answer("w")), ranks=(2, 1))
    (example,) = clips(value, how=how, magnitude=magnitude)
    assert texts([example]) == [["w", "l"]] and [shown(sample) for sample in example.samples] == ["ABCDEFGH"] * 2
    assert example.extras["degraded"].completion == answer("w") and shown(example.extras["degraded"]) == wanted


def test_clips_are_dropped_and_shuffled_alike_in_every_epoch_and_never_left_as_they_are() -> None:
    def of(name: str, **settings: Any) -> str:
        value = Comparison(id=name, prompt=video(*FRAMES), candidates=(answer("w"), answer("l")), ranks=(1, 2))
        (example,) = clips(value, **settings)
        return shown(example.extras["degraded"])

    names = [f"v{n}" for n in range(20)]
    kept = [of(name, how="drop", magnitude=4) for name in names]
    assert all(len(one) == 2 and one[0] < one[1] for one in kept) and len(set(kept)) > 5
    moved = [of(name, magnitude=2) for name in names]
    assert set(moved) == {"EFGHABCD"}, "of two groups one order is another one"
    assert [of(name) for name in names] == [of(name) for name in names] and len({of(name) for name in names}) > 5


def test_rows_without_a_video_are_dropped_and_a_table_of_videos_is_read_through_the_view() -> None:
    assert clips(row("w", "l", ranks=(1, 2))) == Dropped("no video, want several images of one message")
    value = Comparison(id="v", prompt=video(FRAMES[0], *FRAMES[:3]), candidates=(answer("w"), answer("l")), ranks=(1, 1))
    assert clips(value) == Dropped("tie")
    with pytest.raises(UserError, match="got magnitude 1, want 2 or more"):
        clips(value, magnitude=1)
    same = Comparison(id="v", prompt=video(*[FRAMES[0]] * 3), candidates=(answer("w"), answer("l")), ranks=(1, 2))
    examples = Examples(to_dataset([same]), VIEWS["clips"])  # frames that look alike are a video too
    assert len(examples[0].extras["degraded"].prompt.media()) == 3
