"""The `self_play` source of SAPO: the data's answers against what an opponent, which follows the policy, makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from mmalign.cache import content_key
from mmalign.errors import UserError
from mmalign.moving_reference import Following, MovingReference
from mmalign.records import Example
from mmalign.sources.order import Order
from mmalign.sources.prepared import Prepared, Shape, check_answers

FRUITLESS_STEPS = 10  # in a row that left the buffer empty


@dataclass(frozen=True, kw_only=True)
class SelfPlay:
    """SAPO's source: an answer of the data against the same one with a segment written anew by an opponent, from a buffer.

    In each step the opponent rewrites a segment of the step's answers, at a place drawn from seed, epoch and example; what
    follows the segment stays, and the end of the turn is that of the data's answer. The pairs join a buffer, of which the step
    trains on a draw with probabilities proportional to 1 / (times drawn + 1). The opponent is a moving average of the policy.
    SPIN is `segment: null, buffer: null` with `opponent: {decay: 0, every: steps of an iteration}`.

    Logged: `self_play/new`, the share of the step's answers that gave a pair; `self_play/buffer`, pairs there are;
    `self_play/drawn`, how often the step's pairs had been drawn before.

    Source: Yin et al. 2024 (SAPO, arXiv 2405.20830), algorithm 1, and published code; Chen et al. 2024
        (SPIN, arXiv 2401.01335).
    Args:
        segment: tokens; shorter answers are written anew as a whole. Published: 256. None: always whole answers.
        buffer: pairs, of which the oldest leave. Published: 2000. None: no buffer, each step trains on its own pairs.
        opponent: how it follows the policy. Published: decay 0.5.
        max_new_tokens: of an answer that is written anew as a whole.
        temperature, top_k, top_p: of the sampler. Published: 0.7, 50, 0.95.
        sampling_batch: answers written at once on a device.
    """

    segment: int | None = 256
    buffer: int | None = 2000
    opponent: Following = Following(decay=0.5)  # noqa: RUF009 (frozen)
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    sampling_batch: int = 8
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse numbers without meaning."""
        for name in ("segment", "buffer", "max_new_tokens", "sampling_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, want 1 or more.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature, top_k, top_p: want 0 or more, 0 or more, and a share above 0, up to 1.")

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse an adapter that writes no answers, and rows of several candidates."""
        check_answers(adapter, "self_play")
        adapter.check_examples(examples.kinds)
        adapter.check_sources(examples.sources)

    def shape(self, examples: Any) -> Shape:
        """The data's answer and the opponent's; side data of the row.

        Raises:
            UserError: rows of several candidates, or of none.
        """
        count = len(examples[0].samples)
        if count != 1 or examples[0].samples[0].completion.is_empty():
            answers = "several candidates" if count > 1 else "no answer"
            raise UserError(f"data.view: gives {answers}, want one answer an example. Use data.view: best.")
        return Shape(num_candidates=2, side=examples[0].side, errors=False)

    def open(self, examples: Sequence[Example], policy: Any, *, accelerator: Any, seed: int) -> SelfPlayStream:
        """Begin with the policy as its own opponent."""
        return SelfPlayStream(self, examples, policy, accelerator, seed)


@dataclass(kw_only=True)
class Rewritten:
    """A pair in the buffer: the example, the token ids of the opponent's answer, and how often it was drawn."""

    place: int
    epoch: int
    index: int
    rejected: tuple[int, ...]
    drawn: int = 0


class SelfPlayStream:
    """An opened `self_play` source. Its memory: the buffer and the opponent's weights, alike on all processes."""

    def __init__(self, settings: SelfPlay, examples: Sequence[Example], policy: Any, accelerator: Any, seed: int) -> None:
        """Use `SelfPlay.open`."""
        self.settings, self.examples, self.policy = settings, examples, policy
        self.accelerator, self.seed = accelerator, seed
        self.opponent = MovingReference(policy.parameters(), settings.opponent)
        self.pairs: list[Rewritten] = []

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """This process's micro-batches: in each step new pairs join the buffer, and the step's pairs are drawn from it.

        Raises:
            UserError: the opponent says what the data say, so that there is no pair to begin with.
        """
        for step in range(first_step, last_step):
            if self.opponent.step < step:  # the update of the step before
                self.opponent.follow(self.policy.parameters())
            notes = {"self_play/new": self._extend(order, step)}
            drawn = self._draw(order.per_step, step)
            notes |= {"self_play/buffer": float(len(self.pairs))}
            notes |= {"self_play/drawn": sum(pair.drawn - 1 for pair in drawn) / len(drawn)}
            for micro in range(order.accumulation):
                start = (micro * order.num_processes + order.process) * order.batch_size
                yield self._prepared(drawn[start : start + order.batch_size], notes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"opponent": self.opponent.state_dict(), "pairs": [asdict(pair) for pair in self.pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.opponent.load_state_dict(state["opponent"])
        self.pairs = [Rewritten(**pair) for pair in state["pairs"]]

    def _extend(self, order: Order, step: int) -> float:
        """Pairs of the step's answers into the buffer; the share of answers that gave one."""
        if self.settings.buffer is None:
            self.pairs = []
        share, attempt = 0.0, 0
        while not attempt or not self.pairs:
            if attempt == FRUITLESS_STEPS:
                raise UserError(
                    f"source: got self_play, and {attempt} times the opponent said what the data say. Raise "
                    "source.temperature, or use data that the model does not know by heart."
                )
            found = self._rewritten(order, step, attempt)
            self.pairs += found
            share, attempt = len(found) / order.per_step, attempt + 1
        if self.settings.buffer is not None:
            self.pairs = self.pairs[-self.settings.buffer :]
        return share

    def _draw(self, count: int, step: int) -> list[Rewritten]:
        """Pairs of a step, without replacement where there are enough, p ~ 1 / (times drawn + 1)."""
        weights = torch.tensor([1 / (pair.drawn + 1) for pair in self.pairs], dtype=torch.float64)
        generator = torch.Generator().manual_seed(int(content_key(self.seed, "draw", step)[:15], 16))
        repeats = -(-count // len(self.pairs)) - 1  # a small buffer is taken whole, as often as it goes in
        rest = torch.multinomial(weights, count - repeats * len(self.pairs), generator=generator).tolist()
        chosen = [*list(range(len(self.pairs))) * repeats, *rest]
        for place in chosen:
            self.pairs[place].drawn += 1
        return [self.pairs[place] for place in chosen]

    def _rewritten(self, order: Order, step: int, attempt: int) -> list[Rewritten]:
        """The step's answers, rewritten by the opponent, each process its own; gathered, in the order of the step."""
        draws = [draw for batch in order.micro_batches(step, step + 1) for draw in batch]
        places = [
            (micro * order.num_processes + order.process) * order.batch_size + n
            for micro in range(order.accumulation)
            for n in range(order.batch_size)
        ]
        encoded = [self.policy.item(self.examples[index], epoch)["encoded"] for epoch, index in draws]
        keys = [content_key(self.seed, "segment", step, place, attempt) for place in places]
        answers = self._answers(encoded, keys)
        found = [
            Rewritten(place=place, epoch=epoch, index=index, rejected=tuple(answer))
            for place, (epoch, index), answer in zip(places, draws, answers, strict=True)
            if answer is not None
        ]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            found = gather_object(found)
        return sorted(found, key=lambda pair: pair.place)

    def _answers(self, rows: Sequence[Any], keys: Sequence[str]) -> list[list[int] | None]:
        """Of each row the answer with a segment rewritten; None where that changed nothing, or left nothing."""
        settings = self.settings
        parts = [self._parts(row, key) for row, key in zip(rows, keys, strict=True)]
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            self.opponent.reference(self.policy.parameters(), self.policy.network),
        ):
            written = self.policy.answers(
                [part.before for part in parts],
                max_new_tokens=max(part.tokens for part in parts),
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seeds=[int(key[:15], 16) for key in keys],
                batch_size=settings.sampling_batch,
            )
        answers: list[list[int] | None] = []
        for part, said in zip(parts, written, strict=True):
            new = [token for token in said[: part.tokens] if token not in self.policy.ends]
            answer = [*part.kept, *new, *part.after]
            body = answer[: len(answer) - part.tail]
            visible = self.policy.tokenizer.decode(body, skip_special_tokens=True).strip()
            answers.append(answer if visible and answer != part.whole else None)
        return answers

    def _parts(self, row: Any, key: str) -> _Parts:
        """Where a row's answer is cut: what the opponent reads, how much it writes, and what stays."""
        if row.others and row.others[0]:
            raise UserError(
                "source: self_play: got an answer in which users or tools have the word too, want the assistant's alone. Cut "
                "the conversation there, or filter such rows."
            )
        given, whole = row.given[0], list(row.continuations[0][row.given[0] :])
        end = max((n for n, token in enumerate(whole) if token in self.policy.ends), default=len(whole))
        segment = end if self.settings.segment is None else min(self.settings.segment, end)
        generator = torch.Generator().manual_seed(int(key[15:30], 16))
        start = int(torch.randint(end - segment + 1, (1,), generator=generator))
        prompt = [*row.contexts[row.context_of[0]], *row.continuations[0][:given]]
        return _Parts(
            before=[*prompt, *whole[:start]],
            tokens=self.settings.max_new_tokens if self.settings.segment is None else max(segment, 1),
            kept=whole[:start],
            after=whole[start + segment :],
            tail=len(whole) - end,
            whole=whole,
        )

    def _prepared(self, pairs: Sequence[Rewritten], notes: Mapping[str, float]) -> Prepared:
        items = []
        for pair in pairs:
            item = self.policy.item(self.examples[pair.index], pair.epoch)
            row = item["encoded"]
            given, first, owner = row.given[0], row.continuations[0], row.context_of[0]
            both = replace(
                row,
                continuations=(first, (*first[:given], *pair.rejected), *row.continuations[1:]),
                context_of=(owner, owner, *row.context_of[1:]),
                given=(given, given, *row.given[1:]),
                others=row.others and ((), (), *row.others[1:]),
            )
            items.append({**item, "encoded": both, "k": 2})
        prepared: Prepared = self.policy.prepare(self.policy.collate(items))
        return replace(prepared, notes={**prepared.notes, **notes})


@dataclass(frozen=True, kw_only=True)
class _Parts:
    before: list[int]
    tokens: int
    kept: list[int]
    after: list[int]
    tail: int
    whole: list[int]
