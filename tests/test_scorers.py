import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mmalign.errors import UserError
from mmalign.scorers import SCORERS
from mmalign.scorers.digits import (
    ANNOTATOR_ROWS,
    DIGIT_WORDS,
    JUDGE_ROWS,
    fitted_annotator,
    fitted_judge,
    prompted_digit,
)


def test_scorers_stand_in_alphabetical_order_and_those_of_pixels_bear_their_names_in_the_table():
    assert list(SCORERS) == sorted(SCORERS)
    for name in ("brightness", "colourfulness", "digit_judge", "digit_legibility", "saturation", "sharpness"):
        assert SCORERS[name]().name == name


def scans(rows):
    """Real scans as the quickstart's images: 32x32 RGB, ink bright."""
    data, digits = load_digits(return_X_y=True)
    grey = (data[rows].reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    images = [Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for scan in grey]
    return images, digits[rows]


def caption(digit):
    return f"a handwritten digit {DIGIT_WORDS[digit]}"


def test_annotator_and_judge_are_fitted_on_disjoint_scans():
    rows = np.arange(1797)
    annotator, judge = set(rows[ANNOTATOR_ROWS]), set(rows[JUDGE_ROWS])
    assert not annotator & judge
    assert len(annotator) + len(judge) == 1797
    # The judge keeps its support vectors: each must be one of its own rows and none of the annotator's.
    data, _ = load_digits(return_X_y=True)
    vectors = {vector.tobytes() for vector in fitted_judge().support_vectors_}
    assert vectors <= {scan.tobytes() for scan in data[JUDGE_ROWS]}
    assert not vectors & {scan.tobytes() for scan in data[ANNOTATOR_ROWS]}
    # The mean of the annotator's multinomial gradient over its own rows is at the optimum, over the other rows it is not.
    assert _gradient_norm(ANNOTATOR_ROWS) < 0.05 * _gradient_norm(JUDGE_ROWS)


def _gradient_norm(rows):
    """Of the penalised log-likelihood of the annotator's weights on these rows: zero only on those it was fitted on."""
    data, digits = load_digits(return_X_y=True)
    model = fitted_annotator()
    residual = model.predict_proba(data[rows]) - np.eye(10)[digits[rows]]
    return np.abs(0.01 * residual.T @ data[rows] + model.coef_).max()


def test_digit_scorers_read_scans_they_have_not_seen():
    images, digits = scans(slice(0, 200, 2))
    prompts = [caption(digit) for digit in digits]
    legibility = SCORERS["digit_legibility"]()(prompts, images)
    assert (legibility <= 0).all() and legibility.exp().mean() > 0.8
    unseen, labels = scans(slice(1, 201, 2))
    assert SCORERS["digit_judge"]()([caption(digit) for digit in labels], unseen).mean() > 0.95


def test_digit_scorers_prefer_the_prompted_digit_to_another():
    images, digits = scans(slice(0, 100, 2))
    right, wrong = [caption(digit) for digit in digits], [caption((digit + 1) % 10) for digit in digits]
    legibility, judge = SCORERS["digit_legibility"](), SCORERS["digit_judge"]()
    assert (legibility(right, images) > legibility(wrong, images)).float().mean() > 0.95
    assert judge(wrong, images).mean() < 0.05
    assert set(judge(right + wrong, images * 2).tolist()) == {0.0, 1.0}


def test_digit_scores_do_not_depend_on_the_batch():
    images, digits = scans(slice(0, 12, 2))
    prompts = [caption(digit) for digit in digits]
    scorer = SCORERS["digit_legibility"]()
    alone = torch.cat([scorer([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)])
    torch.testing.assert_close(scorer(prompts, images), alone)


def test_prompted_digit_is_one_english_word():
    assert prompted_digit("A Handwritten digit SEVEN.") == 7
    with pytest.raises(UserError, match="prompt 'a someone': got no digit"):
        prompted_digit("a someone")
    with pytest.raises(UserError, match="got 2 digits"):
        prompted_digit("one or two")


def image_of(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def test_brightness_weighs_the_channels_by_bt601():
    colours = [[[255, 0, 0]]], [[[0, 255, 0]]], [[[0, 0, 255]]], [[[255, 255, 255]]]
    scores = SCORERS["brightness"]()(["", "", "", ""], [image_of(colour) for colour in colours])
    torch.testing.assert_close(scores, torch.tensor([0.299, 0.587, 0.114, 1.0]))


def test_colourfulness_of_a_red_and_a_grey_image_is_worked_by_hand():
    # Red: rg = 255, yb = 127.5, no variance: 0.3 sqrt(255^2 + 127.5^2) = 85.5296.
    # Half red, half black: means half as large, deviations 127.5 and 63.75: sqrt(20320.3) + 85.5296 / 2 = 185.3141.
    red, half = image_of([[[255, 0, 0]] * 2] * 2), image_of([[[255, 0, 0], [0, 0, 0]]])
    scores = SCORERS["colourfulness"]()(["", "", ""], [red, half, Image.new("L", (3, 3), 90)])
    torch.testing.assert_close(scores, torch.tensor([85.5296, 185.3141, 0.0]), atol=1e-3, rtol=0)


def test_sharpness_of_one_bright_pixel_is_worked_by_hand():
    # 4x4, one pixel of 100 at (1, 1): Laplacians of the inner 2x2 are -400, 100, 100, 0: variance 42500.
    grey = np.zeros((4, 4), dtype=np.uint8)
    grey[1, 1] = 100
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    blurred = sharp.resize((8, 8)).resize((32, 32))
    scores = SCORERS["sharpness"]()([""] * 4, [Image.fromarray(grey), Image.new("RGB", (2, 9)), sharp, blurred])
    torch.testing.assert_close(scores[:2], torch.tensor([42500.0, 0.0]))
    assert scores[2] > 2 * scores[3]


def test_saturation_is_worked_by_hand_and_is_that_of_pil_up_to_rounding():
    # Red: 1. (200, 100, 50): 150 / 200 = 0.75. Grey, black and white: 0. Half red, half grey: 0.5.
    pure, mixed, half = ([[[255, 0, 0]]], [[[200, 100, 50]]], [[[255, 0, 0], [9, 9, 9]]])
    plain = [Image.new("RGB", (2, 2), grey) for grey in ("black", "white", "grey")]
    scores = SCORERS["saturation"]()([""] * 6, [*(image_of(rows) for rows in (pure, mixed, half)), *plain])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.75, 0.5, 0.0, 0.0, 0.0]))
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    of_pil = np.asarray(noise.convert("HSV"))[..., 1].mean() / 255
    assert SCORERS["saturation"]()([""], [noise]).item() == pytest.approx(of_pil, abs=1 / 255)
