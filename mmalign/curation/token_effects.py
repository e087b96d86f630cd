"""NextQuill: how much a user's history makes of each token, and token weights from it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
