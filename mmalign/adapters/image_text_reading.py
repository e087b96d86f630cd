"""Examples with images as items and micro-batches: each sequence that the losses ask for, under the image that it asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.adapters.text_reading import collated, drawn_number, weights_of
from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.multimodal.degradations import Condition, Degradation, drawn, drop
from mmalign.multimodal.processing import SightedEncoder
from mmalign.records import Content, Example, Sample

OF_CANDIDATES = (
    "degraded",
    "redrawn",
    "each_degraded",
    "each_absent",
    "crossed",
    "greedy",
)  # further completions made of candidates
ABSENT = Condition(degradation=drop())


@dataclass(frozen=True)
class _Sequence:
    """One sequence of an example: a sample, what it is shown under, and the candidate whose answer it is."""

    sample: Sample
    condition: Condition | None = None
    candidate: int | None = None


@dataclass(frozen=True)
class SightedReader:
    """Examples -> items, for worker processes; holds a processor and no model.

    Args:
        encoder: how samples become token ids and tensors.
        extras: names of the further sequences of a row, as `TokenInputs.extras` has them.
        draws: whether the losses ask for a draw.
        seed: of the draws.
        weights: see `weights_of`; those of an answer hold under every image.
        degradation: what `degraded` and its like are shown under; None: only the data tell.
        others: the examples whose images a swap takes; None: there is no swap.
    """

    encoder: SightedEncoder
    extras: tuple[str, ...]
    draws: bool
    seed: int
    weights: Choice | None = None
    degradation: Degradation | None = None
    others: Sequence[Example] | None = None

    def item(self, example: Example, epoch: int) -> dict[str, Any]:
        """Token ids and images of an example's candidates, and of the further sequences that the losses ask for.

        Raises:
            UserError: a candidate is empty, a completion is missing, nothing tells how images are degraded, or the processor
                refuses the prompt.
        """
        sequences = self._sequences(example, epoch)
        try:
            encoded = self.encoder([one.sample for one in sequences], [one.condition for one in sequences])
        except UserError as fault:
            raise UserError(f"{example.id}: {fault}") from fault
        side = dict(example.side)
        if self.draws:
            side["draw"] = drawn_number(self.seed, epoch, example.id)
        weights = None if self.weights is None else self._weights(self.weights, example, encoded, sequences)
        return {"id": example.id, "encoded": encoded, "side": side, "k": len(example.samples), "weights": weights}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Several items as one micro-batch; see `collated`."""
        return collated(items, weighted=self.weights is not None)

    def surveyed(self, examples: Sequence[Example]) -> SightedReader:
        """The reader with the examples whose images a swap takes."""
        return replace(self, others=examples)

    def _sequences(self, example: Example, epoch: int) -> list[_Sequence]:
        """Candidates, further completions column by column, and the best candidate under the degraded image for `greedy`."""
        out = [_Sequence(sample, candidate=i) for i, sample in enumerate(example.samples)]
        columns: dict[str, int] = {}
        for name in self.extras:
            column = columns[name] = columns.get(name, -1) + 1
            out.append(self._further(name, column, example, epoch))
        if "greedy" in self.extras:
            out.append(self._degraded(0, example, epoch))
        return out

    def _further(self, name: str, column: int, example: Example, epoch: int) -> _Sequence:
        samples = example.samples
        if name in example.extras:
            return _Sequence(example.extras[name])
        if name in ("degraded", "each_degraded"):
            return self._degraded(column, example, epoch)
        if name == "redrawn":
            return self._degraded(column, example, epoch, " redrawn")
        if name == "each_absent":
            return _Sequence(samples[column], ABSENT, column)
        if name == "crossed":
            return _Sequence(replace(samples[column], prompt=samples[1 - column].prompt), None, column)
        if name == "greedy":
            return _Sequence(samples[0], None, 0)
        raise UserError(f"{example.id}: has no {name}, which the loss asks for. Add it, or filter the rows.")

    def _degraded(self, candidate: int, example: Example, epoch: int, again: str = "") -> _Sequence:
        sample = example.samples[candidate]
        if self.degradation is None:
            raise UserError(
                f"{example.id}: has no degraded image, which the loss asks for. Set adapter.degradation (mdpo: crop, chip and "
                "povid: noise, vdpo: blank), or choose a view that gives it (retrieved)."
            )
        if not sample.prompt.media():
            return _Sequence(sample, None, candidate)
        other = self._other(example) if self.degradation.wants_other else None
        condition = drawn(self.degradation, seed=self.seed, epoch=epoch, example=example.id + again, other=other)
        return _Sequence(sample, condition, candidate)

    def _other(self, example: Example) -> Content | None:
        """The prompt of another example with images, the same in every epoch."""
        others = self.others or ()
        digest = hashlib.sha256(f"{self.seed} swap {example.id}".encode()).digest()
        first = int.from_bytes(digest[:6], "big")
        for step in range(len(others)):
            found = others[(first + step) % len(others)]
            prompt = found.samples[0].prompt
            if found.id != example.id and prompt.media():
                return prompt
        return None

    def _weights(self, choice: Choice, example: Example, encoded: Encoded, sequences: Sequence[_Sequence]) -> list[list[float]]:
        """Of every sequence the weights of its answer's tokens; 1 where the answer is no candidate's."""
        own = weights_of(choice, example, encoded)
        lengths = encoded.lengths
        out = []
        for number, one in enumerate(sequences):
            told = [1.0] * lengths[number] if one.candidate is None else own[one.candidate]
            if len(told) != lengths[number]:
                raise UserError(
                    f"{example.id}: adapter.token_weights: an answer has {len(told)} tokens after its prompt and "
                    f"{lengths[number]} after the degraded one. Set it to null for such rows."
                )
            out.append(told)
        return out


def sequences_asked(asked: frozenset[str], given: Sequence[str], num_candidates: int) -> tuple[str, ...]:
    """Names of the further sequences that the losses ask for, a name as often as it has columns.

    Args:
        asked: names of all data that the losses ask for.
        given: names of completions that the data have.
        num_candidates: k.
    Raises:
        UserError: `crossed` is asked for with fewer than two candidates.
    """
    names = {name.removeprefix("reference_") for name in asked}
    if "anchored" in names:
        names |= {"each_degraded"}
    columns = {
        "degraded": 1,
        "redrawn": 1,
        "each_degraded": num_candidates,
        "each_absent": num_candidates,
        "crossed": 2,
        "greedy": 1,
    }
    if "crossed" in names and num_candidates < 2:
        raise UserError("loss: asks for crossed with one candidate a prompt, want two or more. Choose data.view crossed.")
    out = [name for name in given if name in names]
    return (*out, *(name for name in OF_CANDIDATES if name in names for _ in range(columns[name])))
