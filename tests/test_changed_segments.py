"""RLHF-V's weights of tokens: what counts as changed (the authors' numbers), and the weights that follow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmalign.curation.changed_segments import changed_segments, changed_tokens
from mmalign.curation.token_effects import TOKEN_WEIGHTS
from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.records import Content, Example, Sample

GOLDEN = Path(__file__).parent / "golden" / "mllm"


@pytest.mark.parametrize("case", range(5))
def test_changed_tokens_are_those_of_the_published_code(case: int) -> None:
    with np.load(GOLDEN / "ddpo_diff_ids.npz") as stored:
        one, other = (stored[f"{side}{case}"].tolist() for side in "ab")
        expected = tuple(tuple(stored[f"{side}{case}_mod"].tolist()) for side in "ab")
    assert changed_tokens(one, other) == expected


def encoded(*answers: tuple[int, ...], given: int = 0) -> Encoded:
    return Encoded(contexts=((1, 2),), continuations=answers, context_of=(0,) * len(answers), given=(given,) * len(answers))


def example(k: int = 2) -> Example:
    return Example(id="7", samples=(Sample(prompt=Content(text="a"), completion=Content(text="b")),) * k)


def test_an_insertion_is_not_marked_and_a_replacement_is_on_both_sides() -> None:
    assert changed_tokens([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 4, 5, 6]) == ((), ())
    assert changed_tokens([1, 2, 3, 8, 4, 5, 6], [1, 2, 3, 9, 9, 4, 5, 6]) == ((3,), (3, 4))
    assert changed_tokens([1, 2, 8], [1, 2, 9], min_match=3) == ((0, 1, 2), (0, 1, 2))
    assert changed_tokens([1, 2, 8], [1, 2, 9], min_match=2) == ((2,), (2,))


def test_changed_tokens_weigh_gamma_and_a_mean_divides_by_the_weights() -> None:
    chosen, rejected = (4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 15, 8, 9, 10, 12)
    sums = changed_segments(example(), encoded(chosen, rejected), gamma=5.0, average=False)
    # The answers begin alike behind one prompt: two tokens are enough there.
    assert sums == [[1, 1, 5, 5, 1, 1, 1, 5], [1, 1, 5, 1, 1, 1, 5]]
    means = changed_segments(example(), encoded(chosen, rejected))
    assert means[0] == [w / 20 for w in sums[0]] and means[1] == [w / 15 for w in sums[1]]
    assert [sum(row) for row in means] == pytest.approx([1.0, 1.0], rel=1e-15)


def test_only_scored_tokens_are_weighed() -> None:
    weights = changed_segments(example(), encoded((3, 4, 5), (3, 6, 5), given=1), average=False)
    assert weights == [[5, 5], [5, 5]]
    assert changed_segments(example(), encoded((3, 4, 5), (3, 4, 5)), average=False) == [[1, 1, 1]] * 2
    told_by_tool = replace(encoded((3, 4, 5), (3, 9, 9, 6, 5)), others=((), (1, 2)))
    assert changed_segments(example(), told_by_tool, average=False) == [[1, 5, 5], [1, 5, 5]]


def test_the_weights_are_those_that_the_authors_tokens_had() -> None:
    with np.load(GOLDEN / "ddpo_rlhfv_sum.npz") as stored:
        labels, weights = stored["labels"], stored["token_weight"]
    answers = [tuple(row[row != -100].tolist()) for row in labels]
    expected = [row[label[1:] != -100] for row, label in zip(weights, labels, strict=True)]
    found = changed_segments(example(), encoded(*answers), gamma=5.0, average=False)
    assert found == [row.tolist() for row in expected]


def test_settings_and_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"7: adapter\.token_weights: changed_segments got 3 answers, want two"):
        changed_segments(example(3), encoded((1,), (2,), (3,)))
    with pytest.raises(UserError, match="got gamma 0 and min_match 3, want both above 0"):
        changed_segments(example(), encoded((1,), (2,)), gamma=0.0)
    assert TOKEN_WEIGHTS["changed_segments"] is changed_segments
