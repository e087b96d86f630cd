"""What may be said about images made before and after training, with its uncertainty: pure functions on numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from mmalign.errors import UserError

RESAMPLES_AT_ONCE = 1_000_000  # random indices held in memory by one step of the bootstrap


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Share of pairs in which the second side scores higher, a tie counting half, with its interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    @property
    def num_pairs(self) -> int:
        """Pairs compared."""
        return self.wins + self.ties + self.losses

    def __str__(self) -> str:
        """Rate and interval in per cent, then the counts."""
        counts = f"{self.wins} won, {self.ties} tied, {self.losses} lost"
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] ({counts})"


def wilson_interval(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion p = successes / trials.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Source: Wilson (1927), JASA 22. `successes` need not be whole: a tie is entered as 0.5. The variance of a trial that can
    give 0, 1/2 or 1 is at most p(1-p), so with ties the interval is a little wider than need be, never too narrow.

    Args:
        successes: 0 to trials.
        trials: at least 1.
        confidence: share of repetitions whose interval covers the truth; published and usual: 0.95.

    Raises:
        ValueError: no trials, successes outside [0, trials], or confidence outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(
            f"wilson_interval: got {successes} of {trials} at {confidence}, want 0 <= successes <= trials, 0 < confidence < 1"
        )
    z = float(torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64)))
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # Clipped because rounding leaves an end of 0 of n or n of n up to 1e-16 outside.
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    values: Float[Tensor, " n"], *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: the values are drawn again, with replacement, num_resamples times.

    Give one value per pair (a difference, or 1 / 0.5 / 0 for won / tied / lost) and the bootstrap is paired. When every
    value is the same the interval has no width: the bootstrap cannot see what the sample lacks; Wilson's interval can.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.

    Args:
        values: one number per pair.
        confidence: as in `wilson_interval`.
        num_resamples: 10 000 keeps the ends steady to about 1 % of the interval's width.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: no values.
    """
    num_values = len(values)
    if num_values == 0:
        raise ValueError("bootstrap_interval: got no values, want at least one")
    generator = torch.Generator().manual_seed(seed)
    values = values.detach().cpu().double()
    step = max(1, RESAMPLES_AT_ONCE // num_values)
    means = []
    for start in range(0, num_resamples, step):
        count = min(step, num_resamples - start)
        drawn = torch.randint(num_values, (count, num_values), generator=generator)
        means.append(values[drawn].mean(dim=1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def wilson(outcomes: Float[Tensor, " n"]) -> tuple[float, float]:
    """Interval of a win rate by `wilson_interval`, from 1 / 0.5 / 0 per pair."""
    return wilson_interval(float(outcomes.double().sum()), len(outcomes))


def bootstrap(outcomes: Float[Tensor, " n"]) -> tuple[float, float]:
    """Interval of a win rate by `bootstrap_interval`, from 1 / 0.5 / 0 per pair."""
    return bootstrap_interval(outcomes)


def win_rate(before: Float[Tensor, " n"], after: Float[Tensor, " n"], *, eps: float = 0.0, interval: str = "wilson") -> WinRate:
    """How often `after` beats `before` on the same prompt and seed; |difference| <= eps is a tie and counts half.

    rate = (wins + ties / 2) / n

    Both intervals take the pairs as independent: many seeds of few prompts say less about new prompts than they seem to.

    Args:
        before, after: scores, entry i of both from the same prompt and seed.
        eps: in units of the score. A strict count (0) saturates at 1 for any consistent nudge, however small.
        interval: a name in INTERVALS. `wilson` stays honest at 0 % and 100 %; `bootstrap` resamples the pairs.

    Raises:
        ValueError: sides of different length or empty, scores that are not finite, negative eps, unknown interval.
    """
    _check_sides(before, after)
    if eps < 0 or interval not in INTERVALS:
        raise ValueError(f"win_rate: got eps={eps}, interval={interval!r}, want eps >= 0, one of {', '.join(INTERVALS)}")
    difference = after.double() - before.double()
    outcomes = torch.where(difference.abs() <= eps, 0.5, (difference > 0).double())
    low, high = INTERVALS[interval](outcomes)
    ties = int((outcomes == 0.5).sum())
    wins = int((outcomes == 1).sum())
    return WinRate(rate=float(outcomes.mean()), low=low, high=high, wins=wins, ties=ties, losses=len(outcomes) - wins - ties)


def effect_size(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> float | None:
    """Mean paired difference in units of its own standard deviation: 0.2 is small, 0.8 is large. None where undefined.

    d_z = mean(after - before) / sd(after - before), sd with n - 1

    Source: Cohen (1988), Statistical Power Analysis, section 2.3.5. None for one pair, or when every difference is the same
    number other than 0.

    Raises:
        ValueError: as `win_rate`.
    """
    _check_sides(before, after)
    difference = after.double() - before.double()
    if not difference.any():
        return 0.0
    if len(difference) < 2 or float(difference.std()) == 0.0:
        return None
    return float(difference.mean() / difference.std())


def diversity(prompts: Sequence[str], images: Sequence[Image]) -> float | None:
    """How different the images of one prompt are: mean pairwise distance within a prompt, averaged over the prompts.

    D = mean over prompts of mean over i < j of sqrt(mean over pixels and channels of (x_i - x_j)^2),  x in [0, 1]

    0 means that every seed gives the same image (collapse). It sees pixels, not meaning: use it to compare two models on
    the same prompts and seeds. None when no prompt has two images.

    Raises:
        UserError: two images of one prompt differ in size.
    """
    places: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(zip(prompts, range(len(images)), strict=True)):
        places.setdefault(prompt, []).append(place)
    per_prompt = [
        _mean_distance(prompt, [images[place] for place in group]) for prompt, group in places.items() if len(group) > 1
    ]
    return sum(per_prompt) / len(per_prompt) if per_prompt else None


def pixel_std(images: Sequence[Image]) -> float:
    """Contrast: standard deviation of an image's pixel values in [0, 1], averaged over the images.

    It falls when images turn flat and rises when training burns in contrast; both are signs of over-optimisation.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("pixel_std: got no images, want at least one")
    return sum(float(_pixels(image).std(correction=0)) for image in images) / len(images)


def first_and_last(values: Sequence[float], *, share: float = 0.1) -> tuple[float, float]:
    """Mean of the first and of the last `share` of a series (at least one value each): where a curve starts and ends.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("first_and_last: got no values, want at least one")
    count = max(1, round(share * len(values)))
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _check_sides(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"paired scores: got shapes {tuple(before.shape)} and {tuple(after.shape)}, want the same (n,), n > 0")
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError("paired scores: got NaN or infinity, want finite scores")


def _mean_distance(prompt: str, images: Sequence[Image]) -> float:
    sizes = sorted({f"{width}x{height}" for width, height in (image.size for image in images)})
    if len(sizes) > 1:
        raise UserError(f"prompt {prompt!r}: got images of sizes {', '.join(sizes)}, want one size. Generate them at one size.")
    flat = torch.stack([_pixels(image).flatten() for image in images])
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1])


def _pixels(image: Image) -> Float[Tensor, "h w c"]:
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255)


INTERVALS: dict[str, Callable[[Float[Tensor, " n"]], tuple[float, float]]] = {"wilson": wilson, "bootstrap": bootstrap}
