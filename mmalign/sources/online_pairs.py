"""The `online_pairs` source: the policy answers each prompt several times, and a scorer's best and worst answer are a pair."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from mmalign.cache import content_key
from mmalign.config import Choice, Table
from mmalign.errors import UserError
from mmalign.records import Content, Example, Sample, asked
from mmalign.scorers import SCORERS, finite_scores, judged_kind
from mmalign.sources.order import Order
from mmalign.sources.prepared import Prepared, Shape, check_answers

logger = logging.getLogger(__name__)
FRUITLESS_ROUNDS = 10  # in a row without one pair
EXPLORATION = "exploration"  # the further completion of SELM's loss


@dataclass(frozen=True, kw_only=True)
class OnlinePairs:
    """Online preference pairs: answers of the policy as it is now, ranked by a scorer of texts.

    Every answer has a random generator of its own, made of seed, round and place, so that neither a resumed run nor another
    number of processes draws others. Prompts whose answers are alike, or score alike, give no pair. With the loss `selm` the
    reference too answers each prompt once: the row's `exploration`.

    Logged: `online/score`, the mean over all answers; `online/gap`, of the best over the worst of a pair; `online/valid`, the
    share of prompts that gave one; `online/epoch`, passes over the prompts.

    Source: Guo et al. 2024 (OAIF, arXiv 2402.04792); Zhang et al. 2024 (SELM, arXiv 2405.19332).
    Args:
        scorer: a scorer of texts.
        num_candidates: answers to a prompt. Published: 2; SELM and iterative DPO: 5.
        every: optimiser steps whose prompts are answered at once. Published: 1; SELM's rounds: a third of the prompts.
        max_new_tokens: of an answer.
        temperature, top_k, top_p: of the sampler. Published: 0.9, all tokens; 0 tokens and 1.0 leave all.
        sampling_batch: answers written at once on a device.
    """

    scorer: Annotated[Choice, Table(SCORERS)]
    num_candidates: int = 2
    every: int = 1
    max_new_tokens: int = 128
    temperature: float = 0.9
    top_k: int = 0
    top_p: float = 1.0
    sampling_batch: int = 8
    online: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        least = {"num_candidates": 2, "every": 1, "max_new_tokens": 1, "top_k": 0, "sampling_batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, want {low} or more.")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature: got {self.temperature}, want a positive number, or all answers are one and the same."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, want a share above 0, up to 1.")

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse an adapter that writes no answers, and prompts that it does not see."""
        check_answers(adapter, "online_pairs")
        adapter.check_sources(examples.sources)

    def shape(self, examples: Any) -> Shape:
        """Pairs without side data."""
        return Shape(num_candidates=2, side={}, errors=False)

    def open(self, examples: Sequence[Example], policy: Any, *, accelerator: Any, seed: int) -> OnlinePairsStream:
        """Build the scorer; of the examples only the prompts are read.

        Raises:
            UserError: the scorer cannot be opened or does not judge texts, or a loss asks for a completion that is not written.
        """
        scorer = self.scorer.build()
        if judged_kind(scorer) != "texts":
            raise UserError(
                f"source.scorer: got {self.scorer.name}, which judges images, want a scorer of texts (text_reward)."
            )
        unknown = sorted(set(policy.extras) - {EXPLORATION})
        if unknown:
            raise UserError(f"loss: asks for {unknown[0]}, which source: online_pairs does not write. Use source: offline.")
        return OnlinePairsStream(self, examples, policy, scorer, accelerator, seed)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A pair: the example whose prompt it answers, in which epoch, the two texts, and the reference's answer where wanted."""

    place: int
    epoch: int
    index: int
    best: str
    worst: str
    gap: float
    exploration: str | None


class OnlinePairsStream:
    """An opened `online_pairs` source. Its memory: pairs that are not trained on yet, alike on all processes."""

    def __init__(
        self, settings: OnlinePairs, examples: Sequence[Example], policy: Any, scorer: Any, accelerator: Any, seed: int
    ) -> None:
        """Use `OnlinePairs.open`."""
        self.settings, self.examples, self.policy, self.scorer = settings, examples, policy, scorer
        self.accelerator, self.seed = accelerator, seed
        self.round = self.fruitless = 0
        self.pool: list[Judged] = []
        self.notes: dict[str, float] = {}

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """Micro-batches of pairs; whenever they run out, the policy as it is now answers the next prompts.

        Raises:
            UserError: no pair in ten rounds.
        """
        together = order.batch_size * order.num_processes
        for _ in range((last_step - first_step) * order.accumulation):
            while len(self.pool) < together:
                self._answer_round(self.settings.every * order.per_step)
            taken, self.pool = self.pool[:together], self.pool[together:]
            start = order.process * order.batch_size
            yield self._prepared(taken[start : start + order.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        pool = [asdict(pair) for pair in self.pool]
        return {"round": self.round, "fruitless": self.fruitless, "notes": self.notes, "pool": pool}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.round, self.fruitless, self.notes = int(state["round"]), int(state["fruitless"]), dict(state["notes"])
        self.pool = [Judged(**pair) for pair in state["pool"]]

    def _answer_round(self, num_prompts: int) -> None:
        """Answer and judge, each process its share, and gather: the same pairs in the same order whatever process made them."""
        deal = Order(num_examples=len(self.examples), batch_size=num_prompts, accumulation=1, seed=self.seed)
        (draws,) = deal.micro_batches(self.round, self.round + 1)
        own = list(enumerate(draws))[self.accelerator.process_index :: self.accelerator.num_processes]
        found, scores = self._judged(own) if own else ([], [])
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found, scores = gather_object(found), gather_object(scores)
        found.sort(key=lambda pair: pair.place)
        self.pool += found
        self.round += 1
        self.fruitless = 0 if found else self.fruitless + 1
        self.notes = {
            "online/score": math.fsum(scores) / len(scores),
            "online/valid": len(found) / num_prompts,
            "online/epoch": self.round * num_prompts / len(self.examples),
            **({"online/gap": math.fsum(pair.gap for pair in found) / len(found)} if found else {}),
        }
        logger.debug("round %d: %d pairs, mean score %.4g", self.round, len(found), self.notes["online/score"])
        if self.fruitless == FRUITLESS_ROUNDS:
            raise UserError(
                f"source.scorer: in {FRUITLESS_ROUNDS} rounds {self.scorer.name} preferred no answer to another. Raise "
                "source.temperature, max_new_tokens or num_candidates, or look at the scorer."
            )

    def _judged(self, own: Sequence[tuple[int, tuple[int, int]]]) -> tuple[list[Judged], list[float]]:
        """Pairs of these draws (place, (epoch, index)), and the scores of all answers."""
        k = self.settings.num_candidates
        prompts = [self.examples[index].samples[0].prompt for _, (_, index) in own]
        texts = self._written(
            [prompt for prompt in prompts for _ in range(k)], [(place, n) for place, _ in own for n in range(k)]
        )
        places = [f"{self.examples[index].id}: answer {n + 1}" for _, (_, index) in own for n in range(k)]
        scores = finite_scores(self.scorer, [asked(prompt) for prompt in prompts for _ in range(k)], texts, places).tolist()
        explored: list[str | None] = [None] * len(own)
        if EXPLORATION in self.policy.extras:
            explored = [*self._written(prompts, [(place, -1) for place, _ in own], by_reference=True)]
        found = []
        for row, (place, (epoch, index)) in enumerate(own):
            ranked = sorted((n for n in range(row * k, row * k + k) if texts[n].strip()), key=lambda n: scores[n], reverse=True)
            said = explored[row]
            if len(ranked) < 2 or scores[ranked[0]] == scores[ranked[-1]] or (said is not None and not said.strip()):
                continue
            best, worst = ranked[0], ranked[-1]
            found.append(
                Judged(
                    place=place,
                    epoch=epoch,
                    index=index,
                    best=texts[best],
                    worst=texts[worst],
                    gap=scores[best] - scores[worst],
                    exploration=said,
                )
            )
        return found, scores

    def _written(self, prompts: Sequence[Content], keys: Sequence[tuple[int, int]], *, by_reference: bool = False) -> list[str]:
        settings = self.settings
        with torch.no_grad(), self.accelerator.autocast():
            answers = self.policy.answers(
                [self.policy.prompt_ids(prompt) for prompt in prompts],
                by_reference=by_reference,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seeds=[int(content_key(self.seed, "answer", self.round, *key)[:15], 16) for key in keys],
                batch_size=settings.sampling_batch,
                never_empty=True,
            )
        return [self.policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def _prepared(self, pairs: Sequence[Judged]) -> Prepared:
        batch = self.policy.collate([self.policy.item(self._example(pair), pair.epoch) for pair in pairs])
        prepared: Prepared = self.policy.prepare(batch)
        return replace(prepared, notes={**prepared.notes, **self.notes})

    def _example(self, pair: Judged) -> Example:
        row = self.examples[pair.index]
        prompt = row.samples[0].prompt
        best, worst = (Sample(prompt=prompt, completion=Content(text=text)) for text in (pair.best, pair.worst))
        extras = {}
        if pair.exploration is not None:
            extras[EXPLORATION] = Sample(prompt=prompt, completion=Content(text=pair.exploration))
        return Example(id=row.id, samples=(best, worst), extras=extras)
