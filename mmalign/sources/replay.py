"""The `replay` source of Diffusion-DRO: expert images against states that the policy's own sampling goes through."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.cache import content_key
from mmalign.errors import UserError
from mmalign.noise import Schedule
from mmalign.sources.offline import Offline, OfflineStream
from mmalign.sources.order import Order
from mmalign.sources.prepared import Prepared, Shape, check_samples


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Diffusion-DRO's source: an expert image, noised, against a state (x_t, output) of the policy's own sampling.

    The two share timestep and prompt. What the network should say of the own state is what the policy that sampled it said.
    Own states come from DPM-Solver++ without guidance, on timesteps jittered in each of `num_steps` equal parts of the
    schedule; one state of a trajectory is used, so sampling stops there.

    Source: Wu et al. 2025 (Diffusion-DRO, arXiv 2510.18353), algorithm 1, and its published settings.
    Args:
        num_steps: of a whole trajectory. Published: 20.
        refresh_every: optimiser steps for which the policy samples at once, after which it samples anew. Published: 1. More is
            faster, with states of a policy that is up to so many steps old; the buffer is kept in checkpoints.
        sampling_batch: states sampled at once on a device.
        num_workers: worker processes that read and resize expert images ahead.
    """

    num_steps: int = 20
    refresh_every: int = 1
    sampling_batch: int = 64
    num_workers: int = 0
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        for name in ("num_steps", "refresh_every", "sampling_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want 1 or more.")

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse examples that are not one expert image each, and an adapter that cannot sample."""
        check_samples(adapter, "replay")
        adapter.check_examples(examples.kinds)
        adapter.check_sources(examples.sources)
        count = len(examples[0].samples)
        if count != 1:
            raise UserError(f"data.view: gives {count} candidates, want one expert image an example. Use data.view: best.")
        if adapter.buckets is not None:
            raise UserError("adapter.buckets: replay samples and trains at one size. Set it to null.")
        if adapter.winner_guard is not None:
            raise UserError("adapter.winner_guard: guards the better of two images, and replay has one. Set it to null.")

    def shape(self, examples: Any) -> Shape:
        """Expert and own state; side data of the expert, but for what is told of each candidate."""
        return Shape(num_candidates=2, side=_of_row(examples[0].side))

    def open(self, examples: Sequence[Any], policy: Any, *, accelerator: Any, seed: int) -> ReplayStream:
        """Read expert images as `offline` does.

        Raises:
            UserError: more steps than timesteps.
        """
        if self.num_steps > policy.schedule.num_timesteps:
            raise UserError(f"source.num_steps: got {self.num_steps}, want at most {policy.schedule.num_timesteps}.")
        expert = Offline(num_workers=self.num_workers).open(examples, policy)
        return ReplayStream(self, expert, policy, accelerator, seed)


class ReplayStream:
    """An opened `replay` source. Its memory: the own states of the optimiser steps until the next refresh."""

    def __init__(self, settings: Replay, expert: OfflineStream, policy: Any, accelerator: Any, seed: int) -> None:
        """Use `Replay.open`."""
        self.settings, self.expert, self.policy, self.accelerator, self.seed = settings, expert, policy, accelerator, seed
        self.buffer: list[dict[str, Tensor]] = []  # of this process, one entry a micro-batch

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """Expert and own state of every example; sampled anew at every multiple of `refresh_every`."""
        block = self.settings.refresh_every
        # The last block is sampled whole, so that a longer run would see the same.
        stream = self.expert.collated(order, first_step, -(-last_step // block) * block)
        step = first_step
        while step < last_step:
            stop = (step // block + 1) * block
            end = min(stop, last_step)
            experts = [self.policy.prepare(batch) for batch in islice(stream, (stop - step) * order.accumulation)]
            if step % block == 0 or not self.buffer:
                self.buffer = self._sampled(experts, order, step)
            for expert in experts[: (end - step) * order.accumulation]:
                yield self._paired(expert, self.buffer.pop(0))
            step = end

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the buffers of all processes."""
        own = [{name: value.cpu() for name, value in one.items()} for one in self.buffer]
        if self.accelerator.num_processes == 1:
            return {"buffers": [own]}
        from accelerate.utils import gather_object

        return {"buffers": gather_object([own])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.buffer = list(state["buffers"][self.accelerator.process_index])

    def _sampled(self, experts: Sequence[Prepared], order: Order, step: int) -> list[dict[str, Tensor]]:
        """An own state for every expert of the block, on the CPU; sampled in batches that are sorted by how far they go."""
        settings, schedule = self.settings, self.policy.schedule
        condition = _conditions(experts)
        timestep = torch.cat([schedule.index_of(one.inputs.timestep[:, 0]) for one in experts])
        noise, jitter = self._draws(order, step, len(experts), tuple(experts[0].inputs.noisy.shape[2:]))
        found = {"noisy": torch.empty_like(noise), "output": torch.empty_like(noise)}
        training = self.policy.network.training
        self.policy.network.eval()
        try:
            for rows in torch.split(timestep.cpu().argsort(stable=True), settings.sampling_batch):
                on = rows.to(self.policy.device)
                with torch.no_grad(), self.accelerator.autocast():
                    noisy, output = own_states(
                        self.policy.denoiser,
                        schedule,
                        noise[rows].to(self.policy.device),
                        timestep[on],
                        jitter[rows].to(self.policy.device),
                        {name: value[on] for name, value in condition.items()},
                    )
                found["noisy"][rows], found["output"][rows] = noisy.float().cpu(), output.float().cpu()
        finally:
            self.policy.network.train(training)
        sizes = [len(one.ids) for one in experts]
        parts = zip(*(torch.split(value, sizes) for value in found.values()), strict=True)
        return [dict(zip(found, part, strict=True)) for part in parts]

    def _draws(self, order: Order, step: int, num_batches: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Noise and jitter of every example, told by its place in the run: the same however a step is split."""
        noise, jitter = [], []
        for number in range(num_batches):
            start = ((step * order.accumulation + number) * order.num_processes + order.process) * order.batch_size
            for position in range(start, start + order.batch_size):
                generator = torch.Generator().manual_seed(int(content_key(self.seed, "replay", position)[:15], 16))
                noise.append(torch.randn(shape, generator=generator))
                jitter.append(torch.rand(self.settings.num_steps, generator=generator, dtype=torch.float64))
        return torch.stack(noise), torch.stack(jitter)

    def _paired(self, expert: Prepared, own: Mapping[str, Tensor]) -> Prepared:
        inputs, device = expert.inputs, self.policy.device

        def beside(value: Tensor, other: Tensor) -> Tensor:
            return torch.cat([value, other.to(value)[:, None]], 1)

        condition = {
            name: value.expand(-1, 2, *value.shape[2:]) if name in inputs.per_candidate else value
            for name, value in inputs.condition.items()
        }
        both = replace(
            inputs,
            noisy=beside(inputs.noisy, own["noisy"].to(device)),
            target=beside(inputs.target, own["output"].to(device)),
            timestep=inputs.timestep.expand(-1, 2),
            condition=condition,
            error_weight=None if inputs.error_weight is None else inputs.error_weight.expand(-1, 2),
        )
        return Prepared(inputs=both, side=_of_row(expert.side), ids=expert.ids)


def own_states(
    network: Any,
    schedule: Schedule,
    noise: Float[Tensor, "rows c *dims"],
    timestep: Int[Tensor, " rows"],
    jitter: Float[Tensor, "rows steps"],
    condition: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "rows c *dims"], Float[Tensor, "rows c *dims"]]:
    """Sample from noise down to `timestep` with DPM-Solver++(2M): x_t there, and what the network says of it.

    Part i of the schedule is the timesteps in [s i, s (i + 1)), s = T / steps; a row visits one of each part above its own, the
    share `jitter` into it, and in its own part exactly `timestep`. Rows that have arrived are not sampled any further.

    Source: Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 2, with lambda = log(alpha / sigma).
    Args:
        network: the policy, without guidance.
        schedule: variance preserving or rectified flow.
        noise: x at the first timestep that a row visits.
        timestep: where each row ends.
        jitter: in [0, 1), one a part, the least noisy first.
        condition: of each row.
    """
    num_steps = jitter.shape[1]
    ends = timestep.tolist()  # the one wait for the device
    order = sorted(range(len(ends)), key=ends.__getitem__)
    parts = [ends[row] * num_steps // schedule.num_timesteps for row in order]  # where each row ends; it only rises
    rows = torch.tensor(order, device=timestep.device)
    noisy, condition = noise[rows], {name: value[rows] for name, value in condition.items()}
    visited = visited_timesteps(timestep[rows], jitter[rows], schedule.num_timesteps)
    solver = _Solver.of(schedule, visited, noisy)
    output, clean_before = torch.zeros_like(noise), None
    for part in range(num_steps - 1, parts[0] - 1, -1):
        count, further = bisect_right(parts, part), bisect_left(parts, part)
        now = visited[:count, part]
        given = schedule.network_timestep(now)
        said = network(noisy[:count], given, **{name: value[:count] for name, value in condition.items()})
        output[:count] = said.to(output)
        if further:
            clean = schedule.clean(noisy[:further], output[:further], now[:further])
            noisy[:further] = solver.step(part, noisy[:further], clean, clean_before)
            clean_before = clean
    back = rows.argsort()
    return noisy[back], output[back]


def visited_timesteps(
    timestep: Int[Tensor, " rows"], jitter: Float[Tensor, "rows steps"], num_timesteps: int
) -> Int[Tensor, "rows steps"]:
    """One timestep of each part, the least noisy first; see `own_states`. In integers, so that no part is left by rounding."""
    num_steps = jitter.shape[1]
    bounds = torch.arange(num_steps + 1, device=timestep.device) * num_timesteps
    bounds = (bounds + num_steps - 1) // num_steps  # a part begins at the first timestep that is not below s i
    low, size = bounds[:-1], bounds.diff()
    visited = low + torch.minimum((jitter * size).long(), size - 1)
    own = timestep * num_steps // num_timesteps
    return torch.where(torch.arange(num_steps, device=timestep.device) == own[:, None], timestep[:, None], visited)


@dataclass(frozen=True, kw_only=True)
class _Solver:
    """The steps of all rows on their timesteps, worked out once.

    x_after = sigma_after / sigma x - alpha_after (e^-h - 1) D,  D = (1 + 1/2r) clean - 1/2r clean_before,  r = h_before / h,
    h = lambda_after - lambda. Axis 1 of each field counts the parts, the least noisy first; a step leads to the part below.
    """

    keep: Tensor  # sigma_after / sigma
    towards: Tensor  # alpha_after
    exponent: Tensor  # e^-h - 1
    half_ratio: Tensor  # 1/2r

    @classmethod
    def of(cls, schedule: Schedule, visited: Int[Tensor, "rows steps"], noisy: Tensor) -> _Solver:
        shape = (*visited.shape, *(1,) * (noisy.ndim - 1))
        precise = noisy.new_empty(shape, dtype=torch.float64)
        alpha, sigma = schedule.coefficients(visited, precise)
        log_snr = alpha.clamp(min=1e-8).log() - sigma.log()
        h = log_snr[:, :-1] - log_snr[:, 1:]
        alpha, sigma = schedule.coefficients(visited, noisy.new_empty(shape))
        return cls(
            keep=sigma[:, :-1] / sigma[:, 1:],
            towards=alpha[:, :-1],
            exponent=torch.expm1(-h).to(noisy),
            half_ratio=(h[:, :-1] / h[:, 1:] / 2).to(noisy),
        )

    def step(self, part: int, noisy: Tensor, clean: Tensor, before: Tensor | None) -> Tensor:
        """x of the next part, of the first rows; `before` is the guess at the part above, None at the first step: D = clean."""
        count, after = len(noisy), part - 1
        if before is not None:
            ratio = self.half_ratio[:count, after]
            clean = (1 + ratio) * clean - ratio * before[:count]
        return self.keep[:count, after] * noisy - self.towards[:count, after] * self.exponent[:count, after] * clean


def _conditions(experts: Sequence[Prepared]) -> dict[str, Tensor]:
    """One row an example; what is told per candidate, as the size of an image, is the expert's."""
    rows = [
        {name: value[:, 0] if name in one.inputs.per_candidate else value for name, value in one.inputs.condition.items()}
        for one in experts
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _of_row(side: Mapping[str, Any]) -> dict[str, Any]:
    """Side data without the scores of candidates, of which the expert is one."""
    return {name: value for name, value in side.items() if name != "scores"}
