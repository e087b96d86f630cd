"""NextQuill: how much a user's history makes of each token, and token weights from it."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.curation.changed_segments import changed_segments
from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.records import Example

SIDES = ("with_history", "without_history")  # of a line in a file of effects


def history_effects(
    with_history: Float[Tensor, "batch seq"], without_history: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Causal effect of the history on each token: p(token | history, context) - p(token | context), -1 to 1.

    Source: NextQuill (ICLR 2026, arXiv 2506.02368), published code, weighting by the target token.

    Args:
        with_history, without_history: log-prob of each response token, nats.
    """
    return with_history.exp() - without_history.exp()


def token_weights(
    effects: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    threshold: float = 0.05,
    high: float = 0.9,
    low: float = 0.1,
) -> Float[Tensor, "batch seq"]:
    """Weights of token log-probs: `high` where the history makes the token likelier by more than the threshold, else `low`.

    Their mean over a response's tokens is 1, so that a weighted sum stays in the units of the plain one; 0 off the mask.
    `likelihoods.Tokens.weights` takes them.

    Source: NextQuill, published code, whose weights sum to 1 over a batch instead, for a weighted mean.

    Args:
        effects: of `history_effects`.
        mask: the response's tokens.
        threshold: in probability. Published: 0.05.
        high, low: before scaling. Published: 0.9 and 0.1.

    Raises:
        ValueError: negative weights, or none above 0.
    """
    if low < 0 or high <= 0 or high < low:
        raise ValueError(f"token_weights: got high {high:g} and low {low:g}, want high above 0, and 0 <= low <= high")
    raw = torch.where(effects > threshold, high, low) * mask
    counts = mask.sum(-1, keepdim=True)
    total = raw.sum(-1, keepdim=True)
    plain = mask.to(raw)  # low is 0 and no token stands out: nothing is known, all count alike
    return torch.where(total > 0, raw * counts / total.where(total > 0, total.new_ones(())), plain)


def nextquill(
    example: Example, encoded: Encoded, *, effects: str, threshold: float = 0.05, high: float = 0.9, low: float = 0.1
) -> list[list[float]]:
    """Token weights of each candidate from a file of log-probabilities with and without the user's history.

    Source: NextQuill; see `history_effects` and `token_weights`.

    Args:
        example, encoded: what is weighed, and its token ids.
        effects: JSON lines `{"id", "with_history", "without_history"}`: of each candidate of the example with this id, best
            first, the log-probabilities of its scored tokens under one model, nats.
        threshold, high, low: see `token_weights`.

    Raises:
        UserError: a file that cannot be read, an example that it lacks, or another number of candidates or tokens.
    """
    line = _lines(effects).get(example.id)
    if line is None:
        raise UserError(f"{effects}: has no line for {example.id}. Write one, or filter the row.")
    got = [[len(row) for row in line[name]] for name in SIDES]
    wanted = list(encoded.lengths[: len(example.samples)])
    if got != [wanted, wanted]:
        raise UserError(f"{effects}: has {got[0]} and {got[1]} tokens for {example.id}, want {wanted}. Write it anew.")
    weights = []
    for one, other in zip(*(line[name] for name in SIDES), strict=True):
        effect = history_effects(torch.tensor([one]), torch.tensor([other]))
        mask = torch.ones_like(effect, dtype=torch.bool)
        weights.append(token_weights(effect, mask, threshold=threshold, high=high, low=low)[0].tolist())
    return weights


@functools.lru_cache(maxsize=4)
def _lines(path: str) -> Mapping[str, Any]:
    """The lines of a file by their ids."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["id"]: {name: row[name] for name in SIDES} for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"adapter.token_weights.effects: cannot read {path} ({fault}). Give JSON lines as told.") from fault


TOKEN_WEIGHTS: dict[str, Callable[..., list[list[float]]]] = {"nextquill": nextquill, "changed_segments": changed_segments}
