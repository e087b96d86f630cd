"""The sampler of rollouts: the published numbers, flow's stochastic step by hand, and what the pairs of branches are."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.noise import Schedule, flow_schedule, scaled_linear_alphas_cumprod, vp_schedule
from mmalign.sources.trajectories import Grid, Guided, Segments, Settings, judged_pairs, select, threshold_at


def golden(name: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


SAMPLER, SELECTION = golden("spo_sampler"), golden("spo_selection")


def published_schedule() -> Schedule:
    return vp_schedule(alphas_cumprod=SAMPLER["alphas_cumprod"])


def stable_diffusion() -> Schedule:
    return vp_schedule(alphas_cumprod=scaled_linear_alphas_cumprod(dtype=torch.float64))


# The grid


def test_the_grid_is_that_of_the_published_code() -> None:
    grid = Grid.of(published_schedule(), 20)
    assert grid.num_steps == 20
    assert torch.equal(grid.timesteps, SAMPLER["ddim_timesteps"])
    assert torch.equal(grid.previous, SAMPLER["grid_prev_timesteps"])
    torch.testing.assert_close(grid.steps.std, SAMPLER["grid_std"], rtol=1e-9, atol=0)


def test_candidates_of_a_step_are_those_of_the_published_code() -> None:
    grid = Grid.of(published_schedule(), 20)
    for row, timestep in enumerate(SAMPLER["cand_t"].tolist()):
        number = grid.timesteps.tolist().index(timestep)
        assert grid.previous[number] == SAMPLER["cand_prev_timestep"][row]
        xt, eps = SAMPLER["cand_xt"][row], SAMPLER["cand_eps"][row]
        mean = grid.steps.sample_weight[number] * xt + grid.steps.output_weight[number] * eps
        drawn = mean + grid.steps.std[number] * SAMPLER["cand_variance_noise"][:, row]
        torch.testing.assert_close(drawn, SAMPLER["cand_x_prev"][:, row], rtol=1e-9, atol=1e-9)
        clean = published_schedule().clean(xt[None], eps[None], SAMPLER["cand_t"][row : row + 1])[0]
        torch.testing.assert_close(clean, SAMPLER["cand_x0_pred"][row], rtol=1e-9, atol=1e-9)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(UserError, match=r"source\.num_steps: got 1001, want at most 500"):
        Grid.of(stable_diffusion(), 1001)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_step_of_rectified_flow_is_flow_grpos(shift: float) -> None:
    """Liu et al. 2025, eq. 9, and the std at sigma 1 of the published code, written out in numbers."""
    grid = Grid.of(flow_schedule(shift=shift, dtype=torch.float64), 10, 0.7)
    assert grid.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert grid.previous.tolist() == [899, 799, 699, 599, 499, 399, 299, 199, 99, 0]
    levels = [shift * (t + 1) / 1000 / (1 + (shift - 1) * (t + 1) / 1000) for t in [*grid.timesteps.tolist(), 0]]
    for number, (now, after) in enumerate(pairwise(levels)):
        dt = after - now
        std_dev = 0.7 * math.sqrt(now / (1 - (after if number == 0 else now)))
        assert float(grid.steps.std[number]) == pytest.approx(std_dev * math.sqrt(-dt), rel=1e-9)
        assert float(grid.steps.sample_weight[number]) == pytest.approx(1 + std_dev**2 / (2 * now) * dt, rel=1e-9)
        expected = (1 + std_dev**2 * (1 - now) / (2 * now)) * dt
        assert float(grid.steps.output_weight[number]) == pytest.approx(expected, rel=1e-9)


def test_without_noise_the_step_of_rectified_flow_is_eulers() -> None:
    schedule = flow_schedule(shift=3.0, dtype=torch.float64)
    grid = Grid.of(schedule, 10, 1e-6)
    torch.testing.assert_close(grid.steps.sample_weight, torch.ones(10, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        grid.steps.output_weight, schedule.sigma[grid.previous] - schedule.sigma[grid.timesteps], rtol=1e-9, atol=1e-10
    )
    assert float(grid.steps.std.max()) < 1e-5


@pytest.mark.parametrize("flow", [False, True])
def test_a_fine_stochastic_sampler_keeps_the_marginals_of_normal_data(flow: bool) -> None:
    """Data ~ Normal(0, c^2): the best network is linear, so that x_t stays normal and its variance can be followed exactly."""
    schedule, data = flow_schedule(dtype=torch.float64) if flow else stable_diffusion(), 0.25
    grid = Grid.of(schedule, 500)
    sigma = schedule.sigma[grid.timesteps]
    alpha = schedule.alpha[grid.timesteps]
    marginal = alpha**2 * data + sigma**2
    gain = (sigma - alpha * data) / marginal if flow else sigma / marginal  # E[noise - clean | x_t] or E[noise | x_t]
    variance = float(marginal[0])
    for number in range(grid.num_steps):
        weight = float(grid.steps.sample_weight[number] + grid.steps.output_weight[number] * gain[number])
        variance = weight**2 * variance + float(grid.steps.std[number]) ** 2
        end = grid.previous[number]
        expected = float(schedule.alpha[end] ** 2 * data + schedule.sigma[end] ** 2)
        if (
            not flow or number > 50
        ):  # where sigma is nearly 1 the noise of flow's step is larger than a step of the grid can follow
            assert variance == pytest.approx(expected, rel=0.04), number


# Segments


def test_pairs_are_made_at_the_published_steps_and_the_rest_is_taken_once() -> None:
    grid = Grid.of(stable_diffusion(), 20)
    segments = Segments.of(grid, 0, 751, 0)
    assert segments.alone == range(4)  # 951, 901, 851, 801
    assert [list(part) for part in segments.parts] == [[number] for number in range(4, 20)]
    assert segments.num_transitions == 16


def test_inner_steps_make_longer_segments_and_a_shorter_last_one() -> None:
    segments = Segments.of(Grid.of(stable_diffusion(), 20), 101, 750, 3)
    assert segments.alone == range(5)
    assert [list(part) for part in segments.parts] == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17]]
    assert segments.num_transitions == 13


def test_a_window_without_a_step_is_refused_with_the_samplers_timesteps() -> None:
    with pytest.raises(UserError, match=r"source\.window: got \[760, 790\], in which none.*\(1 \.\.\. 951\)"):
        Segments.of(Grid.of(stable_diffusion(), 20), 760, 790, 0)


# Selection


@pytest.mark.parametrize("threshold", [0.3, 0.4])
def test_best_worst_and_validity_are_those_of_the_published_code(threshold: float) -> None:
    best, worst, valid = select(SELECTION["cmp_scores"].T, threshold)
    assert torch.equal(valid, SELECTION[f"cmp_valid_th{threshold}"])
    told = torch.tensor([True, False, True, True])  # prompt 1 is an all-tie
    assert torch.equal(torch.stack([best, worst])[:, told], SELECTION[f"cmp_idx_th{threshold}"][:, told])


def test_the_gap_is_the_difference_of_the_softmax() -> None:
    gap = SELECTION["cmp_prob_gap"]
    scores = SELECTION["cmp_scores"].T
    assert torch.equal(select(scores, float(gap[2]) - 1e-9)[2], torch.tensor([False, False, True, True]))
    assert torch.equal(select(scores, float(gap[2]) + 1e-9)[2], torch.tensor([False, False, False, True]))


def test_a_tie_is_never_a_pair() -> None:
    assert not select(torch.ones(2, 3), 0.0)[2].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"source\.scorer: gave NaN or an infinite score"):
        select(torch.tensor([[1.0, value], [0.0, 1.0]]), 0.3)


def test_a_threshold_with_two_ends_is_linear_in_the_noise_of_a_step() -> None:
    grid = Grid.of(published_schedule(), 20)
    std = SAMPLER["grid_std"]
    for number in range(20):
        expected = 0.35 + 0.15 * float((std[number] - std[-1]) / (std[0] - std[-1]))
        assert threshold_at((0.35, 0.5), grid, number) == pytest.approx(expected, rel=1e-9)
        assert threshold_at(0.3, grid, number) == 0.3
    assert threshold_at((0.35, 0.5), grid, 0) == pytest.approx(0.5)
    assert threshold_at((0.35, 0.5), grid, 19) == pytest.approx(0.35)


# Branches


class Judge:
    """Scores by the mean of the guess, or of the latents; keeps what it saw.

    It is asked of one prompt at a time, so that what is sampled beside it can change no score.
    """

    def __init__(self, needs_guess: bool = True) -> None:
        self.needs_guess, self.calls = needs_guess, []

    def __call__(self, *, prompts: list[str], noisy: Tensor, clean: Tensor, timestep: Tensor) -> Tensor:
        assert len(set(prompts)) == 1
        scores = 100 * (clean if self.needs_guess else noisy).flatten(1).mean(1)
        self.calls.append((prompts, noisy, clean, timestep, scores))
        return scores

    @property
    def seen(self) -> list[tuple[Any, ...]]:
        """What it saw at each step, prompt after prompt."""
        count = len({prompts[0] for prompts, *_ in self.calls})
        seen = []
        for start in range(0, len(self.calls), count):
            prompts, *tensors = zip(*self.calls[start : start + count], strict=True)
            seen.append(([one for some in prompts for one in some], *(torch.cat(parts) for parts in tensors)))
        return seen


class Network:
    """Linear in x_t, the timestep and the condition; keeps the number of rows of each pass, and the states."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.states: list[Tensor] = []

    def __call__(self, noisy: Tensor, timestep: Tensor, *, text: Tensor) -> Tensor:
        self.rows.append(len(noisy))
        self.states.append(noisy)
        return 0.3 * noisy + 0.1 * (timestep / 1000 + text).view(-1, 1, 1, 1)


PROMPTS = ["a", "b", "c"]
TEXT = torch.tensor([0.1, 0.2, 0.3])
SHAPE = (2, 3, 3)


def sampled(rows: list[int] | None = None, **changes: Any) -> tuple[list[Any], Tensor, Network, Judge, Grid]:
    options = {
        "inner": 0,
        "window": (0, 751),
        "guess": True,
        "scale": 5.0,
        "steps": 10,
        "k": 3,
        "on": "random",
        "threshold": 0.0,
    }
    options |= changes
    schedule = options.get("schedule", stable_diffusion())
    grid = Grid.of(schedule, options["steps"])
    segments = Segments.of(grid, *options["window"], options["inner"])
    network, judge, chosen = Network(), Judge(options["guess"]), [0, 1, 2] if rows is None else rows
    text = TEXT[chosen]
    guided = Guided(network, {"text": text}, None if options["scale"] == 1 else {"text": 0 * text}, options["scale"])
    pairs, scores = judged_pairs(
        guided,
        schedule,
        grid,
        segments,
        judge,
        [PROMPTS[row] for row in chosen],
        [f"key {row}" for row in chosen],
        shape=SHAPE,
        device=torch.device("cpu"),
        settings=Settings(options["k"], options["threshold"], options["on"]),
    )
    return pairs, scores, network, judge, grid


def implied_noise(pair: Any, grid: Grid, scale: float = 5.0) -> Tensor:
    """The normal draws by which x_t became its two successors, from the sampler's formula and the network's."""
    timestep = grid.timesteps[pair.step]
    text = TEXT[PROMPTS.index(pair.prompt)]
    plain = 0.3 * pair.noisy + 0.1 * (timestep / 1000)
    output = plain + scale * 0.1 * text
    mean = grid.steps.sample_weight[pair.step] * pair.noisy + grid.steps.output_weight[pair.step] * output
    return (pair.next_noisy - mean) / grid.steps.std[pair.step]


def test_no_state_is_forwarded_twice_and_none_in_vain() -> None:
    _, scores, network, judge, _ = sampled()  # t = 901, 801 alone; 701 ... 1 judged
    assert network.rows == [6, 6, 6] + [18] * 7  # with guidance; the last step's successors are judged as they are
    assert len(judge.seen) == 8 and scores.shape == (3, 8 * 3)
    states = torch.cat([state[: len(state) // 2] for state in network.states])
    assert len(states.flatten(1).unique(dim=0)) == len(states)


def test_without_guidance_no_row_is_doubled() -> None:
    assert sampled(scale=1.0)[2].rows == [3, 3, 3] + [9] * 7


def test_a_scorer_that_needs_no_guess_costs_no_pass_of_the_branches() -> None:
    pairs, _, network, judge, grid = sampled(guess=False)
    assert network.rows == [6] * 10
    assert [int(timestep[0]) for _, _, _, timestep, _ in judge.seen] == [*grid.timesteps[3:].tolist(), 0]
    assert float(torch.cat([implied_noise(pair, grid).flatten() for pair in pairs]).std()) == pytest.approx(1, abs=0.1)


def test_successors_share_their_state_and_differ_by_standard_normal_noise() -> None:
    pairs, _, _, _, grid = sampled()
    assert len(pairs) == 3 * 8 and all(pair.shared and pair.noisy.shape == (1, *SHAPE) for pair in pairs)
    noise = torch.stack([implied_noise(pair, grid) for pair in pairs])
    assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert abs(float(torch.corrcoef(torch.stack([noise[:, 0].flatten(), noise[:, 1].flatten()]))[0, 1])) < 0.15


def test_the_judge_sees_the_guidances_guess_at_the_next_timestep_and_in_the_end_the_latents() -> None:
    _, _, _, judge, grid = sampled()
    schedule = stable_diffusion()
    for number, (prompts, noisy, clean, timestep, _) in enumerate(judge.seen, 2):
        assert prompts == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
        if number == 9:
            assert torch.equal(clean, noisy) and timestep.tolist() == [0] * 9
            continue
        assert timestep.tolist() == [int(grid.timesteps[number + 1])] * 9
        said = 0.3 * noisy + 0.1 * (timestep[0] / 1000) + 0.5 * TEXT.repeat_interleave(3).view(-1, 1, 1, 1)
        alpha, sigma = schedule.alpha[timestep[0]], schedule.sigma[timestep[0]]
        torch.testing.assert_close(clean, ((noisy - sigma * said) / alpha).float(), rtol=1e-4, atol=1e-4)


def test_the_better_successor_of_a_pair_has_the_highest_score_and_the_worse_the_lowest() -> None:
    pairs, _, _, judge, _ = sampled()
    for pair in pairs:
        _, noisy, _, _, scores = judge.seen[pair.step - 2]
        row = PROMPTS.index(pair.prompt)
        own, states = scores.view(3, 3)[row], noisy.view(3, 3, *SHAPE)[row]
        assert torch.equal(pair.next_noisy, torch.stack([states[own.argmax()], states[own.argmin()]]))


@pytest.mark.parametrize("way", ["random", "best", "worst"])
def test_the_branch_that_goes_on_is_the_one_that_was_asked_for(way: str) -> None:
    pairs, _, _, judge, _ = sampled(on=way)
    places = []
    for pair in [pair for pair in pairs if pair.step < 9]:
        _, noisy, _, _, scores = judge.seen[pair.step - 2]
        row = PROMPTS.index(pair.prompt)
        own, states = scores.view(3, 3)[row], noisy.view(3, 3, *SHAPE)[row]
        (after,) = [other for other in pairs if other.prompt == pair.prompt and other.step == pair.step + 1]
        (place,) = [place for place in range(3) if torch.equal(states[place], after.noisy[0])]
        places.append(int(own.argsort(descending=True).argsort()[place]))
    wanted = {"random": {0, 1, 2}, "best": {0}, "worst": {2}}[way]
    assert set(places) == wanted


def test_pairs_that_differ_too_little_are_dropped() -> None:
    pairs, _, _, judge, _ = sampled(threshold=0.9, on="best")
    expected = set()
    for number, (_, _, _, _, scores) in enumerate(judge.seen, 2):
        gap = torch.tanh((scores.view(3, 3).amax(1) - scores.view(3, 3).amin(1)) / 2)
        expected |= {(PROMPTS[row], number) for row in range(3) if gap[row] > 0.9}
    assert {(pair.prompt, pair.step) for pair in pairs} == expected
    assert 0 < len(expected) < 24


def test_inner_steps_give_pairs_that_start_each_at_its_own_state_but_the_first() -> None:
    pairs, scores, network, judge, grid = sampled(inner=2)  # segments of 701 601 501, 401 301 201, 101 1
    assert len(judge.seen) == 3 and scores.shape == (3, 9)
    assert network.rows == [6, 6, 6, *[18] * 7]
    assert len(pairs) == 3 * 8
    for pair in pairs:
        assert pair.shared == (pair.step in (2, 5, 8))
        if not pair.shared:
            (before,) = [one for one in pairs if one.prompt == pair.prompt and one.step == pair.step - 1]
            assert torch.equal(pair.noisy, before.next_noisy)
    noise = torch.stack([implied_noise(pair, grid) for pair in pairs])
    assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.1)


def test_steps_after_the_window_are_not_taken() -> None:
    pairs, _, network, judge, _ = sampled(window=(350, 751))
    assert {pair.step for pair in pairs} == {2, 3, 4, 5}
    assert len(judge.seen) == 4 and network.rows == [6, 6, 6] + [18] * 4


def test_a_prompt_has_the_same_pairs_whatever_is_sampled_beside_it() -> None:
    whole = {pair.key: pair for pair in sampled()[0]}
    apart = [pair for rows in ([2, 0], [1]) for pair in sampled(rows)[0]]
    assert {pair.key for pair in apart} == set(whole)
    for pair in apart:
        torch.testing.assert_close(pair.next_noisy, whole[pair.key].next_noisy, rtol=0, atol=1e-5)
        torch.testing.assert_close(pair.noisy, whole[pair.key].noisy, rtol=0, atol=1e-5)
