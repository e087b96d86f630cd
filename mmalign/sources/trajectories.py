"""Sampling with the policy step by step: the time grid, its segments, and pairs of branches judged at their ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.cache import content_key
from mmalign.errors import UserError
from mmalign.noise import Schedule, Step

Network = Callable[..., Tensor]


class Settings(NamedTuple):
    """How successors are drawn and judged; see `Rollouts`."""

    num_candidates: int
    threshold: float | tuple[float, float]
    continue_from: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A better and a worse transition of one sampler step, on the CPU.

    Args:
        prompt: of both.
        step: number of the sampler step.
        noisy: x_t, once where the two share it, else best first.
        next_noisy: where they went, best first.
        shared: whether they share x_t.
        key: tells the pair from all others of a round.
    """

    prompt: str
    step: int
    noisy: Float[Tensor, "m c *dims"]
    next_noisy: Float[Tensor, "two c *dims"]
    shared: bool
    key: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The timesteps of a stochastic sampler, noisiest first, and its steps.

    Args:
        timesteps, previous: where each step starts and ends.
        steps: its weights and standard deviation, one entry a step.
    """

    timesteps: Int[Tensor, " steps"]
    previous: Int[Tensor, " steps"]
    steps: Step

    @classmethod
    def of(cls, schedule: Schedule, num_steps: int, eta: float | None = None) -> Grid:
        """t = T - s + 1, T - 2 s + 1, ... 1 with s = T / num_steps; the last step ends at timestep 0 and keeps some noise.

        Rectified flow has the SDE step of Flow-GRPO, on t = T - 1, T - s - 1, ... s - 1.

        Source: the DDIM grid of SPO's published code (20 steps: 951, 901 ... 1; eta 1).
        Raises:
            UserError: more steps than half the timesteps.
        """
        stride, flow = schedule.num_timesteps // num_steps, schedule.prediction == "flow"
        if stride < 2:
            raise UserError(f"source.num_steps: got {num_steps}, want at most {schedule.num_timesteps // 2}.")
        leading = torch.arange(num_steps - 1, -1, -1) * stride
        timesteps = leading + (stride - 1 if flow else 1)
        timesteps = timesteps.clamp(max=schedule.num_timesteps - 1)
        previous = (timesteps - stride).clamp(min=0)
        if flow:
            steps = schedule.sde_step(timesteps, previous, noise_level=0.7 if eta is None else eta)
        else:
            steps = schedule.step(timesteps, previous, eta=1.0 if eta is None else eta)
        return cls(timesteps=timesteps, previous=previous, steps=steps)

    @property
    def num_steps(self) -> int:
        """Number of sampler steps."""
        return len(self.timesteps)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which steps of a grid belong together: branches part at the first, and are judged after the last.

    Args:
        alone: steps before the window, taken once.
        parts: ranges of steps; the last may be shorter. Steps after the window are not taken.
    """

    alone: range
    parts: tuple[range, ...]

    @classmethod
    def of(cls, grid: Grid, low: int, high: int, inner_steps: int) -> Segments:
        """Segments of 1 + inner_steps steps over the steps that start in [low, high].

        Raises:
            UserError: no step starts there.
        """
        inside = [number for number, t in enumerate(grid.timesteps.tolist()) if low <= t <= high]
        if not inside:
            ends = f"{grid.timesteps[-1]} ... {grid.timesteps[0]}"
            raise UserError(f"source.window: got [{low}, {high}], in which none of the sampler's timesteps lies ({ends}).")
        starts = range(inside[0], inside[-1] + 1, 1 + inner_steps)
        parts = tuple(range(start, min(start + 1 + inner_steps, inside[-1] + 1)) for start in starts)
        return cls(alone=range(inside[0]), parts=parts)

    @property
    def num_transitions(self) -> int:
        """Pairs that one prompt can give."""
        return sum(len(part) for part in self.parts)


class Guided:
    """The policy with classifier-free guidance, on the conditions of some prompts. Rows are (prompt, branch), prompt first."""

    def __init__(
        self, network: Network, condition: Mapping[str, Tensor], without: Mapping[str, Tensor] | None, guidance_scale: float
    ) -> None:
        """Args:
        network: noisy, timestep, condition -> output.
        condition, without: of each prompt, and of as many empty ones; None: no guidance.
        guidance_scale: output = without + scale * (with - without).
        """
        self.network, self.condition, self.without, self.guidance_scale = network, condition, without, guidance_scale

    def __call__(self, noisy: Float[Tensor, "rows c *dims"], timestep: Tensor) -> Float[Tensor, "rows c *dims"]:
        """The output for rows that are a whole multiple of the prompts, at one timestep."""
        count = len(noisy) // len(next(iter(self.condition.values())))
        condition = {name: value.repeat_interleave(count, 0) for name, value in self.condition.items()}
        times = timestep.to(noisy.device).expand(len(noisy))
        if self.without is None:
            return self.network(noisy, times, **condition).float()
        without = {name: value.repeat_interleave(count, 0) for name, value in self.without.items()}
        both = {name: torch.cat([without[name], condition[name]]) for name in condition}
        output = self.network(torch.cat([noisy, noisy]), torch.cat([times, times]), **both).float()
        plain, prompted = output.chunk(2)
        return plain + self.guidance_scale * (prompted - plain)


def check_finite_scores(scores: Float[Tensor, "*shape"]) -> None:
    """Refuse a judge of steps by whose scores nothing can be compared.

    Raises:
        UserError: a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise UserError("source.scorer: gave NaN or an infinite score. Look at the scorer and its weights; try dtype float32.")


def select(
    scores: Float[Tensor, "prompts k"], threshold: float
) -> tuple[Int[Tensor, " prompts"], Int[Tensor, " prompts"], Bool[Tensor, " prompts"]]:
    """Best and worst candidate of each prompt, and whether they differ enough.

    softmax([s_best, s_worst]) differs by tanh((s_best - s_worst) / 2) > threshold

    Source: SPO's published code, compare_funcs.
    Raises:
        UserError: a score is not finite.
    """
    check_finite_scores(scores)
    best, worst = scores.argmax(1), scores.argmin(1)
    gap = torch.tanh((scores.gather(1, best[:, None]) - scores.gather(1, worst[:, None]))[:, 0] / 2)
    return best, worst, gap > threshold


def judged_pairs(
    policy: Guided,
    schedule: Schedule,
    grid: Grid,
    segments: Segments,
    scorer: Any,
    prompts: list[str],
    keys: list[str],
    *,
    shape: tuple[int, ...],
    device: torch.device,
    settings: Settings,
) -> tuple[list[Pair], Float[Tensor, "prompts judged"]]:
    """Sample all prompts at once; returns the valid pairs, and the scores of all candidates of each prompt.

    What the network said of the branch that goes on serves its next step: no state is forwarded twice. Where the scorer needs
    no guess, only the branch that goes on is forwarded. The branches of a prompt are judged together, those of another apart,
    so that no other prompt changes a score.

    Args:
        policy: the network with guidance.
        schedule, grid, segments: the sampler and where it branches.
        scorer: a step scorer.
        prompts, keys: one a row; every random number of a row comes from its key.
        shape: of one latent.
        device: where it runs.
        settings: how successors are drawn and judged.
    """
    generators = [torch.Generator().manual_seed(int(content_key(key)[:15], 16)) for key in keys]
    noisy = _randn(generators, shape, device)
    for number in segments.alone:
        said = policy(noisy, _time(schedule, grid, number))
        noisy = _stepped(grid, number, noisy, said, _randn(generators, shape, device))
    output: Tensor | None = None
    pairs: list[Pair] = []
    scores: list[Tensor] = []
    for part in segments.parts:
        if output is None:
            output = policy(noisy, _time(schedule, grid, part[0]))
        states = _branches(policy, schedule, grid, part, noisy, output, generators, settings.num_candidates)
        ends = states[-1]
        outputs, clean, timestep = _end(policy, schedule, grid, part[-1], ends, guess=scorer.needs_guess)
        judged = torch.stack(
            [
                scorer(prompts=[prompt] * len(here), noisy=here, clean=guess, timestep=timestep.expand(len(here)))
                for prompt, here, guess in zip(prompts, ends, clean, strict=True)
            ]
        )
        best, worst, valid = select(judged, threshold_at(settings.threshold, grid, part[0]))
        scores.append(judged)
        pairs += _pairs(part, states, best, worst, valid, prompts, keys)
        on = _chosen(settings.continue_from, best, worst, generators, settings.num_candidates)
        rows_of = torch.arange(len(prompts), device=device)
        noisy = ends[rows_of, on]
        output = None if outputs is None else outputs[rows_of, on]
    return pairs, torch.cat(scores, 1).cpu()


def _branches(
    policy: Guided,
    schedule: Schedule,
    grid: Grid,
    part: range,
    noisy: Tensor,
    output: Tensor,
    generators: Sequence[torch.Generator],
    count: int,
) -> list[Tensor]:
    """x_t (prompts, 1, ...) and after each step of the segment the branches (prompts, count, ...)."""
    shape = noisy.shape[1:]
    states = [noisy[:, None]]
    noise = _randn(generators, (count, *shape), noisy.device)
    states.append(_stepped(grid, part[0], noisy[:, None], output[:, None], noise))
    for number in part[1:]:
        current = states[-1]
        output = policy(current.flatten(0, 1), _time(schedule, grid, number)).reshape(current.shape)
        noise = _randn(generators, (count, *shape), noisy.device)
        states.append(_stepped(grid, number, current, output, noise))
    return states


def _end(
    policy: Guided, schedule: Schedule, grid: Grid, number: int, ends: Tensor, *, guess: bool
) -> tuple[Tensor | None, Tensor, Int[Tensor, ""]]:
    """What the network says of the branches where they are judged, the clean latents it implies, and their timestep.

    After the sampler's last step the latents are taken as clean, at timestep 0, as published.
    """
    if number == grid.num_steps - 1:
        return None, ends, torch.tensor(0, device=ends.device)
    timestep = grid.timesteps[number + 1].to(ends.device)
    if not guess:
        return None, ends, timestep
    outputs = policy(ends.flatten(0, 1), _time(schedule, grid, number + 1)).reshape(ends.shape)
    return outputs, schedule.clean(ends, outputs, timestep.expand(ends.shape[:2])), timestep


def _pairs(
    part: range, states: list[Tensor], best: Tensor, worst: Tensor, valid: Tensor, prompts: list[str], keys: list[str]
) -> list[Pair]:
    pairs = []
    for row in valid.nonzero()[:, 0].tolist():
        two = torch.stack([best[row], worst[row]])
        for place, number in enumerate(part):
            before, after = states[place][row], states[place + 1][row]
            noisy = before if place == 0 else before[two]
            pair = Pair(
                prompt=prompts[row],
                step=number,
                noisy=noisy.cpu(),
                next_noisy=after[two].cpu(),
                shared=place == 0,
                key=f"{keys[row]}/{number:04d}",
            )
            pairs.append(pair)
    return pairs


def _chosen(way: str, best: Tensor, worst: Tensor, generators: Sequence[torch.Generator], count: int) -> Tensor:
    if way != "random":
        return best if way == "best" else worst
    return torch.tensor([int(torch.randint(count, (), generator=one)) for one in generators], device=best.device)


def threshold_at(threshold: float | tuple[float, float], grid: Grid, number: int) -> float:
    """One threshold, or least + (most - least) (std - min std) / (max std - min std), std being the noise of a sampler step.

    Source: the published code of LPO, dynamic_threshold_sigma.
    """
    if not isinstance(threshold, tuple):
        return threshold
    least, most = threshold
    std, low, high = (float(value) for value in (grid.steps.std[number], grid.steps.std.min(), grid.steps.std.max()))
    return least + (most - least) * (std - low) / (high - low)


def _stepped(grid: Grid, number: int, noisy: Tensor, output: Tensor, noise: Tensor) -> Tensor:
    steps = grid.steps
    return (
        float(steps.sample_weight[number]) * noisy
        + float(steps.output_weight[number]) * output
        + float(steps.std[number]) * noise
    )


def _time(schedule: Schedule, grid: Grid, number: int) -> Tensor:
    return schedule.network_timestep(grid.timesteps[number])


def _randn(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows, *shape): each row's noise is from its own generator, on the CPU, so that no device or batch changes it."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)
