import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.errors import UserError
from mmalign.statistics import (
    bootstrap_interval,
    diversity,
    effect_size,
    first_and_last,
    pixel_std,
    wilson_interval,
    win_rate,
)


def flat(value, size=(4, 4)):
    return Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8))


def test_wilson_interval_of_eight_in_ten_is_the_textbook_one():
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_wilson_interval_stays_inside_zero_and_one_and_never_closes():
    # n of n has the closed form [n / (n + z^2), 1].
    low, high = wilson_interval(10, 10)
    assert high == pytest.approx(1.0, abs=1e-15)
    assert high <= 1.0
    assert low == pytest.approx(10 / (10 + 1.959963984540054**2), abs=1e-12)
    assert wilson_interval(0, 10) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_interval_narrows_with_trials_and_widens_with_confidence():
    def width(*args, **settings):
        low, high = wilson_interval(*args, **settings)
        return high - low

    assert width(80, 100) < width(8, 10) < width(8, 10, confidence=0.99)


@pytest.mark.parametrize("successes, trials", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_counts_that_cannot_be(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_win_rate_counts_ties_as_half():
    before = torch.tensor([0.0, 0.0, 0.0, 0.0])
    after = torch.tensor([1.0, 0.05, -0.05, -1.0])
    strict = win_rate(before, after)
    assert (strict.wins, strict.ties, strict.losses, strict.rate) == (2, 0, 2, 0.5)
    calm = win_rate(before[:3], after[:3], eps=0.1)
    assert (calm.wins, calm.ties, calm.losses) == (1, 2, 0)
    assert calm.rate == pytest.approx(2 / 3)
    assert (calm.low, calm.high) == pytest.approx(wilson_interval(2, 3))


def test_win_rate_of_a_model_against_itself_is_one_half():
    scores = torch.randn(50)
    result = win_rate(scores, scores)
    assert (result.rate, result.ties) == (0.5, 50)
    assert result.low < 0.5 < result.high


def test_win_rate_turns_round_when_the_sides_are_swapped():
    before, after = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    one, other = win_rate(before, after, eps=0.2), win_rate(after, before, eps=0.2)
    assert one.rate == pytest.approx(1 - other.rate)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))


def test_win_rate_refuses_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN"):
        win_rate(torch.tensor([0.0]), torch.tensor([math.nan]))


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_values():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert low == pytest.approx(float(values.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.01)


def test_bootstrap_interval_is_the_same_for_the_same_seed_only():
    values = torch.tensor([0.0, 1.0, 4.0, 9.0, 2.5])
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1, num_resamples=50) != bootstrap_interval(values, seed=2, num_resamples=50)


def test_bootstrap_win_rate_is_close_to_wilson_away_from_the_ends():
    before = torch.zeros(200)
    after = torch.tensor([1.0] * 120 + [-1.0] * 80)
    wilson, bootstrap = (win_rate(before, after, interval=name) for name in ("wilson", "bootstrap"))
    assert bootstrap.rate == wilson.rate == 0.6
    assert bootstrap.low == pytest.approx(wilson.low, abs=0.01)
    assert bootstrap.high == pytest.approx(wilson.high, abs=0.01)


def test_effect_size_of_a_worked_example():
    # Differences 1, 2, 3: mean 2, sd 1.
    assert effect_size(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert effect_size(torch.ones(3), torch.ones(3)) == 0.0
    assert effect_size(torch.zeros(3), torch.ones(3)) is None


def test_diversity_of_black_grey_and_white_is_worked_by_hand():
    # Distances 0.2, 1.0 and 0.8 within "a"; 0 within "b"; "c" has one image only.
    images = [flat(0), flat(51), flat(255), flat(9), flat(9), flat(200)]
    assert diversity(["a", "a", "a", "b", "b", "c"], images) == pytest.approx((2.0 / 3 + 0) / 2, abs=1e-6)
    assert diversity(["a", "b"], images[:2]) is None


def test_diversity_does_not_grow_with_the_image():
    small, large = ([flat(0, size), flat(255, size)] for size in ((2, 2), (16, 8)))
    assert diversity(["a", "a"], small) == pytest.approx(diversity(["a", "a"], large))


def test_diversity_names_the_prompt_whose_sizes_differ():
    with pytest.raises(UserError, match=r"'a cat'.*2x2, 4x4"):
        diversity(["a cat", "a cat"], [flat(0, (2, 2)), flat(0, (4, 4))])


def test_pixel_std_is_zero_for_flat_images_and_half_for_half_black_half_white():
    checker = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (2, 2)))
    assert pixel_std([flat(10), flat(250)]) == 0.0
    assert pixel_std([checker]) == pytest.approx(0.5)


def test_first_and_last_tenth_of_a_curve():
    assert first_and_last([float(value) for value in range(20)]) == (0.5, 18.5)
    assert first_and_last([3.0]) == (3.0, 3.0)
