"""Both sides of every method benchmark, on the same weights, data and draws; ours through adapter, cache, source and loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusion_variants import BETA, LEARNING_RATE, MAX_GRAD_NORM, answer_of, cycle, draws_of, held_tensors, move_away
from measuring import GRADIENT_TOLERANCE, Answer, GateError
from method_peers import (
    Condition,
    DroSampler,
    PublicBatch,
    PublicReplay,
    PublicStep,
    PublicTransitions,
    dro_loss,
    mapo_loss,
    rank_dpo_loss,
    spo_loss,
)
from method_sampling import SpoSampler, our_round, public_round, save_scorer
from method_toys import Toy, lists
from torch import Tensor

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.adapters.diffusion_policy import DiffusionPolicy
from mmalign.adapters.options import Lora
from mmalign.cache import content_key
from mmalign.config import Choice
from mmalign.loop import Run
from mmalign.losses import LOSSES
from mmalign.models.step_aware import open_step_aware
from mmalign.models.step_scorers import STEP_SCORERS
from mmalign.objective import Objective, Term
from mmalign.optimisers import OPTIMISERS
from mmalign.records import Example
from mmalign.scorers import SCORERS
from mmalign.sources import Order, Prepared, Replay, Rollouts
from mmalign.sources.replay import ReplayStream, visited_timesteps
from mmalign.sources.rollouts import RolloutStream
from mmalign.sources.trajectories import Guided, Pair
from mmalign.training import Training, start

PEER = "public structure"
AGAIN = "public structure, the same twice"
ONLINE = "mmalign, nothing prepared"
OURS = "mmalign"
PARTS = "mmalign, one candidate at a time"
GUIDANCE = 5.0
MAPO_SCALE = 100.0  # published: 1000, with which float32 rounding of the errors moves the gradient more than the gate allows
NEAR = 0.03  # how far an SPO policy is moved: the published clamp of its ratios must not cut the gradient off


@dataclass(kw_only=True)
class Side:
    """The variants of one method on one toy.

    Args:
        variants: by name.
        num_batches: of the gate.
        apart: what is computed beside the step, by name and variant: gated and timed.
        states: the same, gated alone.
        twins: what the peer answers on the data of a variant that makes other data than the peer.
    """

    variants: dict[str, Any]
    num_batches: int
    apart: dict[str, dict[str, Callable[[], Any]]] = field(default_factory=dict)
    states: dict[str, dict[str, Callable[[], Any]]] = field(default_factory=dict)
    twins: dict[str, Callable[[], Answer]] = field(default_factory=dict)


class OurStep:
    """mmalign's own step: a source's micro-batches, then `micro_step` and `take_step` of the training loop."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        micro_batches: Callable[[], Iterable[Prepared]],
        loss: tuple[str, Mapping[str, Any]],
        work: Path,
        *,
        candidates: int | None = None,
        accumulation: int = 1,
    ) -> None:
        """Args:
        policy: opened, and already away from its reference.
        micro_batches: those of a step, however long it takes to make them.
        loss: name and settings.
        work: folder for the run's output.
        candidates, accumulation: the settings `training.candidate_microbatch` and `training.accumulation`.
        """
        name, settings = loss
        training = Training(
            steps=1_000_000,
            optimiser=Choice(name="adamw", target=OPTIMISERS["adamw"], settings={"learning_rate": LEARNING_RATE}),
            schedule="constant",
            max_grad_norm=MAX_GRAD_NORM,
            candidate_microbatch=candidates,
            accumulation=accumulation,
            mixed_precision="no",
        )
        self.policy, self.micro_batches = policy, micro_batches
        self.run = Run(
            accelerator=start(training, work),
            policy=policy,
            objective=Objective([Term(name=name, loss=LOSSES[name], settings=dict(settings))]),
            training=training,
            order=Order(num_examples=1, batch_size=1, accumulation=1, seed=0),
            output=work,
            config={},
            total=1_000_000,
        )
        self.run.network.train()

    def answer(self) -> Answer:
        """Loss and gradients of the next batch; the weights stay."""
        self.run.sums = {}
        self.micro_step_of_next()
        total, count = self.run.sums["loss"]
        parameters = {name: p for name, p in self.policy.denoiser.core.named_parameters() if p.requires_grad}
        return answer_of(float(total / count), parameters)

    def micro_step_of_next(self) -> None:
        """Gradients of the next batch, which stay."""
        for prepared in self.micro_batches():
            self.run.micro_step(prepared, sync=True)

    def drop_gradients(self) -> None:
        """As after a step."""
        self.run.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step."""
        self.run.take_step(self.micro_batches())

    def tensors(self) -> list[Tensor]:
        """All that is held between steps; encoders that a cache stands for are on the host's side of a real run."""
        parts = [part for part in self.policy.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return held_tensors([*parts, self.policy.denoiser, self.policy._copy], self.run.optimiser)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How policies of one case are opened, always with the same weights.

    Args:
        toy, folder, lora: the pipeline and the mode.
        work: folder of caches and runs.
        needs_reference: of the loss.
        independent: whether each image has its own noise.
        fault: planted in the peers' loss.
    """

    toy: Toy
    folder: Path
    lora: bool
    work: Path
    needs_reference: bool = True
    independent: bool = False
    fault: float = 1.0

    def policy(self, cache: Path | None = None, *, caching: int | None = None) -> DiffusionPolicy:
        """One that stands where its reference stands."""
        adapter = DiffusionAdapter(
            family=self.toy.family,
            model=str(self.folder),
            resolution=self.toy.resolution,
            lora=Lora() if self.lora else None,
            noise="independent" if self.independent else "shared",
            cache=None if cache is None else str(cache),
        )
        return adapter.open(seed=0, needs_reference=self.needs_reference, caching=caching)

    def moved(self, cache: Path | None = None, distance: float = 0.1) -> DiffusionPolicy:
        """One that has moved away from its reference."""
        policy = self.policy(cache)
        move_away(policy, distance)
        return policy

    def filled(self, examples: Sequence[Example]) -> Path:
        """A cache of their latents and text, filled as `mmalign prepare` does it."""
        folder = self.work / f"cache-{len(examples[0].samples)}"
        if not folder.exists():
            policy = self.policy(folder, caching=0)
            assert policy.cache is not None
            policy.cache.fill(policy, examples)
            policy.cache.close()
        return folder

    def peers(self, policy: DiffusionPolicy, batches: Sequence[Any], loss: Any, *, reference: str) -> dict[str, PublicStep]:
        """The public structure, twice."""
        return {
            name: PublicStep(policy, self.folder, batches, loss, reference=reference, fault=self.fault)
            for name in (PEER, AGAIN)
        }


def mapo_side(how: Opening) -> Side:
    """MaPO on pairs: a micro-batch is one pair, as published."""
    examples = lists(how.toy, how.toy.num_batches, 2)
    loss = functools.partial(mapo_loss, scale=MAPO_SCALE)
    return _offline(how, examples, ("mapo", {"scale": MAPO_SCALE}), loss, parts=False)


def rank_dpo_side(how: Opening, num_candidates: int = 4) -> Side:
    """RankDPO on lists of k images, each with its own noise."""
    examples = lists(how.toy, how.toy.num_batches, num_candidates)
    if num_candidates == 2:  # two images have scores too
        examples = [Example(id=one.id, samples=one.samples, side={"scores": (1.0, 0.0)}) for one in examples]
    loss = functools.partial(rank_dpo_loss, beta=BETA)
    return _offline(how, examples, ("rank_dpo", {"beta": BETA}), loss, parts=True)


def _offline(how: Opening, examples: Sequence[Example], loss: tuple[str, Any], peer_loss: Any, *, parts: bool) -> Side:
    online = how.moved()
    collated = [online.collate([online.item(one, 0)]) for one in examples]
    public = [public_batch(online, batch) for batch in collated]
    cache = how.filled(examples)
    reference = "own" if how.needs_reference else "none"
    variants: dict[str, Any] = dict(how.peers(online, public, peer_loss, reference=reference))
    variants[ONLINE] = OurStep(online, _prepared(online, collated), loss, how.work)
    for name, candidates in ((OURS, None), (PARTS, 1)):
        if name == PARTS and not parts:
            continue
        policy = how.moved(cache)
        given = [policy.collate([policy.item(one, 0)]) for one in examples]
        variants[name] = OurStep(policy, _prepared(policy, given), loss, how.work, candidates=candidates)
    return Side(variants=variants, num_batches=len(examples))


def spo_side(how: Opening) -> Side:
    """SPO's training phase on pairs of successors of one x_t."""
    policy = how.moved(distance=NEAR)
    stream = _rollouts(policy, how)
    order = Order(num_examples=1, batch_size=how.toy.pairs, accumulation=1, seed=0)
    groups = [transitions(policy, stream, how.toy.pairs, number) for number in range(how.toy.num_batches)]
    turn = cycle(groups)

    def micro_batch() -> Iterator[Prepared]:
        stream.pool = list(next(turn))
        return stream.batches(order, 0, 1)

    loss = functools.partial(spo_loss, guidance_scale=GUIDANCE)
    public = [_public_transitions(policy, stream, group) for group in groups]
    peers = how.peers(policy, public, loss, reference="copy")
    ours = OurStep(policy, micro_batch, ("spo", {}), how.work)
    apart = {"sampling": _spo_sampling(how, policy, ours, peers)} if how.toy.family == "sd15" else {}
    return Side(variants={**peers, OURS: ours}, num_batches=len(groups), apart=apart)


def _spo_sampling(how: Opening, policy: DiffusionPolicy, ours: OurStep, peers: Mapping[str, PublicStep]) -> dict[str, Any]:
    """One prompt, 4 successors a step, all of which are scored; no gap is too small for a pair."""
    folder = save_scorer(how.work / "scorer")
    stream = sampling_stream(how, ours, "step_aware", {"path": str(folder)})
    prompts, keys = ["red cat 1"], [content_key("round", 0)]
    given = public_round(stream, prompts, keys)
    network, reads = open_step_aware(str(folder))
    sampler = SpoSampler(given, network, reads, GUIDANCE)
    return {PEER: functools.partial(sampler, peers[PEER]), OURS: functools.partial(our_round, stream, prompts, keys)}


def sampling_stream(how: Opening, ours: OurStep, name: str, scorer: Mapping[str, Any]) -> RolloutStream:
    """SPO's source as published on SD 1.5, a prompt a round, every transition of which becomes a pair.

    Args:
        how: the case.
        ours: whose policy samples.
        name, scorer: of the step scorer, and its settings.
    """
    choice = Choice(name=name, target=STEP_SCORERS[name], settings=scorer)
    settings = Rollouts(scorer=choice, guidance_scale=GUIDANCE, threshold=0.0, prompts_per_round=1)
    return settings.open(lists(how.toy, 1, 1), ours.policy, accelerator=ours.run.accelerator, seed=0)


def dro_side(how: Opening) -> Side:
    """Diffusion-DRO: an update of several micro-batches, for all of which one policy samples, as published."""
    toy = how.toy
    examples = lists(toy, toy.replayed * toy.accumulation, 1)
    parts = [examples[start : start + toy.replayed] for start in range(0, len(examples), toy.replayed)]
    online = how.moved()
    batches = [online.collate([online.item(one, 0) for one in part]) for part in parts]
    seed = typical_seed(online, batches, toy.num_steps)
    policy = how.moved(how.filled(examples))
    policy.seed = online.seed = seed
    given = [policy.collate([policy.item(one, 0) for one in part]) for part in parts]
    order = Order(num_examples=len(examples), batch_size=toy.replayed, accumulation=toy.accumulation, seed=0)
    variants: dict[str, Any] = {}
    streams: dict[str, ReplayStream] = {}
    for name, one, items in ((ONLINE, online, batches), (OURS, policy, given)):
        stream = Replay(num_steps=toy.num_steps).open(examples, one, accelerator=None, seed=0)
        stream.expert = _Given(items)  # type: ignore[assignment]
        micro_batches = functools.partial(stream.batches, order, 0, 1)
        step = OurStep(one, micro_batches, ("dro", {}), how.work, accumulation=toy.accumulation)
        stream.accelerator = step.run.accelerator
        variants[name], streams[name] = step, stream
    replays = _public_replays(online, batches, streams[OURS], order)
    peers, apart = {}, {}
    for name in (PEER, AGAIN):
        sampler = DroSampler()
        loss = functools.partial(dro_loss, sampler=sampler)
        peers[name] = PublicStep(online, how.folder, [replays], loss, reference="copy", fault=how.fault)
        text = [peers[name].text(one.experts.tokens) for one in replays]
        apart[name] = functools.partial(_public_own, sampler, peers[name], replays, text)
    experts = [policy.prepare(one) for one in given]
    apart[OURS] = functools.partial(_own, streams[OURS], experts, order)
    return Side(variants={**peers, **variants}, num_batches=1, apart={"sampling": apart})


def _public_replays(
    policy: DiffusionPolicy, batches: Sequence[Mapping[str, Any]], stream: ReplayStream, order: Order
) -> list[PublicReplay]:
    """The micro-batches of an update in the public script's form, with the very draws that `stream` makes."""
    count, total = stream.settings.num_steps, policy.schedule.num_timesteps
    noise, jitter = stream._draws(order, 0, len(batches), policy.latent_shape)
    draws = zip(noise.split(order.batch_size), jitter.split(order.batch_size), strict=True)
    replays = []
    for batch, (begin, shares) in zip(batches, draws, strict=True):
        experts = public_batch(policy, batch)
        visited, own = visited_timesteps(experts.timestep, shares, total), experts.timestep * count // total
        replays.append(PublicReplay(experts=experts, first=not replays, noise=begin, visited=visited, own=own))
    return replays


def _public_own(
    sampler: DroSampler, side: PublicStep, replays: Sequence[PublicReplay], text: Sequence[Condition]
) -> tuple[Tensor, Tensor]:
    found = [sampler(side, one, condition) for one, condition in zip(replays, text, strict=True)]
    states, outputs = zip(*found, strict=True)
    return torch.cat(states), torch.cat(outputs)


def gate_states(name: str, ours: Sequence[Tensor], peer: Sequence[Tensor]) -> float:
    """The relative distance of states and outputs that two sides sampled from the same draws.

    Raises:
        GateError: they differ by more than gradients may.
    """
    gaps = [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(ours, peer, strict=True)]
    if not all(gap <= GRADIENT_TOLERANCE for gap in gaps):  # NaN is no small gap
        raise GateError(f"{name}: got own states off by {gaps}, want {GRADIENT_TOLERANCE:g}. Nothing is timed.")
    return max(gaps)


def typical_seed(policy: DiffusionPolicy, batches: Sequence[Mapping[str, Any]], num_steps: int) -> int:
    """The first seed whose draws stop, on average, where draws do on average: after (num_steps + 1) / 2 steps."""
    before, wanted = policy.seed, (num_steps + 1) / 2
    for seed in range(1000):
        policy.seed = seed
        timestep = torch.cat([public_batch(policy, batch).timestep for batch in batches])
        steps = num_steps - timestep * num_steps // policy.schedule.num_timesteps
        if abs(float(steps.float().mean()) - wanted) <= 0.02 * num_steps:
            policy.seed = before
            return seed
    raise ValueError(f"typical_seed: got no seed below 1000 for {num_steps} steps, want one.")


def public_batch(policy: DiffusionPolicy, batch: Mapping[str, Any]) -> PublicBatch:
    """A micro-batch of an uncached policy in the public scripts' form, with the very draws that `policy` makes."""
    pixels = dict(zip(batch["names"], batch["pixels"], strict=True))
    columns = list(zip(*batch["images"], strict=True))  # names of the best, of the second ...
    draws = draws_of(policy, batch)
    tokens = []
    for name in policy.family.tokenizers:
        tokenizer = getattr(policy.pipe, name)
        length = 256 if name == "tokenizer_3" else tokenizer.model_max_length
        told = tokenizer(batch["prompt"], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        tokens.append(told.input_ids)
    return PublicBatch(
        pixels=torch.stack([pixels[name] for column in columns for name in column]).float() / 127.5 - 1,
        tokens=tuple(tokens),
        sizes={name: value.transpose(0, 1).flatten(0, 1) for name, value in batch["sizes"].items()},
        timestep=policy.settings.timesteps.build(draws.u, policy.schedule.num_timesteps)[:, 0],
        noise=draws.noise.expand(draws.posterior.shape).transpose(0, 1).flatten(0, 1),
        posterior=draws.posterior.transpose(0, 1).flatten(0, 1),
        scores=batch["side"].get("scores"),
    )


def transitions(policy: DiffusionPolicy, stream: RolloutStream, count: int, number: int) -> list[Pair]:
    """Pairs as sampling makes them: x_t of an image's noise level, and two successors drawn by the policy, with guidance."""
    generator = torch.Generator().manual_seed(number)
    pairs = []
    for place in range(count):
        prompt, step = f"red cat {number} {place}", stream.segments.parts[(7 * number + 3 * place) % 16][0]
        guided = Guided(policy.denoiser, policy.conditions([prompt]), policy.unconditional(1), GUIDANCE)
        noisy = torch.randn(1, *policy.latent_shape, generator=generator)
        with torch.no_grad():
            output = guided(noisy, policy.schedule.network_timestep(stream.grid.timesteps[step]))
        steps = stream.grid.steps
        noise = torch.randn(2, *policy.latent_shape, generator=generator)
        after = steps.sample_weight[step] * noisy + steps.output_weight[step] * output + steps.std[step] * noise
        pairs.append(Pair(prompt=prompt, step=step, noisy=noisy, next_noisy=after, shared=True, key=f"{number}/{place}"))
    return pairs


def _rollouts(policy: DiffusionPolicy, how: Opening) -> RolloutStream:
    brightness = Choice(name="brightness", target=SCORERS["brightness"])
    scorer = Choice(name="image", target=STEP_SCORERS["image"], settings={"scorer": brightness})
    examples = lists(how.toy, 1, 1)
    return RolloutStream(Rollouts(scorer=scorer, guidance_scale=GUIDANCE), examples, policy, None, 0)


def _public_transitions(policy: DiffusionPolicy, stream: RolloutStream, pairs: Sequence[Pair]) -> PublicTransitions:
    steps = torch.tensor([pair.step for pair in pairs])
    better, worse = torch.stack([pair.next_noisy for pair in pairs]).unbind(1)
    return PublicTransitions(
        noisy=torch.cat([pair.noisy for pair in pairs]),
        better=better,
        worse=worse,
        timestep=stream.grid.timesteps[steps],
        previous=stream.grid.previous[steps],
        condition=policy.conditions([pair.prompt for pair in pairs]),
        unconditional=policy.unconditional(len(pairs)),
    )


def _prepared(policy: DiffusionPolicy, items: Sequence[Any]) -> Callable[[], Iterator[Prepared]]:
    turn = cycle(items)
    return lambda: iter([policy.prepare(next(turn))])


def _own(stream: ReplayStream, experts: Sequence[Prepared], order: Order) -> tuple[Tensor, Tensor]:
    found = stream._sampled(experts, order, 0)
    return torch.cat([one["noisy"] for one in found]), torch.cat([one["output"] for one in found])


class _Given:
    """Experts that are read already."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def collated(self, order: Order, first_step: int, last_step: int) -> Sequence[Any]:
        return self.batches
