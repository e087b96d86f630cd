"""The `rollouts` source of SPO: pairs of successors of one sampler step, judged by a step-aware scorer. On-policy, no data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from mmalign.cache import content_key
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.likelihoods import TransitionInputs
from mmalign.models.diffusion import find_family
from mmalign.models.step_scorers import STEP_SCORERS, Kept
from mmalign.sources.order import Order
from mmalign.sources.prepared import Prepared, Shape, check_samples
from mmalign.sources.trajectories import Grid, Guided, Pair, Segments, Settings, check_finite_scores, judged_pairs

logger = logging.getLogger(__name__)
FRUITLESS_ROUNDS = 10  # in a row without one valid pair
# Settings of the diffusion adapter that are about given images.
WITHOUT_MEANING = (
    *("cache", "cache_dtype", "winner_guard", "weights", "buckets", "draws", "crop", "flip", "prompt_dropout"),
    *("timesteps", "noise", "timestep", "latents"),
)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """SPO's source: sample with the policy, and make pairs of the best and worst of several successors of one x_t.

    Logged: `rollout/valid`, the share of transitions that gave a pair; `rollout/score`, the mean over all candidates;
    `rollout/epoch`, passes over the prompts.

    At each step in the window `num_candidates` successors are drawn; the scorer judges what each of them leads to; the best and
    the worst become a pair if softmax([s_best, s_worst]) differs by more than `threshold`; one of them, at random, goes on.

    Source: Liang et al. 2024 (SPO, arXiv 2406.04314), section 3 and published code.
    Args:
        scorer: a step scorer: `step_aware`, `latent`, or `image` for a plain scorer of predicted clean images.
        num_steps: sampler steps. Published: 20.
        eta: of DDIM; noise level of rectified flow (published there: 0.7). None: 1 and 0.7.
        guidance_scale: in sampling and in training, of policy and reference. Published: 5. 1: none, which FLUX.1 needs: it is
            told its guidance (adapter.guidance_embedding).
        num_candidates: successors of a step. Published: 4 (SD 1.5), 2 (SDXL).
        inner_steps: further steps of each branch before it is judged; each becomes a pair with its own two x_t. Published: 0
            (SD 1.5), 3 (SDXL).
        window: (lowest, highest) timestep at which pairs are made. Published: 0 to 750, in code up to the grid's step
            751; nothing is published for rectified flow.
        threshold: least difference of the softmax; two numbers: at the steps of least and of most noise, linear in the noise
            that a step adds. Published: 0.3 (SD 1.5), 0.4 (SDXL); LPO 0.35 to 0.5.
        continue_from: which candidate goes on. Published: random.
        prompts_per_round: prompts that are sampled together over all processes, before their pairs are trained on once.
            Published: 40.
        sampling_batch: prompts sampled at once on a device.
    """

    scorer: Annotated[Choice, Table(STEP_SCORERS)]
    num_steps: int = 20
    eta: float | None = None
    guidance_scale: float = 5.0
    num_candidates: int = 4
    inner_steps: int = 0
    window: tuple[int, int] = (0, 751)
    threshold: float | tuple[float, float] = 0.3
    continue_from: Literal["random", "best", "worst"] = "random"
    prompts_per_round: int = 40
    sampling_batch: int = 10
    online: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        least = {"num_steps": 2, "num_candidates": 2, "inner_steps": 0, "prompts_per_round": 1, "sampling_batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, want {low} or more.")
        if not 0 < self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: got {self.guidance_scale}, want a positive number; 1 is no guidance.")
        if self.eta is not None and not 0 < self.eta < math.inf:
            raise ValueError(
                f"eta: got {self.eta}, a sampler without noise (an ODE), want a positive number, or the successors of a step "
                "are one and the same."
            )
        ends = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not all(0 <= end < 1 for end in ends):
            raise ValueError(f"threshold: got {self.threshold}, want numbers from 0 to below 1.")
        if not 0 <= self.window[0] <= self.window[1]:
            raise ValueError(f"window: got {list(self.window)}, want 0 <= lowest <= highest timestep.")

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse an adapter whose model cannot be sampled step by step."""
        check_samples(adapter, "rollouts")
        adapter.check_sources(examples.sources)
        if adapter.frames is not None:
            raise UserError(
                f"source: got rollouts with family: {adapter.family}, want a family of images: videos are not judged."
            )
        if self.guidance_scale != 1.0 and find_family(adapter.family).embeds_guidance:
            raise UserError(
                f"source.guidance_scale: got {self.guidance_scale}, but {adapter.family} is told its guidance and not guided "
                "against the empty prompt. Set guidance_scale: 1 and adapter.guidance_embedding: 3.5 (FLUX.1 dev)."
            )
        defaults = {one.name: one.default for one in fields(adapter)}
        for name in WITHOUT_MEANING:
            if getattr(adapter, name) != defaults[name]:
                default = defaults[name]
                told = "null" if default is None else getattr(default, "name", default)
                raise UserError(f"adapter.{name}: has no meaning for sampler steps (source: rollouts). Set it to {told}.")

    def shape(self, examples: Any) -> Shape:
        """Pairs without side data."""
        return Shape(num_candidates=2, side={}, errors=False)

    def open(self, examples: Sequence[Any], policy: Any, *, accelerator: Any, seed: int) -> RolloutStream:
        """Read the prompts of the examples and build the scorer.

        Raises:
            UserError: the window holds no step, the scorer cannot be opened or gives no numbers, or the family edits images.
        """
        return RolloutStream(self, examples, policy, accelerator, seed)


class RolloutStream:
    """An opened `rollouts` source. Its memory: the pairs that are not trained on yet, alike on all processes."""

    def __init__(self, settings: Rollouts, examples: Sequence[Any], policy: Any, accelerator: Any, seed: int) -> None:
        """Use `Rollouts.open`."""
        self.settings, self.examples, self.policy, self.accelerator, self.seed = settings, examples, policy, accelerator, seed
        self.grid = Grid.of(policy.schedule, settings.num_steps, settings.eta)
        low, high = settings.window
        self.segments = Segments.of(self.grid, low, high, settings.inner_steps)
        self.scorer = settings.scorer.build(policy)
        self.conditions = Kept(compute=policy.conditions)
        self.conditions([""])  # a family that cannot be told a text alone is refused before anything is written
        self.without = None if settings.guidance_scale == 1.0 else policy.unconditional(1)
        self.round = 0
        self.fruitless = 0
        self.pool: list[Pair] = []
        self.notes: dict[str, float] = {}
        self._try_scorer()

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """Micro-batches of pairs; whenever they run out, the policy as it is now samples the next round.

        Raises:
            UserError: no pair in ten rounds.
        """
        per_batch = order.batch_size * order.num_processes
        for _ in range((last_step - first_step) * order.accumulation):
            while (pairs := self._taken(per_batch)) is None:
                self._sample_round()
            start = order.process * order.batch_size
            yield self._prepared(pairs[start : start + order.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "round": self.round,
            "fruitless": self.fruitless,
            "notes": self.notes,
            "pool": [vars(pair) for pair in self.pool],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.round, self.fruitless, self.notes = int(state["round"]), int(state["fruitless"]), dict(state["notes"])
        self.pool = [Pair(**pair) for pair in state["pool"]]

    def _taken(self, count: int) -> list[Pair] | None:
        """The next pairs of one kind (one x_t, or each its own), so that they make one batch; None: there are too few."""
        first = not self.pool or self.pool[0].shared
        for shared in (first, not first):
            kind = [pair for pair in self.pool if pair.shared == shared][:count]
            if len(kind) == count:
                taken = {id(pair) for pair in kind}
                self.pool = [pair for pair in self.pool if id(pair) not in taken]
                return kind
        return None

    def _sample_round(self) -> None:
        """Sample a round of prompts, each process its share, and mix the pairs of all."""
        settings = self.settings
        deal = Order(num_examples=len(self.examples), batch_size=settings.prompts_per_round, accumulation=1, seed=self.seed)
        (draws,) = deal.micro_batches(self.round, self.round + 1)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = list(enumerate(draws))[rank::world]
        found: list[Pair] = []
        scores: list[float] = []
        training = self.policy.network.training
        self.policy.network.eval()
        try:
            for start in range(0, len(own), settings.sampling_batch):
                part = own[start : start + settings.sampling_batch]
                prompts = [self.examples[index].samples[0].prompt.text or "" for _, (_, index) in part]
                keys = [content_key(self.seed, self.round, place) for place, _ in part]
                pairs, score = self._sampled(prompts, keys)
                found += pairs
                scores += score.flatten().tolist()
        finally:
            self.policy.network.train(training)
        self._mix(found, scores)

    def _try_scorer(self) -> None:
        """Have states of noise judged, as many as a prompt has branches, which a judge may look at together.

        A scorer that gives no numbers is refused before anything is written.
        """
        count, generator = self.settings.num_candidates, torch.Generator().manual_seed(0)
        states = torch.randn(count, *self.policy.latent_shape, generator=generator).to(self.policy.device)
        prompts = [self.examples[0].samples[0].prompt.text or ""] * count
        timestep = torch.zeros(count, dtype=torch.long, device=self.policy.device)
        check_finite_scores(self.scorer(prompts=prompts, noisy=states, clean=states, timestep=timestep))

    def _sampled(self, prompts: list[str], keys: list[str]) -> tuple[list[Pair], Tensor]:
        settings = self.settings
        condition, without = self._conditions(prompts)

        def network(*arguments: Tensor, **condition: Tensor) -> Tensor:
            with self.accelerator.autocast():  # not of the scorer, which knows its own precision
                output: Tensor = self.policy.denoiser(*arguments, **condition)
            return output

        with torch.no_grad():
            return judged_pairs(
                Guided(network, condition, without, settings.guidance_scale),
                self.policy.schedule,
                self.grid,
                self.segments,
                self.scorer,
                prompts,
                keys,
                shape=self.policy.latent_shape,
                device=self.policy.device,
                settings=Settings(settings.num_candidates, settings.threshold, settings.continue_from),
            )

    def _mix(self, found: list[Pair], scores: list[float]) -> None:
        """Gather, and order at random: the same pairs and the same order whatever process found them."""
        every, all_scores = found, scores
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            every, all_scores = gather_object(found), gather_object(scores)
        every.sort(key=lambda pair: pair.key)
        generator = torch.Generator().manual_seed(int(content_key(self.seed, "mix", self.round)[:15], 16))
        self.pool += [every[place] for place in torch.randperm(len(every), generator=generator).tolist()]
        self.round += 1
        self.fruitless = 0 if every else self.fruitless + 1
        attempts = self.settings.prompts_per_round * self.segments.num_transitions
        self.notes = {
            "rollout/valid": len(every) / attempts,
            "rollout/score": math.fsum(all_scores) / len(all_scores),
            "rollout/epoch": self.round * self.settings.prompts_per_round / len(self.examples),
        }
        logger.info("round %d: %d pairs, mean score %.4g", self.round, len(every), self.notes["rollout/score"])
        if self.fruitless == FRUITLESS_ROUNDS:
            raise UserError(
                f"source.threshold: got {self.settings.threshold}, and in {FRUITLESS_ROUNDS} rounds no pair differed as much, "
                f"with {self.settings.prompts_per_round} prompts each. Lower it, or look at the scorer's scale."
            )

    def _conditions(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        with torch.no_grad():
            found = self.conditions(prompts)
        if self.without is None:
            return found, None
        return found, {name: value.expand(len(prompts), *value.shape[1:]) for name, value in self.without.items()}

    def _prepared(self, pairs: Sequence[Pair]) -> Prepared:
        """Pairs -> the inputs of one step; where both branches share x_t the network is asked once."""
        device, schedule = self.policy.device, self.policy.schedule
        steps = torch.tensor([pair.step for pair in pairs], device=device)
        count = 1 if pairs[0].shared else 2
        step = {name: value.to(device)[steps, None].expand(-1, count) for name, value in vars(self.grid.steps).items()}
        timestep = schedule.network_timestep(self.grid.timesteps.to(device)[steps])[:, None].expand(-1, count)
        condition, without = self._conditions([pair.prompt for pair in pairs])
        inputs = TransitionInputs(
            noisy=torch.stack([pair.noisy for pair in pairs]).to(device),
            next_noisy=torch.stack([pair.next_noisy for pair in pairs]).to(device),
            timestep=timestep,
            condition=condition,
            unconditional=without,
            guidance_scale=self.settings.guidance_scale,
            **step,
        )
        return Prepared(inputs=inputs, side=_NO_SIDE, ids=[pair.prompt for pair in pairs], notes=self.notes)


_NO_SIDE: Mapping[str, Tensor] = {}
