"""How likely a language model finds continuations of contexts: the likelihood of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.likelihoods.anchoring import anchored_sums
from mmalign.likelihoods.layouts import Layout, Tokens
from mmalign.likelihoods.networks import Measures

# network(layout, wanted) -> {name: (num_slots,)}: sums over the scored tokens of every slot, float32 or better.
# "logps" is always there; "agreement" = sum of lp - log sum_v p_v^2 and "entropy", both detached, where wanted. Where GRADED
# ones are wanted, a third argument is what the teacher made of the layout. Of "target_logits" there is one a scored token.
# network.observe(layout, wanted) gives the sums, and what makes this network the teacher of another on the same layout.
TokenNetwork = Callable[..., Mapping[str, Float[Tensor, " slots"]]]
Teacher = Callable[["Layout"], Any]  # teacher(layout) -> what a network takes as its lesson
PER_TOKEN = frozenset({"agreement", "entropy"})  # measures that are means over the scored tokens, detached
GRADED = frozenset({"teacher_divergence", "advantage"})  # those that a teacher gives, with a gradient
EACH = "each_"  # before the name of further completions of which every candidate has its own
RIVALS = frozenset({"rival", "degraded_rival"})  # of candidates, and of the further completion degraded
TOKENS = frozenset({"tokens", "each_degraded_tokens"})  # one value a token, padded with zeros: (batch, k, seq)
ANCHORED_ON = "each_degraded"  # whose tokens' logits those of the candidates are compared with
ROW, CONTEXT = "row", "context"


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """k continuations a prompt, whose likelihood is the sum of their tokens' log-probabilities.

    logp = sum_t w_t log p(y_t | x, y_<t),  in float32 or better whatever the autocast

    The sequences are the k candidates of the first row, of the second ..., and then, for each name of `extras`, one further
    completion of every row.

    Args:
        tokens: all sequences.
        num_candidates: k; 0 is allowed in parts that hold no candidate.
        batch: number of rows.
        extras: names of further completions, which are measures of their own: `rationale`, `exploration`, `gold`. A name that
            is there several times has as many columns; of those that begin with `each_` column i goes with candidate i.
        wanted: further measures: `shared` (the heads' sums), `joint` (with the context), `agreement`, `entropy`; as means
            over a candidate's scored tokens whatever their weights, `teacher_divergence` and `advantage`; `divergence`, the
            sum over them of KL(reference || policy); `anchored`, see `anchored_sums`; and `rival` and `degraded_rival`, the
            logps where the likeliest other token, as this network finds it, stands for each one of a candidate's, or of the
            further completion `degraded`; alone among these, `tokens` and `each_degraded_tokens`: the log-probabilities of the
            scored tokens of every candidate, and of its further completion, without weights, padded with zeros.
        teacher: what the first two of a teacher are taken from; never trained.
        device: where the network is.
        pack: one row without padding, every context run once; else padded rows.
        multiple, pad: see `Tokens.padded`.
        mismatched: prompts with answers of others, one a row, whose logps are the measure `mismatched`, without a gradient:
            KTO's anchor is made of them.
        noisy: of every row the best candidate under the degraded image: what a network finds likeliest there is what the
            further completion `greedy`, the best candidate's tokens, is scored on in their place; see `echoed`.
        lesson: what the reference made of the scored tokens, for `divergence`; `refer` gives it.
        first: number of the first candidate, in parts.
        longest: what `tokens` are padded to, in parts.
        opposed: the loss sees of two candidates only the difference of their log-ratios, whose gradients are then opposite:
            a trained output layer needs one accumulator for both; see `language.head.slot_sums`.
    """

    tokens: Tokens
    num_candidates: int
    batch: int
    extras: tuple[str, ...] = ()
    wanted: frozenset[str] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pack: bool = False
    multiple: int = 1
    pad: int = 0
    mismatched: Tokens | None = None
    teacher: Teacher | None = None
    noisy: Tokens | None = None
    lesson: Any = None
    first: int = 0
    longest: int = 0
    opposed: bool = False

    def __post_init__(self) -> None:
        """Refuse a teacher's measures without one, and logits that nothing is to be compared with."""
        if self.wanted & GRADED and self.teacher is None:
            raise ValueError(f"wanted: got {', '.join(sorted(self.wanted & GRADED))} without a teacher, want one.")
        if "divergence" in self.wanted and self.teacher is not None:
            raise ValueError("wanted: got divergence with a teacher, whose lesson is another. Leave one of them out.")
        if "anchored" in self.wanted and self.extras.count(ANCHORED_ON) != self.num_candidates:
            raise ValueError(f"wanted: got anchored without the further completions {ANCHORED_ON} of all candidates.")
        if self.wanted & TOKENS and self.wanted - TOKENS:
            raise ValueError(f"wanted: got {', '.join(sorted(self.wanted))}, want tokens alone. Leave the others out.")

    def readings(self, logps: Float[Tensor, "batch k"]) -> dict[str, Float[Tensor, "batch k"]]:
        """Other names under which these logps are logged: none."""
        return {}

    def logps(self, network: TokenNetwork) -> Float[Tensor, "batch k"]:
        """Summed log-probability of every candidate, in nats."""
        return self.measures(network)["policy"]

    def measures(self, network: TokenNetwork) -> Measures:
        """All that losses may ask of one pass: `policy`, one name an extra completion, and what is `wanted`.

        Raises:
            ValueError: `divergence` is wanted, and `refer` was not called before.
        """
        if self.wanted & TOKENS:
            return self._of_tokens(network)
        layout = replace(self._layout(self.tokens), opposed=self._opposed())
        lesson = self.lesson if self.teacher is None or not self.wanted & GRADED else self.teacher(layout)
        if "divergence" in self.wanted and lesson is None:
            raise ValueError("divergence: got inputs that know nothing of the reference. Call refer first.")
        out = self.of_slots(network(layout, self._asked()) if lesson is None else network(layout, self._asked(), lesson))
        if self.mismatched is not None:
            with torch.no_grad():
                out["mismatched"] = network(self._layout(self.mismatched), frozenset())["logps"][:, None]
        return out

    def of_slots(self, sums: Mapping[str, Float[Tensor, " slots"]]) -> Measures:
        """Measures from the sums of every slot, as a network gives them or a cache kept them."""
        parts = 1 if self.tokens.heads is None else 2
        sequences = len(self.tokens.continuations)
        both = {
            name: values[: parts * sequences].view(sequences, parts) for name, values in sums.items() if name != "target_logits"
        }
        out = self._by_row(both["logps"].sum(1))
        if "shared" in self.wanted:
            out["shared"] = self._candidates(both["logps"][:, 0])
        if "joint" in self.wanted:
            contexts = sums["logps"][parts * sequences :]
            owners = torch.tensor(self.tokens.context_of[: self.batch * self.num_candidates], dtype=torch.long).to(
                contexts.device
            )
            out["joint"] = out["policy"] + contexts[owners].view(self.batch, self.num_candidates)
        scored = self.tokens.scored().clamp(min=1)
        for name in sorted(self.wanted & (PER_TOKEN | GRADED)):
            values = both[name].sum(1)
            mean = self._candidates(values / scored.to(values))
            out[name] = mean if name in GRADED else mean.detach()
        if "divergence" in self.wanted:
            out["divergence"] = self._candidates(both["teacher_divergence"].sum(1))
        if "anchored" in self.wanted:
            out["anchored"] = out["policy"] + self._anchors(sums["target_logits"])
        if self.wanted & RIVALS:
            rivals = self._by_row(both["rival"].sum(1))
            names = {"rival": "policy", "degraded_rival": "degraded"}
            out |= {name: rivals[names[name]] for name in sorted(self.wanted & RIVALS) if names[name] in rivals}
        return out

    def refer(self, network: TokenNetwork, *, drift: bool = False) -> tuple[Measures, TokenInputs]:
        """The reference's measures, without a graph, and these inputs, with what they keep of the reference.

        Raises:
            ValueError: `drift` is asked for, which is not defined for text.
        """
        if drift:
            raise ValueError("drift: is not defined for text. Leave the loss that asks for it out.")
        with torch.no_grad():
            plain = replace(self, wanted=self.wanted - PER_TOKEN - GRADED - {"divergence"}).echoed(network)
            if "divergence" not in self.wanted:
                return plain.measures(network), self
            observer: Any = network
            sums, lesson = observer.observe(self._layout(self.tokens), plain._asked())
            return plain.of_slots(sums), replace(self, lesson=lesson)

    def echoed(self, network: TokenNetwork) -> TokenInputs:
        """These inputs with what a network would say itself, place by place, as targets of `greedy`; no graph."""
        if self.noisy is None:
            return self
        speaker: Any = network
        said = speaker.likeliest(self._layout(self.noisy)).cpu()
        start = self.batch * (self.num_candidates + self.extras.index("greedy"))
        targets = list(self.tokens.continuations if self.tokens.targets is None else self.tokens.targets)
        counts = [int(count) for count in self.noisy.scored()]
        for row, own in enumerate(torch.split(said, counts)):
            weights = None if self.tokens.weights is None else self.tokens.weights[start + row]
            ids = self.tokens.continuations[start + row]
            targets[start + row] = own if weights is None else ids.masked_scatter(weights != 0, own)
        return replace(self, tokens=replace(self.tokens, targets=tuple(targets)))

    def settle(self, network: TokenNetwork) -> tuple[Measures, TokenInputs]:
        """Measures without a graph, and these inputs, whose candidates are independent already."""
        with torch.no_grad():
            return self.measures(network), self

    def candidates(self, part: slice) -> TokenInputs:
        """The same inputs with only some of the k candidates, and what goes with them; other extras go with the first."""
        kept = range(self.num_candidates)[part]
        chosen = [row * self.num_candidates + i for row in range(self.batch) for i in kept]
        extras: list[str] = []
        seen: dict[str, int] = {}
        for number, name in enumerate(self.extras):
            column = seen[name] = seen.get(name, -1) + 1
            if column in kept if name.startswith(EACH) else kept.start == 0:
                extras.append(name)
                start = self.batch * (self.num_candidates + number)
                chosen += range(start, start + self.batch)
        return replace(
            self,
            tokens=self.tokens.select(chosen),
            num_candidates=len(kept),
            extras=tuple(extras),
            mismatched=None,
            lesson=None if self.lesson is None else self.lesson.take(self._scored_of(chosen).to(self.device)),
            first=self.first + kept.start,
            longest=self.longest or max(self._counts()),
        )

    def _asked(self) -> frozenset[str]:
        """What is asked of the network for the measures that are wanted."""
        asked = self.wanted & (PER_TOKEN | GRADED)
        if "divergence" in self.wanted:
            asked |= {"teacher_divergence"}
        if self.wanted & RIVALS:
            asked |= {"rival"}
        return asked | {"target_logits"} if "anchored" in self.wanted else asked

    def _opposed(self) -> tuple[tuple[int, int], ...] | None:
        """Slots of the first and of the second candidate, where there are no others and the loss sees their difference."""
        if not self.opposed or self.num_candidates != 2 or self.extras or self.tokens.context_weights is not None:
            return None
        parts = 1 if self.tokens.heads is None else 2
        return tuple(
            (2 * parts * row + part, 2 * parts * row + parts + part) for row in range(self.batch) for part in range(parts)
        )

    def _layout(self, tokens: Tokens) -> Layout:
        layout = tokens.packed() if self.pack else tokens.padded(multiple=self.multiple, pad=self.pad)
        return layout.to(self.device)

    def _by_row(self, values: Float[Tensor, " sequences"]) -> Measures:
        columns: dict[str, list[Tensor]] = {}
        for number, name in enumerate(self.extras):
            start = self.batch * (self.num_candidates + number)
            columns.setdefault(name, []).append(values[start : start + self.batch])
        return {"policy": self._candidates(values), **{name: torch.stack(own, 1) for name, own in columns.items()}}

    def _candidates(self, values: Float[Tensor, " sequences"]) -> Float[Tensor, "batch k"]:
        return values[: self.batch * self.num_candidates].view(self.batch, self.num_candidates)

    def _of_tokens(self, network: TokenNetwork) -> Measures:
        """The measures where those of single tokens are wanted."""
        layout = self._layout(self.tokens)
        values = network(layout.token_by_token(), frozenset())["logps"]
        counted = values if layout.weight is None else values * layout.weight.to(values)
        out = dict(self.of_slots({"logps": values.new_zeros(layout.num_slots).index_add(0, layout.slot, counted)}))
        counts = self._counts()
        rows = torch.split(values[: sum(counts)], counts)
        longest = self.longest or max(counts)
        padded = torch.stack([torch.cat([own, own.new_zeros(longest - len(own))]) for own in rows])
        k, starts = self.num_candidates, [self.batch * (self.num_candidates + n) for n in range(len(self.extras))]
        out["tokens"] = padded[: self.batch * k].view(self.batch, k, longest)
        degraded = [start for start, name in zip(starts, self.extras, strict=True) if name == ANCHORED_ON]
        if degraded:
            out["each_degraded_tokens"] = torch.stack([padded[start : start + self.batch] for start in degraded], 1)
        return out

    def _counts(self) -> list[int]:
        return [int(count) for count in self.tokens.scored()]

    def _anchors(self, logits: Float[Tensor, " scored"]) -> Float[Tensor, "batch k"]:
        """What `anchored_sums` adds to the logps."""
        counts = self._counts()
        own = torch.split(logits[: sum(counts)], counts)
        columns = [number for number, name in enumerate(self.extras) if name == ANCHORED_ON]
        rows = []
        for row in range(self.batch):
            pairs = [
                (own[row * self.num_candidates + i], own[self.batch * (self.num_candidates + number) + row])
                for i, number in enumerate(columns)
            ]
            rows.append(torch.stack([anchored_sums(*pair, best=self.first + i == 0) for i, pair in enumerate(pairs)]))
        return torch.stack(rows)

    def _scored_of(self, chosen: Sequence[int]) -> Int[Tensor, " scored"]:
        """Where the scored tokens of some sequences stand among those of all."""
        counts = self.tokens.scored().long()
        starts = counts.cumsum(0) - counts
        return torch.cat([torch.arange(int(starts[n]), int(starts[n] + counts[n])) for n in chosen])


def shared_heads(lengths: Sequence[Collection[int]]) -> tuple[int, ...]:
    """Of each candidate the length of its head: that of its row's shortest candidate (LD-DPO's shared part)."""
    return tuple(min(row) for row in lengths for _ in row)


def first_difference(rows: Sequence[Int[Tensor, " _"]]) -> int:
    """How many first tokens all candidates of a row have in common: scored "from the first difference", they drop out."""
    shortest = min(len(ids) for ids in rows)
    alike = torch.stack([ids[:shortest] == rows[0][:shortest] for ids in rows]).all(0)
    return shortest if bool(alike.all()) else int((~alike).int().argmax())
