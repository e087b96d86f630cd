"""What a reward model of texts says of candidates: its scores stand for the logps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

# network(texts) -> (batch, m): a score for each of the k candidates, or one for each pair.
ScoreNetwork = Callable[["Texts"], Float[Tensor, "batch m"]]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Prompts with their answers as token ids, a row each, padded on the right.

    Args:
        ids: k rows a prompt, one prompt after the other.
        last: place of the token that a text is judged at.
        prompt_last: place of the last token of its prompt.
        num_candidates: k.
    """

    ids: Int[Tensor, "rows length"]
    last: Int[Tensor, " rows"]
    prompt_last: Int[Tensor, " rows"]
    num_candidates: int

    def to(self, device: torch.device | str) -> Texts:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "last", "prompt_last")}
        return replace(self, **moved)


def padded_texts(texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int], num_candidates: int, *, pad: int) -> Texts:
    """Token ids as one tensor.

    A text is judged at its last token that is not the padding token, as transformers' sequence classifiers find it.

    Args:
        texts: prompt and answer, k of each prompt.
        prompt_lengths: how many first tokens of each are its prompt.
        num_candidates: k.
        pad: the model's padding token.
    """
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text))
    places = torch.arange(ids.shape[1])
    return Texts(
        ids=ids,
        last=(places * (ids != pad)).argmax(1),
        prompt_last=torch.tensor(list(prompt_lengths)) - 1,
        num_candidates=num_candidates,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """k texts a prompt, of which a reward model's scores stand for the logps.

    Args:
        texts: what is scored, on the network's device.
        paired: whether the network compares two texts, so that there is one score for both.
    """

    texts: Texts
    paired: bool = False

    @property
    def num_candidates(self) -> int:
        """k, or 1 where both texts of a pair have one score."""
        return 1 if self.paired else self.texts.num_candidates

    def logps(self, network: ScoreNetwork) -> Float[Tensor, "batch m"]:
        """The scores, in float32."""
        return network(self.texts).float()

    def measures(self, network: ScoreNetwork) -> dict[str, Float[Tensor, "batch m"]]:
        """The scores, by the name of the losses' data parameter."""
        return {"policy": self.logps(network)}

    def refer(self, network: ScoreNetwork, *, drift: bool = False) -> tuple[dict[str, Float[Tensor, "batch m"]], ScoreInputs]:
        """The measures of other weights of the same network, without a graph, and these inputs.

        Raises:
            ValueError: `drift` is asked for, which scores do not have.
        """
        if drift:
            raise ValueError("drift: is not defined for scores. Leave the loss that asks for it out.")
        with torch.no_grad():
            return self.measures(network), self

    def readings(self, logps: Float[Tensor, "batch m"]) -> dict[str, Float[Tensor, "batch m"]]:
        """Other names under which these scores are logged: none."""
        return {}

    def settle(self, network: ScoreNetwork) -> tuple[dict[str, Float[Tensor, "batch m"]], ScoreInputs]:
        """The measures without a graph, and these inputs, whose candidates are independent already."""
        with torch.no_grad():
            return self.measures(network), self

    def candidates(self, part: slice) -> ScoreInputs:
        """The same inputs with only some of the k candidates; a pair stays whole."""
        if self.paired:
            return self
        k = self.texts.num_candidates
        kept = range(k)[part]
        rows = torch.tensor([row for row in range(len(self.texts.last)) if row % k in kept]).to(self.texts.ids.device)
        texts = replace(
            self.texts,
            ids=self.texts.ids[rows],
            last=self.texts.last[rows],
            prompt_last=self.texts.prompt_last[rows],
            num_candidates=len(kept),
        )
        return replace(self, texts=texts)
