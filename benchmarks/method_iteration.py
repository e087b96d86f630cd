"""An iteration of SPO on both sides: a prompt is sampled, and all pairs that come of it are trained on once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from measuring import Answer
from method_peers import PublicStep, PublicTransitions, spo_loss
from method_sampling import PublicRound, SpoSampler, public_round, save_scorer, save_small_decoder
from method_variants import AGAIN, GUIDANCE, NEAR, OURS, PEER, Opening, OurStep, Side, sampling_stream
from torch import Tensor

from mmalign.cache import content_key
from mmalign.models.latent_reward import LatentReward, first_half, save_latent_reward, text_summary
from mmalign.models.step_aware import open_step_aware
from mmalign.models.step_scorers import StepAwareScorer
from mmalign.sources import Order, Prepared
from mmalign.sources.rollouts import RolloutStream

APPROXIMATE = "mmalign, a small decoder: approximate"
LATENT = "mmalign, LPO's latent reward: another judge"
SMALL_DECODER = 8  # channels, an eighth of TAESD's, as the toy's VAE has an eighth of SD 1.5's
NUM_PAIRS = 16  # of a prompt: 20 steps of which the first 4 do not branch, and every gap is enough
BATCH = 8  # pairs an optimiser step; published: 10 a process


class PublicIteration:
    """The public structure: sample as `SpoSampler`, mix the pairs, and an optimiser step for each batch of them."""

    def __init__(self, side: PublicStep, sampler: SpoSampler, order: Tensor) -> None:
        """Args:
        side: network, optimiser and loss.
        sampler: of the round.
        order: in which the pairs are trained on.
        """
        self.side, self.sampler, self.order = side, sampler, order
        self.parameters = side.parameters

    def pairs(self) -> tuple[Tensor, Tensor]:
        """x_t, and the better and the worse successor, in the order of the sampler."""
        return self.sampler(self.side)

    def batches(self, noisy: Tensor, successors: Tensor) -> list[PublicTransitions]:
        """Pairs as training is given them."""
        given = self.sampler.given
        return [self._batch(given, places, noisy, successors) for places in self.order.split(BATCH)]

    def _batch(self, given: PublicRound, places: Tensor, noisy: Tensor, successors: Tensor) -> PublicTransitions:
        steps = given.alone + places
        return PublicTransitions(
            noisy=noisy[places],
            better=successors[places, 0],
            worse=successors[places, 1],
            timestep=given.timesteps[steps],
            previous=given.previous[steps],
            condition={name: value.expand(len(places), *value.shape[1:]) for name, value in given.condition.items()},
            unconditional={name: value.expand(len(places), *value.shape[1:]) for name, value in given.unconditional.items()},
        )

    def trained(self, noisy: Tensor, successors: Tensor) -> Answer:
        """Loss and gradients of all batches of these pairs; the weights stay."""
        self.side.batches = iter([self.batches(noisy, successors)])
        return self.side.answer()

    def answer(self) -> Answer:
        """Loss and gradients of an iteration; the weights stay."""
        return self.trained(*self.pairs())

    def micro_step_of_next(self) -> None:
        """Gradients of an iteration, which stay."""
        self.side.batches = iter([self.batches(*self.pairs())])
        self.side.micro_step()

    def drop_gradients(self) -> None:
        """As after a step."""
        self.side.drop_gradients()

    def step(self) -> None:
        """An iteration."""
        for batch in self.batches(*self.pairs()):
            self.side.batches = iter([[batch]])
            self.side.step()

    def tensors(self) -> list[Tensor]:
        """All that is held between steps."""
        return [*self.side.tensors(), *self.sampler.scorer.state_dict().values()]


class OurIteration:
    """mmalign: the `rollouts` source and the loop, the same round every time, its prompt new to the scorer."""

    def __init__(self, ours: OurStep, stream: RolloutStream) -> None:
        """Args:
        ours: policy and loop.
        stream: the source.
        """
        self.ours, self.stream, self.run = ours, stream, ours.run

    def batches(self) -> Iterator[Prepared]:
        """Those of an iteration; the first samples."""
        self.stream.round, self.stream.pool = 0, []
        if isinstance(self.stream.scorer, StepAwareScorer):
            self.stream.scorer.text.rows.clear()
        order = Order(num_examples=1, batch_size=BATCH, accumulation=1, seed=0)
        return self.stream.batches(order, 0, NUM_PAIRS // BATCH)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """x_t, and the better and the worse successor, in the order of the sampler."""
        self.stream.round, self.stream.pool = 0, []
        self.stream._sample_round()
        pairs = sorted(self.stream.pool, key=lambda pair: pair.key)
        return torch.cat([pair.noisy for pair in pairs]), torch.stack([pair.next_noisy for pair in pairs])

    def answer(self) -> Answer:
        """Loss and gradients of an iteration; the weights stay."""
        found = self.ours.answer()
        return Answer(found.loss, {name: value * BATCH / NUM_PAIRS for name, value in found.gradient.items()})

    def micro_step_of_next(self) -> None:
        """Gradients of an iteration, which stay."""
        self.ours.micro_step_of_next()

    def drop_gradients(self) -> None:
        """As after a step."""
        self.ours.drop_gradients()

    def step(self) -> None:
        """An iteration."""
        for prepared in self.batches():
            self.run.take_step([prepared])

    def tensors(self) -> list[Tensor]:
        """All that is held between steps."""
        return [*self.ours.tensors(), *self.stream.scorer.network.state_dict().values()]  # type: ignore[attr-defined]


def spo_iteration_side(how: Opening) -> Side:
    """SPO as published on SD 1.5, a prompt at a time: exact, with a small decoder, and with LPO's judge, which needs none."""
    folder = save_scorer(how.work / "scorer")
    small = save_small_decoder(how.work / "small decoder", SMALL_DECODER)
    exact = _ours(how, "step_aware", {"path": str(folder)})
    others = {
        APPROXIMATE: _ours(how, "step_aware", {"path": str(folder), "decoder": str(small)}),
        LATENT: _ours(how, "latent", {"path": str(_save_latent(how))}),
    }
    policy = exact.ours.policy
    given = public_round(exact.stream, ["red cat 0"], [content_key(exact.stream.seed, 0, 0)])
    generator = torch.Generator().manual_seed(int(content_key(exact.stream.seed, "mix", 0)[:15], 16))
    order = torch.randperm(NUM_PAIRS, generator=generator)
    loss = functools.partial(spo_loss, guidance_scale=GUIDANCE)
    network, reads = open_step_aware(str(folder))
    sampler = SpoSampler(given, network, reads, GUIDANCE)
    sides = how.peers(policy, [()], loss, reference="copy")
    peers = {name: PublicIteration(side, sampler, order) for name, side in sides.items()}
    return Side(
        variants={PEER: peers[PEER], AGAIN: peers[AGAIN], OURS: exact, **others},
        num_batches=1,
        states={"pairs": {PEER: peers[PEER].pairs, OURS: exact.pairs}},
        twins={name: functools.partial(_twin, peers[PEER], other) for name, other in others.items()},
    )


def _twin(peer: PublicIteration, ours: OurIteration) -> Answer:
    """What the peer answers to the pairs that another judge chose."""
    return peer.trained(*ours.pairs())


def _save_latent(how: Opening) -> Path:
    """A random latent reward model with its own half of a UNet, as published."""
    policy = replace(how, lora=False, needs_reference=False).policy()
    width = text_summary(policy.conditions([""])).shape[1]
    network = LatentReward(policy.family, first_half(policy.denoiser.core), text_width=width, tuned=True)
    return save_latent_reward(network, how.work / "latent")


def _ours(how: Opening, name: str, scorer: dict[str, str]) -> OurIteration:
    policy = how.moved(distance=NEAR)
    nothing: Sequence[Prepared] = ()
    ours = OurStep(policy, lambda: nothing, ("spo", {}), how.work)
    made = OurIteration(ours, sampling_stream(how, ours, name, scorer))
    ours.micro_batches = made.batches
    return made
